"""One half of the action fixed, the other left to the agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from hiedit_env.envs.actions import check_layers, check_step_sizes
from hiedit_env.errors import ActionError, SettingsError
from hiedit_env.wrappers.spaces import layers_and_sizes


class FixedLayers(
    gym.ActionWrapper[NDArray[np.float32], NDArray[np.float32], Any],
    gym.utils.RecordConstructorArgs,
):
    """Leaves only the step sizes of ``hiedit/LifelongEdit-v1`` to the agent: ``Box(-1, 1, (L,))``.

    The same layers are written at every step. ``hiedit/StepSize-v1`` is the id where they change
    from fact to fact.

    Args:
        env: An environment whose action space is ``Dict(layers=MultiBinary(L),
            step_size=Box(-1, 1, (L,)))``.
        layers: Indices of the layers to write, from 0, each once, at least one.

    Raises:
        SettingsError: another action space, or layers that do not exist.

    >>> import gymnasium, hiedit_env
    >>> env = FixedLayers(gymnasium.make("hiedit/LifelongEdit-v1", num_edits=2), [1, 4])
    >>> env.action([0.5] * 6)["layers"]
    array([0, 1, 0, 0, 1, 0], dtype=int8)
    """

    def __init__(self, env: gym.Env[NDArray[np.float32], Any], layers: Sequence[int]) -> None:
        gym.ActionWrapper.__init__(self, env)
        self._num_layers = count = layers_and_sizes(env, "FixedLayers")
        self._mask = np.zeros(count, np.int8)
        try:
            indices = np.array(layers)
        except ValueError:
            indices = np.zeros(0)
        good = indices.ndim == 1 and indices.dtype.kind in "iu" and len(indices) > 0
        if not good or not ((indices >= 0) & (indices < count)).all():
            raise SettingsError(
                f"layers must be indices from 0 to {count - 1}, at least one, got {layers!r}"
            )
        if len(set(indices.tolist())) < len(indices):
            raise SettingsError(f"layers must be different indices, got {layers!r}")
        self._mask[indices] = 1
        gym.utils.RecordConstructorArgs.__init__(self, layers=indices.tolist())
        self.action_space = spaces.Box(-1.0, 1.0, (count,), np.float32)

    def action(self, action: ArrayLike) -> dict[str, NDArray[Any]]:
        """The dict with the fixed layers.

        Args:
            action: L step sizes in decades, in [−1, 1]; those of layers not written do nothing.

        Returns:
            ``layers``, L int8, and ``step_size``, L float32.

        Raises:
            ActionError: not L finite numbers in [−1, 1].
        """
        check_step_sizes(action, self._num_layers)
        return {"layers": self._mask.copy(), "step_size": np.array(action, np.float32)}


class FixedStepSize(
    gym.ActionWrapper[NDArray[np.float32], NDArray[np.int8], Any],
    gym.utils.RecordConstructorArgs,
):
    """Leaves only the layers of ``hiedit/LifelongEdit-v1`` to the agent: ``MultiBinary(L)``.

    One step is one primitive update, so the layers of a fact may change from step to step; in
    ``hiedit/LayerSelection-v1`` one step is the whole fact. :class:`.BoxLayers`,
    :class:`.DiscreteSubsets` and :class:`.SequentialSelection` fit around it.

    Args:
        env: An environment whose action space is ``Dict(layers=MultiBinary(L),
            step_size=Box(-1, 1, (L,)))``.
        step_size: In decades around the rule's nominal step size, one number in [−1, 1] or L of
            them: 0 is the nominal step size, 1 ten times as much.

    Raises:
        SettingsError: another action space, or step sizes outside [−1, 1].

    >>> import gymnasium, hiedit_env
    >>> env = FixedStepSize(gymnasium.make("hiedit/LifelongEdit-v1", num_edits=2))
    >>> env.action_space
    MultiBinary(6)
    >>> env.action([1, 0, 0, 0, 0, 0])["step_size"]
    array([0., 0., 0., 0., 0., 0.], dtype=float32)
    """

    def __init__(
        self, env: gym.Env[NDArray[np.float32], Any], step_size: float | Sequence[float] = 0.0
    ) -> None:
        gym.ActionWrapper.__init__(self, env)
        self._num_layers = count = layers_and_sizes(env, "FixedStepSize")
        sizes = step_size if isinstance(step_size, Sequence | np.ndarray) else [step_size] * count
        try:
            check_step_sizes(sizes, count)
        except ActionError as error:
            raise SettingsError(f"{error}; one number stands for all layers") from error
        self._sizes = np.array(sizes, np.float32)
        gym.utils.RecordConstructorArgs.__init__(self, step_size=self._sizes.tolist())
        self.action_space = spaces.MultiBinary(count)

    def action(self, action: ArrayLike) -> dict[str, NDArray[Any]]:
        """The dict with the fixed step sizes.

        Args:
            action: L zeros and ones.

        Returns:
            ``layers``, L int8, and ``step_size``, L float32.

        Raises:
            ActionError: not L zeros and ones.
        """
        mask = check_layers(action, self._num_layers)
        return {"layers": mask.astype(np.int8), "step_size": self._sizes.copy()}
