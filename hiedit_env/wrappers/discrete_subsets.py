"""One number for one subset of K layers."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from hiedit_env.envs.actions import check_index, check_layers
from hiedit_env.errors import ActionError, SettingsError, whole_number
from hiedit_env.wrappers.spaces import chosen_layers


class DiscreteSubsets(
    gym.ActionWrapper[NDArray[np.float32], np.int64, Any],
    gym.utils.RecordConstructorArgs,
):
    """``Discrete`` over all subsets of ``size`` layers, in lexicographic order.

    For algorithms that choose one of n arms: DQN, bandits, tabular methods.

    Args:
        env: An environment whose action space is ``MultiBinary(L)``.
        size: K, from 1 to L.
        limit: Most subsets allowed. An output per subset is of little use far above this.

    Attributes:
        subsets: The layers of every action, as tuples of indices.

    Raises:
        SettingsError: another action space, K outside 1 … L, or more subsets than ``limit``.

    >>> import gymnasium, hiedit_env
    >>> env = DiscreteSubsets(gymnasium.make("hiedit/Toy-v1", num_layers=4), size=2)
    >>> env.action_space, env.subsets
    (Discrete(6), ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)))
    >>> env.action(4)
    array([0, 1, 0, 1], dtype=int8)
    """

    def __init__(
        self, env: gym.Env[NDArray[np.float32], Any], size: int, *, limit: int = 4096
    ) -> None:
        gym.ActionWrapper.__init__(self, env)
        self._num_layers = layers = chosen_layers(env, "DiscreteSubsets")
        self.size = whole_number(size, "size", 1)
        limit = whole_number(limit, "limit", 1)
        gym.utils.RecordConstructorArgs.__init__(self, size=self.size, limit=limit)
        if self.size > layers:
            raise SettingsError(
                f"size must be from 1 to {layers}, the number of layers, got {size}"
            )
        count = comb(layers, self.size)
        if count > limit:
            raise SettingsError(
                f"there are {count} subsets of {self.size} out of {layers} layers, more than "
                f"limit={limit}; SequentialSelection picks them one after another with "
                f"{layers + 1} actions"
            )
        self.subsets = tuple(combinations(range(layers), self.size))
        self._indices = {subset: i for i, subset in enumerate(self.subsets)}
        self.action_space = spaces.Discrete(count)

    def action(self, action: Any) -> NDArray[np.int8]:
        """The mask of a subset.

        Args:
            action: Its index, one whole number.

        Returns:
            L int8, of which K are 1.

        Raises:
            ActionError: not an index of a subset.
        """
        subset = self.subsets[check_index(action, len(self.subsets), "the index of a subset")]
        mask = np.zeros(self._num_layers, np.int8)
        mask[list(subset)] = 1
        return mask

    def reverse_action(self, action: ArrayLike) -> int:
        """The index of a mask's subset.

        Raises:
            ActionError: not L zeros and ones, or not K ones.
        """
        subset = tuple(map(int, np.flatnonzero(check_layers(action, self._num_layers))))
        if len(subset) != self.size:
            raise ActionError(f"a subset has {self.size} layers, got {len(subset)}: {subset}")
        return self._indices[subset]
