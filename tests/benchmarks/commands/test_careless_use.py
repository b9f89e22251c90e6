"""What careless use gets: one line with the remedy, status 2, and nothing is lost."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

from hiedit_agents.command_line import run_script
from hiedit_benchmarks.commands import layers
from hiedit_benchmarks.commands.cli import main

NESTED = "[" * 100_000


def complaint(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The only line that a command complains in."""
    assert main(words) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("hiedit: error: ")]
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit", "--fact", "f.json", "--out", "x"], "no option --fact; did you mean --facts?"),
        (["record", "--helpp"], "no option --helpp; see hiedit record --help"),
        (["edit", "--agent", "x"], "--facts, --out must be given"),
        (["data", ""], "no data set ''"),
    ],
)
def test_options_that_are_not_there(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(capsys, words)


@pytest.mark.parametrize("option", ["--out", "--picture"])
def test_no_file_is_overwritten_by_a_measurement(
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(layers, "find_layers", lambda _: pytest.fail("measured for nothing"))
    path = tmp_path / ("mine.json" if option == "--out" else "mine.png")
    path.write_text("mine")
    assert f"{path} exists" in complaint(capsys, ["layers", "--model", "tiny", option, str(path)])
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ["record", "--model", "tiny", "--dataset", "tiny-facts", "--out"],
        ["compare", "--model", "tiny", "--agents", "no-edit", "--num-edits", "2", "--out"],
    ],
)
def test_a_file_in_the_place_of_a_folder(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine"
    path.write_text("mine")
    assert f"{path} is a file" in complaint(capsys, [*words, str(path)])
    assert path.read_text() == "mine"


@pytest.mark.parametrize("facts", ["tiny-facts", "-"])
def test_a_ledger_in_the_folder_of_the_model(
    facts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", "--model", "tiny", "--facts", facts, "--out"]
    out = tmp_path / "out"
    for ledger in (out, out / "ledger"):
        line = complaint(capsys, [*words, str(out), "--ledger", str(ledger)])
        assert "must be folders beside each other" in line
    for name in ("ledger.sqlite", "command.json/out", ".lock"):
        line = complaint(capsys, [*words, str(tmp_path / name), "--ledger", str(tmp_path)])
        assert f"would take the place of {Path(name).parts[0]!r} of the ledger" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["data", "-"], ["edit", "--facts", "-", "--model", "tiny"]])
def test_a_closed_standard_input(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    out = ["--out", str(tmp_path / "out")] if words[0] == "edit" else []
    assert "standard input, which is closed" in complaint(capsys, [*words, *out])


@pytest.mark.parametrize("name", ["agent.json", "config.json", "layers.json"])
def test_json_that_is_nested_too_deep(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(NESTED)
    words = ["compare", "--num-edits", "2", "--out", str(tmp_path / "out"), "--agents"]
    given = {
        "agent.json": [str(tmp_path), "--model", "tiny"],
        "config.json": ["no-edit", "--model", str(tmp_path)],
        "layers.json": ["no-edit", "--model", "tiny", "--layers", str(tmp_path / name)],
    }
    line = complaint(capsys, [*words, *given[name]])
    assert str(tmp_path) in line
    assert ("nested too deep" in line) == (name == "agent.json")


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, 2), (errno.EPIPE, 141), (errno.EIO, 2)]
)
def test_what_cannot_be_printed(
    number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise OSError(number, "no more")

    assert run_script(run, "program") == status
    said = capsys.readouterr().err
    assert said == (
        "" if status == 141 else "program: error: cannot write: no more; free some space\n"
    )


def test_other_errors_of_the_system_are_not_taken_for_it() -> None:
    def run() -> Any:
        raise OSError(errno.ENOENT, "not there")

    with pytest.raises(OSError, match="not there"):
        run_script(run)
