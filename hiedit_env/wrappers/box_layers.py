"""L numbers instead of L bits."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from hiedit_env.envs.actions import as_array, check_layers
from hiedit_env.errors import ActionError
from hiedit_env.wrappers.spaces import chosen_layers


class BoxLayers(
    gym.ActionWrapper[NDArray[np.float32], NDArray[np.float32], Any],
    gym.utils.RecordConstructorArgs,
):
    """A ``Box`` for ``hiedit/LayerSelection-v1``, for algorithms that know nothing else.

    The action space becomes ``Box(-1, 1, (L,), float32)``: layer l is written if number l is above
    0. Stable-Baselines3's SAC and TD3, for example, take only such actions.

    Args:
        env: An environment whose action space is ``MultiBinary(L)``.

    Raises:
        SettingsError: the environment has another action space.

    >>> import gymnasium, hiedit_env
    >>> env = BoxLayers(gymnasium.make("hiedit/Toy-v1", num_layers=4))
    >>> env.action([0.3, -0.3, 0, 1])
    array([1, 0, 0, 1], dtype=int8)
    """

    def __init__(self, env: gym.Env[NDArray[np.float32], Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        self._num_layers = chosen_layers(env, "BoxLayers")
        self.action_space = spaces.Box(-1.0, 1.0, (self._num_layers,), np.float32)

    def action(self, action: ArrayLike) -> NDArray[np.int8]:
        """The mask that L numbers stand for.

        Args:
            action: L numbers in [−1, 1].

        Returns:
            L int8, 1 where the number is above 0.

        Raises:
            ActionError: not L finite numbers in [−1, 1].
        """
        numbers = as_array(action, "the action")
        if numbers.shape != (self._num_layers,):
            raise ActionError(
                f"the action must have shape ({self._num_layers},), one number per candidate "
                f"layer, got shape {numbers.shape}"
            )
        # Written so that NaN fails too.
        if numbers.dtype.kind == "b" or not (np.abs(numbers) <= 1).all():
            raise ActionError(
                f"the action must hold finite numbers from -1 to 1, got {numbers.dtype} {numbers}"
            )
        return (numbers > 0).astype(np.int8)

    def reverse_action(self, action: ArrayLike) -> NDArray[np.float32]:
        """L numbers that stand for a mask: 1 for a layer to write, −1 for one to leave alone.

        Raises:
            ActionError: not L zeros and ones.
        """
        return np.where(check_layers(action, self._num_layers), 1, -1).astype(np.float32)
