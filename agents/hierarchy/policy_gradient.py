"""The loss of a policy router: REINFORCE (Williams 1992) on the options of a window of facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit_agents.hierarchy.options import Choice
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_env.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Tried:
    """An option that a policy router tried for a fact.

    Args:
        choice: With the log-probability it was drawn with.
        advantage: Its own reward over the baseline.
    """

    choice: Choice
    advantage: float


def policy_loss(
    tried: Sequence[Sequence[Tried]], settings: TrainSettings, name: str
) -> Tensor | None:
    """−Σ log π(ω) A(ω) − entropy weight × Σ entropy; the options of one fact count a share each.

    Args:
        tried: For each fact the options tried, last the one the episode went on with.
        settings: Whether advantages are normalised, and the weight of the entropy.
        name: Of the high level, for an error.

    Returns:
        A scalar; None where no option was tried.

    Raises:
        SettingsError: a choice has no log-probability to learn from.
    """
    log_probabilities: list[Tensor] = []
    advantages: list[float] = []
    entropies: list[Tensor] = []
    for options in tried:
        for option in options:
            if option.choice.log_probability is None:
                raise SettingsError(
                    f"the high level {name!r} has parameters, but its choice has no "
                    "log_probability to learn from (or say straight_through = True, and give gates)"
                )
            # Each counts a share, since they tell of one fact.
            log_probabilities.append(option.choice.log_probability / len(options))
            advantages.append(option.advantage)
        if options:
            entropy = options[-1].choice.entropy
            entropies += [] if entropy is None else [entropy]
    if not advantages:
        return None
    weights = torch.tensor(advantages)
    if settings.normalize_advantage:
        weights = weights / weights.square().mean().sqrt().clamp_min(1e-8)
    stacked = torch.stack(log_probabilities)
    loss = -(stacked * weights.to(stacked.device)).sum()
    if entropies:
        loss = loss - settings.entropy_weight * torch.stack(entropies).sum()
    return loss
