"""N environments on one resident model as a vector environment of Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from hiedit_env.errors import MissingLibraryError, SettingsError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise MissingLibraryError("stable-baselines3", "sb3") from error


class EditingVecEnv(VecEnv):
    """A Gymnasium vector environment as one of Stable-Baselines3's own.

    With those that come with Stable-Baselines3 every environment would load a model.

    Args:
        envs: Of ``gym.make_vec`` or :meth:`hiedit_agents.policies.Task.make_vec`, with
            ``autoreset_mode="SameStep"``: that is what Stable-Baselines3 expects.

    Raises:
        SettingsError: another autoreset mode.

    >>> import gymnasium, hiedit_env
    >>> vector_env = EditingVecEnv(
    ...     gymnasium.make_vec(
    ...         "hiedit/LayerSelection-v1",
    ...         2,
    ...         vectorization_mode="vector_entry_point",
    ...         autoreset_mode="SameStep",
    ...         num_edits=2,
    ...     )
    ... )
    >>> vector_env.reset().shape
    (2, 137)
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        mode = AutoresetMode(envs.metadata["autoreset_mode"])
        if mode is not AutoresetMode.SAME_STEP:
            raise SettingsError(
                "Stable-Baselines3 expects environments that begin again within the step; make the "
                f"environments with autoreset_mode='SameStep', not {mode.value!r}"
            )
        self.envs = envs
        self._actions: Any = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """N × size, first observations of new episodes; uses the seeds of ``seed`` once."""
        # Gymnasium's vector environments take a list too, which their base class does not say.
        seeds: Any = list(self._seeds)
        observations, info = self.envs.reset(seed=seeds)
        self.reset_infos = [_of_environment(info, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return np.asarray(observations)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keeps the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], Any]:
        """Observations, rewards, whether episodes ended, one dict of information each."""
        observations, rewards, terminated, truncated, info = self.envs.step(self._actions)
        ended, infos = terminated | truncated, []
        for i in range(self.num_envs):
            one = _of_environment(info, i)
            if ended[i]:
                # What the step itself told; the rest is about the episode that has begun since.
                one = {**one["final_info"], "terminal_observation": one["final_obs"]}
            one["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            infos.append(one)
        return np.asarray(observations), np.asarray(rewards, np.float32), ended, infos

    def close(self) -> None:
        """Closes the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the chosen environments."""
        found = self._environments()
        return [found[i].get_wrapper_attr(attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the chosen environments."""
        found = self._environments()
        for i in self._get_indices(indices):
            found[i].set_wrapper_attr(attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """A method's results in the chosen environments."""
        methods = self.get_attr(method_name, indices)
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Whether the chosen environments are inside a wrapper of this class."""
        from stable_baselines3.common.env_util import is_wrapped

        return [
            is_wrapped(self._environments()[i], wrapper_class) for i in self._get_indices(indices)
        ]

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        """One picture per environment, if they were made with ``render_mode="rgb_array"``."""
        return [one.render() for one in self._environments()]

    def _environments(self) -> Sequence[Any]:
        inner: Any = self.envs.unwrapped
        vector_env: Sequence[Any] = inner.envs
        return vector_env


def _of_environment(info: dict[str, Any], i: int) -> dict[str, Any]:
    """One environment's part of the information of a Gymnasium vector environment.

    >>> import numpy as np
    >>> together = {"a": np.array(["one", None]), "_a": np.array([True, False])}
    >>> _of_environment(together, 0), _of_environment(together, 1)
    ({'a': 'one'}, {})
    """
    found = {}
    for name, values in info.items():
        if name.startswith("_") or not info.get(f"_{name}", [True] * (i + 1))[i]:
            continue
        found[name] = _of_environment(values, i) if isinstance(values, dict) else values[i]
    return found
