"""Recorded facts as an environment of one-step episodes, for algorithms that only know those."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_agents.bandits.full_information import Pool
from hiedit_env.envs.actions import check_selection
from hiedit_env.errors import SettingsError

#: What standardised observations are clipped to.
_MOST = 5.0


class RecordedFacts(gym.Env[NDArray[np.float32], NDArray[np.int8]]):
    """A contextual bandit: each episode is one recorded fact, and its action one set of layers.

    The reward is the one that was recorded of this set, so a step takes microseconds and an
    algorithm can learn as long as it wants from the facts that others learn from.

    ## Action Space
    ``MultiBinary(L)``.

    ## Observation Space
    ``Box(D)``: the recorded observation, standardised over the pool and clipped to ±5.

    Args:
        pool: Facts with the rewards of all 2^L sets of layers.

    Raises:
        SettingsError: some set of layers was not recorded.

    >>> from itertools import product
    >>> masks = np.array(list(product((0, 1), repeat=2)), bool)
    >>> env = RecordedFacts(Pool(masks, np.zeros((1, 3), np.float32), np.array([[0.0, 1, 2, 3]])))
    >>> _ = env.reset(seed=0)
    >>> env.step(np.array([1, 0], np.int8))[1]
    2.0
    """

    def __init__(self, pool: Pool) -> None:
        count = pool.masks.shape[1]
        self._places = {tuple(m): i for i, m in enumerate(pool.masks.astype(int).tolist())}
        if len(self._places) != 2**count:
            raise SettingsError(
                f"all {2**count} sets of {count} layers must have been recorded, got "
                f"{len(self._places)}; record with options of all subsets"
            )
        self._pool = pool
        self.mean, self.scale = pool.observations.mean(0), pool.observations.std(0)
        self.scale = np.where(self.scale < 1e-6, 1.0, self.scale).astype(np.float32)
        self.observation_space = spaces.Box(-_MOST, _MOST, self.mean.shape, np.float32)
        self.action_space = spaces.MultiBinary(count)
        self._row = 0

    def seen(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """An observation of the recorded environment as this one shows it."""
        found: NDArray[np.float32] = (observation - self.mean) / self.scale
        return found.clip(-_MOST, _MOST).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draws a fact."""
        super().reset(seed=seed)
        self._row = int(self.np_random.integers(len(self._pool.rewards)))
        return self.seen(self._pool.observations[self._row]), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Looks the reward up; the episode ends."""
        layers = check_selection(action, self._pool.masks.shape[1])
        place = self._places[tuple(layers.astype(int).tolist())]
        observation = self.seen(self._pool.observations[self._row])
        return observation, float(self._pool.rewards[self._row, place]), True, False, {}
