"""Several facts per step: what is written, observed, rewarded, told, and taken back."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.nn import functional as F

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.reward_terms import MEASURED
from hiedit_env.rules.names import RULES
from hiedit_env.wrappers import SequentialSelection
from tests.hiedit_env.envs.test_info import form
from tests.support.episodes import (
    IDS,
    KINDS,
    LIFELONG,
    SELECTION,
    STEP_SIZE,
    L,
    PlainModel,
    act,
    actions,
    bits,
    make,
    plain_levels,
    roll,
    same_bits,
    shown,
)

ALL = np.ones(L, np.int8)
PLANTED = "hiedit/Planted-v1"
UNITS: dict[str, Any] = {"num_edits": 7, "edits_per_step": 3, "retention_window": 4}


@pytest.fixture(scope="module")
def plain() -> PlainModel:
    return PlainModel()


def steps(env: EditingEnv, count: int) -> list[dict[str, Any]]:
    """Steps with all layers; what they told."""
    return [env.step(ALL)[4] for _ in range(count)]


# -- what is written ------------------------------------------------------------------------------


def test_a_step_goes_down_the_mean_loss_of_its_facts(plain: PlainModel) -> None:
    """By another way: the gradient of the mean loss of a plain model's dense weights."""
    env = make(SELECTION, **UNITS, update_rule="gradient", step_size=0.1, max_steps_per_edit=1)
    env.reset(seed=0)
    names = [f"{name}.weight" for name in env.llm.names]
    parameters = dict(plain.model.named_parameters())
    losses = []
    for request in env.stream[:3]:
        prompt_ids, answer_ids = plain.ids(request.prompt, request.answer)
        logits = plain.model(torch.tensor([prompt_ids + answer_ids])).logits[0]
        rows = logits[len(prompt_ids) - 1 : -1]
        losses.append(F.cross_entropy(rows, torch.tensor(answer_ids)))
    mean = torch.stack(losses).mean()
    gradients = torch.autograd.grad(mean, [parameters[name] for name in names])
    assert env.capture.loss == pytest.approx(float(mean.detach()), rel=1e-4)
    env.step(ALL)
    now = bits(env)
    for name, gradient in zip(names, gradients, strict=True):
        change = now[name].double() - parameters[name].detach()
        torch.testing.assert_close(change, -0.1 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_asked_once_for_all_facts_of_a_step(name: str) -> None:
    env = make(SELECTION, **UNITS, update_rule=name, max_steps_per_edit=1)
    env.reset(seed=0)
    prompts = [fact.prompt for fact in env.unit]
    assert [fact.request for fact in env.unit] == list(env.stream[:3])
    rule = type(env.rule)(env.llm.shapes, env.llm.device, step_size=env.rule.step_size)
    capture = env.llm.read(*prompts).capture()
    rule.observe(capture)
    wanted = rule.propose(capture, np.ones(L, bool))
    before = [env.llm.change(i) for i in range(L)]
    assert before == [None] * L
    env.step(ALL)
    for i, update in enumerate(wanted):
        assert update is not None
        found = env.llm.change(i)
        assert found is not None
        torch.testing.assert_close(found, update.dense(), rtol=1e-4, atol=1e-7)


def test_one_fact_per_step_is_as_without_the_setting() -> None:
    results = []
    for settings in ({}, {"edits_per_step": 1, "prompt_form": "plain", "end_token": False}):
        env = make(LIFELONG, max_steps_per_edit=2, **settings)
        first = shown(env.reset(seed=3))
        results.append([first, *roll(env, actions(env, 20, 5))])
        assert env.episode.ended
    assert results[0] == results[1]


# -- where we are ---------------------------------------------------------------------------------


def test_the_last_unit_is_smaller_and_memory_counts_facts() -> None:
    env = make(SELECTION, **UNITS, max_steps_per_edit=1)
    _, info = env.reset(seed=0)
    seen = []
    for _ in range(3):
        seen.append(
            (
                [f.request for f in env.unit],
                [f.request for f in env.episode.remembered],
                len(env.past_facts),
            )
        )
        _, _, ended, _, info = env.step(ALL)
        assert info["unit_size"] == len(seen[-1][0])
        assert info["edit_index"] == 3 * (len(seen) - 1)
    facts = list(env.stream)
    assert ended
    assert seen == [
        (facts[:3], [], 0),
        (facts[3:6], facts[2::-1], 3),
        (facts[6:], facts[5:1:-1], 6),
    ]
    # After the stream, the last unit; each fact has a record of its own.
    assert [f.request for f in env.unit] == facts[6:]
    assert env.fact.request == facts[6]
    assert [(r.edit_index, r.prompt) for r in env.history.records] == [
        (i, fact.prompt) for i, fact in enumerate(facts)
    ]
    assert env.episode.written_counts.tolist() == [7] * L


def test_a_unit_ends_when_all_its_facts_are_answered() -> None:
    env = make(SELECTION, num_edits=1, max_steps_per_edit=1, step_size=1e-9)
    env.reset(seed=0)
    [prompt] = [fact.prompt for fact in env.unit]
    known = env.episode.evaluator.unedited.answers([prompt])[0]
    right = Request(prompt.prompt, env.llm.encoder.decode(known.answer_ids[:1]), "x")
    wrong = Request("Belka lives in", "Istrand", "Belka")
    assert env.llm.read(env.llm.encode(right.prompt, right.answer)).answered
    assert not env.llm.read(env.llm.encode(wrong.prompt, wrong.answer)).answered
    settings = {"edits_per_step": 2, "max_steps_per_edit": 3, "step_size": 1e-9}
    env = make(LIFELONG, **settings)
    for stream, over in (([right, wrong], False), ([right, right], True)):
        env.reset(options={"requests": stream})
        *_, info = env.step(act(LIFELONG))
        assert info["edit_over"] is over
        assert info["metrics"]["answered"] is over
        assert info["fact_metrics"]["answered"].tolist() == [True, over]
        # An answered unit is left alone; one that is half answered is written as a whole.
        assert bool(info["layers"].any()) is not over


# -- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_is_the_mean_over_the_facts(plain: PlainModel, kind: Any) -> None:
    env = make(SELECTION, **UNITS, reward=kind, max_steps_per_edit=1, step_size=3e-3)
    weights = {"edit": 1.0, "locality": 2.0, "sparsity": 0.0, "recent_retention": 0.5}
    env.weights_of_terms |= weights
    env.reset(seed=0)
    for start in (0, 3, 6):
        *_, info = env.step(ALL)
        now = PlainModel(bits(env))
        facts = list(env.stream)
        old = facts[max(0, start - 4) : start][::-1]
        each = [plain_levels(plain, now, f, old, kind) for f in facts[start : start + 3]]
        for term in MEASURED:
            wanted = weights[term] * np.mean([one[term] for one in each])
            assert info["reward_terms"][term] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_facts_without_unrelated_prompts_count_as_perfect_in_the_mean(plain: PlainModel) -> None:
    stream = [
        Request("Belka lives in", "Istrand", "Belka"),
        Request("Corrin lives in", "Kessford", "Corrin", locality=(Probe("Zorbel lives in", "x"),)),
    ]
    env = make(SELECTION, edits_per_step=2, max_steps_per_edit=1, step_size=3e-3)
    env.reset(options={"requests": stream})
    *_, info = env.step(ALL)
    own = plain_levels(plain, PlainModel(bits(env)), stream[1], [])["locality"]
    assert own < -1e-4
    assert info["reward_terms"]["locality"] == pytest.approx(own / 2, rel=1e-3)
    assert np.isnan(info["fact_metrics"]["agreement"]).tolist() == [True, False]
    assert info["metrics"]["agreement"] == info["fact_metrics"]["agreement"][1]
    # The low level's objective means the same.
    env.reset(options={"requests": stream})
    nothing = [None] * L
    levels = [plain_levels(plain, plain, fact, []) for fact in stream]
    wanted = -np.mean([sum(one.values()) for one in levels])
    assert float(env.loss(nothing)) == pytest.approx(wanted, rel=1e-4)


def test_every_fact_has_its_metrics() -> None:
    env = make(SELECTION, **UNITS, max_steps_per_edit=1)
    _, info = env.reset(seed=0)
    infos = [info, *steps(env, 3)]
    for info in infos:
        for name, column in info["fact_metrics"].items():
            assert column.shape == (3,)
            own = column[: info["unit_size"]]
            if name == "answered":
                assert info["metrics"][name] == own.all()
                assert not column[info["unit_size"] :].any()
            else:
                assert np.isnan(column[info["unit_size"] :]).all()
                own = own[~np.isnan(own)]
                mean = own.mean() if len(own) else np.nan
                np.testing.assert_allclose(info["metrics"][name], mean, equal_nan=True)
    now = PlainModel(bits(env))
    shares = [now.accuracy(f.prompt, f.answer) for f in env.stream[6:]]
    assert infos[-1]["fact_metrics"]["efficacy"][:1] == pytest.approx(shares)
    assert [r.metrics["efficacy"] for r in env.history.records] == pytest.approx(
        [x for i in infos[1:] for x in i["fact_metrics"]["efficacy"][: i["unit_size"]]]
    )


@pytest.mark.parametrize("name", [*IDS, PLANTED])
def test_the_form_of_info_never_varies(name: str) -> None:
    settings = {**UNITS, "num_edits": 4, "max_steps_per_edit": 2}
    env: Any = gym.make(name, **settings)
    _, info = env.reset(seed=0)
    wanted, ended = form(info), False
    env.action_space.seed(0)
    while not ended:
        _, _, ended, _, info = env.step(env.action_space.sample())
        assert form(info) == wanted
    collapsing = make(SELECTION, **settings, step_size=1e30)
    collapsing.reset(seed=0)
    _, _, ended, _, info = collapsing.step(ALL)
    assert ended
    assert set(info) == set(wanted) - {"true_layers"}
    assert np.isnan(info["fact_metrics"]["efficacy"]).all()
    env.reset(seed=0)
    base = env.unwrapped
    *_, info = base.apply(base.episode.propose(np.ones(L, bool)), judge="never")
    assert np.isfinite(info["fact_metrics"]["efficacy"]).all()


def test_the_observation_is_the_mean_of_the_facts_own() -> None:
    together = make(SELECTION, **UNITS)
    observation, _ = together.reset(seed=0)
    alone = make(SELECTION)
    own = [alone.reset(options={"requests": [f]})[0] for f in together.stream[:3]]
    assert observation.shape == own[0].shape
    assert together.observation_space == alone.observation_space
    np.testing.assert_allclose(observation, np.mean(own, 0), atol=1e-5)
    assert np.abs(observation - own[0]).max() > 0.01


# -- the way back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDS)
def test_a_state_saved_inside_a_unit_is_restored_bit_for_bit(name: str) -> None:
    settings = {**UNITS, "num_edits": 14, "update_rule": "decorrelated", "max_steps_per_edit": 2}
    env = make(name, **settings)
    env.reset(seed=1)
    chosen = actions(env, 12, 0)
    for action in chosen[:3]:
        env.step(action)
    state, weights, twin = env.save_state(), bits(env), copy.deepcopy(env)
    after = roll(env, chosen[3:])
    env.restore_state(state)
    assert same_bits(bits(env), weights)
    assert roll(env, chosen[3:]) == after
    assert roll(twin, chosen[3:]) == after


def test_a_failed_step_takes_the_whole_unit_back() -> None:
    env = make(LIFELONG, **UNITS, step_size=1e30)
    env.reset(seed=0)
    before = bits(env)
    _, _, ended, _, info = env.step(act(LIFELONG))
    assert (ended, info["error_type"], info["unit_size"]) == (True, 2, 3)
    assert same_bits(bits(env), before)


def test_two_answers_for_one_prompt_are_refused_before_anything_changes() -> None:
    stream = [
        Request("Belka lives in", "Istrand", "Belka", source="a row 0"),
        Request("Corrin lives in", "Kessford", "Corrin", source="a row 1"),
        Request("Belka lives in", "Kessford", "Belka", source="a row 2"),
    ]
    env = make(SELECTION, edits_per_step=3)
    env.reset(seed=0)
    env.step(ALL)
    before, state = bits(env), env.np_random.bit_generator.state
    with pytest.raises(SettingsError, match=r"a row 0 and a row 2 .*two answers.*edits_per_step=1"):
        env.reset(seed=7, options={"requests": stream})
    assert same_bits(bits(env), before)
    assert env.np_random.bit_generator.state == state
    # In two steps the later one stands; and one fact given twice is no contradiction.
    for number, given in ((2, stream), (3, [*stream[:2], stream[0]])):
        env = make(SELECTION, edits_per_step=number)
        env.reset(options={"requests": given})


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_a_number_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(SettingsError, match="edits_per_step must be ≥ 1 and a whole number"):
        make(SELECTION, edits_per_step=wrong)


# -- other views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IDS, PLANTED])
@pytest.mark.parametrize("kind", ["loss", "generation"])
def test_vector_environments_equal_single_ones(name: str, kind: str) -> None:
    settings = {**UNITS, "num_edits": 5, "max_steps_per_edit": 2, "reward": kind}
    envs: Any = gym.make_vec(name, 3, vectorization_mode="vector_entry_point", **settings)
    singles = [gym.make(name, **settings) for _ in range(3)]
    observations, info = envs.reset(seed=4)
    first = [env.reset(seed=4 + i) for i, env in enumerate(singles)]
    np.testing.assert_allclose(observations, [one[0] for one in first], atol=1e-3)
    assert info["unit_size"].tolist() == [3, 3, 3]
    envs.action_space.seed(0)
    ended = np.zeros(3, bool)
    while not ended.any():
        chosen = envs.action_space.sample()
        observations, rewards, ended, _, info = envs.step(chosen)
        for i, env in enumerate(singles):
            own = {k: v[i] for k, v in chosen.items()} if isinstance(chosen, dict) else chosen[i]
            observation, reward, over, _, told = env.step(own)
            np.testing.assert_allclose(observations[i], observation, atol=1e-3)
            assert rewards[i] == pytest.approx(reward, abs=2e-3)
            assert (ended[i], info["edit_index"][i]) == (over, told["edit_index"])
            for metric, column in told["fact_metrics"].items():
                np.testing.assert_allclose(info["fact_metrics"][metric][i], column, atol=1e-6)


def test_rewards_that_stay_on_the_device_are_the_same() -> None:
    settings = {**UNITS, "reward": "token_accuracy", "max_steps_per_edit": 1}
    pair = [
        gym.make_vec(SELECTION, 2, vectorization_mode="vector_entry_point", tensors=t, **settings)
        for t in (False, True)
    ]
    for envs in pair:
        envs.reset(seed=0)
    for _ in range(3):
        rewards = [envs.step(np.ones((2, L), np.int8))[1] for envs in pair]
        np.testing.assert_allclose(rewards[0], np.asarray(rewards[1]), atol=1e-5)


def test_the_planted_layers_and_the_oracle_are_those_of_all_facts() -> None:
    env: Any = gym.make(PLANTED, **{**UNITS, "num_edits": 4}).unwrapped
    _, info = env.reset(seed=0)
    names = {name for request in env.stream[:3] for name in request.true_layers}
    assert len(names) > 1
    assert {n for n, t in zip(env.llm.names, info["true_layers"], strict=True) if t} == names
    best = env.oracle()
    reward = env.step(best.layers.astype(np.int8))[1]
    assert reward == pytest.approx(best.reward, abs=1e-4)


def test_picking_layers_one_by_one_counts_units() -> None:
    env = SequentialSelection(gym.make(SELECTION, **UNITS, max_steps_per_edit=1))
    env.reset(seed=0)
    env.step(0)
    assert env.step(env.stop)[4]["edit_index"] == 0
    assert env.step(1)[4]["edit_index"] == 3


def test_a_high_level_chooses_once_for_all_facts_of_a_step() -> None:
    env: Any = make(STEP_SIZE, **UNITS, high_level="gradient-norm", layers_per_edit=2)
    env.reset(seed=0)
    norms = env.capture.gradient_norms()
    assert sorted(norms.topk(2).indices.tolist()) == np.flatnonzero(env.option).tolist()


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker_has_nothing_to_say(name: str) -> None:
    env = gym.make(name, **UNITS, disable_env_checker=True)
    check_env(env.unwrapped, skip_render_check=True)


def test_the_intrinsic_reward_of_all_layers_is_zero() -> None:
    env = make(SELECTION, **UNITS, intrinsic=True)
    env.reset(seed=0)
    assert env.step(ALL)[1] == 0.0
    assert env.step(np.array([1, 0, 0, 0, 0, 0], np.int8))[1] != 0.0
