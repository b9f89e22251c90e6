"""What a write to each layer would do at first order, as part of the observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Probe
from hiedit_env.envs.effects import EFFECTS, Effects, choose_controls, control_keys
from hiedit_env.errors import SettingsError

if TYPE_CHECKING:
    from hiedit_env.envs.base import EditingEnv


class ObserveEffects(
    gym.Wrapper[NDArray[np.float32], Any, NDArray[np.float32], Any],
    gym.utils.RecordConstructorArgs,
):
    """Appends to the observation, layer after layer, five numbers about one plain gradient step.

    A gradient step on the present fact in layer l alone, Δ = −s g with g = uᵀ v, would do this at
    first order:

    ===== ==========================================================================================
    0     effect: the loss of the fact falls by s ‖g‖² nats; log10(1 + s ‖g‖²) / 2
    1     spill: how much it would change what the layer writes at the controls, ‖k g‖ over the same
          at the fact itself; root mean square over the controls
    2     the same, of the control that changes most
    3     interference: as number 1, at the facts edited earlier in the episode
    4     the same, of the fact that changes most
    ===== ==========================================================================================

    All are clipped to [0, 1]. So these numbers mean the same in every layer and in every world: a
    layer in which a fact has a key of its own has no spill; one where many facts share a key has.
    Keys k are those at the tokens that predict the answer: of a control at the unedited model, of
    an earlier fact when it was edited. No prompt that a reward asks is looked at.

    Args:
        env: An environment of one fact per step on a language model.
        controls: Prompts with their true answers that stand for all that must not change; None for
            those of a planted world, ``env.unwrapped.controls``.
        step_size: s; None for that of the environment's low level.

    Raises:
        SettingsError: another environment, or no controls.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/Planted-v2", world_seed=0, num_edits=2)
    >>> env.observation_space.shape, ObserveEffects(env).observation_space.shape
    ((145,), (175,))
    """

    def __init__(
        self,
        env: gym.Env[NDArray[np.float32], Any],
        controls: Sequence[Probe] | None = None,
        step_size: float | None = None,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, controls=controls, step_size=step_size)
        gym.Wrapper.__init__(self, env)
        # Not at the top: it imports torch.
        from hiedit_env.envs.base import EditingEnv

        inner = env.unwrapped
        if not isinstance(inner, EditingEnv) or not isinstance(env.observation_space, spaces.Box):
            raise SettingsError(
                f"ObserveEffects wraps a hiedit environment with a model, got {env}"
            )
        self._inner: EditingEnv = inner
        self.controls = choose_controls(inner, controls, "ObserveEffects")
        self._step_size = step_size
        self._effects: Effects | None = None
        self.observation_space = with_effects(env.observation_space, len(inner.llm.layers))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """As the environment's, with a longer observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._longer(observation), info

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """As the environment's, with a longer observation."""
        # An episode that has ended or not begun says so itself.
        if self._effects is not None and not self._inner.episode.ended:
            self._effects.keep(self._inner)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._longer(observation), float(reward), terminated, truncated, info

    def _longer(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._effects is None:
            found = control_keys(self._inner.llm, self.controls)
            self._effects = Effects(found, self._step_size)
        return np.concatenate((observation, self._effects.now(self._inner).ravel()))


def with_effects(space: spaces.Box, num_layers: int) -> spaces.Space[NDArray[np.float32]]:
    """An observation space with the effects of L layers at its end.

    Args:
        space: D numbers.
        num_layers: L.
    """
    count = EFFECTS * num_layers
    return spaces.Box(
        np.concatenate((space.low, np.zeros(count, np.float32))),
        np.concatenate((space.high, np.ones(count, np.float32))),
        dtype=np.float32,
    )
