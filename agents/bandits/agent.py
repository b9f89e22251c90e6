"""Agents made from a recording: ``fixed-best`` and ``linear-bandit``."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_agents.bandits.fixed_best import Found, greedy_search, recorded_score
from hiedit_agents.bandits.linear import Exploration, LinearBandit
from hiedit_agents.bandits.recording import Recording
from hiedit_agents.bandits.recording_files import read_recording
from hiedit_agents.hierarchy.options import layer_selection
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_env.errors import SettingsError, whole_number


class RecordedAgent(FixedAgent):
    """Base of agents that learned from a recording alone.

    The low level is the environment's own update rule.

    Args:
        recording: Folder that ``hiedit record`` wrote; without one the agent cannot be reset.

    Raises:
        DatasetError: the folder holds no recording.
    """

    name: ClassVar[str]
    #: Whether it acts by the observation, which then has to be that of the recording.
    observes: ClassVar[bool] = True

    def __init__(self, *, recording: str | None = None) -> None:
        self.folder = recording
        self._recording = None if recording is None else read_recording(Path(recording))

    @property
    def recording(self) -> Recording:
        """What it learns from.

        Raises:
            SettingsError: no folder was given.
        """
        if self._recording is None:
            raise SettingsError(
                f"agent {self.name!r} learns from recorded options: make them with 'hiedit record' "
                f"and name the folder, as in {self.name},recording=FOLDER"
            )
        return self._recording

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, by which a comparison that is resumed knows the agent."""
        return {"recording": self.folder}

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Checks that the recording is of this environment, and seeds what is drawn.

        Raises:
            SettingsError: no recording, or one of another model, other layers or, where the agent
                acts by it, another observation.
        """
        inner = layer_selection(env, self.name)
        self.recording.check_fits(env, observations=self.observes)
        inner.use_low_level(None)


class FixedBest(RecordedAgent):
    """The same layers for every fact: those of the best mean reward in recorded facts.

    A greedy search adds or drops one layer at a time, among the options that were recorded.

    Args:
        recording: As for :class:`RecordedAgent`.
        most: Largest number of layers; None for any.
    """

    name: ClassVar[str] = "fixed-best"
    observes: ClassVar[bool] = False

    def __init__(self, *, recording: str | None = None, most: int | None = None) -> None:
        if most is not None:
            whole_number(most, "most", 1)
        super().__init__(recording=recording)
        self.most = most

    @property
    def identity(self) -> dict[str, Any]:
        """As in the base, and the largest number of layers."""
        return {**super().identity, "most": self.most}

    @cached_property
    def found(self) -> Found:
        """What the search found."""
        score = recorded_score(self.recording.masks, self.recording.rewards)
        return greedy_search(score, len(self.recording.origin.layers), self.most)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, the same for every fact."""
        return self.found.layers.astype(np.int8)


class LinearBanditAgent(RecordedAgent):
    """A contextual bandit: ridge regression of every recorded option on the observation.

    Args:
        recording: As for :class:`RecordedAgent`.
        exploration: How it chooses, see :class:`~hiedit_agents.bandits.linear.LinearBandit`.
        epsilon: Share of random choices where that is ``"epsilon"``.
    """

    name: ClassVar[str] = "linear-bandit"

    def __init__(
        self,
        *,
        recording: str | None = None,
        exploration: Exploration = "greedy",
        epsilon: float = 0.1,
    ) -> None:
        self._settings: dict[str, Any] = {"exploration": exploration, "epsilon": epsilon}
        LinearBandit(**self._settings)
        super().__init__(recording=recording)
        self._bandit = LinearBandit(**self._settings)

    @property
    def identity(self) -> dict[str, Any]:
        """As in the base, and the settings."""
        return {**super().identity, **self._settings}

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """As in the base; learns again with the seed's draws."""
        super().reset(env, seed)
        self._bandit = LinearBandit(**self._settings, seed=seed)
        self._bandit.fit(self.recording.observations, self.recording.rewards)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, the option that is predicted to be best, or that is explored."""
        chosen = int(self._bandit.choose(observation[None])[0])
        mask: NDArray[np.int8] = self.recording.masks[chosen].astype(np.int8)
        return mask
