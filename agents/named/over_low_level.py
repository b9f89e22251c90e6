"""A policy of a library over another low level than the environment's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym

from hiedit_agents.protocol import Agent, Observation
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import rule_settings
from hiedit_env.errors import SettingsError, whole_number
from hiedit_env.rules.names import check_rule, make_rule


class OverLowLevel:
    """An agent that chooses layers, with settings of the low level below it.

    Args:
        agent: Chooses the layers.
        given: ``max_steps_per_edit``, ``update_rule``, and settings of that rule.

    Raises:
        SettingsError: settings that the rule does not take.
    """

    def __init__(self, agent: Agent, given: Mapping[str, Any]) -> None:
        self.agent, self.name = agent, agent.name
        self._given = dict(given)
        settings = dict(given)
        steps = settings.pop("max_steps_per_edit", None)
        self._steps = None if steps is None else whole_number(steps, "max_steps_per_edit", 1)
        self._rule = settings.pop("update_rule", None)
        self._settings = settings
        if self._rule is not None:
            check_rule(self._rule, settings)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "agent":
            raise AttributeError(name)
        return getattr(self.agent, name)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two agents of one name different."""
        return {**getattr(self.agent, "identity", {}), "low": self._given}

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes the agent ready and gives the environment the low level.

        Raises:
            SettingsError: an environment without a low level, or settings it does not take.
        """
        self.agent.reset(env, seed)
        inner = env.unwrapped
        if not isinstance(inner, EditingEnv):
            raise SettingsError(f"{self.name}: {env} has no low level to change")
        low = None
        if self._settings or self._rule is not None:
            rule = self._rule or inner.settings.rule
            settings = rule_settings(inner.model_name, rule, None, self._settings)
            low = make_rule(rule, inner.llm.shapes, inner.llm.device, settings)
        inner.use_low_level(low, max_steps_per_edit=self._steps)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> Any:
        """The agent's action."""
        return self.agent.select_action(observation, info)

    def update(self, *transition: Any, **named: Any) -> None:
        """Hands a transition on."""
        self.agent.update(*transition, **named)
