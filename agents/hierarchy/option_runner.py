"""Runs an option step by step, where its updates are wanted and not only what came of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hiedit_agents.hierarchy.options import Option
from hiedit_agents.protocol import Observation
from hiedit_env.envs.accounting import Judging
from hiedit_env.envs.base import EditingEnv
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates

#: Called before every primitive step with the capture; returns the updates to write.
Policy = Callable[[Capture], Updates]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one option: a transition of the semi-Markov decision process.

    Args:
        reward: Σ_i γ^i r_i over its primitive steps.
        discount: γ^k after k primitive steps: what the next option's value counts for.
        steps: k.
        observation: After the option.
        ended: Whether the episode is over.
        info: Of the last step.
    """

    reward: float
    discount: float
    steps: int
    observation: Observation
    ended: bool
    info: dict[str, Any]


def run_option(
    env: EditingEnv,
    option: Option,
    *,
    gamma: float = 1.0,
    policy: Policy | None = None,
    judge: Judging = "fact",
) -> Outcome:
    """Runs an option on the present fact of a LayerSelection environment.

    With γ = 1 and the option's own policy this is ``env.step(option.layers)``, primitive step by
    primitive step. The model is judged when the fact is over, so all reward comes then; with
    γ < 1 after every primitive step, since otherwise losses of late steps would count less.

    Args:
        env: The environment, with the option's low level and horizon in use.
        option: What to run.
        gamma: Discount per primitive step.
        policy: In the place of the option's intra-option policy.
        judge: As for :meth:`~hiedit_env.envs.base.EditingEnv.apply`; ``"never"`` where the reward
            is not needed, which is most of a step's cost.
    """
    if gamma < 1 and judge == "fact":
        judge = "step"
    reward, discount, steps = 0.0, 1.0, 0
    if not option.can_begin(env.capture) or not option.layers.any():
        # Nothing is written: the environment judges the fact as it is.
        observation, own, ended, _, info = env.step(np.zeros(len(option.layers), np.int8))
        own = 0.0 if judge == "never" else own
        return Outcome(own, discount, steps, observation, ended, info)
    while True:
        env.rule.look(env.observe)
        capture = env.observe_fact()
        updates = (policy or option.updates)(capture)
        steps += 1
        # An option may end before the environment's own horizon: its reward is due then.
        horizon = judge == "fact" and steps >= option.max_steps
        observation, own, ended, _, info = env.apply(
            updates, judge="step" if horizon else judge, rule_made=True
        )
        reward += discount * own
        discount *= gamma
        if ended or info["edit_over"] or option.is_over(env.capture, steps):
            return Outcome(reward, discount, steps, observation, ended, info)
