"""Observations of mean 0 and variance 1, by statistics that can be frozen and kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import safetensors
from gymnasium import spaces
from numpy.typing import NDArray
from safetensors.numpy import load, save

from hiedit_env.errors import CheckpointError, SettingsError, as_float, shown
from hiedit_env.files import write_bytes

_NAMES = ("mean", "var", "count")


@dataclass(frozen=True, slots=True)
class NormalizeState:
    """A saved state of :class:`NormalizeObservation`.

    Args:
        inner: What the wrapped environment's ``save_state`` returned.
        statistics: Mean and variance, float64 of the observation's shape, and the count.
        updating: Whether the statistics still change.
    """

    inner: Any
    statistics: tuple[NDArray[np.float64], NDArray[np.float64], float]
    updating: bool


class NormalizeObservation(
    gym.wrappers.NormalizeObservation[NDArray[np.float32], Any, NDArray[np.float32]]
):
    """Gymnasium's wrapper of the same name, with statistics that can be saved and loaded.

    An agent trained on normalised observations has to be evaluated with the statistics of its
    training, and they must not move then. Here ``save(path)`` writes them, ``statistics=path``
    reads and freezes them; ``update_running_mean = False`` freezes and ``True`` thaws, as in
    Gymnasium. Two more differences: the running sums are float64, and what is returned is clipped,
    so that a feature that hardly varied in training cannot explode later.

    While the statistics move, the same seed gives other observations in every episode.

    Args:
        env: An environment whose observations are a Box.
        epsilon: Added to the variance under the root; above 0.
        clip: Largest absolute value returned; the observation space is ``Box(-clip, clip)``.
        statistics: A file written by :meth:`save`; the wrapper then starts frozen. None starts
            with the mean 0 and variance 1 of no observation, and learns.

    Raises:
        SettingsError: the observation space is no Box; epsilon or clip not a finite number above 0.
        CheckpointError: a file that cannot be read or is for observations of another shape.

    >>> import gymnasium, hiedit_env, os, tempfile
    >>> env = NormalizeObservation(gymnasium.make("hiedit/Toy-v1"))
    >>> for seed in range(20):
    ...     _ = env.reset(seed=seed)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "statistics.safetensors")
    ...     env.save(file)
    ...     again = NormalizeObservation(gymnasium.make("hiedit/Toy-v1"), statistics=file)
    >>> again.update_running_mean, bool((again.obs_rms.mean == env.obs_rms.mean).all())
    (False, True)
    """

    def __init__(
        self,
        env: gym.Env[NDArray[np.float32], Any],
        epsilon: float = 1e-8,
        *,
        clip: float = 10.0,
        statistics: str | os.PathLike[str] | None = None,
    ) -> None:
        file = None if statistics is None else os.fspath(statistics)
        gym.utils.RecordConstructorArgs.__init__(self, epsilon=epsilon, clip=clip, statistics=file)
        if not isinstance(env.observation_space, spaces.Box):
            raise SettingsError(
                "NormalizeObservation needs a Box as observation space, got "
                f"{env.observation_space}"
            )
        for name, value in (("epsilon", epsilon), ("clip", clip)):
            if not 0 < as_float(value) < np.inf:
                raise SettingsError(f"{name} must be a finite number above 0, got {shown(value)}")
        super().__init__(env, epsilon)
        shape = env.observation_space.shape
        self.clip = clip
        self.observation_space = spaces.Box(-clip, clip, shape, np.float32)
        # Gymnasium's are float32, in which a long run's mean stops moving.
        self._use((np.zeros(shape), np.ones(shape), float(self.obs_rms.count)))
        if file is not None:
            self.load(file)

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """The normalised and clipped observation; takes it into the statistics unless frozen."""
        return np.clip(super().observation(observation), -self.clip, self.clip)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics as safetensors: ``mean``, ``var`` and ``count``, float64.

        Args:
            path: The file; it appears complete or not at all.

        Raises:
            CheckpointError: statistics that are not finite (nothing is written), or a file that
                cannot be written.
        """
        values = {k: np.array(v) for k, v in zip(_NAMES, self._statistics(), strict=True)}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise CheckpointError(
                    f"the {name} of the observations is not finite, so {os.fspath(path)} is not "
                    f"written: {value}"
                )
        file = Path(path)
        try:
            write_bytes(file, save(values))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written: {error}") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads statistics that :meth:`save` wrote, and freezes them.

        Set ``update_running_mean = True`` afterwards to go on learning them.

        Raises:
            CheckpointError: a file that cannot be read, holds something else, or is for
                observations of another shape; nothing has changed.
        """
        file, shape = Path(path), self.observation_space.shape
        try:
            found = load(file.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if set(found) != set(_NAMES):
            raise CheckpointError(
                f"{file} holds {sorted(found)}, not the statistics of observations {_NAMES}"
            )
        mean, var, count = (found[name].astype(np.float64) for name in _NAMES)
        if mean.shape != shape or var.shape != shape:
            raise CheckpointError(
                f"{file} is for observations of shape {mean.shape}, these have shape {shape}; use "
                "the statistics of the same model and layers"
            )
        numbers = np.concatenate((mean.ravel(), var.ravel(), count.ravel()))
        if count.size != 1 or not np.isfinite(numbers).all() or var.min() < 0 or count.min() <= 0:
            raise CheckpointError(f"{file} holds numbers that are no statistics: count {count}")
        self._use((mean, var, float(count.item())))
        self.update_running_mean = False

    def save_state(self) -> NormalizeState:
        """The wrapped environment's state and the statistics, for :meth:`restore_state`."""
        inner = self.env.get_wrapper_attr("save_state")()
        return NormalizeState(inner, self._statistics(), self.update_running_mean)

    def restore_state(self, state: NormalizeState) -> None:
        """Goes back to a saved state of this environment, statistics included, bit for bit."""
        self.env.get_wrapper_attr("restore_state")(state.inner)
        self._use(state.statistics)
        self.update_running_mean = state.updating

    def _statistics(self) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        rms = self.obs_rms
        return np.array(rms.mean), np.array(rms.var), float(rms.count)

    def _use(self, statistics: tuple[NDArray[np.float64], NDArray[np.float64], float]) -> None:
        mean, var, count = statistics
        self.obs_rms.mean, self.obs_rms.var = mean.copy(), var.copy()
        self.obs_rms.count = count
