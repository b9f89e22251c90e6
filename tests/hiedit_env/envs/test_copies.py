"""Copies of environments: pickled ones begin anew, deep copies go on; each has its own model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.planted import Planted
from hiedit_env.envs.vector import VectorEditing
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import (
    IDS,
    SELECTION,
    STEP_SIZE,
    actions,
    bits,
    make,
    roll,
    same_bits,
)

SETTINGS: dict[str, Any] = {"num_edits": 3, "max_steps_per_edit": 2}


def together(**settings: Any) -> VectorEditing[Any]:
    envs = gym.make_vec(SELECTION, 3, **(SETTINGS | settings))
    assert isinstance(envs, VectorEditing)
    return envs


def rewards(envs: VectorEditing[Any], count: int = 3) -> list[list[float]]:
    return [envs.step(np.ones((3, 6), np.int8))[1].tolist() for _ in range(count)]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda envs: pickle.loads(pickle.dumps(envs))])
def test_a_copied_vector_environment_answers_through_its_own_model(clone: Any) -> None:
    envs = together()
    twin = clone(envs)
    assert len({id(env.llm.model) for env in twin.envs}) == 1
    assert twin.envs[0].llm.model is not envs.envs[0].llm.model
    assert twin.envs[0].observer.llm.model is twin.envs[0].llm.model
    first = twin.envs[0].episode.evaluator.unedited
    assert all(env.episode.evaluator.unedited.shares_with(first) for env in twin.envs)
    assert not envs.envs[0].episode.evaluator.unedited.shares_with(first)
    envs.reset(seed=0)
    twin.reset(seed=0)
    wanted = rewards(envs)
    assert rewards(twin) == wanted
    assert len({tuple(row) for row in wanted}) == 3


def test_a_vector_environment_copied_in_mid_episode_goes_on() -> None:
    envs = together(autoreset_mode="SameStep", max_episode_steps=2)
    envs.reset(seed=0)
    envs.step(np.ones((3, 6), np.int8))
    twin = copy.deepcopy(envs)
    after = [envs.step(np.ones((3, 6), np.int8)) for _ in range(3)]
    again = [twin.step(np.ones((3, 6), np.int8)) for _ in range(3)]
    assert repr(again) == repr(after)
    assert after[0][3].all()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", IDS)
def test_a_deep_copy_goes_on_in_mid_episode(name: str, wrapped: bool) -> None:
    settings = {"high_level": "random-layers"} if name == STEP_SIZE else {}
    env: Any = make(name, **SETTINGS, **settings)
    if wrapped:
        env = gym.make(name, **SETTINGS, **settings)
    env.reset(seed=0)
    chosen = actions(env.unwrapped, 6, 0)
    env.step(chosen[0])
    twin = copy.deepcopy(env)
    assert twin.unwrapped.llm.model is not env.unwrapped.llm.model
    before = bits(twin.unwrapped)
    assert same_bits(before, bits(env.unwrapped))
    after = roll(env, chosen[1:])
    # The original has gone on without the copy.
    assert same_bits(bits(twin.unwrapped), before)
    assert roll(twin, chosen[1:]) == after
    # And so does its random state.
    assert twin.reset()[0].tobytes() == env.reset()[0].tobytes()


def test_a_deep_copy_keeps_the_low_level_and_what_was_set() -> None:
    env = make(SELECTION)
    env.use_low_level(OuterProductRule(env.llm.shapes, env.llm.device), max_steps_per_edit=2)
    env.weights_of_terms["edit"] = 3.0
    twin = copy.deepcopy(env)
    assert isinstance(twin, EditingEnv)
    assert (type(twin.rule), twin.max_steps_per_edit) == (OuterProductRule, 2)
    assert twin.rule is not env.rule
    assert twin.weights_of_terms == env.weights_of_terms
    twin.weights_of_terms["edit"] = 1.0
    assert env.weights_of_terms["edit"] == 3.0
    env.reset(seed=0)
    twin.reset(seed=0)
    assert same_bits(bits(env), bits(twin))


def test_a_copied_oracle_asks_its_own_model() -> None:
    env: Any = gym.make("hiedit/Planted-v1", num_edits=2).unwrapped
    env.reset(seed=0)
    env.oracle()
    twin = copy.deepcopy(env)
    assert isinstance(twin, Planted)
    assert twin._last is None
    env.step(np.ones(6, np.int8))
    twin.step(np.ones(6, np.int8))
    np.testing.assert_allclose(twin.oracle().rewards, env.oracle().rewards, atol=1e-5)
    # The copy asks its own model: what is written into the other one is not in its answers.
    told = twin.oracle().rewards
    twin._last = None
    for i, layer in enumerate(env.llm.layers):
        env.llm._weight(i).zero_()
        assert layer.module is not twin.llm.layers[i].module
    np.testing.assert_allclose(twin.oracle().rewards, told, atol=1e-5)
