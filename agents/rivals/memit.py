"""MEMIT (arXiv 2210.07229), one fact or one batch of facts after another."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hiedit_agents.hierarchy.key_moments import symmetric
from hiedit_agents.rivals.spread_agent import SpreadAgent
from hiedit_env.rules.base import positive


class Memit(SpreadAgent):
    """MEMIT: values sought at the subject, spread over the last matrices of several MLPs.

    The change of a matrix is R Kᵀ (λ C + K Kᵀ)⁻¹ (eq. 14), with C the mean of k kᵀ over the tokens
    of unrelated prompts at the unedited weights. Edits that were written before count for nothing,
    as in ``memit/memit_main.py`` of kmeng01/memit (commit b86d971).

    Args:
        weight: λ, the number of tokens that C counts for.
        prior: Share of the mean diagonal of C that is added to it: C is taken from far fewer tokens
            than in the paper, and what no prompt gave would have an infinite inverse.

    Raises:
        SettingsError: a number out of range.
    """

    name: ClassVar[str] = "memit"
    remembers: ClassVar[bool] = False

    def __init__(self, *, weight: float = 30.0, prior: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.weight, self.prior = positive(weight, "weight"), positive(prior, "prior")

    def metric(self, moment: Tensor) -> Tensor:
        """(λ C)⁻¹, d_in × d_in float32."""
        whole = moment.double()
        noise = self.prior * whole.diagonal().mean().clamp_min(1e-30)
        identity = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
        return symmetric(torch.linalg.inv(self.weight * (whole + noise * identity))).float()
