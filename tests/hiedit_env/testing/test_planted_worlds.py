"""``hiedit/PlantedWorlds-v2``, what its observation says of writes, and headroom known by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import hiedit_env  # noqa: F401
from hiedit_env.datasets.difficulty import WorldName, world_seeds
from hiedit_env.datasets.planted import World, make_world
from hiedit_env.envs.effects import EFFECTS
from hiedit_env.envs.planted import Planted
from hiedit_env.errors import SettingsError
from hiedit_env.testing.planted_worlds import PlantedWorlds
from hiedit_env.wrappers import ObserveEffects


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "worlds"))


def one_world(difficulty: str, seed: int = 0, **arguments: Any) -> gym.Env[Any, Any]:
    return gym.make(
        "hiedit/Planted-v2",
        disable_env_checker=True,
        world_seed=seed,
        difficulty=difficulty,
        **{"num_edits": 4, **arguments},
    )


def worlds(**arguments: Any) -> gym.Env[Any, Any]:
    arguments = {"num_worlds": 3, "num_edits": 3, **arguments}
    return gym.make("hiedit/PlantedWorlds-v2", disable_env_checker=True, **arguments)


def planted(env: gym.Env[Any, Any]) -> Planted:
    inner = env.unwrapped
    assert isinstance(inner, Planted)
    return inner


@pytest.mark.parametrize("difficulty", ["plain,layers=3,home_layers=3", "crowded,layers=3"])
def test_the_oracle_is_the_best_of_all_options(difficulty: str) -> None:
    env = one_world(difficulty)
    inner = planted(env)
    env.reset(seed=0)
    env.step(np.array([1, 0, 1], np.int8))
    oracle = inner.oracle()
    state = inner.save_state()
    earned = {}
    for option in product((0, 1), repeat=3):
        earned[option] = env.step(np.array(option, np.int8))[1]
        inner.restore_state(state)
        assert oracle.reward_of(np.array(option)) == pytest.approx(earned[option], abs=1e-4)
    assert oracle.reward == pytest.approx(max(earned.values()), abs=1e-4)


def test_headroom_of_two_layers_is_the_price_of_the_idle_one() -> None:
    # Two relations at home in one layer each: the best constant choice writes both layers, and
    # every fact then costs 0.1 more than with its own home alone.
    env = one_world("plain,layers=2,home_layers=2,relations=2,decoys=0,wording=0", num_edits=8)
    inner = planted(env)
    earned: dict[tuple[int, ...], float] = {}
    for option in product((0, 1), repeat=2):
        env.reset(seed=0)
        earned[option] = sum(env.step(np.array(option, np.int8))[1] for _ in range(8)) / 8
    env.reset(seed=0)
    best = sum(env.step(inner.oracle().layers.astype(np.int8))[1] for _ in range(8)) / 8
    assert max(earned, key=earned.__getitem__) == (1, 1)
    assert best - earned[1, 1] == pytest.approx(0.1, abs=1e-3)


def test_the_flat_difficulty_has_no_headroom() -> None:
    env = one_world("flat,layers=3,wording=0", num_edits=5)
    inner = planted(env)
    home = make_world_of(inner).homes[0, 0]
    env.reset(seed=0)
    for _ in range(5):
        assert np.flatnonzero(inner.oracle().layers).tolist() == [home]
        env.step(inner.oracle().layers.astype(np.int8))


def make_world_of(env: Planted) -> World:
    return make_world(WorldName.read(env.model_name))


def test_effects_tell_a_home_from_a_decoy() -> None:
    env = ObserveEffects(one_world("plain,wording=0"))
    inner = planted(env)
    world = make_world_of(inner)
    observation, _ = env.reset(seed=0)
    relation = world.topics.index(inner.fact.request.relation)
    (home,), (decoy,) = world.homes[relation], world.decoys[relation]
    found = observation[-EFFECTS * 6 :].reshape(6, EFFECTS)
    rest = [layer for layer in range(6) if layer not in (home, decoy)]
    # Four of the twenty controls share the decoy's key, and none that of the home.
    assert found[decoy, 1:3] == pytest.approx([np.sqrt(4 / 20), 1.0], abs=1e-3)
    assert found[home, 1:3] == pytest.approx([0.0, 0.0], abs=1e-3)
    # ‖g‖² = ‖k‖² ‖p − y‖², with ‖k‖² from 7 · 0.95 on and ‖p − y‖² a little below 2.
    assert np.log10(1 + 7 * 0.95 * 1.75) / 2 < found[home, 0] < np.log10(1 + 7 * 1.15 * 2) / 2
    assert found[rest].max() < 1e-3
    # Nothing was edited yet.
    assert not found[:, 3:].any()


def test_interference_is_seen_after_a_fact_of_the_same_relation() -> None:
    env = ObserveEffects(one_world("plain,wording=0,relations=2,subjects=12", num_edits=8))
    inner = planted(env)
    observation, _ = env.reset(seed=0)
    world = make_world_of(inner)
    relations = [world.topics.index(fact.request.relation) for fact in inner.episode.facts]
    for place, relation in enumerate(relations):
        found = observation[-EFFECTS * 6 :].reshape(6, EFFECTS)
        earlier = relations[:place]
        share = earlier.count(relation) / len(earlier) if earlier else 0.0
        expected = [np.sqrt(share), float(relation in earlier)]
        assert found[world.decoys[relation, 0], 3:] == pytest.approx(expected, abs=1e-3)
        observation, *_ = env.step(np.eye(6, dtype=np.int8)[world.homes[relation, 0]])


def test_the_wrapper_only_adds_to_the_observation() -> None:
    plain, longer = one_world("crowded"), ObserveEffects(one_world("crowded"))
    first, _ = plain.reset(seed=3)
    second, _ = longer.reset(seed=3)
    for _ in range(4):
        np.testing.assert_array_equal(first, second[: -EFFECTS * 6])
        assert longer.observation_space.contains(second)
        action = np.array([0, 1, 0, 1, 1, 0], np.int8)
        first, reward, *_ = plain.step(action)
        second, same, *_ = longer.step(action)
        assert reward == same


def test_what_the_wrapper_cannot_do_is_refused() -> None:
    with pytest.raises(SettingsError, match="give it controls"):
        ObserveEffects(gym.make("hiedit/Planted-v2", num_edits=2))
    with pytest.raises(SettingsError, match="wraps a hiedit environment with a model"):
        ObserveEffects(gym.make("hiedit/Toy-v1"))
    with pytest.raises(SettingsError, match="one fact per step, got edits_per_step=2"):
        ObserveEffects(one_world("plain", edits_per_step=2))


def test_gymnasium_accepts_it() -> None:
    env = worlds(num_worlds=2, num_edits=2).unwrapped
    check_env(env, skip_render_check=True)


def test_episodes_are_in_different_worlds_and_follow_from_the_seed() -> None:
    env, again = worlds(), worlds()
    seen = set()
    for seed in range(10):
        observation, info = env.reset(seed=seed)
        other, told = again.reset(seed=seed)
        np.testing.assert_array_equal(observation, other)
        assert info["world_seed"] == told["world_seed"]
        seen.add(info["world_seed"])
        step, same = (e.step(np.array([1, 0, 1, 0, 0, 1], np.int8)) for e in (env, again))
        np.testing.assert_array_equal(step[0], same[0])
        assert step[1] == same[1]
        assert step[4]["world_seed"] == info["world_seed"]
    assert seen == {0, 1, 2}


def test_splits_have_no_world_in_common_and_others_are_refused() -> None:
    train, test = worlds().unwrapped, worlds(split="test").unwrapped
    assert isinstance(train, PlantedWorlds)
    assert isinstance(test, PlantedWorlds)
    assert not set(train.seeds) & set(test.seeds)
    assert test.seeds == world_seeds("test", 3)
    _, info = train.reset(seed=0, options={"world_seed": 2})
    assert info["world_seed"] == 2
    assert train.world.model_name == "planted:plain:2"
    with pytest.raises(SettingsError, match="world_seed must be from 0 to 2, got 1000000"):
        train.reset(options={"world_seed": 1_000_000})
    with pytest.raises(SettingsError, match="unknown reset options"):
        train.reset(options={"requests": []})
    with pytest.raises(SettingsError, match="'model' is drawn here"):
        worlds(model="tiny")
