"""From the name of an agent to the two levels that edit a model, without an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from hiedit_agents.hierarchy.options import HierarchicalAgent, HighLevel, UntrainedChoice
from hiedit_agents.hierarchy.simple import LayerChoiceAgent
from hiedit_agents.named.spec_agent import SpecAgent
from hiedit_agents.protocol import Agent
from hiedit_agents.registry import explain, make_agent, refuse_unused_size
from hiedit_env.envs.settings import EnvSettings, rule_settings
from hiedit_env.errors import SettingsError
from hiedit_env.model.relatives import belongings
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import make_rule


@dataclass(frozen=True, slots=True)
class HowToEdit:
    """Who edits, and with which settings.

    Args:
        agent: Name for :func:`hiedit_agents.registry.make_agent`.
        layers_per_edit, max_steps_per_edit, step_size, update_rule: As there; None for the agent's
            or the model's own.
        seed: Of everything that is drawn.
    """

    agent: str
    layers_per_edit: int | None = None
    max_steps_per_edit: int | None = None
    step_size: float | None = None
    update_rule: str | None = None
    seed: int = 0

    def make(self) -> Agent:
        """The agent.

        Raises:
            SettingsError: unknown, not made of a high and a low level, or a number of layers that
                changes nothing about it.
            CheckpointError: a folder that is no trained agent.
        """
        made = make_agent(
            self.agent,
            layers_per_edit=self.layers_per_edit,
            max_steps_per_edit=self.max_steps_per_edit,
            step_size=self.step_size,
            update_rule=self.update_rule,
        )
        if not has_levels(made):
            raise SettingsError(
                f"agent {self.agent!r} acts in an environment only; give one that is made of a "
                "high and a low level, such as hiedit, all-layers, or HIGH+LOW"
            )
        refuse_unused_size([made], self.layers_per_edit)
        return made


def has_levels(agent: Agent) -> TypeGuard[SpecAgent | LayerChoiceAgent]:
    """Whether an agent is made of a high and a low level, so that it can edit by itself."""
    return isinstance(agent, SpecAgent | LayerChoiceAgent)


@dataclass(frozen=True, slots=True)
class Levels:
    """An agent's two levels, for one model.

    Args:
        name: Name of the agent.
        explained: Which trained numbers it uses, in one line.
        high: Chooses the layers.
        low: Computes the updates.
        max_steps: Maximum number of primitive steps per fact.
        identity: Settings and trained weights, as JSON.
    """

    name: str
    explained: str
    high: HighLevel
    low: UpdateRule
    max_steps: int
    identity: dict[str, Any]


def make_levels(how: HowToEdit, agent: Agent, llm: ResidentLLM, model: str) -> Levels:
    """Builds both levels, seeded, as at the beginning of an episode.

    Args:
        how: The settings.
        agent: From :meth:`HowToEdit.make`.
        llm: The model.
        model: Its name, to find what belongs to it.

    Raises:
        SettingsError, CheckpointError: the agent does not fit the model.
    """
    built: HierarchicalAgent
    if isinstance(agent, SpecAgent):
        built = agent.build(llm, model)
        high, low, steps = built.high, built.low, built.max_steps_per_edit
    else:
        high = UntrainedChoice(how.agent, len(llm.layers), how.layers_per_edit)
        low, steps = None, None
    if low is None:
        rule = how.update_rule or belongings(model).rule
        settings = rule_settings(model, rule, how.step_size)
        low = make_rule(rule, llm.shapes, llm.device, settings)
    low.require_ready()
    high.reset(how.seed)
    low.seed(how.seed)
    low.reset()
    horizon = steps or how.max_steps_per_edit or EnvSettings.max_steps_per_edit
    return Levels(
        agent.name, explain(agent, model), high, low, horizon, getattr(agent, "identity", {})
    )
