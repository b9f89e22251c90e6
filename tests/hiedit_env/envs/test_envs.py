"""The three ids as Gymnasium environments: checkers, seeds, specs, actions, errors, information."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import hiedit_env
from hiedit_env.datasets.requests import Request
from hiedit_env.wrappers import FlattenAction
from tests.support.episodes import (
    IDS,
    LIFELONG,
    SELECTION,
    SMALL,
    STEP_SIZE,
    L,
    act,
    actions,
    known,
    make,
    roll,
    shown,
)

MODES = (None, "ansi", "rgb_array")


# Registration and checkers


def test_importing_registers_the_ids_and_imports_no_framework() -> None:
    code = (
        "import sys, gymnasium, hiedit_env\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(*sorted(i for i in gymnasium.registry if i.startswith('hiedit/')))"
    )
    root = hiedit_env.__path__[0] + "/.."
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    first = (*IDS, "hiedit/Planted-v1")
    second = (name.replace("-v1", "-v2") for name in first)
    others = ("hiedit/PlantedWorlds-v2", "hiedit/Toy-v1")
    assert run.stdout.split() == sorted((*first, *second, *others))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", IDS)
def test_gymnasium_checker_has_nothing_to_say(name: str, mode: str | None) -> None:
    env = gym.make(name, num_edits=2, step_size=SMALL, render_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The checker makes the environment in every other render mode too; once is enough.
        gymnasium_check(env.unwrapped, skip_render_check=mode is not None)
    assert env.unwrapped.render_mode == mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", IDS)
def test_stable_baselines3_checker_has_nothing_to_say(name: str, mode: str | None) -> None:
    env = gym.make(name, num_edits=2, step_size=SMALL, render_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check(FlattenAction(env) if name == LIFELONG else env)


@pytest.mark.parametrize("name", IDS)
def test_spaces(name: str) -> None:
    env = make(name)
    assert env.observation_space == gym.spaces.Box(-1.0, 1.0, (22 * L + 5,), np.float32)
    layers, sizes = gym.spaces.MultiBinary(L), gym.spaces.Box(-1.0, 1.0, (L,), np.float32)
    wanted = {LIFELONG: {"layers": layers, "step_size": sizes}, SELECTION: layers, STEP_SIZE: sizes}
    space = wanted[name]
    assert env.action_space == (gym.spaces.Dict(space) if isinstance(space, dict) else space)


# Equal seeds


def played(env: Any, seed: int) -> list[tuple[Any, ...]]:
    return [shown(env.reset(seed=seed)), *roll(env, actions(env, 4, seed))]


@pytest.mark.parametrize("name", IDS)
def test_a_seed_decides_everything(name: str) -> None:
    settings: dict[str, Any] = {"high_level": "random-layers"} if name == STEP_SIZE else {}
    env = make(name, max_steps_per_edit=2, **settings)
    first = played(env, 7)
    assert first == played(env, 7)
    other = played(env, 8)
    assert first[0] != other[0]
    env.reset()
    env.reset(seed=9)
    env.step(env.action_space.sample())
    assert first == played(env, 7)
    assert first == played(make(name, max_steps_per_edit=2, **settings), 7)


def test_without_a_seed_the_generator_goes_on() -> None:
    env = make(SELECTION)
    env.reset(seed=0)
    second = shown(env.reset())
    assert second != shown(env.reset())
    env.reset(seed=0)
    assert second == shown(env.reset())


def test_without_shuffling_the_stream_is_the_head_of_the_data() -> None:
    env = make(SELECTION, shuffle=False)
    env.reset(seed=1)
    assert [fact.request for fact in env.episode.facts] == list(env.requests[:3])
    env.reset(seed=2)
    assert [fact.request for fact in env.episode.facts] == list(env.requests[:3])


# Copies by pickle and by spec

SETTINGS: dict[str, dict[str, Any]] = {
    LIFELONG: {"reward": "token_accuracy", "reward_weights": {"edit": 2.0}},
    SELECTION: {"update_rule": "ridge", "update_rule_settings": {"ridge": 2.0}},
    STEP_SIZE: {"high_level": "random-layers", "layers_per_edit": 2, "retention_window": 1},
}


@pytest.mark.parametrize("name", IDS)
def test_pickled_environments_are_equal(name: str) -> None:
    env = make(name, max_steps_per_edit=2, **SETTINGS[name])
    expected = played(env, 1)
    copy = pickle.loads(pickle.dumps(env))
    assert type(copy) is type(env)
    assert played(copy, 1) == expected
    copy = pickle.loads(
        pickle.dumps(gym.make(name, num_edits=3, update_rule="outer-product", step_size=SMALL))
    )
    assert played(copy, 1) == played(make(name), 1)


@pytest.mark.parametrize("name", IDS)
def test_a_spec_goes_through_json_and_pickle(name: str) -> None:
    env = gym.make(name, num_edits=3, step_size=SMALL, max_steps_per_edit=2, **SETTINGS[name])
    assert env.spec is not None
    expected = played(env, 1)
    for spec in (EnvSpec.from_json(env.spec.to_json()), pickle.loads(pickle.dumps(env.spec))):
        assert spec == env.spec
        assert played(gym.make(spec), 1) == expected


# Results


def test_a_stream_can_be_given() -> None:
    env = make(LIFELONG, num_edits=1)
    belka = Request("Belka lives in", "Istrand", "Belka")
    stream = [belka, Request("Corrin lives in", "Kessford", "Corrin")]
    env.reset(seed=0, options={"requests": stream})
    assert [fact.request for fact in env.episode.facts] == stream
    assert env.history.num_edits == 2
    env.reset(seed=0)
    assert len(env.episode.facts) == 1


@pytest.mark.parametrize("name", IDS)
def test_what_is_returned(name: str) -> None:
    env = make(name, max_steps_per_edit=2, num_edits=2)
    _, info = env.reset(seed=0)
    keys = {"reward_terms", "metrics", "layers", "weights_fingerprint", "edit_index", "edit_steps"}
    terms = {"edit", "locality", "sparsity", "recent_retention", "collapse"}
    assert set(info) == keys | {"edit_over", "error_type"}
    assert info["reward_terms"] == dict.fromkeys(terms, 0.0)
    assert set(known(info["metrics"])) == {"efficacy", "answered"}
    assert (info["edit_index"], info["edit_steps"], info["edit_over"]) == (0, 0, False)
    observation, reward, terminated, truncated, info = env.step(act(name, [1, 0, 0, 0, 0, 0]))
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert set(info) == keys | {"edit_over", "error_type"}
    assert set(info["reward_terms"]) == terms
    assert {type(value) for value in info["reward_terms"].values()} == {float}
    assert info["layers"].dtype == np.int8
    written = [1, 1, 1, 1, 1, 1] if name == STEP_SIZE else [1, 0, 0, 0, 0, 0]
    assert info["layers"].tolist() == written
    assert type(info["edit_over"]) is bool
    assert f"{info['weights_fingerprint'] % 2**64:016x}" == env.llm.weights_fingerprint()
    # The first fact has no memory, so there is no retention to measure.
    names = {"efficacy", "generalization", "agreement", "argmax_match", "answered"}
    assert set(known(info["metrics"])) == names
    assert set(info["metrics"]) == names | {"recent_retention"}
    assert type(info["metrics"]["answered"]) is bool
    while not terminated:
        _, _, terminated, _, info = env.step(act(name))
    assert "recent_retention" in known(info["metrics"])


@pytest.mark.parametrize("name", IDS)
def test_what_is_returned_may_be_overwritten(name: str) -> None:
    env, twin = make(name, max_steps_per_edit=2), make(name, max_steps_per_edit=2)
    results = [env.reset(seed=0)]
    twin.reset(seed=0)
    for action in actions(twin, 6, 0):
        for observation, *_, info in results:
            observation[:] = 7
            info["layers"][:] = 7
            info["metrics"].clear()
            info["reward_terms"].clear()
        results = [env.step(action)]
        assert shown(results[0]) == shown(twin.step(action))
        if results[0][2]:
            break


@pytest.mark.parametrize("step_size", [3e-3, 1.0])
@pytest.mark.parametrize("name", IDS)
def test_observations_stay_in_their_space(name: str, step_size: float) -> None:
    env = make(name, step_size=step_size, num_edits=4, max_steps_per_edit=2)
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        ended = False
        for action in actions(env, 8, seed):
            assert env.observation_space.contains(observation)
            observation, _, ended, _, _ = env.step(action)
            if ended:
                break
        assert env.observation_space.contains(observation)


def test_observations_end_with_the_place_in_fact_and_stream() -> None:
    env = make(LIFELONG, num_edits=2, max_steps_per_edit=4, stop_when_answered=False)
    observation, _ = env.reset(seed=0)
    places = [observation[-2:].tolist()]
    for _ in range(8):
        observation, _, ended, _, info = env.step(act(LIFELONG))
        places.append(observation[-2:].tolist())
        if not ended:
            # The third from the end says whether the fact is answered now.
            assert bool(observation[-3]) == env.capture.answered
    # Share of the fact's steps used, share of the stream done.
    first = [[0.0, 0.0], [0.25, 0.0], [0.5, 0.0], [0.75, 0.0]]
    second = [[0.0, 0.5], [0.25, 0.5], [0.5, 0.5], [0.75, 0.5]]
    assert places == [*first, *second, [1.0, 1.0]]


@pytest.mark.parametrize("name", IDS)
def test_rendering(name: str) -> None:
    text = make(name, render_mode="ansi", max_steps_per_edit=1)
    picture = make(name, render_mode="rgb_array", max_steps_per_edit=1)
    frames = []
    for env in (text, picture):
        env.reset(seed=0)
        frames.append(env.render())
        env.step(act(name))
        frames.append(env.render())
    assert all(isinstance(frame, str) for frame in frames[:2])
    assert frames[0] != frames[1]
    for frame in frames[2:]:
        assert frame.dtype == np.uint8
        assert frame.ndim == 3
        assert frame.shape[2] == 3
    with pytest.warns(UserWarning, match="render_mode"):
        assert make(name).render() is None
