"""What a write to each layer would do at first order, in the observations of many environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Probe
from hiedit_env.envs.effects import Effects, choose_controls, control_keys
from hiedit_env.errors import SettingsError
from hiedit_env.wrappers.observe_effects import with_effects

if TYPE_CHECKING:
    from hiedit_env.envs.vector import VectorEditing

    VectorWrapper = gym.vector.VectorWrapper[Any, Any, Any, Any, Any]
else:
    # Before Gymnasium 1.4 the class takes no parameters.
    VectorWrapper = gym.vector.VectorWrapper


class VectorObserveEffects(VectorWrapper):
    """:class:`~hiedit_env.wrappers.observe_effects.ObserveEffects` around a vector environment.

    Every environment has the observations that it would have alone, up to rounding. Each remembers
    the facts edited in its own episode; what the controls' keys are is found once for all.

    With ``autoreset_mode="SameStep"`` the last observation of an episode,
    ``info["final_obs"]``, holds the effects of that moment. With ``tensors=True`` observations stay
    tensors, though the effects are computed with the host's help.

    Args:
        env: A vector environment of hiedit of one fact per step.
        controls: As for the single form.
        step_size: As for the single form.

    Raises:
        SettingsError: another environment, or no controls.

    >>> import gymnasium, hiedit_env
    >>> envs = gymnasium.make_vec(
    ...     "hiedit/Planted-v2",
    ...     3,
    ...     vectorization_mode="vector_entry_point",
    ...     world_seed=0,
    ...     num_edits=2,
    ... )
    >>> envs.observation_space.shape, VectorObserveEffects(envs).observation_space.shape
    ((3, 145), (3, 175))
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        controls: Sequence[Probe] | None = None,
        step_size: float | None = None,
    ) -> None:
        # Not at the top: it imports torch.
        from hiedit_env.envs.vector import VectorEditing

        inner = env.unwrapped
        single = env.single_observation_space
        if not isinstance(inner, VectorEditing) or not isinstance(single, spaces.Box):
            raise SettingsError(
                f"VectorObserveEffects wraps a vector environment of hiedit, got {env}; around a "
                "single one take ObserveEffects"
            )
        super().__init__(env)
        self._inner: VectorEditing[Any] = inner
        first = inner.envs[0]
        self.controls = choose_controls(first, controls, "VectorObserveEffects")
        keys = control_keys(first.llm, self.controls)
        self._effects = [Effects(keys, step_size) for _ in inner.envs]
        self.single_observation_space = with_effects(single, len(first.llm.layers))
        self.observation_space = batch_space(self.single_observation_space, inner.num_envs)
        #: Effects that the observations hold, one row per environment.
        self._rows: dict[int, NDArray[np.float32]] = {}

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment's, with longer observations."""
        seen: list[dict[int, NDArray[np.float32]]] = []
        with self._inner.watched(lambda chosen: seen.append(self._look(chosen))):
            observations, info = self.env.reset(seed=seed, options=options)
        self._rows = {**self._rows, **seen[0]}
        return self._longer(observations), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's, with longer observations, those of ended episodes too."""
        for own, env in zip(self._effects, self._inner.envs, strict=True):
            # One whose episode has ended begins a new one, or says why it cannot.
            if not env.episode.ended:
                own.keep(env)
        seen: list[dict[int, NDArray[np.float32]]] = []
        with self._inner.watched(lambda chosen: seen.append(self._look(chosen))):
            observations, rewards, terminated, truncated, info = self.env.step(actions)
        first, *begun = seen
        for i in begun[0] if begun else ():
            info["final_obs"][i] = _joined(info["final_obs"][i], first[i])
        self._rows = {**first, **(begun[0] if begun else {})}
        return self._longer(observations), rewards, terminated, truncated, info

    def _look(self, chosen: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """The effects in some environments as they are now, L · EFFECTS float32 each."""
        return {i: self._effects[i].now(self._inner.envs[i]).ravel() for i in chosen}

    def _longer(self, observations: Any) -> Any:
        rows = np.stack([self._rows[i] for i in range(self._inner.num_envs)])
        return _joined(observations, rows)


def _joined(observations: Any, effects: NDArray[np.float32]) -> Any:
    """Both side by side, arrays or tensors."""
    if isinstance(observations, np.ndarray):
        return np.concatenate((observations, effects), -1)
    import torch

    return torch.cat((observations, torch.from_numpy(effects).to(observations.device)), -1)
