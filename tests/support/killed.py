"""Processes that are killed while they write."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
import warnings

import torch


def run_until_killed(script: str, *arguments: str, after: float, at_least: int = 1) -> list[str]:
    """Runs a Python script in a forked process and kills it (SIGKILL); it can clean up nothing.

    Args:
        script: Its text; it prints one line for everything that it reports as done.
        *arguments: For ``sys.argv``.
        after: Seconds from the line ``at_least`` to the kill.
        at_least: Lines to wait for.

    Returns:
        The complete lines that it had printed.
    """
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        # A forked process that only computes on one thread is safe.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        try:
            os.close(reads)
            os.dup2(writes, 1)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
            sys.argv = ["-c", *arguments]
            torch.set_num_threads(1)
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
        finally:
            os._exit(70)
    os.close(writes)
    text = b""
    end: float | None = None
    while end is None or time.monotonic() < end:
        ready, _, _ = select.select([reads], [], [], 0.001 if end else 60)
        data = os.read(reads, 65536) if ready else b""
        text += data
        assert data or end is not None, "the process ended before it was killed"
        if end is None and text.count(b"\n") >= at_least:
            end = time.monotonic() + after
    os.kill(process, signal.SIGKILL)
    while data := os.read(reads, 65536):
        text += data
    os.close(reads)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return text.decode().split("\n")[:-1]
