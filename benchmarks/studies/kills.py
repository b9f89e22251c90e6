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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies.killed_work import WORKS, Work
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings

PROGRAM = "python -m hiedit_benchmarks.studies.kills"
#: Kills of one piece of work at most; then it may end.
MOST = 3


@settings
class Options:
    """How often."""

    kills: AtLeast1 = 12
    """kills of each kind of work, at least"""
    seed: AtLeast0 = 0
    """of the moments"""


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
