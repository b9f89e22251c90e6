"""Memory and time of many environments on one model.

``python -m hiedit_benchmarks.studies.vector_memory``

Reads the process's resident memory from /proc, so it runs on Linux only. The C library keeps freed
tensors of a few megabytes for itself unless it is told to map them one by one, which shows what is
really held::

    MALLOC_MMAP_THRESHOLD_=1000000 python -m hiedit_benchmarks.studies.vector_memory
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.command_line import parse, run_script
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.envs.vector import VectorEditing

PROGRAM = "python -m hiedit_benchmarks.studies.vector_memory"


def measure(
    model: str, num_envs: int, steps: int, device: str = "cpu", update_rule: str = "decorrelated"
) -> dict[str, Any]:
    """Edits all layers of every environment, again and again, one primitive step per fact.

    Args:
        model: Name or path.
        num_envs: N.
        steps: Facts per environment.
        device: Of the model.
        update_rule: Name of the rule; its statistics are every environment's own.

    Returns:
        ``unedited_mb``, resident memory after a first step that wrote nothing; ``edited_mb`` and
        ``seconds`` after and of each of the following steps; ``updates_mb``, what the accumulated
        changes of all environments hold at the end.
    """
    envs = gymnasium.make_vec(
        "hiedit/LayerSelection-v1",
        num_envs,
        vectorization_mode="vector_entry_point",
        model=model,
        num_edits=steps + 1,
        max_steps_per_edit=1,
        device=device,
        update_rule=update_rule,
    ).unwrapped
    assert isinstance(envs, VectorEditing)
    assert envs.action_space.shape is not None
    envs.reset(seed=0)
    envs.step(np.zeros(envs.action_space.shape, np.int8))
    unedited = resident_mb()
    edited, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        envs.step(np.ones(envs.action_space.shape, np.int8))
        seconds.append(time.perf_counter() - start)
        edited.append(resident_mb())
    changes = [env.llm.change(i) for env in envs.envs for i in range(len(env.llm.layers))]
    size = sum(change.nbytes for change in changes if change is not None)
    return {
        "num_envs": num_envs,
        "unedited_mb": unedited,
        "edited_mb": edited,
        "updates_mb": size / 2**20,
        "seconds": seconds,
    }


def resident_mb() -> float:
    """Resident memory of this process in MiB, without what the C library holds for later."""
    # What is free in the heap is given back first, where the C library can: it is nobody's.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@settings
class Options:
    """Memory and time of many environments on one model."""

    model: str = "smollm2-135m"
    """name or path"""
    num_envs: AtLeast1 = 8
    """environments that share the model"""
    steps: AtLeast1 = 3
    """facts per environment"""
    device: str = "cpu"
    """of the model"""
    update_rule: str = "decorrelated"
    """name of the update rule"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement and prints it as JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    found = measure(given.model, given.num_envs, given.steps, given.device, given.update_rule)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
