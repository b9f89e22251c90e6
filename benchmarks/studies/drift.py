"""Whether anything drifts: memory over many episodes, weights over many edits and ways back.

Plays many episodes on the toy model and reads the process's memory; then edits from one state and
goes back to it, again and again, and compares the weights bit for bit. Reads /proc, so it runs on
Linux only. Prints JSON::

    python -m hiedit_benchmarks.studies.drift --episodes 1000 --edits 10000
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies.vector_memory import resident_mb
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings

PROGRAM = "python -m hiedit_benchmarks.studies.drift"


@settings
class Options:
    """How long."""

    episodes: AtLeast1 = 1000
    """episodes whose memory is watched"""
    edits: AtLeast1 = 10_000
    """edits that are made and taken back"""
    seed: AtLeast0 = 0
    """of all actions"""


def make(**more: Any) -> tuple[gymnasium.Env[Any, Any], EditingEnv]:
    """An environment of the toy model."""
    env = gymnasium.make("hiedit/LayerSelection-v1", model="tiny", disable_env_checker=True, **more)
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    return env, inner


def watch_memory(episodes: int, seed: int) -> dict[str, Any]:
    """Plays episodes of three facts with random layers.

    Returns:
        ``memory_mb``: resident memory in MiB after every tenth of the episodes; ``growth_mb``, the
        last of them minus the second, and ``seconds``.
    """
    env, _ = make(num_edits=3)
    env.action_space.seed(seed)
    found: list[float] = []
    start = time.perf_counter()
    for number in range(episodes):
        env.reset(seed=seed + number)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended = terminated or truncated
        if (number + 1) * 10 // episodes > number * 10 // episodes:
            gc.collect()
            found.append(round(resident_mb(), 2))
    env.close()
    return {
        "episodes": episodes,
        "memory_mb": found,
        "growth_mb": round(found[-1] - found[min(1, len(found) - 1)], 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def watch_weights(edits: int, seed: int) -> dict[str, Any]:
    """Edits from one edited state and goes back to it.

    Returns:
        ``differences``: how often the fingerprint of the weights was another one after the way
        back; ``same_bits``: whether all parameters of the model are equal at the end, and a step
        from there gives the reward and the weights that it gave the first time.
    """
    env, inner = make(num_edits=20)
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    actions = np.array([env.action_space.sample() for _ in range(64)])
    for _ in range(3):
        env.step(np.ones_like(actions[0]))
    state, model = inner.save_state(), inner.llm.model
    before, fingerprint = _bits(model), inner.llm.weights_fingerprint()
    first = _step(env, inner, actions[0])
    differences = 0
    start = time.perf_counter()
    for _ in range(edits):
        inner.restore_state(state)
        differences += inner.llm.weights_fingerprint() != fingerprint
        env.step(actions[rng.integers(len(actions))])
    seconds = time.perf_counter() - start
    inner.restore_state(state)
    same = _bits(model) == before
    again = _step(env, inner, actions[0])
    inner.restore_state(state)
    env.close()
    return {
        "edits": edits,
        "differences": differences,
        "same_bits": same and again == first and _bits(model) == before,
        "seconds": round(seconds, 1),
    }


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }


def _step(env: gymnasium.Env[Any, Any], inner: EditingEnv, action: Any) -> tuple[float, str]:
    _, reward, _, _, _ = env.step(action)
    return float(reward), inner.llm.weights_fingerprint()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both, prints JSON, and returns 1 where weights drifted."""
    given = parse(Options, arguments, program=PROGRAM)
    torch.set_num_threads(1)
    weights = watch_weights(given.edits, given.seed)
    result = {
        "weights": weights,
        "memory": watch_memory(given.episodes, given.seed),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    return 1 if weights["differences"] or not weights["same_bits"] else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
