"""Options and their runner: the environment's own step, taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiedit_agents.hierarchy.option_runner import run_option
from hiedit_agents.hierarchy.options import HierarchicalAgent, Option, UntrainedChoice
from hiedit_agents.registry import make_agent
from hiedit_env.envs.accounting import StepError, fingerprint_number
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.scheduler import run
from hiedit_env.errors import SettingsError
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import LIFELONG, SELECTION, L, make

HALF = np.array([1, 0, 1, 0, 1, 0], bool)


def option(env: EditingEnv, layers: np.ndarray = HALF) -> Option:
    return Option(
        layers, env.episode.rule, env.episode.max_steps_per_edit, env.episode.stop_when_answered
    )


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("mask", [HALF, np.zeros(L, bool), np.ones(L, bool)])
def test_an_option_run_step_by_step_is_one_step_of_the_environment(
    stop: bool, mask: np.ndarray
) -> None:
    one, two = (make(SELECTION, stop_when_answered=stop) for _ in range(2))
    for env in (one, two):
        env.reset(seed=3)
    for _ in range(3):
        observation, reward, ended, _, info = one.step(mask.astype(np.int8))
        found = run_option(two, option(two, mask))
        assert found.reward == pytest.approx(reward, abs=1e-9)
        assert found.ended == ended
        assert found.info["weights_fingerprint"] == info["weights_fingerprint"]
        assert found.info["metrics"] == info["metrics"]
        np.testing.assert_array_equal(found.observation, observation)
    assert two.episode.written_counts.tolist() == one.episode.written_counts.tolist()


class LookingRule(OuterProductRule):
    """Notes what it was shown before each update."""

    def reset(self) -> None:
        super().reset()
        self.seen: list[np.ndarray] = []

    def look(self, observe: Any) -> None:
        self.seen.append(observe())


def test_a_rule_is_shown_what_the_environment_shows_it() -> None:
    found = []
    for stepwise in (False, True):
        env = make(SELECTION)
        rule = LookingRule(env.llm.shapes, env.llm.device, step_size=1e-4)
        env.use_low_level(rule)
        env.reset(seed=3)
        if stepwise:
            run_option(env, option(env))
        else:
            env.step(HALF.astype(np.int8))
        found.append(rule.seen)
    assert len(found[0]) > 1
    np.testing.assert_array_equal(found[0], found[1])


def test_an_option_cannot_begin_on_an_answered_fact() -> None:
    env = make(SELECTION, max_steps_per_edit=30)
    env.reset(seed=0)
    assert option(env).can_begin(env.capture)
    while not env.episode.reading.answered:
        run(env.episode.primitive(env.episode.propose(np.ones(L, bool))))
    assert not option(env).can_begin(env.capture)
    assert option(env).is_over(env.capture, 1)
    before = env.llm.weights_fingerprint()
    outcome = run_option(env, option(env))
    assert outcome.steps == 0
    assert outcome.info["weights_fingerprint"] == fingerprint_number(before)


def test_the_horizon_ends_an_option() -> None:
    env = make(SELECTION, step_size=1e-9, max_steps_per_edit=3)
    env.reset(seed=0)
    assert [option(env).is_over(env.capture, k) for k in (0, 2, 3)] == [False, False, True]
    assert run_option(env, option(env)).steps == 3


def test_reward_and_discount_of_an_option_of_k_steps() -> None:
    """Σ_i γ^i r_i and γ^k, from primitive steps that are taken one by one."""
    plain, discounted, single = (make(SELECTION, max_steps_per_edit=4) for _ in range(3))
    for env in (plain, discounted, single):
        env.reset(seed=1)
    one, two = (
        run_option(plain, option(plain)),
        run_option(discounted, option(discounted), gamma=0.5),
    )
    assert one.steps == two.steps > 1
    assert one.discount == 1.0
    assert two.discount == 0.5**two.steps
    gained = []
    for _ in range(two.steps):
        updates = single.episode.rule.propose(single.episode.observe(), HALF)
        gained.append(single.apply(updates)[1])
    assert two.reward == pytest.approx(sum(0.5**i * r for i, r in enumerate(gained)), rel=1e-6)
    # Undiscounted it makes no difference when the model is judged.
    assert one.reward == pytest.approx(sum(gained), rel=1e-5)


def test_a_discount_does_not_reward_taking_longer() -> None:
    """Of two options that end with negative levels, the quicker and better one stays ahead."""
    rewards = {}
    for gamma in (1.0, 0.5):
        for name, layers in (("all", np.ones(L, bool)), ("first", np.arange(L) == 0)):
            env = make(SELECTION, step_size=2e-3, max_steps_per_edit=4)
            env.reset(seed=1)
            rewards[gamma, name] = run_option(env, option(env, layers), gamma=gamma)
    quick, slow = rewards[1.0, "all"], rewards[1.0, "first"]
    assert quick.steps < slow.steps
    assert slow.reward < quick.reward
    assert rewards[0.5, "first"].reward < rewards[0.5, "all"].reward


def test_any_high_level_goes_with_any_low_level() -> None:
    env = make(SELECTION)
    low = OuterProductRule(env.llm.shapes, env.llm.device, step_size=1e-3)
    agent = HierarchicalAgent("both", UntrainedChoice("fixed-layers", L, 2), low, 2)
    agent.reset(env, 0)
    observation, info = env.reset(seed=0)
    assert env.episode.rule is low
    assert env.episode.max_steps_per_edit == 2
    before = {name: w.clone() for name, w in env.llm.model.state_dict().items()}
    env.step(agent.select_action(observation, info))
    changed = [
        i
        for i, name in enumerate(env.llm.names)
        if not torch.equal(before[f"{name}.weight"], env.llm.model.state_dict()[f"{name}.weight"])
    ]
    assert changed == [0, 1]
    env.use_low_level(None)
    assert env.episode.rule is not low
    assert env.episode.max_steps_per_edit == 5


def test_a_low_level_ends_the_episode_and_has_to_fit() -> None:
    env = make(SELECTION)
    env.reset(seed=0)
    env.use_low_level(OuterProductRule(env.llm.shapes, env.llm.device))
    with pytest.raises(Exception, match="reset"):
        env.step(np.ones(L, np.int8))
    fewer = OuterProductRule(env.llm.shapes[:2], env.llm.device)
    with pytest.raises(SettingsError, match="layers of shapes"):
        env.use_low_level(fewer)


def test_levels_act_on_layer_selection_only() -> None:
    with pytest.raises(SettingsError, match="LayerSelection"):
        make_agent("random-layers+ridge").reset(make(LIFELONG), 0)


def test_unjudged_steps_are_paid_with_the_next_judged_one() -> None:
    one, two = (make(LIFELONG, max_steps_per_edit=3, stop_when_answered=False) for _ in range(2))
    rewards = []
    judges: tuple[Any, Any] = ("step", "fact")
    for env, judge in zip((one, two), judges, strict=True):
        env.reset(seed=0)
        gained = []
        for _ in range(3):
            updates = env.episode.propose(np.ones(L, bool))
            _, reward, _, _, info = env.apply(updates, judge=judge)
            gained.append(reward)
        rewards.append(gained)
        assert info["edit_over"]
    assert rewards[1][:2] == [0.0, 0.0]
    assert rewards[1][2] == pytest.approx(sum(rewards[0]), abs=1e-9)
    assert one.llm.weights_fingerprint() == two.llm.weights_fingerprint()


def test_nothing_is_paid_where_nothing_is_judged() -> None:
    one, two = (make(SELECTION) for _ in range(2))
    for env in (one, two):
        env.reset(seed=0)
    for _ in range(3):
        judged = run_option(one, option(one))
        found = run_option(two, option(two), judge="never")
        assert found.reward == 0.0
        assert found.info["metrics"]["efficacy"] == judged.info["metrics"]["efficacy"]
        assert found.info["weights_fingerprint"] == judged.info["weights_fingerprint"]
        np.testing.assert_array_equal(found.observation, judged.observation)
    assert found.ended


def test_an_option_may_end_before_the_environments_horizon() -> None:
    env = make(SELECTION, step_size=1e-9, max_steps_per_edit=5)
    env.reset(seed=0)
    short = Option(HALF, env.episode.rule, max_steps=2)
    outcome = run_option(env, short)
    assert outcome.steps == 2
    assert not outcome.info["edit_over"]
    assert outcome.reward != 0.0
    # What is left of the fact is gained when it is over: the levels sum up.
    rest = run_option(env, option(env))
    assert rest.steps == 3
    assert rest.info["edit_over"]


def test_updates_that_are_not_finite_end_the_episode_as_in_a_step() -> None:
    one, two = (make(SELECTION, step_size=1e36) for _ in range(2))
    for env in (one, two):
        env.reset(seed=0)
    _, reward, ended, _, info = one.step(np.ones(L, np.int8))
    found = run_option(two, option(two, np.ones(L, bool)))
    assert (found.reward, found.ended) == (reward, ended) == (-10.0, True)
    assert found.info["error_type"] == info["error_type"] == StepError.NON_FINITE_UPDATE
