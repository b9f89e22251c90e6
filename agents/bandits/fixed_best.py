"""``fixed-best``: the one set of layers that is best for all facts, found by a greedy search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError

#: N × L masks to their mean rewards, N.
Score = Callable[[NDArray[np.bool_]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Args:
        layers: L bool.
        reward: Its mean reward.
        steps: Every set that was kept on the way, with its mean reward; the first is empty.
        tried: Number of different sets tried.
    """

    layers: NDArray[np.bool_]
    reward: float
    steps: tuple[tuple[tuple[int, ...], float], ...]
    tried: int


def greedy_search(score: Score, num_layers: int, most: int | None = None) -> Found:
    """Adds or drops the one layer that raises the score most, until none does.

    Args:
        score: Mean rewards of sets; called with all neighbours of a set at once.
        num_layers: L.
        most: Largest set; None for all layers.

    Raises:
        SettingsError: ``most`` below 1.

    >>> worth = np.array([1.0, -1.0, 2.0])
    >>> greedy_search(lambda masks: masks @ worth, 3).layers.tolist()
    [True, False, True]
    """
    limit = num_layers if most is None else most
    if limit < 1:
        raise SettingsError(f"the largest set must have at least 1 layer, got {most!r}")
    present = np.zeros(num_layers, bool)
    known: dict[tuple[int, ...], float] = {(): float(score(present[None])[0])}
    steps: list[tuple[tuple[int, ...], float]] = [((), known[()])]
    while True:
        near = present ^ np.eye(num_layers, dtype=bool)
        near = near[near.sum(1) <= limit]
        new = np.array([row for row in near if _key(row) not in known], bool)
        if len(new):
            found = zip(new, score(new), strict=True)
            known |= {_key(row): float(reward) for row, reward in found}
        best = max(near, key=lambda row: known[_key(row)])
        if known[_key(best)] <= known[_key(present)]:
            return Found(present, known[_key(present)], tuple(steps), len(known))
        present = best
        steps.append((_key(present), known[_key(present)]))


def recorded_score(masks: NDArray[np.bool_], rewards: NDArray[np.floating]) -> Score:
    """Scores of sets from recorded rewards of all options.

    Args:
        masks: M × L bool.
        rewards: N × M.

    Returns:
        A score; a set that was not recorded is never chosen.
    """
    known = {_key(mask): float(mean) for mask, mean in zip(masks, rewards.mean(0), strict=True)}
    return lambda wanted: np.array([known.get(_key(mask), -np.inf) for mask in wanted])


def search_in(
    env: gym.Env[Any, Any], seeds: Sequence[int], most: int | None = None, facts: int | None = None
) -> Found:
    """The best set on the facts of some streams, each fact from the unedited model.

    Args:
        env: A layer-selection environment on training facts.
        seeds: Streams.
        most: Largest set.
        facts: Facts of every stream; None for all.

    Raises:
        SettingsError: no hiedit environment.
    """
    inner = env.unwrapped
    if not isinstance(inner, EditingEnv):
        raise SettingsError(f"a set of layers is searched in a hiedit environment, got {env}")
    states = []
    for seed in seeds:
        env.reset(seed=seed)
        stream = inner.stream[:facts]
        for request in stream:
            env.reset(seed=seed, options={"requests": [request]})
            states.append(inner.save_state())

    def score(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        total = np.zeros(len(masks))
        for state in states:
            inner.restore_state(state)
            total += inner.try_options(masks).rewards
        return total / len(states)

    return greedy_search(score, len(inner.llm.layers), most)


def _key(mask: NDArray[Any]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())
