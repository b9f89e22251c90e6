"""Planted worlds as recordings: every set of layers is tried on every fact of a stream."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.bandits.recording import Recording, mostly_best, record
from hiedit_env.datasets.difficulty import WorldName
from hiedit_env.errors import SettingsError
from hiedit_env.wrappers.observe_effects import ObserveEffects

#: Most layers whose subsets are all tried.
MOST_LAYERS = 8


def masks_of(count: int) -> NDArray[np.int8]:
    """All subsets of the layers, fewest first: 2^L × L.

    Raises:
        SettingsError: more than 8 layers.

    >>> masks_of(2).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    if count > MOST_LAYERS:
        raise SettingsError(
            f"all subsets of at most {MOST_LAYERS} layers are played, got {count} layers; take a "
            "difficulty with fewer"
        )
    chosen = [c for size in range(count + 1) for c in combinations(range(count), size)]
    masks = np.zeros((len(chosen), count), np.int8)
    for row, layers in enumerate(chosen):
        masks[row, list(layers)] = 1
    return masks


def open_world(name: WorldName, num_edits: int) -> gym.Env[Any, Any]:
    """The environment of a world, with effects in the observation."""
    env = gym.make(
        "hiedit/Planted-v2", disable_env_checker=True, model=str(name), num_edits=num_edits
    )
    return ObserveEffects(env)


def record_world(name: WorldName, num_edits: int, seed: int = 0) -> Recording:
    """One stream of a world; the best option is carried out, or with probability 0.15 any.

    Args:
        name: Which world.
        num_edits: Facts of the stream.
        seed: Of the stream.

    Raises:
        SettingsError: more than 8 layers, or fewer facts than asked for.
    """
    masks = masks_of(name.difficulty.layers)
    return record(open_world(name, num_edits), masks, [seed], behaviour=mostly_best)
