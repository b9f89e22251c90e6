"""An interrupted ``hiedit edit`` without ``--ledger`` loses nothing: the same command goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.saved_folder import SavedFolder
from hiedit_benchmarks.commands import edit as edit_command
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.unfinished import folder_of
from hiedit_env.evaluation.matching import starts_with
from hiedit_env.files import lock_folder
from tests.benchmarks.commands.test_edit_folders import errors, record
from tests.support.editors import FACTS, NONE

LINES = [{"prompt": f.prompt, "answer": f.answer, "subject": f.subject} for f in FACTS[:4]]
#: So few that the model does not give all facts, which must not be written twice for it.
STEPS = 1


def edit(folder: Path, *lines: Any, out: str = "out", **options: Any) -> int:
    """Edits facts of a file, or of the standard input where ``stream`` is among the options."""
    file = folder / "facts.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines or LINES)
    file.write_text(text)
    words = ["edit", "--model", "tiny", "--out", str(folder / out)]
    if options.pop("stream", False):
        sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
        words += ["--facts", "-", "--min-agreement", "0", "--max-lost", "1"]
    else:
        words += ["--facts", str(file)]
    for name, value in {"max_steps_per_edit": STEPS, **options}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return main(words)


def killed(work: Callable[[], int], after: int) -> None:
    """Does work in a process that kills itself (SIGKILL) when so many edits are in the ledger."""
    append = Ledger.append

    def append_and_die(ledger: Ledger, *given: Any, **more: Any) -> int:
        number = append(ledger, *given, **more)
        if number == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    killed_with(work, Ledger, "append", append_and_die)


def killed_with(
    work: Callable[[], int], owner: type, name: str, instead: Callable[..., Any]
) -> None:
    """Does work in a process in which a method is another one, which kills the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # A forked process that only computes on one thread is safe.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        try:
            setattr(owner, name, instead)
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(70)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def prompts(folder: Path) -> list[list[str]]:
    with Ledger.open(folder) as ledger:
        return [[f["request"]["prompt"] for f in event.record["facts"]] for event in ledger]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "facts.jsonl")


def test_the_same_command_goes_on_after_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, out="whole") == 0
    assert left(tmp_path) == ["whole"]
    killed(lambda: edit(tmp_path), after=3)
    assert left(tmp_path) == ["out.unfinished", "whole"]
    assert prompts(tmp_path / "out.unfinished") == [[line["prompt"]] for line in LINES[:3]]
    capsys.readouterr()
    assert edit(tmp_path) == 0
    assert "goes on after 3 edits of an interrupted run" in capsys.readouterr().err
    assert left(tmp_path) == ["out", "whole"]
    # Every fact once, also the one that one step was not enough for.
    assert prompts(tmp_path / "out") == [[line["prompt"]] for line in LINES]
    SavedFolder(tmp_path / "out").close()
    told, wanted = (record(tmp_path / name)["facts"] for name in ("out", "whole"))
    assert {fact["given"] for fact in told[:3]} == {True, False}
    for one, two in zip(told, wanted, strict=True):
        for key in ("prompt", "before", "steps", "layers", "run"):
            assert one[key] == two[key]
    for one, two in zip(told[:3], wanted[:3], strict=True):
        assert one["answered_right_after"] == two["answered_right_after"]
    # Taken back, it is the unedited model.
    assert main(["rewind", str(tmp_path / "out"), "0"]) == 0


@pytest.mark.parametrize("named", [False, True])
def test_a_killed_stream_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    named: bool,
) -> None:
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    monkeypatch.setattr("hiedit_benchmarks.commands.edit_stream.Checks", lambda **_: NONE)
    place = tmp_path / ("ledger" if named else "out.unfinished")
    # The second line is not given, or lost by the third: it must not be written twice for it.
    lines = (*LINES[:3], "no JSON", LINES[3])
    given: dict[str, Any] = {"stream": True, **({"ledger": place} if named else {})}
    killed(lambda: edit(tmp_path, *lines, **given), after=3)
    assert left(tmp_path) == [place.name]
    with Ledger.open(place) as ledger:
        records = [event.record for event in ledger]
    capsys.readouterr()
    assert edit(tmp_path, *lines, **given) == 0
    assert left(tmp_path) == (["ledger", "out"] if named else ["out"])
    assert prompts(tmp_path / "out") == [[line["prompt"]] for line in LINES]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(a.get("line"), a.get("status"), a.get("id")) for a in said] == [
        (1, "written", 1),
        (2, "written", 2),
        (3, "written", 3),
        (4, "refused", None),
        (5, "written", 4),
        (None, None, None),
    ]
    for answer, made in zip(said, records, strict=False):
        assert answer["layers"] == made["layers"]
        assert answer["after"] == made["facts"][0]["after"]
    assert {starts_with(a["after"]["plain"], a["answer"]) for a in said[:3]} == {True, False}


def test_another_command_with_the_same_ledger_begins_anew(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    killed(lambda: edit(tmp_path, ledger=ledger), after=3)
    assert edit(tmp_path, ledger=ledger) == 0
    assert prompts(ledger) == [[line["prompt"]] for line in LINES]
    given = [fact["given"] for fact in record(tmp_path / "out")["facts"]]
    # Another --out is another command: what the model does not give is written again.
    assert edit(tmp_path, ledger=ledger, out="new", max_steps_per_edit=5) == 0
    again = [[line["prompt"]] for line, is_given in zip(LINES, given, strict=True) if not is_given]
    assert prompts(ledger)[4 : 4 + len(again)] == again
    assert again


@pytest.mark.filterwarnings("default::hiedit_env.errors.HieditWarning")
def test_facts_written_together_and_two_answers_to_a_prompt(tmp_path: Path) -> None:
    again = {**LINES[0], "answer": LINES[2]["answer"]}
    lines = (LINES[0], LINES[1], again, LINES[2], LINES[0])
    given: dict[str, Any] = {"batch": 2, "max_steps_per_edit": 5}
    killed(lambda: edit(tmp_path, *lines, **given), after=2)
    done = prompts(tmp_path / "out.unfinished")
    assert done == [[LINES[0]["prompt"], LINES[1]["prompt"]], [again["prompt"], LINES[2]["prompt"]]]
    assert edit(tmp_path, *lines, **given) == 0
    # The first answer is given a second time at the end, which is an edit of its own.
    assert prompts(tmp_path / "out") == [*done, [LINES[0]["prompt"]]]
    assert [f["answer"] for f in record(tmp_path / "out")["facts"]] == [f["answer"] for f in lines]


def test_another_command_is_refused_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(lambda: edit(tmp_path), after=2)
    kept = prompts(tmp_path / "out.unfinished")

    def refused(*lines: Any, **options: Any) -> str:
        assert edit(tmp_path, *lines, **options) == 2
        (line,) = errors(capsys)
        assert f"remove it to begin anew (rm -r {tmp_path / 'out.unfinished'})" in line
        assert prompts(tmp_path / "out.unfinished") == kept
        assert left(tmp_path) == ["out.unfinished"]
        return line

    assert "other settings (step_size None, now 0.5)" in refused(step_size=0.5)
    assert "(agent 'all-layers', now 'random-layers'" in refused(agent="random-layers")
    wrong = {**LINES[1], "answer": "Istria"}
    told = refused(LINES[0], wrong)
    assert f"not among the facts ({LINES[1]['prompt']!r} → {LINES[1]['answer']!r})" in told
    # Another --out has nothing to do with it.
    assert edit(tmp_path, LINES[0], out="other") in (0, 3)
    assert prompts(tmp_path / "out.unfinished") == kept
    # Neither more facts nor another order are another command.
    assert edit(tmp_path, LINES[3], *LINES[:3]) == 0
    wanted = [line["prompt"] for line in (*LINES[:2], LINES[3], LINES[2])]
    assert prompts(tmp_path / "out") == [[prompt] for prompt in wanted]
    assert left(tmp_path) == ["other", "out"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert edit(tmp_path) == 2
    assert "holds 'notes.txt', which is none of its files" in errors(capsys)[0]
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    killed(lambda: edit(tmp_path), after=1)
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "begins": "x", "settings": {}}'):
        (folder / "command.json").write_text(text)
        assert edit(tmp_path) == 2
        assert "command.json cannot be read" in errors(capsys)[0]
        assert prompts(folder) == [[LINES[0]["prompt"]]]


def test_an_interruption_says_where_the_edits_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Ledger.append

    def interrupted(ledger: Ledger, *given: Any, **more: Any) -> int:
        number = append(ledger, *given, **more)
        if number == 2:
            raise KeyboardInterrupt
        return number

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", interrupted)
        assert edit(tmp_path, max_steps_per_edit=5) == 130
    said = capsys.readouterr().err.splitlines()
    place = tmp_path / "out.unfinished"
    assert any(
        line.startswith(f"hiedit: 2 edits so far are kept in {place}: the same command goes on")
        for line in said
    )
    # What the line says to save them as they are.
    words = ["export", str(place), "--as", "folder", "--out", str(tmp_path / "part")]
    assert main(words) == 0
    assert prompts(tmp_path / "part") == [[line["prompt"]] for line in LINES[:2]]
    assert edit(tmp_path, max_steps_per_edit=5) == 0
    assert prompts(tmp_path / "out") == [[line["prompt"]] for line in LINES]


def test_where_nothing_was_written_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert edit(tmp_path, layers="no.such.layer") == 2
    assert left(tmp_path) == []

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(edit_command.Questions, "before", broken)
        assert edit(tmp_path) == 130
    assert left(tmp_path) == []
    assert "kept in" not in capsys.readouterr().err


def test_two_processes_with_one_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(lambda: edit(tmp_path), after=1)
    lock = lock_folder(tmp_path / "out.unfinished")
    try:
        assert edit(tmp_path) == 2
        assert "another process is writing into" in errors(capsys)[0]
    finally:
        lock.release()
    assert prompts(tmp_path / "out.unfinished") == [[LINES[0]["prompt"]]]


def test_what_a_kill_after_saving_leaves_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(lambda: edit(tmp_path), after=4)
    shutil.copytree(tmp_path / "out.unfinished", tmp_path / "copy")
    assert edit(tmp_path) == 0
    (tmp_path / "copy").rename(tmp_path / "out.unfinished")
    assert edit(tmp_path) == 2
    assert "exists and is not an empty folder" in errors(capsys)[0]
    assert left(tmp_path) == ["out"]
    # What a finished model does not hold stays.
    killed(lambda: edit(tmp_path, *reversed(LINES), out="new"), after=2)
    (tmp_path / "new.unfinished").rename(tmp_path / "out.unfinished")
    assert edit(tmp_path) == 2
    assert left(tmp_path) == ["out", "out.unfinished"]


def test_a_model_that_is_edited_again(tmp_path: Path) -> None:
    assert edit(tmp_path, LINES[0], out="first") in (0, 3)
    given = {"model": str(tmp_path / "first")}
    killed(lambda: edit(tmp_path, *LINES[1:], **given), after=3)
    assert edit(tmp_path, *LINES[1:], **given) == 0
    assert prompts(tmp_path / "out") == [[line["prompt"]] for line in LINES]
    assert left(tmp_path) == ["first", "out"]
    assert [fact["run"] for fact in record(tmp_path / "out")["facts"]] == [0, 1, 1, 1]


def test_names_that_are_long() -> None:
    assert folder_of(Path("a/b")).as_posix() == "a/b.unfinished"
    one, two = (folder_of(Path("x" * 250 + end)) for end in "ab")
    assert one != two
    assert len(os.fsencode(one.name)) < 256
