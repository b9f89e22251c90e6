"""A router learns from recordings, in which the reward of every option is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hiedit_agents.bandits.recording import Recording
from hiedit_agents.hierarchy.shared_router import SharedScores
from hiedit_env.envs.settings import AtLeast1, Positive, Weight, settings
from hiedit_env.errors import SettingsError


@settings
class LearnSettings:
    """How a router learns from recorded facts."""

    steps: AtLeast1 = 2000
    """steps of Adam"""
    batch: AtLeast1 = 64
    """facts per step"""
    learning_rate: Positive = 3e-3
    """Adam's at the beginning; it falls to 0 along a straight line"""
    entropy_weight: Weight = 0.02
    """weight of the entropy of the choice at the beginning; falls likewise"""


@dataclass(frozen=True, slots=True)
class Pool:
    """Facts of several recordings with the same options.

    Args:
        masks: M × L bool.
        observations: N × D float32.
        rewards: N × M float64.
    """

    masks: NDArray[np.bool_]
    observations: NDArray[np.float32]
    rewards: NDArray[np.float64]


def pooled(recordings: Sequence[Recording]) -> Pool:
    """The facts of recordings of several models or worlds as one table.

    Raises:
        SettingsError: none, or recordings whose options or observations differ.
    """
    if not recordings:
        raise SettingsError("there must be at least one recording")
    first = recordings[0]
    for other in recordings[1:]:
        same = first.masks.shape == other.masks.shape and (first.masks == other.masks).all()
        if not same or first.observations.shape[1] != other.observations.shape[1]:
            raise SettingsError(
                f"recordings of the same options and observations can be learned from together, "
                f"got {first.origin.words} with {len(first.masks)} options and "
                f"{other.origin.words} with {len(other.masks)}"
            )
    return Pool(
        first.masks,
        np.concatenate([one.observations for one in recordings]),
        np.concatenate([one.rewards for one in recordings]),
    )


def learn(
    router: SharedScores, pool: Pool, generator: torch.Generator, how: LearnSettings | None = None
) -> list[float]:
    """Raises the expected reward of a router's choice on recorded facts, by its exact gradient.

    The expectation over all recorded options, Σ_m π(m) r(m), is a sum of known numbers, so nothing
    is sampled and there is no baseline: this is the policy gradient of REINFORCE without its noise.

    Args:
        router: Learns; its features are standardised by the pool's.
        pool: The facts.
        generator: Draws the batches.
        how: Settings; None for the defaults.

    Returns:
        Mean expected reward of the batches of each step.
    """
    how = how or LearnSettings()
    router.standardise(pool.observations)
    features = router.features(pool.observations)
    masks = torch.from_numpy(pool.masks)
    # Which option is best does not depend on a constant; and Adam does not on the scale.
    rewards = torch.from_numpy(pool.rewards - pool.rewards.max(1, keepdims=True)).float()
    levels = torch.from_numpy(pool.rewards.max(1)).float()
    optimizer = torch.optim.Adam(router.parameters(), lr=how.learning_rate)
    earned = []
    for step in range(how.steps):
        left = 1 - step / how.steps
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * left
        rows = torch.randint(len(rewards), (how.batch,), generator=generator)
        logarithms = router.log_probabilities(features[rows], masks)
        chances = logarithms.exp()
        expected = (chances * rewards[rows]).sum(1).mean()
        entropy = -(chances * logarithms).sum(1).mean()
        loss = -expected - how.entropy_weight * left * entropy
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        earned.append(float(expected.detach() + levels[rows].mean()))
    return earned
