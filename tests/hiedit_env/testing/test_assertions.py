"""The testing kit: every assertion holds on good environments and fails on broken ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward

from hiedit_env.errors import SettingsError
from hiedit_env.testing import (
    ToyEditing,
    assert_no_hooks_left,
    assert_only_layers_changed,
    assert_restores_bit_exact,
    assert_reward_terms_sum,
    assert_same_episode,
    make_tiny,
    tiny_requests,
)
from hiedit_env.testing.assertions import _difference
from hiedit_env.wrappers import BoxLayers, FlattenAction
from tests.support.episodes import IDS, LIFELONG, SELECTION, STEP_SIZE, L, act

TOY = "hiedit/Toy-v1"
ALL_IDS = (*IDS, TOY)
MASK = np.array([0, 1, 0, 1, 0, 0], np.int8)


def started(name: str, **settings: Any) -> Any:
    env = make_tiny(name, **settings)
    env.reset(seed=0)
    return env


def action_of(name: str) -> Any:
    return MASK if name == TOY else act(name, MASK.tolist())


# All is well


@pytest.mark.parametrize("name", ALL_IDS)
def test_good_environments_pass(name: str) -> None:
    env = started(name)
    action = action_of(name)
    assert_restores_bit_exact(env, [action] * 3)
    assert_reward_terms_sum(assert_only_layers_changed(env, action))
    assert_no_hooks_left(env)
    assert_same_episode(lambda: make_tiny(name), 1, [action] * 2)


def test_wrapped_environments_pass() -> None:
    env = FlattenAction(make_tiny(LIFELONG))
    env.reset(seed=0)
    flat = np.array([1, -1] * 3 + [0.5] * L, np.float32)
    assert_restores_bit_exact(env, [flat])
    step = assert_only_layers_changed(env, flat)
    assert step[4]["layers"].tolist() == [1, 0] * 3
    assert_same_episode(lambda: FlattenAction(make_tiny(LIFELONG)), 1, [flat])
    assert_no_hooks_left(env)


def test_an_answered_fact_and_a_chosen_option_pass() -> None:
    # Under a high level that changes its mind with every fact.
    env = started(STEP_SIZE, high_level="random-layers", layers_per_edit=2, max_steps_per_edit=1)
    for _ in range(3):
        option = env.unwrapped.option.astype(int).tolist()
        assert assert_only_layers_changed(env, act(STEP_SIZE))[4]["layers"].tolist() == option


def test_the_environment_is_left_as_it_was() -> None:
    env, twin = started(SELECTION), started(SELECTION)
    assert_restores_bit_exact(env, [MASK] * 9)  # to the end of the episode and back
    one, other = env.step(MASK), twin.step(MASK)
    assert one[0].tobytes() == other[0].tobytes()
    assert repr(one[1:]) == repr(other[1:])
    assert "step" not in vars(env.unwrapped)


# Something is broken


def test_a_reward_that_is_not_the_sum_is_found() -> None:
    step = started(TOY).step(MASK)
    terms = dict(step[4]["reward_terms"])
    assert_reward_terms_sum(step)
    doubled = TransformReward(make_tiny(TOY), lambda reward: 2 * float(reward))
    doubled.reset(seed=0)
    with pytest.raises(AssertionError, match=rf"reward is {2 * step[1]!r}.*sum.*{step[1]!r}"):
        assert_reward_terms_sum(doubled.step(MASK))
    off = (step[0], step[1] + 1e-9, *step[2:])
    with pytest.raises(AssertionError, match="sum of its terms"):
        assert_reward_terms_sum(off)
    assert_reward_terms_sum(off, tolerance=1e-8)
    for bad in (np.float64(step[1]), 1, None):
        with pytest.raises(AssertionError, match="the reward must be a finite Python float"):
            assert_reward_terms_sum((step[0], bad, *step[2:]))
    for bad in (float("nan"), np.float32(0)):
        info = {"reward_terms": terms | {"edit": bad}}
        with pytest.raises(AssertionError, match="edit must be a finite Python float"):
            assert_reward_terms_sum((*step[:4], info))


class ForgetsWeights(ToyEditing):
    def restore_state(self, state: Any) -> None:
        weights = self.weights
        super().restore_state(state)
        self.weights = weights


class ForgetsPlace(ToyEditing):
    def restore_state(self, state: Any) -> None:
        place = self._position
        super().restore_state(state)
        self._position = place


class ForgetsChance(ToyEditing):
    """Draws at every step, and does not go back in the random numbers."""

    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        observation[0] = self.np_random.uniform()
        return observation, *rest

    def restore_state(self, state: Any) -> None:
        random = self.np_random.bit_generator.state
        super().restore_state(state)
        self.np_random.bit_generator.state = random


class Counts(ToyEditing):
    """Shows something that no state holds: how many steps there ever were."""

    steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation, reward, *rest, info = super().step(action)
        info["metrics"]["efficacy"] = float(self.steps)
        return observation, reward, *rest, info


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (ForgetsWeights, r"after 2 steps and restore_state, weights.*layer 1.*layer 3"),
        (ForgetsPlace, r"step 0 is not the same taken again.*observation\[\d\] is"),
        (ForgetsChance, "restore_state, not as saved: the random state.*is"),
        (Counts, r"step 0 .*info\['metrics'\]\['efficacy'\] is 1\.0 and 3\.0"),
    ],
)
def test_a_restore_that_forgets_is_found(broken: type[ToyEditing], words: str) -> None:
    env = broken(num_edits=8)
    env.reset(seed=0)
    with pytest.raises(AssertionError, match=words):
        assert_restores_bit_exact(env, [MASK, MASK])


def test_a_weight_that_is_off_by_the_last_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    env = started(LIFELONG)
    restore = env.unwrapped.restore_state

    def restored(state: Any) -> None:
        restore(state)
        with torch.no_grad():
            weight = env.unwrapped.llm.model.get_submodule(env.unwrapped.llm.names[2]).weight
            weight.view(torch.int32)[0, 0] += 1

    monkeypatch.setattr(env.unwrapped, "restore_state", restored)
    name = rf"{env.unwrapped.llm.names[2]}\.weight"
    with pytest.raises(AssertionError, match=rf"weights are not as saved: \['{name}'\]"):
        assert_restores_bit_exact(env, [action_of(LIFELONG)])


class WritesOneMore(ToyEditing):
    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.weights[5] += 1
        return result


class WritesOthers(ToyEditing):
    def step(self, action: Any) -> Any:
        return super().step(np.roll(action, 1))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (WritesOneMore, r"changed layers \[1, 3, 5\], but info\['layers'\] names \[1, 3\]"),
        (WritesOthers, r"wrote layers \[2, 4\], but chosen were \[1, 3\]"),
    ],
)
def test_layers_that_were_not_chosen_are_found(broken: type[ToyEditing], words: str) -> None:
    env = BoxLayers(broken())
    env.reset(seed=0)
    with pytest.raises(AssertionError, match=words):
        assert_only_layers_changed(env, MASK * 2 - 1)


@pytest.mark.parametrize("name", IDS)
def test_weights_outside_the_candidates_are_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = started(name)
    episode = env.unwrapped.episode
    primitive = episode.primitive

    def leaking(updates: Any) -> Any:
        with torch.no_grad():
            episode.llm.model.lm_head.weight[0, 0] += 1
        return primitive(updates)

    monkeypatch.setattr(episode, "primitive", leaking)
    with pytest.raises(AssertionError, match=r"no candidate layers: .*lm_head\.weight"):
        assert_only_layers_changed(env, action_of(name))


def test_chance_without_a_seed_is_found() -> None:
    class Unseeded(ToyEditing):
        def reset(self, **settings: Any) -> Any:
            result = super().reset(**settings)
            self._groups = np.random.default_rng().integers(6, size=self.num_edits)
            return result

    with pytest.raises(AssertionError, match=r"is not the same in a second environment: "):
        assert_same_episode(lambda: Unseeded(num_edits=50), 0, [MASK] * 50)


def test_what_a_reset_leaves_behind_is_found() -> None:
    words = r"step 0 is not the same in the same environment: info\['metrics'\].* 1\.0 and 3\.0"
    with pytest.raises(AssertionError, match=words):
        assert_same_episode(Counts, 0, [MASK] * 2)


def test_an_environment_that_differs_at_reset_is_found() -> None:
    made = iter((make_tiny(TOY, noise=0.1), make_tiny(TOY, noise=0.2)))
    with pytest.raises(AssertionError, match=r"reset is not the same.*observation\[0\] is"):
        assert_same_episode(lambda: next(made), 0, [MASK])


HOOKS: list[tuple[str, Callable[[Any], Any]]] = [
    ("_forward_hooks: 1", lambda m: m.register_forward_hook(print)),
    ("_forward_pre_hooks: 1", lambda m: m.register_forward_pre_hook(print)),
    ("_backward_hooks: 1", lambda m: m.register_full_backward_hook(print)),
    ("_backward_pre_hooks: 1", lambda m: m.register_full_backward_pre_hook(print)),
]


@pytest.mark.parametrize(("words", "register"), HOOKS)
def test_hooks_are_found(words: str, register: Callable[[Any], Any]) -> None:
    env = started(SELECTION)
    name = env.unwrapped.llm.names[3]
    handle = register(env.unwrapped.llm.model.get_submodule(name))
    with pytest.raises(AssertionError, match=rf"{name}\.{words}"):
        assert_no_hooks_left(env)
    handle.remove()
    assert_no_hooks_left(env)
    weight = next(env.unwrapped.llm.model.parameters()).requires_grad_()
    handle = weight.register_hook(print)
    with pytest.raises(AssertionError, match=r"weight\._backward_hooks: 1"):
        assert_no_hooks_left(env)
    handle.remove()


# What cannot be checked


def test_no_actions_and_foreign_environments_are_refused() -> None:
    env = started(TOY)
    with pytest.raises(SettingsError, match="at least one action"):
        assert_restores_bit_exact(env, [])
    with pytest.raises(SettingsError, match="at least one action"):
        assert_same_episode(lambda: env, 0, iter([]))
    foreign = gym.make("CartPole-v1")
    foreign.reset(seed=0)
    with pytest.raises(SettingsError, match=r"not an environment of hiedit.*CartPole"):
        assert_no_hooks_left(foreign)
    with pytest.raises(SettingsError, match=r"not an environment of hiedit.*CartPole"):
        assert_only_layers_changed(foreign, 0)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (np.zeros(2, np.float32), np.zeros(2), r"x is float32 \(2,\) and float64 \(2,\)"),
        (np.zeros(2), np.array([0.0, -0.0]), r"x\[1\] is .*0\.0.* and .*-0\.0"),
        ({"a": 1}, {"b": 1}, r"x has the keys \['a'\] and \['b'\]"),
        ({"a": {"b": 1}}, {"a": {"b": True}}, r"x\['a'\]\['b'\] is 1 and True"),
        (0.1 + 0.2, 0.3, "x is 0.30000000000000004 and 0.3"),
    ],
)
def test_differences(one: Any, other: Any, words: str) -> None:
    found = _difference(one, other, "x")
    assert found is not None
    assert re.search(words, found), found
    assert _difference(one, one, "x") is None


def test_equal_bits_that_are_no_number_are_no_difference() -> None:
    assert _difference(np.array([np.nan]), np.array([np.nan]), "x") is None
    assert _difference({"a": float("nan")}, {"a": float("nan")}, "x") is None


# Factories


def test_tiny_environments_are_small_and_settings_win() -> None:
    env: Any = make_tiny(LIFELONG).unwrapped
    assert (env.num_edits, env.episode.max_steps_per_edit, env.model_name) == (3, 2, "tiny")
    env = make_tiny(LIFELONG, num_edits=1, max_steps_per_edit=4).unwrapped
    assert (env.num_edits, env.episode.max_steps_per_edit) == (1, 4)
    with pytest.raises(SettingsError, match=r"'CartPole-v1'.*LayerSelection.*Toy"):
        make_tiny("CartPole-v1")


def test_tiny_requests_are_a_stream() -> None:
    requests = tiny_requests(2)
    env = make_tiny(SELECTION)
    env.reset(seed=0, options={"requests": requests})
    inner: Any = env.unwrapped
    assert [fact.request for fact in inner.episode.facts] == requests == tiny_requests(5)[:2]
    for n in (0, 10**6, 1.5):
        with pytest.raises(SettingsError, match=f"n must be.*{n}"):
            tiny_requests(n)  # type: ignore[arg-type]
