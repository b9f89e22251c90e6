"""One regression for all options: exact errors of facts left out, skill, and none invented."""

from __future__ import annotations

import numpy as np
import pytest

from hiedit_agents.bandits.shared_ridge import SharedRidge
from hiedit_env.errors import SettingsError


def test_it_learns_a_weight_that_all_options_share() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(30, 3, 4))
    rewards = numbers @ np.array([1.0, 0.0, -0.5, 0.0]) + np.array([0.0, 0.3, 0.0])
    # What all options of a fact have in common decides nothing.
    rewards = rewards + 10 * generator.normal(size=(30, 1))
    ridge = SharedRidge()
    ridge.fit(numbers, rewards + 0.1 * generator.normal(size=rewards.shape))
    unseen = generator.normal(size=(200, 3, 4))
    best = (unseen @ np.array([1.0, 0.0, -0.5, 0.0]) + np.array([0.0, 0.3, 0.0])).argmax(1)
    assert (ridge.choose(unseen) == best).mean() > 0.9


def test_without_a_signal_it_takes_the_best_mean() -> None:
    generator = np.random.default_rng(1)
    taken = []
    for _ in range(20):
        rewards = generator.normal(size=(40, 3)) + np.array([0.0, 0.8, 0.0])
        ridge = SharedRidge()
        ridge.fit(generator.normal(size=(40, 3, 12)), rewards)
        taken.append((ridge.choose(generator.normal(size=(50, 3, 12))) == 1).mean())
    assert np.mean(taken) > 0.9


def test_the_error_of_a_fact_left_out_is_that_of_a_fit_without_it() -> None:
    generator = np.random.default_rng(2)
    numbers, rewards = generator.normal(size=(12, 3, 2)), generator.normal(size=(12, 3))
    whole = SharedRidge()
    whole.fit(numbers, rewards)
    design = whole._design(numbers)
    target = rewards - rewards.mean(1, keepdims=True)
    errors = []
    for weight in SharedRidge.RIDGES:
        used = 3 if np.isinf(weight) else design.shape[2]
        penalty = np.diag([0.0] * 3 + [weight] * (used - 3))
        left = []
        for out in range(12):
            kept = np.delete(np.arange(12), out)
            rows = design[kept][:, :, :used].reshape(-1, used)
            found = np.linalg.pinv(rows.T @ rows + penalty) @ rows.T @ target[kept].ravel()
            left.append(target[out] - design[out][:, :used] @ found)
        errors.append(np.square(left).mean())
    assert whole.ridge == SharedRidge.RIDGES[int(np.argmin(errors))]
    assert whole.errors == pytest.approx(errors)


def test_bad_input_is_told() -> None:
    ridge = SharedRidge()
    with pytest.raises(SettingsError, match="call fit"):
        ridge.predict(np.zeros((1, 2, 3)))
    with pytest.raises(SettingsError, match="at least two facts"):
        ridge.fit(np.zeros((1, 2, 3)), np.zeros((1, 2)))
    with pytest.raises(SettingsError, match=r"\(4, 2, 3\) and \(4, 3\)"):
        ridge.fit(np.zeros((4, 2, 3)), np.zeros((4, 3)))
