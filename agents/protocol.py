"""The protocol of an agent: four members, after bsuite's agent interface (arXiv 1908.03568)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Observation = NDArray[np.float32]


@runtime_checkable
class Agent(Protocol):
    """Chooses actions in one of the hiedit environments, and may learn from what happens.

    An episode is played as::

        observation, info = begin_episode(env, agent, seed)
        while not ended:
            action = agent.select_action(observation, info)
            next_observation, reward, terminated, truncated, next_info = env.step(action)
            agent.update(
                observation, action, reward, terminated, truncated, next_observation, next_info
            )

    :func:`hiedit_agents.registry.make_agent` says how an agent is made from its name.
    """

    @property
    def name(self) -> str:
        """How the agent is called in tables and files."""

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes ready for a new episode; called before ``env.reset``.

        Args:
            env: The environment to act on. Its spaces are known; torch agents keep
                ``env.unwrapped`` for its ``capture``.
            seed: The only source of the agent's randomness.

        Raises:
            SettingsError: the agent's settings do not fit the environment.
        """

    def select_action(self, observation: Observation, info: dict[str, Any]) -> Any:
        """An action for the present fact.

        Args:
            observation: The environment's latest observation.
            info: The information that came with it.
        """

    def update(
        self,
        observation: Observation,
        action: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
        next_observation: Observation,
        info: dict[str, Any],
    ) -> None:
        """Takes in one transition; ``info`` is the information that came with its reward."""


class FixedAgent:
    """Base of agents that do not learn while they act."""

    def update(self, *transition: Any, **named: Any) -> None:
        """Does nothing."""


@runtime_checkable
class Trainable(Protocol):
    """A level with trained numbers. Every ``torch.nn.Module`` is one."""

    def parameters(self) -> Any:
        """What training changes: an iterable of ``torch.nn.Parameter``."""

    def state_dict(self) -> Mapping[str, Any]:
        """All trained numbers by dotted path: parameters, and what was collected in training.

        The statistics of an episode do not belong to them; an update rule has ``statistics()``.
        """

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Puts a saved :meth:`state_dict` back."""


def begin_episode(
    env: gym.Env[Any, Any], agent: Agent, seed: int, *, options: dict[str, Any] | None = None
) -> tuple[Observation, dict[str, Any]]:
    """Begins an episode with an agent, in the one order that is right.

    First the environment gets its own low level back, whatever the agent before used; then the
    agent is reset, which may hand over a low level; then the environment is reset, since a new low
    level ends the present episode.

    Args:
        env: The environment.
        agent: Will act on it.
        seed: Of both.
        options: Passed to ``env.reset``.

    Returns:
        The first observation and its information.

    Raises:
        SettingsError: the agent does not fit the environment.
    """
    use_low_level = getattr(env.unwrapped, "use_low_level", None)
    if use_low_level is not None:
        use_low_level(None)
    agent.reset(env, seed)
    return env.reset(seed=seed, options=options)
