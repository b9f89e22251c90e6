"""What the tests of all RL libraries share: the margin by which a trained policy beats random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from hiedit_agents.hierarchy.simple import OracleAgent
from hiedit_agents.policies import FunctionPolicy, PolicyAgent, PolicyRecord, Task
from hiedit_agents.policies.task import Sizes
from hiedit_agents.protocol import Agent

#: Training on the planted world: short episodes, so that one bad choice does not spoil many facts,
#: and few primitive steps and nothing remembered, so that a minute gives some thousands of facts.
WORLD: Mapping[str, Any] = {
    "model": "planted",
    "num_edits": 8,
    "max_steps_per_edit": 2,
    "retention_window": 0,
}
TRAIN: Mapping[str, Any] = {**WORLD, "dataset": "planted-facts-train"}
#: The same for step sizes: all layers are written for every fact, so that facts are spoilt by those
#: before them whatever the agent does; episodes are two facts long.
WORLD_OF_STEP_SIZES: Mapping[str, Any] = {**WORLD, "num_edits": 2, "max_steps_per_edit": 1}
TRAIN_STEP_SIZES: Mapping[str, Any] = {**TRAIN, **WORLD_OF_STEP_SIZES}
#: Share of the way from random to the oracle that a trained policy must have gone: half of it where
#: it chooses layers. Step sizes cannot leave a layer alone, only write a tenth as much, which costs
#: most of the way: the smallest steps everywhere, the best there are, go about a quarter of it.
MARGIN, MARGIN_OF_STEP_SIZES = 0.5, 0.12
#: Facts of the evaluation; their subjects were never trained on.
FACTS = 48


@dataclass(frozen=True, slots=True)
class Outcome:
    """Mean rewards per held-out fact.

    Args:
        trained: Of the trained agent.
        random: Of uniformly drawn actions of the same form.
        oracle: Of the best layers for every fact.
    """

    trained: float
    random: float
    oracle: float

    @property
    def share(self) -> float:
        """Share of the way from random (0) to the oracle (1)."""
        return (self.trained - self.random) / (self.oracle - self.random)


def needed_share(agent: Agent) -> float:
    """The share that an agent must have gone, see :data:`MARGIN`."""
    assert isinstance(agent, PolicyAgent)
    return MARGIN_OF_STEP_SIZES if agent.record.task.form == "step-sizes" else MARGIN


def held_out(agent: Agent, world: Mapping[str, Any] | None = None) -> Outcome:
    """Plays a trained agent, random actions of its form and the oracle on held-out facts.

    Args:
        agent: What a library's ``load`` returned.
        world: Arguments of ``hiedit/Planted-v1``; those of the agent's form where None.
    """
    assert isinstance(agent, PolicyAgent)
    if world is None:
        world = WORLD_OF_STEP_SIZES if agent.record.task.form == "step-sizes" else WORLD
    random = mean_reward(random_agent(agent.record.task, agent.record.sizes), world)
    return Outcome(mean_reward(agent, world), random, _oracle(tuple(world.items())))


def mean_reward(agent: Agent, world: Mapping[str, Any] = WORLD) -> float:
    """Mean reward per fact of ``planted-facts-test`` over :data:`FACTS` facts."""
    env = gym.make("hiedit/Planted-v1", **{**world, "dataset": "planted-facts-test"})
    rewards = []
    for seed in range(FACTS // world["num_edits"]):
        rewards += _episode(env, agent, seed)
    return float(np.mean(rewards))


def random_agent(task: Task, sizes: Sizes) -> PolicyAgent:
    """Uniformly drawn actions of a task's form (allowed ones where there are masks)."""
    space = task.spaces(sizes)[1]
    space.seed(0)

    def draw(observation: Any, mask: Any) -> Any:
        return space.sample() if mask is None else space.sample(mask.astype(np.int8))

    record = PolicyRecord("random", "random", task, sizes, {}, {}, "", Path())
    return PolicyAgent(record, FunctionPolicy(draw))


@cache
def _oracle(world: tuple[tuple[str, Any], ...]) -> float:
    return mean_reward(OracleAgent(), dict(world))


def _episode(env: gym.Env[Any, Any], agent: Agent, seed: int) -> list[float]:
    inner: Any = env.unwrapped
    inner.use_low_level(None)
    agent.reset(env, seed)
    observation, info = env.reset(seed=seed)
    rewards, ended = [], False
    while not ended:
        action = agent.select_action(observation, info)
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(float(reward))
        ended = terminated or truncated
    return rewards
