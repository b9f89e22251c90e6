"""hiedit/Toy-v1: every reward by hand, means over all masks, checkers, state."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.env_util import make_vec_env

import hiedit_env
from hiedit_env.errors import ActionError, SettingsError
from hiedit_env.testing import (
    ToyEditing,
    assert_only_layers_changed,
    assert_restores_bit_exact,
    assert_reward_terms_sum,
    assert_same_episode,
    make_tiny,
)
from hiedit_env.testing.toy import POLICIES
from tests.support.episodes import SELECTION, known

TOY = "hiedit/Toy-v1"


def make(**settings: Any) -> ToyEditing:
    env = gym.make(TOY, **settings).unwrapped
    assert isinstance(env, ToyEditing)
    return env


@pytest.mark.parametrize("mode", [None, "ansi"])
def test_the_checkers_have_nothing_to_say(mode: str | None) -> None:
    env = gym.make(TOY, num_edits=3, render_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(env.unwrapped, skip_render_check=mode is None)
        sb3_check(env)


def test_making_and_stepping_imports_no_framework() -> None:
    code = (
        "import sys, gymnasium, hiedit_env\n"
        "env = gymnasium.make('hiedit/Toy-v1', num_edits=1)\n"
        "env.reset(seed=0)\n"
        "assert env.step(env.unwrapped.best_action())[2]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    root = hiedit_env.__path__[0] + "/.."
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr


# A fact of group 1 among four layers: each number worked out by hand.
REWARDS = [
    ([0, 1, 0, 0], {"edit": 1.0, "locality": 0.0, "sparsity": 0.075}),
    ([0, 0, 0, 0], {"edit": 0.0, "locality": 0.0, "sparsity": 0.1}),
    ([1, 0, 0, 0], {"edit": 0.0, "locality": -0.25, "sparsity": 0.075}),
    ([1, 1, 0, 1], {"edit": 1.0, "locality": -0.5, "sparsity": 0.025}),
    ([1, 1, 1, 1], {"edit": 1.0, "locality": -0.75, "sparsity": 0.0}),
]


@pytest.mark.parametrize(("mask", "terms"), REWARDS)
def test_rewards_by_hand(mask: list[int], terms: dict[str, float]) -> None:
    env = make(num_layers=4, num_edits=2)
    seed = next(seed for seed in range(100) if env.reset(seed=seed) and env.group == 1)
    env.reset(seed=seed)
    step = assert_only_layers_changed(env, np.array(mask, np.int8))
    assert_reward_terms_sum(step)
    _, reward, terminated, truncated, info = step
    assert reward == pytest.approx(sum(terms.values()))
    assert info["reward_terms"] == pytest.approx(terms | {"recent_retention": 0.0, "collapse": 0.0})
    wrong = sum(mask) - mask[1]
    assert known(info["metrics"]) == {
        "efficacy": float(mask[1]),
        "agreement": 1 - wrong / 4,
        "answered": bool(mask[1]),
    }
    assert (info["layers"].tolist(), info["layers"].dtype) == (mask, np.int8)
    assert (info["edit_index"], info["edit_steps"], info["edit_over"]) == (0, 1, True)
    assert (terminated, truncated) == (False, False)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_mean_rewards_by_trying_everything(count: int) -> None:
    env = make(num_layers=count, num_edits=1)
    by_mask = {}
    for mask in product((0, 1), repeat=count):
        env.reset(seed=0)
        by_mask[mask] = env.step(np.array(mask))[1]
    env.reset(seed=0)
    singles = [by_mask[tuple(row)] for row in np.eye(count, dtype=int).tolist()]
    wanted = {
        "best": max(by_mask.values()),
        "all-layers": by_mask[(1,) * count],
        "no-edit": by_mask[(0,) * count],
        "random": float(np.mean(list(by_mask.values()))),
        "one-random-layer": float(np.mean(singles)),
    }
    assert {name: env.expected_reward(name) for name in POLICIES} == pytest.approx(wanted)
    assert by_mask[tuple(env.best_action().tolist())] == max(by_mask.values())
    # The next best writes one layer more, or nothing.
    assert sorted(by_mask.values())[-2] < wanted["best"] - 0.05
    with pytest.raises(SettingsError, match=r"'luck'.*best, all-layers"):
        env.expected_reward("luck")


def test_what_is_seen() -> None:
    env = make(num_layers=3, num_edits=4, noise=0.0)
    observation, _ = env.reset(seed=2)
    groups = []
    for i in range(4):
        assert observation.dtype == np.float32
        assert observation.tolist() == [*(float(j == env.group) for j in range(3)), i / 4]
        groups.append(env.group)
        observation, *_ = env.step(env.best_action())
    assert observation.tolist() == [*(float(j == groups[-1]) for j in range(3)), 1.0]
    assert env.weights.tolist() == [groups.count(j) for j in range(3)]


def test_noise_has_the_given_size_and_groups_are_uniform() -> None:
    env = make(num_layers=4, num_edits=4000, noise=0.1)
    env.reset(seed=0)
    shares = np.bincount(env._groups) / 4000
    assert shares == pytest.approx([0.25] * 4, abs=0.03)  # 4 standard errors
    seen = []
    for _ in range(4000):
        seen.append(env.step(env.best_action())[0])
    rows, groups = np.array(seen)[:-1], env._groups[1:]
    others = rows[:, :4][np.arange(4)[None] != groups[:, None]]
    assert others.std() == pytest.approx(0.1, rel=0.05)
    assert (rows[:, :4].argmax(1) == groups).all()
    assert np.abs(rows).max() <= 1


def test_state_seed_spec_and_fingerprint() -> None:
    env = make(num_edits=4)
    env.reset(seed=0)
    env.step(env.best_action())
    actions = [env.best_action(), np.ones(6, np.int8), np.zeros(6, np.int8)]
    assert_restores_bit_exact(env, actions)
    assert_same_episode(lambda: make(num_edits=2), 0, actions)
    state = env.save_state()
    following = env.reset()[0].tobytes()
    env.restore_state(state)
    assert env.reset()[0].tobytes() == following
    _, info = env.reset()
    start = info["weights_fingerprint"]
    assert env.step(np.zeros(6, int))[4]["weights_fingerprint"] == start
    assert env.step(np.ones(6, int))[4]["weights_fingerprint"] != start
    made = gym.make(TOY, num_layers=3, noise=0.5)
    again = gym.make(EnvSpec.from_json(made.spec.to_json()))  # type: ignore[union-attr]
    assert made.reset(seed=1)[0].tobytes() == again.reset(seed=1)[0].tobytes()


def test_the_information_is_that_of_layer_selection() -> None:
    toy, real = make_tiny(TOY), make_tiny(SELECTION)
    assert toy.action_space == real.action_space
    results = [(env.reset(seed=0)[1], env.step(np.ones(6, np.int8))[4]) for env in (toy, real)]
    for ours, theirs in zip(*results, strict=True):
        assert set(ours) == set(theirs)
        assert set(ours["reward_terms"]) == set(theirs["reward_terms"])
        assert set(ours["metrics"]) == set(theirs["metrics"])
        for key, value in ours.items():
            assert type(value) is type(theirs[key])


def test_what_is_refused() -> None:
    env = make(num_edits=1)
    for door in (lambda: env.step(np.ones(6, int)), env.best_action, env.save_state):
        with pytest.raises(ResetNeeded, match="reset"):
            door()
    with pytest.raises(SettingsError, match=r"requests.*there are none"):
        env.reset(options={"requests": []})
    env.reset(seed=0)
    with pytest.raises(ActionError, match=r"\(6,\).*\(\).*DiscreteSubsets"):
        env.step(3)
    with pytest.raises(ActionError, match="BoxLayers"):
        env.step(np.full(6, 0.5))
    assert env.step(np.ones(6, int))[2]
    with pytest.raises(ResetNeeded, match="ended"):
        env.step(np.ones(6, int))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 1}, "num_layers.*≥ 2.*1"),
        ({"num_edits": 0}, "num_edits.*≥ 1.*0"),
        ({"num_edits": 10**14}, r"^num_edits × num_layers.*at most 10000000.*1e\+14 × 6; make"),
        ({"num_edits": 10**22}, r"num_edits.*1e\+22"),
        ({"num_layers": 10**22}, r"num_layers.*1e\+22"),
        ({"num_edits": 10**5000}, "num_edits.*got inf × 6"),
        ({"num_edits": 5_000_001, "num_layers": 2}, "num_edits"),
        ({"noise": -0.1}, "noise.*-0.1"),
        ({"noise": float("nan")}, "noise.*nan"),
        ({"noise": "a"}, "noise.*'a'"),
    ],
)
def test_refused_arguments(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        gym.make(TOY, **settings)


def test_rendering() -> None:
    env = make(num_layers=3, num_edits=2, render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == "no step yet"
    group = env.group
    env.step(env.best_action())
    assert env.render() == f"fact 1 of 2, group {group}: layers [{group}], reward 1.067"
    with pytest.raises(SettingsError, match=r"render_mode.*'video'"):
        ToyEditing(render_mode="video")
    with pytest.warns(UserWarning, match="render_mode"):
        assert make().render() is None


def test_the_picture_shows_the_layers_written() -> None:
    env = make(num_layers=3, num_edits=2, render_mode="rgb_array")
    env.reset(seed=0)
    group = env.group
    env.step(np.ones(3, np.int8))
    picture: Any = env.render()
    assert (picture.shape, picture.dtype) == ((24, 16, 3), np.uint8)
    colours = [tuple(picture[8 * layer + 4, 4]) for layer in range(3)]
    right, wrong = (0, 158, 115), (213, 94, 0)
    assert colours == [right if layer == group else wrong for layer in range(3)]
    # The second fact was not edited yet.
    assert (picture[:, 8:] == 255).all()


def test_stable_baselines_makes_and_trains_it_by_its_id() -> None:
    envs = make_vec_env(TOY, n_envs=2)
    assert envs.reset().shape == (2, 7)
    PPO("MlpPolicy", TOY, n_steps=8, batch_size=8, device="cpu").learn(8)


def test_the_threshold_is_just_below_the_best_reward() -> None:
    threshold = gym.spec(TOY).reward_threshold
    best = 32 * make(num_layers=6).expected_reward("best")
    assert threshold is not None
    assert best - 1 < threshold < best


def test_only_an_id_whose_best_return_is_known_has_a_threshold() -> None:
    ids = {name: spec for name, spec in gym.registry.items() if name.startswith("hiedit/")}
    assert len(ids) == 10
    assert [name for name, spec in ids.items() if spec.reward_threshold is not None] == [TOY]
