"""Headroom of planted worlds against arithmetic and against plain episodes."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest

from hiedit_agents.bandits.worlds import masks_of
from hiedit_benchmarks.worlds.headroom import main, measure, play, play_constants
from hiedit_env.datasets.difficulty import WorldName
from hiedit_env.errors import SettingsError

#: Two relations, each at home in one of two layers, and no decoys.
TWO_LAYERS = "planted:plain,layers=2,home_layers=2,relations=2,subjects=12,decoys=0,wording=0:0"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "worlds"))


def test_headroom_of_two_layers_is_the_price_of_the_idle_one() -> None:
    # The best constant choice writes both layers: each fact costs 0.1 more than at home alone.
    found = measure(WorldName.read(TWO_LAYERS), 6)
    assert int(found.constants.argmax()) == 3
    assert found.headroom == pytest.approx(0.1, abs=1e-3)
    # Nothing written: the new answer is GAP below the old one, and eleven others stay away. So is
    # the loss of each fact, and of all that is remembered; nothing else changes.
    loss = np.log(np.exp(5) + 11)
    assert found.constants[0] == pytest.approx(-loss * (1 + 5 / 6), abs=0.02)


def test_a_flat_world_has_no_headroom() -> None:
    name = "planted:flat,layers=2,relations=2,subjects=12,wording=0:0"
    assert measure(WorldName.read(name), 4).headroom == pytest.approx(0.0, abs=1e-3)


def test_outcomes_are_what_version_1_pays_with_the_prices_of_version_2() -> None:
    name = "planted:crowded,layers=4,relations=3,subjects=12:5"
    actions = np.random.default_rng(0).integers(0, 2, (5, 4)).astype(np.int8)
    envs = [
        gym.make(f"hiedit/Planted-v{v}", disable_env_checker=True, model=name, num_edits=5)
        for v in (1, 2)
    ]
    turns = iter(actions)
    found = play(envs[1], lambda env, observation: next(turns), 3)
    envs[0].reset(seed=3)
    for action, outcome in zip(actions, found, strict=True):
        _, reward, _, _, info = envs[0].step(action)
        written = int(info["layers"].sum())
        prices = 0.1 * written + 0.3 * (info["edit_steps"] if written else 0)
        paid = reward - info["reward_terms"]["sparsity"] - prices
        assert outcome == pytest.approx(paid, abs=1e-3)


def test_rewards_pay_for_the_repair_of_what_was_broken_and_outcomes_do_not() -> None:
    # One relation at home in layer 0, with its decoy in layer 1: to write the decoy breaks the
    # facts that come later, and their edits are then worth more.
    name = "planted:plain,layers=2,home_layers=1,relations=1,decoys=1:0"
    env = gym.make("hiedit/Planted-v2", disable_env_checker=True, model=name, num_edits=8)
    rewards, outcomes = {}, {}
    for layer in (0, 1):
        mask = np.eye(2, dtype=np.int8)[layer]
        env.reset(seed=0)
        rewards[layer] = sum(float(env.step(mask)[1]) for _ in range(8))
        outcomes[layer] = sum(play(env, lambda inner, seen, m=mask: m, 0))  # type: ignore[misc]
    assert rewards[1] > rewards[0]
    assert outcomes[0] > outcomes[1]


def test_constants_side_by_side_are_their_own_episodes() -> None:
    world = WorldName.read("planted:plain,layers=3,home_layers=3,relations=2,subjects=12:1")
    masks = masks_of(3)
    found = play_constants(world, masks, 4, 2)
    env = gym.make("hiedit/Planted-v2", disable_env_checker=True, model=str(world), num_edits=4)
    for place in (0, 3, 7):
        alone = play(env, lambda inner, seen, p=place: masks[p], 2)  # type: ignore[misc]
        assert found[place] == pytest.approx(np.mean(alone), abs=1e-3)


def test_it_prints_a_line_per_difficulty(capsys: pytest.CaptureFixture[str]) -> None:
    small = "plain,layers=2,home_layers=2,relations=2,subjects=10"
    assert main(["--difficulty", small, "--worlds", "1", "--num-edits", "2"]) == 0
    row, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert row["headroom"] == pytest.approx(row["oracle"] - row["best_constant"])
    assert len(row["headroom_of_worlds"]) == 1
    assert last["num_edits"] == 2


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(SettingsError, match="at most 8 layers are played, got 9"):
        masks_of(9)
