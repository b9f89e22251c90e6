"""A ``hiedit edit --ledger`` that has ended is over; only an interrupted one is gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hiedit_agents import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_benchmarks.commands import edit as edit_command
from hiedit_benchmarks.commands.unfinished import FILE, Unfinished
from hiedit_env.evaluation.matching import starts_with
from tests.benchmarks.commands.test_edit_folders import errors, record
from tests.benchmarks.commands.test_edit_ledger import weights
from tests.benchmarks.commands.test_unfinished import LINES, edit, killed, killed_with, prompts
from tests.support.editors import NONE

BELKA = {"prompt": "Belka lives in", "answer": "Averlund", "subject": "Belka"}
MOVED = {**BELKA, "answer": "Istrand"}
DASMO = {"prompt": "Dasmo lives in", "answer": "Istrand", "subject": "Dasmo"}
#: So many that every fact is given.
ENOUGH = {"max_steps_per_edit": 5}
GOES_ON = "of an interrupted run"


@pytest.fixture(params=["stream", "file"])
def options(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """How facts are given to :func:`edit`, with a ledger that stays."""
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    monkeypatch.setattr("hiedit_benchmarks.commands.edit_stream.Checks", lambda **_: NONE)
    given = {"stream": True} if request.param == "stream" else {}
    return {**given, "ledger": tmp_path / "ledger", **ENOUGH}


def pairs(folder: Path) -> list[tuple[str, str]]:
    with Ledger.open(folder) as ledger:
        requests = [f["request"] for event in ledger for f in event.record["facts"]]
    return [(request["prompt"], request["answer"]) for request in requests]


def answers(text: str) -> list[dict[str, Any]]:
    """What a stream answered to its lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"line"')]


# Two answers to a prompt in one file are warned of.
@pytest.mark.filterwarnings("default::hiedit_env.errors.HieditWarning")
def test_a_command_that_has_ended_is_over(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, out = tmp_path / "ledger", tmp_path / "out"
    assert edit(tmp_path, BELKA, MOVED, **options) == 0
    told = [(BELKA["prompt"], BELKA["answer"]), (MOVED["prompt"], MOVED["answer"])]
    assert pairs(ledger) == told
    out.rename(tmp_path / "first")
    capsys.readouterr()
    # The earlier answer was replaced, so it is written again.
    assert edit(tmp_path, BELKA, **options) == 0
    said = capsys.readouterr()
    assert GOES_ON not in said.err
    assert "nothing was written" not in said.err
    assert pairs(ledger) == pairs(out) == [*told, told[0]]
    if "stream" in options:
        [answer] = answers(said.out)
        assert (answer["status"], answer["id"], answer["replaces"]) == ("written", 3, 2)
        assert starts_with(answer["before"]["plain"], MOVED["answer"])
        after = answer["after"]["plain"]
    else:
        [fact] = record(out)["facts"]
        assert (fact["given"], fact["steps"] > 0) == (True, True)
        after = fact["after"]
    assert starts_with(after, BELKA["answer"])
    out.rename(tmp_path / "second")
    # What the model gives is left alone, and said to be.
    assert edit(tmp_path, BELKA, **options) == 0
    said = capsys.readouterr()
    assert GOES_ON not in said.err
    assert pairs(ledger) == [*told, told[0]]
    if "stream" in options:
        [answer] = answers(said.out)
        assert (answer["status"], answer["id"]) == ("known", None)
    else:
        assert "nothing was written for 1 of 1 facts, which the model gives already" in said.err
    assert not (ledger / FILE).exists()


def test_a_kill_between_the_last_edit_and_the_end(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, out = tmp_path / "ledger", tmp_path / "out"
    options["max_steps_per_edit"] = 1
    killed(lambda: edit(tmp_path, **options), after=4)
    assert (ledger / FILE).exists()
    assert not out.exists()
    capsys.readouterr()
    assert edit(tmp_path, **options) == 0
    assert f"goes on after 4 edits {GOES_ON}" in capsys.readouterr().err
    assert prompts(ledger) == prompts(out) == [[line["prompt"]] for line in LINES]
    assert not (ledger / FILE).exists()
    # One step is not enough for all of them. Those are written again, now that it has ended.
    with Editor.from_pretrained("tiny", ledger=ledger, checks=NONE) as editor:
        texts = editor.ask([line["prompt"] for line in LINES])
    lost = [
        line
        for line, text in zip(LINES, texts, strict=True)
        if not starts_with(text, line["answer"])
    ]
    assert 0 < len(lost) < len(LINES)
    out.rename(tmp_path / "first")
    assert edit(tmp_path, **options) == 0
    assert GOES_ON not in capsys.readouterr().err
    again = [prompt for [prompt] in prompts(ledger)[len(LINES) :]]
    assert again[0] == lost[0]["prompt"]


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


def test_a_kill_when_the_model_is_saved(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, out = tmp_path / "ledger", tmp_path / "out"
    killed_with(lambda: edit(tmp_path, BELKA, DASMO, **options), Unfinished, "end", die)
    assert (ledger / FILE).exists()
    saved, told = weights(out), pairs(out)
    assert told == pairs(ledger)
    # Moved away before the command is given again: nothing is written twice.
    shutil.copytree(ledger, tmp_path / "copy")
    shutil.copytree(out, tmp_path / "first")
    shutil.rmtree(out)
    capsys.readouterr()
    assert edit(tmp_path, BELKA, DASMO, **options) == 0
    assert f"goes on after 2 edits {GOES_ON}" in capsys.readouterr().err
    assert (weights(out), pairs(out), pairs(ledger)) == (saved, told, told)
    # Given again while the model is there: the model is found to hold all, so it is over.
    shutil.rmtree(ledger)
    (tmp_path / "copy").rename(ledger)
    assert edit(tmp_path, BELKA, DASMO, **options) == 2
    assert "exists and is not an empty folder" in errors(capsys)[0]
    assert not (ledger / FILE).exists()
    assert pairs(ledger) == told
    shutil.rmtree(out)
    assert edit(tmp_path, MOVED, **options) == 0
    assert pairs(ledger) == [*told, (MOVED["prompt"], MOVED["answer"])]
    assert GOES_ON not in capsys.readouterr().err


def test_a_model_that_is_there_ends_no_other_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger"
    assert edit(tmp_path, BELKA, out="other", ledger=ledger, **ENOUGH) == 0
    killed(lambda: edit(tmp_path, DASMO, LINES[0], ledger=ledger, **ENOUGH), after=2)
    noted = (ledger / FILE).read_bytes()
    for out in ("other", "out"):
        # A model that lacks the edit, or the command's own place with somebody else's files.
        if out == "out":
            (tmp_path / out).mkdir()
            (tmp_path / out / "notes.txt").write_text("mine")
        assert edit(tmp_path, BELKA, out=out, ledger=ledger, **ENOUGH) == 2
        assert "exists and is not an empty folder" in errors(capsys)[0]
        assert (ledger / FILE).read_bytes() == noted
    # A whole copy of the ledger in a model of another command.
    shutil.copy(tmp_path / "other" / "ledger.sqlite", tmp_path / "kept.sqlite")
    with Ledger.open(ledger) as one:
        (tmp_path / "other" / "ledger.sqlite").unlink()
        one.copy_to(tmp_path / "other")
    assert edit(tmp_path, BELKA, out="other", ledger=ledger, **ENOUGH) == 2
    assert (ledger / FILE).read_bytes() == noted


def test_a_fact_that_is_missing_is_named_and_nothing_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger"
    killed(lambda: edit(tmp_path, BELKA, DASMO, ledger=ledger, **ENOUGH), after=1)
    noted = (ledger / FILE).read_bytes()
    assert edit(tmp_path, DASMO, ledger=ledger, **ENOUGH) == 2
    (line,) = errors(capsys)
    missing = f"({BELKA['prompt']!r} → {BELKA['answer']!r})"
    assert f"{ledger} holds an edit of an interrupted run that is not among the facts" in line
    assert missing in line
    assert "give the facts of that run, or another --ledger, or another --out" in line
    # No word of removing a ledger that was there before.
    assert "rm -r" not in line
    # Another answer to the same prompt is another fact.
    assert edit(tmp_path, MOVED, ledger=ledger, **ENOUGH) == 2
    assert missing in errors(capsys)[0]
    assert (ledger / FILE).read_bytes() == noted
    assert pairs(ledger) == [(BELKA["prompt"], BELKA["answer"])]
    assert not (tmp_path / "out").exists()
    # What the line says: the facts of that run, with others.
    shutil.copytree(ledger, tmp_path / "copy")
    assert edit(tmp_path, DASMO, BELKA, ledger=ledger, **ENOUGH) == 0
    assert f"goes on after 1 edit {GOES_ON}" in capsys.readouterr().err
    assert prompts(tmp_path / "out") == [[BELKA["prompt"]], [DASMO["prompt"]]]
    # Another ledger.
    shutil.rmtree(tmp_path / "out")
    assert edit(tmp_path, DASMO, ledger=tmp_path / "new", **ENOUGH) == 0
    assert prompts(tmp_path / "out") == [[DASMO["prompt"]]]
    # Another place, where the ledger's edits are asked for.
    assert edit(tmp_path, DASMO, out="more", ledger=tmp_path / "copy", **ENOUGH) == 0
    assert prompts(tmp_path / "more") == [[BELKA["prompt"]], [DASMO["prompt"]]]


def test_a_stream_names_edits_that_no_line_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    monkeypatch.setattr("hiedit_benchmarks.commands.edit_stream.Checks", lambda **_: NONE)
    options: dict[str, Any] = {"stream": True, **ENOUGH}
    killed(lambda: edit(tmp_path, BELKA, DASMO, **options), after=1)
    capsys.readouterr()
    assert edit(tmp_path, DASMO, **options) == 0
    out = tmp_path / "out"
    told = capsys.readouterr().err
    assert (
        "hiedit: the model holds 1 edit of the interrupted run that no line asked for "
        f"({BELKA['prompt']!r} → {BELKA['answer']!r}); 'hiedit revoke {out} 1' takes it back"
    ) in told.splitlines()
    assert pairs(out) == [(f["prompt"], f["answer"]) for f in (BELKA, DASMO)]
    # Asked for by all lines, nothing is said.
    shutil.rmtree(out)
    killed(lambda: edit(tmp_path, BELKA, DASMO, **options), after=1)
    capsys.readouterr()
    assert edit(tmp_path, BELKA, DASMO, **options) == 0
    assert "no line asked for" not in capsys.readouterr().err


def test_a_command_that_wrote_nothing_does_not_claim_the_edits_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger"

    def broken(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(edit_command.Questions, "before", broken)
        assert edit(tmp_path, DASMO, ledger=ledger, **ENOUGH) == 130
    assert not (ledger / FILE).exists()
    with Editor.from_pretrained("tiny", ledger=ledger, checks=NONE, agent="all-layers") as editor:
        assert editor.edit(BELKA)[0].status == "written"
    capsys.readouterr()
    assert edit(tmp_path, DASMO, ledger=ledger, **ENOUGH) == 0
    assert GOES_ON not in capsys.readouterr().err
    assert prompts(ledger) == [[BELKA["prompt"]], [DASMO["prompt"]]]


def test_a_record_that_cannot_be_removed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == FILE:
            raise PermissionError("not yours")
        unlink(path, missing_ok)

    ledger = tmp_path / "ledger"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        assert edit(tmp_path, DASMO, ledger=ledger, **ENOUGH) == 0
    told = capsys.readouterr().err
    assert f"hiedit: warning: {ledger / FILE} cannot be removed (not yours); remove it" in told
    assert prompts(tmp_path / "out") == [[DASMO["prompt"]]]


def test_a_command_at_work_is_not_an_interrupted_one(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for ledger in (options["ledger"], None):
        options["ledger"] = ledger
        killed(lambda: edit(tmp_path, **options), after=2)
        place = ledger or tmp_path / "out.unfinished"
        before = record_of(place)
        with Ledger.open(place, write=True):
            capsys.readouterr()
            # Facts that the one at work was not given.
            assert edit(tmp_path, DASMO, **options) == 2
            said = capsys.readouterr().err
            assert f"another process is writing into {place}" in said
            assert "interrupted" not in said
            assert "rm -r" not in said
        assert record_of(place) == before


def record_of(folder: Path) -> bytes:
    return (folder / FILE).read_bytes()
