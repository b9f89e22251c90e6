"""Processes that are killed while they write: scripts for tests that start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_until_killed(script: str, *arguments: str, after: float, at_least: int = 1) -> list[str]:
    """Runs a Python script and kills it (SIGKILL), so that it can clean up nothing.

    Args:
        script: Its text; it prints one line for everything that it reports as done.
        *arguments: For ``sys.argv``.
        after: Seconds from the line ``at_least`` to the kill.
        at_least: Lines to wait for.

    Returns:
        The complete lines that it had printed.
    """
    paths = [str(ROOT), *(path for path in sys.path if path)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(at_least)]
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, "the process ended before it was killed"
    text = "".join(lines) + rest
    return text.split("\n")[:-1]
