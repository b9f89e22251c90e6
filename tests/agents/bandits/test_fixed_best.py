"""The greedy search, against enumeration, and in an environment against ``step``."""

from __future__ import annotations

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from hiedit_agents.bandits.fixed_best import greedy_search, recorded_score, search_in
from hiedit_env.errors import SettingsError
from tests.support.episodes import SELECTION, make

EVERY = np.array(list(product((False, True), repeat=4)))


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_of_all_where_layers_add_up(seed: int) -> None:
    worth = np.random.default_rng(seed).normal(size=4)
    found = greedy_search(lambda masks: masks @ worth, 4)
    assert found.reward == pytest.approx(max(EVERY @ worth))
    assert found.layers.tolist() == (worth > 0).tolist()
    rewards = [reward for _, reward in found.steps]
    assert rewards == sorted(rewards)
    assert found.steps[0][0] == ()


def test_it_drops_a_layer_that_others_make_useless() -> None:
    # By hand: alone the first is best; with the two others, better without it.
    table = {(): 0.0, (0,): 2.0, (1,): 1.0, (2,): 1.0, (0, 1): 2.5, (0, 2): 2.1}
    table |= {(0, 1, 2): 3.0, (1, 2): 4.0}

    def score(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.array([table[tuple(np.flatnonzero(mask).tolist())] for mask in masks])

    found = greedy_search(score, 3)
    assert [layers for layers, _ in found.steps] == [(), (0,), (0, 1), (0, 1, 2), (1, 2)]
    assert found.reward == 4.0
    assert greedy_search(score, 3, most=1).layers.tolist() == [True, False, False]
    with pytest.raises(SettingsError, match="at least 1 layer"):
        greedy_search(score, 3, most=0)


def test_from_recorded_rewards_only_recorded_sets_are_chosen() -> None:
    masks = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]], bool)
    rewards = np.array([[0.0, 1.0, 3.0, 2.0], [0.0, 2.0, 1.0, 2.5]])
    found = greedy_search(recorded_score(masks, rewards), 3)
    assert found.layers.tolist() == [False, True, True]  # 2, then 2.25
    assert found.reward == pytest.approx(2.25)


def test_in_an_environment_a_set_is_worth_its_mean_reward_from_the_unedited_model() -> None:
    env = make(SELECTION, num_edits=2, layers="model.layers.2.mlp.{gate,up,down}_proj")
    found = search_in(env, seeds=[0, 3])
    total = []
    for seed in (0, 3):
        env.reset(seed=seed)
        for request in env.stream:
            env.reset(options={"requests": [request]})
            total.append(env.step(found.layers.astype(np.int8))[1])
    assert found.reward == pytest.approx(np.mean(total), abs=1e-4)
    assert len(total) == 4
    assert 4 <= found.tried <= 8
    with pytest.raises(SettingsError, match="hiedit environment"):
        search_in(gym.make("CartPole-v1"), seeds=[0])
