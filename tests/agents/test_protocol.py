"""Beginning an episode with an agent: one call, and errors for the wrong order."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from hiedit_agents.hierarchy.options import HierarchicalAgent, UntrainedChoice
from hiedit_agents.protocol import begin_episode
from hiedit_env.envs.base import EditingEnv
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import SELECTION


def agent(env: EditingEnv, own: bool) -> HierarchicalAgent:
    low = OuterProductRule(env.llm.shapes, env.llm.device) if own else None
    return HierarchicalAgent(
        "fixed", UntrainedChoice("fixed-layers", 6, 2), low, 2 if own else None
    )


def test_an_episode_begins_with_the_agents_low_level_or_the_environments_own() -> None:
    env = gym.make(SELECTION, num_edits=2)
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    first, own = agent(inner, True), inner.rule
    observation, _ = begin_episode(env, first, 0)
    assert (inner.rule, inner.max_steps_per_edit) == (first.low, 2)
    assert np.array_equal(observation, inner.observe())
    env.step(first.select_action(observation, {}))
    # An agent without one does not inherit that of the agent before.
    begin_episode(env, agent(inner, False), 0)
    assert (inner.rule, inner.max_steps_per_edit) == (own, 5)


def test_the_wrong_order_is_an_error_that_says_what_is_missing() -> None:
    env = gym.make(SELECTION, num_edits=2)
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    env.reset(seed=0)
    agent(inner, True).reset(env, 0)
    with pytest.raises(ResetNeeded, match=r"reset\(\) first.*low level"):
        env.step(np.ones(6, np.int8))
