"""One flat vector for layers and step sizes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from hiedit_env.envs.actions import as_array, check_layers, check_step_sizes, split_dict
from hiedit_env.errors import ActionError
from hiedit_env.wrappers.spaces import layers_and_sizes


class FlattenAction(
    gym.ActionWrapper[NDArray[np.float32], NDArray[np.float32], Any],
    gym.utils.RecordConstructorArgs,
):
    """One flat vector instead of the dict of ``hiedit/LifelongEdit-v1``, for RL libraries.

    The action space becomes ``Box(-1, 1, (2 L,), float32)``. The first L numbers choose layers:
    layer l is written if number l is above 0. The last L are the step sizes, unchanged.

    Args:
        env: An environment whose action space is ``Dict(layers=MultiBinary(L),
            step_size=Box(-1, 1, (L,)))``.

    Raises:
        SettingsError: the environment has another action space.

    >>> import gymnasium, hiedit_env
    >>> env = FlattenAction(gymnasium.make("hiedit/LifelongEdit-v1", num_edits=2))
    >>> env.action_space
    Box(-1.0, 1.0, (12,), float32)
    >>> env.action([0.3, -0.3, 0, 1, -1, 0.1] + [0.5] * 6)["layers"]
    array([1, 0, 0, 1, 0, 1], dtype=int8)
    """

    def __init__(self, env: gym.Env[NDArray[np.float32], Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        self._num_layers = layers_and_sizes(env, "FlattenAction")
        self.action_space = spaces.Box(-1.0, 1.0, (2 * self._num_layers,), np.float32)

    def action(self, action: ArrayLike) -> dict[str, NDArray[Any]]:
        """The dict a flat action stands for.

        Args:
            action: 2 L numbers in [−1, 1].

        Returns:
            ``layers``, L int8, and ``step_size``, L float32.

        Raises:
            ActionError: not 2 L finite numbers in [−1, 1].
        """
        flat = as_array(action, "the flat action")
        if flat.shape != (2 * self._num_layers,):
            raise ActionError(
                f"the flat action must have shape ({2 * self._num_layers},), layer choices and "
                f"then step sizes, got shape {flat.shape}"
            )
        # Written so that NaN fails too.
        if flat.dtype.kind == "b" or not (np.abs(flat) <= 1).all():
            raise ActionError(
                f"the flat action must hold finite numbers from -1 to 1, got {flat.dtype} {flat}"
            )
        choices, sizes = np.split(flat, 2)
        return {"layers": (choices > 0).astype(np.int8), "step_size": sizes.astype(np.float32)}

    def reverse_action(self, action: dict[str, ArrayLike]) -> NDArray[np.float32]:
        """A flat action that stands for a dict: 1 for a layer to write, −1 for one to leave alone.

        Args:
            action: ``layers``, L zeros and ones, and ``step_size``, L numbers in [−1, 1].

        Returns:
            2 L float32; :meth:`action` turns it back into the same dict.

        Raises:
            ActionError: not an action of the wrapped environment.
        """
        layers, sizes = split_dict(action, self._num_layers)
        chosen = check_layers(layers, self._num_layers)
        check_step_sizes(sizes, self._num_layers)
        return np.concatenate((np.where(chosen, 1, -1), sizes), dtype=np.float32)
