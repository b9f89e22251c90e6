"""AlphaEdit (arXiv 2410.02355): MEMIT's values, written where unrelated prompts read nothing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hiedit_agents.hierarchy.key_moments import symmetric
from hiedit_agents.rivals.spread_agent import SpreadAgent
from hiedit_env.rules.base import positive


class AlphaEdit(SpreadAgent):
    """AlphaEdit: MEMIT within the null space of what is read elsewhere, with memory of its edits.

    The change of a matrix is R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + ridge)⁻¹ (eq. 14), with P the projection
    onto the directions in which unrelated prompts have small second moments and K_p the inputs at
    the subjects of earlier edits of the episode, read after they were written, as in
    ``AlphaEdit/AlphaEdit_main.py`` and ``experiments/evaluate.py`` of jianghoucheng/AlphaEdit
    (commit 2ff0e4e). There threshold and ridge are absolute numbers for each model; here they are
    shares of the mean second moment, which suits models of every scale.

    Args:
        threshold: Second moment, as a share of the mean over all directions, below which a
            direction may be written.
        ridge: What is added to the diagonal, as a share of the same mean.

    Raises:
        SettingsError: a number out of range.
    """

    name: ClassVar[str] = "alphaedit"
    remembers: ClassVar[bool] = True

    def __init__(self, *, threshold: float = 0.5, ridge: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.threshold = positive(threshold, "threshold")
        self.ridge = positive(ridge, "ridge")

    def metric(self, moment: Tensor) -> Tensor:
        """P over the ridge, d_in × d_in float32."""
        values, directions = torch.linalg.eigh(moment.double())
        mean = values.mean().clamp_min(1e-30)
        free = directions[:, values < self.threshold * mean]
        return symmetric(free @ free.mT / (self.ridge * mean)).float()
