"""How much faster ``try_options`` is than one option after the other, and how far they differ.

Both are measured in one run, on the same state and options, in turns: first from the unedited
model, then after some edits, whose retention is judged too. One after the other means
``save_state``, ``step``, ``restore_state``. Prints JSON::

    python -m hiedit_benchmarks.studies.options --model smollm2-135m --options 16
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

import hiedit_env  # noqa: F401
from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.comparison.results import versions
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import AtLeast0, AtLeast1, RuleSettings, settings

PROGRAM = "python -m hiedit_benchmarks.studies.options"


@settings
class Options:
    """What is measured."""

    options: AtLeast1 = 16
    """random sets of a quarter of the candidate layers, as the router of hiedit chooses"""
    edits: AtLeast0 = 4
    """facts edited before the second measurement"""
    one_by_one: AtLeast1 = 4
    """options that are also tried one after the other, in each round"""
    rounds: AtLeast1 = 2
    """times that both are measured; the median counts"""
    editing: RuleSettings = RuleSettings(model="smollm2-135m")


def draw(count: int, layers: int, seed: int = 0) -> NDArray[np.int8]:
    """Random sets of a quarter of the layers, N × L."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, layers), np.int8)
    for mask in masks:
        mask[generator.choice(layers, max(1, layers // 4), replace=False)] = 1
    return masks


def measure(env: EditingEnv, masks: NDArray[np.int8], given: Options) -> dict[str, Any]:
    """Seconds of an option both ways, the ratio, and the largest difference of a reward."""
    state = env.save_state()
    # Both ways once before anything counts: caches of prompts and references are filled.
    env.step(masks[0])
    env.restore_state(state)
    env.try_options(masks[:2])
    single: list[float] = []
    together: list[float] = []
    processor: list[tuple[float, float]] = []
    rewards: dict[int, float] = {}
    tried = env.try_options(masks[:1])
    for number in range(given.rounds):
        wall, own = time.perf_counter(), time.process_time()
        chosen = [(number * given.one_by_one + i) % len(masks) for i in range(given.one_by_one)]
        for i in chosen:
            rewards[i] = env.step(masks[i])[1]
            env.restore_state(state)
        single.append((time.perf_counter() - wall) / len(chosen))
        alone = (time.process_time() - own) / len(chosen)
        wall, own = time.perf_counter(), time.process_time()
        tried = env.try_options(masks)
        together.append((time.perf_counter() - wall) / len(masks))
        processor.append((alone, (time.process_time() - own) / len(masks)))
    one, many = statistics.median(single), statistics.median(together)
    return {
        "seconds_one_by_one": one,
        "seconds_together": many,
        "ratio": one / many,
        "ratio_of_processor_time": statistics.median(a / b for a, b in processor),
        "largest_difference": max(abs(tried.rewards[i] - reward) for i, reward in rewards.items()),
        "mean_steps": float(tried.edit_steps.mean()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    own = given.editing
    env = gymnasium.make(
        "hiedit/LayerSelection-v1",
        model=own.model,
        layers=own.layers,
        update_rule=own.update_rule,
        step_size=own.step_size,
        max_steps_per_edit=own.max_steps_per_edit or 5,
        num_edits=given.edits + 2,
        device=own.device,
        dtype=own.dtype,
    ).unwrapped
    assert isinstance(env, EditingEnv)
    env.reset(seed=0)
    layers = len(env.llm.layers)
    masks = draw(given.options, layers)
    found = {"0": measure(env, masks, given)}
    for mask in draw(given.edits, layers, seed=1):
        env.step(mask)
    if given.edits:
        found[str(given.edits)] = measure(env, masks, given)
    result = {
        "model": own.model,
        "layers": layers,
        "options": given.options,
        "rule": env.settings.rule,
        "after_edits": found,
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
