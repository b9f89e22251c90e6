"""The contextual bandit learns what there is to learn, and invents no skill where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hiedit_agents.bandits.linear import LinearBandit
from hiedit_env.errors import SettingsError

LAYERS, FEATURES = 6, 40


def toy(depends: bool, seed: int, facts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Facts of six kinds, shown in the observation; the best layer is that of the kind, or 2.

    With and without dependence each layer has the same distribution of rewards for a fact.
    """
    generator = np.random.default_rng(seed)
    kinds = generator.integers(LAYERS, size=facts)
    seen = generator.normal(0, 0.2, (facts, FEATURES))
    seen[np.arange(facts), kinds] += 1.0
    rewards = generator.normal(0, 0.5, (facts, LAYERS))
    homes = kinds if depends else generator.integers(LAYERS, size=facts)
    rewards[np.arange(facts), homes] += 1.0
    rewards[:, 2] += 0.05
    return seen, rewards


def earned(bandit: LinearBandit, depends: bool, seed: int) -> tuple[float, float, float]:
    """Mean reward on facts that were not learned from: the bandit's, the best fixed, the oracle."""
    bandit.fit(*toy(depends, seed, 600))
    seen, rewards = toy(depends, 1000 + seed, 2000)
    chosen = bandit.choose(seen)
    own = rewards[np.arange(len(rewards)), chosen].mean()
    return float(own), float(rewards.mean(0).max()), float(rewards.max(1).mean())


@pytest.mark.parametrize("exploration", ["greedy", "thompson"])
def test_it_learns_a_toy_whose_best_layer_depends_on_the_fact(exploration: str) -> None:
    for seed in range(3):
        own, fixed, _ = earned(LinearBandit(exploration, seed=seed), True, seed)  # type: ignore[arg-type]
        # The right layer earns 1, any other one 0; the noise cannot be known. A draw explores.
        assert own > (0.85 if exploration == "greedy" else 0.75)
        assert fixed < 0.3


def test_it_invents_no_skill_where_the_best_layer_does_not_depend_on_the_fact() -> None:
    gains = []
    for seed in range(6):
        own, fixed, oracle = earned(LinearBandit(seed=seed), False, seed)
        assert oracle > fixed + 0.5  # there is something to choose, but nothing says what
        gains.append(own - fixed)
    # Two standard errors of a mean of six times 2000 facts.
    assert max(gains) < 0.05
    assert np.mean(gains) < 0.02


def test_without_signal_it_is_the_best_fixed_option_at_most_a_little_off() -> None:
    seen, rewards = toy(False, 0, 300)
    rewards[:, 4] += 1.0
    bandit = LinearBandit()
    bandit.fit(seen, rewards)
    assert (bandit.choose(toy(False, 1, 200)[0]) == 4).mean() > 0.95


def test_leave_one_out_errors_are_those_of_fitting_without_each_fact() -> None:
    # The closed form picks the ridge; here by the long way.
    seen, rewards = toy(True, 5, 25)
    z = (seen - seen.mean(0)) / seen.std(0)
    errors = []
    for ridge in LinearBandit.RIDGES[:-1]:
        total = 0.0
        for i in range(25):
            rest = np.arange(25) != i
            # A free constant beside the features, which stay as they are standardised.
            x = np.column_stack((np.ones(25), z))
            penalty = ridge * np.diag([0.0] + [1.0] * FEATURES)
            weights = np.linalg.solve(x[rest].T @ x[rest] + penalty, x[rest].T @ rewards[rest])
            total += ((rewards[i] - x[i] @ weights) ** 2).mean()
        errors.append(total)
    bandit = LinearBandit()
    bandit.fit(seen, rewards)
    assert bandit.ridge == LinearBandit.RIDGES[int(np.argmin(errors))]


def test_draws_are_repeated_by_the_seed_and_epsilon_explores() -> None:
    seen, rewards = toy(True, 0, 100)
    runs = []
    for seed in (0, 0, 1):
        bandit = LinearBandit("thompson", seed=seed)
        bandit.fit(seen, rewards)
        runs.append(bandit.choose(seen).tolist())
    assert runs[0] == runs[1] != runs[2]
    greedy, random = LinearBandit(), LinearBandit("epsilon", epsilon=1.0)
    for bandit in (greedy, random):
        bandit.fit(seen, rewards)
    same = (greedy.choose(seen) == random.choose(seen)).mean()
    assert 0 < same < 0.4  # one in six


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="exploration must be one of"):
        LinearBandit("ucb")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="epsilon"):
        LinearBandit(epsilon=2.0)
    with pytest.raises(SettingsError, match="call fit"):
        LinearBandit().choose(np.zeros((1, 3)))
    with pytest.raises(SettingsError, match="at least two facts"):
        LinearBandit().fit(np.zeros((3, 2)), np.zeros((2, 2)))
