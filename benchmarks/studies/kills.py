"""Kills editing, undoing, training and comparing at random moments, and checks what is left.

A trial does a small piece of work on the toy model in a process of its own and kills it (SIGKILL)
at a moment drawn evenly over the time that the work takes. Then the same command is started again,
and may be killed again, until it ends by itself. What is there at the end is compared with an
uninterrupted run: nothing that was reported is lost, nothing is applied twice, and a training has
the same bits. Prints JSON; the exit status is 1 where anything was wrong::

    python -m hiedit_benchmarks.studies.kills --kills 20
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import MARKER
from hiedit_agents.editing.saved_folder import SavedFolder
from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_benchmarks.comparison.results import versions
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import HieditError

PROGRAM = "python -m hiedit_benchmarks.studies.kills"
#: Kills of one piece of work at most; then it may end.
MOST = 3
FACTS = 5
_WEIGHTS = "model.safetensors"
#: What differs from run to run: times, and what follows from them.
_TIMES = ("seconds", "seconds_per_edit", "time", "versions")


@settings
class Options:
    """How often."""

    kills: AtLeast1 = 12
    """kills of each kind of work, at least"""
    seed: AtLeast0 = 0
    """of the moments"""


@dataclass(frozen=True, slots=True)
class Work:
    """Something that is interrupted and gone on with.

    Args:
        name: How it is called.
        prepare: Makes what is needed in an empty folder.
        run: Does the work in the folder, from the beginning or from where it was interrupted;
            returns the exit status.
        check: Compares a folder with one of an uninterrupted run; one line per fault.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path], int]
    check: Callable[[Path, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Found:
    """What killing one kind of work showed.

    Args:
        kills: Processes that were killed while they worked.
        trials: Pieces of work that were ended after it.
        seconds: What an uninterrupted run takes.
        faults: One line each.
    """

    kills: int
    trials: int
    seconds: float
    faults: tuple[str, ...]


# -- killing --------------------------------------------------------------------------------------


def run_until(work: Work, folder: Path, seconds: float | None) -> int | None:
    """Runs a piece of work in a process of its own.

    Args:
        work: What to do.
        folder: Where.
        seconds: When it is killed, from its start; None to let it end.

    Returns:
        Its exit status; None where it was killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # A forked process that only computes on one thread is safe.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        status = 70
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
            torch.set_num_threads(1)
            status = work.run(folder)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, state = os.waitpid(process, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(state)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    _, state = os.waitpid(process, 0)
    status = os.waitstatus_to_exitcode(state)
    # It may have ended in this very moment.
    return None if status == -signal.SIGKILL else status


def kill_at_random(
    work: Work, kills: int, rng: np.random.Generator, place: Path, most: int = MOST
) -> Found:
    """Interrupts a kind of work again and again.

    Args:
        work: What to do.
        kills: How often at least.
        rng: Draws the moments.
        place: An empty folder.
        most: Kills of one piece of work at most.
    """
    whole = place / "whole"
    whole.mkdir(parents=True)
    work.prepare(whole)
    start = time.monotonic()
    status = run_until(work, whole, None)
    seconds = time.monotonic() - start
    if status != 0:
        text = (whole / "log.txt").read_text(encoding="utf-8", errors="replace")
        return Found(0, 0, seconds, (f"uninterrupted: status {status}: {text[-500:]}",))
    faults: list[str] = []
    killed, trials = 0, 0
    while killed < kills:
        folder = place / f"trial-{trials}"
        folder.mkdir()
        work.prepare(folder)
        moments: list[float] = []
        ended: int | None = None
        while ended is None:
            moment = float(rng.uniform(0, seconds)) if len(moments) < most else None
            ended = run_until(work, folder, moment)
            if ended is None and moment is not None:
                moments.append(moment)
        killed += len(moments)
        trials += 1
        found = [f"status {ended}"] if ended else work.check(folder, whole)
        when = ", ".join(f"{moment:.3f} s" for moment in moments)
        faults += [f"trial {trials}, killed after {when}: {fault}" for fault in found]
        if not found:
            shutil.rmtree(folder)
    return Found(killed, trials, seconds, tuple(faults))


# -- editing --------------------------------------------------------------------------------------


def _lines() -> list[str]:
    facts = load_requests("tiny-facts")[:FACTS]
    return [
        json.dumps({"prompt": f.prompt, "answer": f.answer, "subject": f.subject}) for f in facts
    ]


def _write_facts(folder: Path) -> None:
    (folder / "facts.jsonl").write_text("\n".join(_lines()) + "\n", encoding="utf-8")


def _places(folder: Path) -> list[str]:
    return ["--out", str(folder / "out"), "--ledger", str(folder / "ledger"), "--model", "tiny"]


def _edit_stream(folder: Path) -> int:
    if (folder / "out").exists():  # it was killed after it had saved
        return 0
    sys.stdin = io.TextIOWrapper(io.BytesIO((folder / "facts.jsonl").read_bytes()))
    with (folder / "said.jsonl").open("a", encoding="utf-8", buffering=1) as said:
        sys.stdout = said
        checks = ["--max-lost", "1", "--min-agreement", "0"]
        return hiedit(["edit", "--facts", "-", *_places(folder), *checks])


def _edit_file(folder: Path) -> int:
    if (folder / "out").exists():
        return 0
    return hiedit(["edit", "--facts", str(folder / "facts.jsonl"), *_places(folder)])


def _check_ledger(folder: Path, whole: Path) -> list[str]:
    """Every fact once, and weights that are those of the ledger."""
    faults = []
    with Ledger.open(folder / "ledger") as ledger, Ledger.open(whole / "ledger") as other:
        written, wanted = (
            Counter(f["request"]["prompt"] for e in one for f in e.record["facts"])
            for one in (ledger, other)
        )
        if written != wanted:
            faults.append(f"edits {sorted(written.items())}, uninterrupted {sorted(wanted)}")
        if ledger.active != tuple(range(1, len(ledger) + 1)):
            faults.append(f"in place are {ledger.active}")
        reported = folder / "said.jsonl"
        for line in reported.read_text().split("\n")[:-1] if reported.exists() else []:
            answer = _answer(line)
            if answer.get("status") == "written":
                record = ledger[answer["id"]].record
                if record["facts"][0]["request"]["prompt"] != answer["prompt"]:
                    faults.append(f"edit {answer['id']} was reported and is another one")
    return faults + _check_saved(folder / "out")


def _answer(line: str) -> dict[str, Any]:
    """A line of the answers; empty where it was cut off by a kill."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found


def _check_saved(out: Path) -> list[str]:
    try:
        SavedFolder(out).close()  # compares the weights with the ledger, bit for bit
    except HieditError as error:
        return [str(error)]
    return [f"{path.name} is left behind" for path in out.parent.glob(".*.hiedit-*")]


def _check_file(folder: Path, whole: Path) -> list[str]:
    facts = json.loads((folder / "out" / "edits.json").read_text())["facts"]
    told = [fact["prompt"] for fact in facts]
    wanted = [json.loads(line)["prompt"] for line in _lines()]
    faults = [] if told == wanted else [f"edits.json names {told}"]
    return faults + _check_ledger(folder, whole)


# -- undoing --------------------------------------------------------------------------------------


def _save_edited(folder: Path) -> None:
    checks = Checks(target=False, min_agreement=None, earlier=0)
    with Editor.from_pretrained("tiny", checks=checks) as editor:
        editor.edit(load_requests("tiny-facts")[:FACTS])
        editor.save(folder / "out")


def _undo(folder: Path) -> int:
    out = str(folder / "out")
    return max(hiedit(["rewind", out, str(number)]) for number in (0, 2, 1, FACTS))


def _check_undone(folder: Path, whole: Path) -> list[str]:
    faults = _check_saved(folder / "out")
    if _bytes(folder / "out" / _WEIGHTS) != _bytes(whole / "out" / _WEIGHTS):
        faults.append("other weights than without an interruption")
    if (folder / "out" / MARKER).exists() or list((folder / "out").glob(".*.hiedit-new")):
        faults.append("something is left behind")
    return faults


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


# -- training and comparing -----------------------------------------------------------------------

_TRAIN = [
    *("train", "policy+hypernetwork", "--model", "tiny", "--dataset", "tiny-facts", "--resume"),
    *("--episodes", "4", "--edits-per-episode", "3", "--held-out", "0.5", "--no-tensorboard"),
    *("--evaluation-edits", "2", "--samples-per-fact", "2", "--max-steps-per-edit", "2"),
]
_COMPARE = [
    *("compare", "--model", "tiny", "--num-edits", "3", "--no-generation", "--resume"),
    *("--agents", "all-layers", "--seeds", "0", "1"),
]


def _train(folder: Path) -> int:
    return hiedit([*_TRAIN, "--out", str(folder / "out")])


def _check_trained(folder: Path, whole: Path) -> list[str]:
    faults = []
    one, two = folder / "out", whole / "out"
    if _bytes(one / "agent.safetensors") != _bytes(two / "agent.safetensors"):
        faults.append("agent.safetensors differs")
    for name in ("agent.json", "evaluation.json"):
        if _timeless(json.loads(_bytes(one / name))) != _timeless(json.loads(_bytes(two / name))):
            faults.append(f"{name} differs")
    rows, wanted = (_rows(out / "train.jsonl") for out in (one, two))
    faults += [] if rows == wanted else ["train.jsonl differs"]
    return faults + [f"{path.name} is left behind" for path in one.glob("checkpoint-*")]


def _compare(folder: Path) -> int:
    return hiedit([*_COMPARE, "--out", str(folder / "out")])


def _check_compared(folder: Path, whole: Path) -> list[str]:
    def key(row: Mapping[str, Any]) -> str:
        return json.dumps([row.get("agent"), row.get("seed")])

    rows, wanted = (
        sorted(_rows(place / "out" / "results.jsonl"), key=key) for place in (folder, whole)
    )
    faults = [] if rows == wanted else [f"{len(rows)} rows that are not the {len(wanted)} wanted"]
    runs, others = (
        {f.name: _timeless(json.loads(_bytes(f))) for f in (place / "out" / "runs").glob("*.json")}
        for place in (folder, whole)
    )
    return faults if runs == others else [*faults, "runs/ differs"]


def _rows(file: Path) -> list[Any]:
    return [_timeless(json.loads(line)) for line in _bytes(file).decode().splitlines()]


def _timeless(value: Any) -> Any:
    """JSON values without what differs from run to run."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _TIMES and "second" not in k}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


#: What is killed.
WORKS: Sequence[Work] = (
    Work("edit a stream", _write_facts, _edit_stream, _check_ledger),
    Work("edit a file", _write_facts, _edit_file, _check_file),
    Work("take edits back", _save_edited, _undo, _check_undone),
    Work("train", Path.iterdir, _train, _check_trained),
    Work("compare", Path.iterdir, _compare, _check_compared),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills every kind of work, prints JSON, and returns 1 where anything was wrong."""
    given = parse(Options, arguments, program=PROGRAM)
    torch.set_num_threads(1)
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, work in enumerate(WORKS):
            rng = np.random.default_rng([given.seed, number])
            found[work.name] = kill_at_random(work, given.kills, rng, Path(place, str(number)))
            print(f"{work.name}: {found[work.name]}", file=sys.stderr, flush=True)
    result = {
        "kills": sum(one.kills for one in found.values()),
        "faults": sum(len(one.faults) for one in found.values()),
        "work": {
            name: {
                "kills": one.kills,
                "trials": one.trials,
                "seconds": round(one.seconds, 2),
                "faults": list(one.faults),
            }
            for name, one in found.items()
        },
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
