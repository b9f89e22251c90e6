"""What a terminal and a model card get of facts that hold escape sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hiedit_agents import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_benchmarks.commands import diff
from hiedit_benchmarks.commands.cli import main
from hiedit_env.errors import one_line
from tests.support.editors import NONE

#: Colours, a mark that turns the direction, a line break, a control of one byte, a separator.
PROMPT = "\x1b[31mBelka\u202e\nlives\u2028in\x9b2J"
ANSWER = "Aver\x1b]0;lund\x07\u2067"
RAW = frozenset("\x1b\u202e\u2028\x9b\x07\u2067")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile") / "out"
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit((PROMPT, ANSWER))
        editor.save(place)
    return place


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Lines of a command, none of which steers a terminal."""
    assert main(list(words)) == 0
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert all(one_line(line) == line for line in lines)
    return lines


def test_log_shows_escapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "log", str(folder))
    assert len(lines) == 2
    assert lines[0].endswith(
        r"\x1b[31mBelka\u202e\nlives\u2028in\x9b2J → Aver\x1b]0;lund\x07\u2067"
    )


def test_show_is_still_json_of_the_true_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, "show", str(folder), "1")
    assert lines[0] == printed(capsys, "log", str(folder))[0]
    record = json.loads("\n".join(lines[1 : lines.index("}") + 1]))
    with Ledger.open(folder) as ledger:
        assert record == ledger[1].record
    request = record["facts"][0]["request"]
    assert (request["prompt"], request["answer"]) == (PROMPT, ANSWER)


def test_letters_of_other_scripts_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Editor.from_pretrained("tiny", checks=NONE, ledger=tmp_path) as editor:
        editor.edit(("東京 は", "ירושלים"))
    assert printed(capsys, "log", str(tmp_path))[0].endswith("東京 は → ירושלים")
    assert '"東京 は"' in "\n".join(printed(capsys, "show", str(tmp_path), "1"))


def test_diff_gives_three_lines_an_entry(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(name: str, questions: Any) -> list[str | None]:
        other = [None] * (len(questions) - 1)
        return [" first\n\x1b[2Jline \n" if name == "tiny" else "\u202eother", *other]

    monkeypatch.setattr(diff, "_answers", answers)
    lines = printed(capsys, "diff", "tiny", str(folder))
    assert lines == [
        r"\x1b[31mBelka\u202e\nlives\u2028in\x9b2J",
        r"  < first\n\x1b[2Jline",
        r"  > \u202eother",
        f"1 of 1 answers differ (< tiny, > {folder})",
    ]


def test_a_card_shows_escapes_and_files_hold_the_true_text(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert not RAW & set(card)
    assert r"Belka\\u202e lives in\\x9b2J | Aver\\x1b\]0;lund\\x07\\u2067 |" in card
    with Ledger.open(folder) as ledger:
        assert ledger[1].record["facts"][0]["request"]["prompt"] == PROMPT


def test_what_edit_prints_shows_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, out = tmp_path / "facts.json", tmp_path / "out"
    facts.write_text(json.dumps([{"prompt": PROMPT, "answer": ANSWER}]))
    # The toy model does not learn such a fact, which status 3 says.
    assert main(["edit", "--facts", str(facts), "--model", "tiny", "--out", str(out)]) == 3
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert all(one_line(line) == line for line in lines)
    assert r"\x1b[31mBelka\u202e lives in\x9b2J" in lines
    assert r"    wanted: Aver\x1b]0;lund\x07\u2067" in lines
    assert json.loads((out / "edits.json").read_text())["facts"][0]["prompt"] == PROMPT
