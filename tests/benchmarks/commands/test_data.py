"""``hiedit data``: what it prints of a good file, and its exit status for a bad one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from hiedit_benchmarks.commands import cli, data


def write(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_what_was_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "prompt": "{} lives in",
        "target_new": "Istrand",
        "subject": "Belka",
        "ground_truth": "Cindrath",
        "rephrase_prompt": "The home of Belka is in",
        "locality_prompt": "Corrin lives in",
        "locality_ground_truth": "Grelmouth",
        "portability": {"Reasoning": [{"prompt": "R", "ground_truth": ["1", "one"]}]},
        "remark": "[bold]x",
    }
    rows = [row, row, row | {"target_new": "Averlund"}, row | {"subject": "Dasmo"}]
    assert data.main(write(tmp_path, *rows)) == 0
    printed = capsys.readouterr().out
    assert "facts.json: format knowedit" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for expected in (
        "4 facts",
        "2 subjects",
        "4 portability prompts",
        "prompt 'Belka lives in'",
        "answer 'Istrand'",
        "read as 'Belka lives in Istrand'",
        "old answer 'Cindrath'",
        "paraphrase 'The home of Belka is in'",
        "unrelated 'Corrin lives in' → 'Grelmouth'",
        "portability 'R' → '1' or 'one' (reasoning)",
        "… and 1 more facts",
    ):
        assert expected in lines
    warned = [line.partition("facts.json: ")[2] for line in lines if line.startswith("warning:")]
    assert warned == [
        "1 facts contradict an earlier one of the same prompt: row 2 repeats row 0 with the answer "
        "'Averlund' for 'Istrand'",
        "fields that are not read: remark (4 rows)",
        "1 facts repeat an earlier one: row 1 repeats row 0",
    ]


def test_the_end_of_a_prompt_and_the_seam_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "user: hi\nbot:\n", "answer": "Rex"}, {"prompt": "首都是", "answer": "东川"}]
    assert data.main(write(tmp_path, *rows)) == 0
    printed = capsys.readouterr().out
    assert r"'user: hi\nbot:\n'" in printed
    assert r"bot:\nRex'" in printed
    assert "'首都是东川'" in printed


def test_a_refused_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(write(tmp_path, {"prompt": "P", "answer": ""})) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hiedit: error: ")
    assert printed.err.endswith("facts.json row 0: field 'answer' is empty\n")


def test_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '{"prompt": "P", "answer": "A"}\n{"prompt": "Q", "answer": "B"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert data.main("-") == 0
    assert "-: format facts" in capsys.readouterr().out


def test_the_console_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", write(tmp_path, {"prompt": "P", "answer": "A"})]) == 0
    assert "format facts" in capsys.readouterr().out
    assert cli.main(["data", str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.startswith("hiedit: error: no data set ")


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "  data     Show what hiedit understands of a file of facts." in printed.splitlines()
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)
