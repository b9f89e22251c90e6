"""Lifelong statistics: running mean and variance of rows, one set per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance of all rows seen so far (Chan, Golub and LeVeque's pairwise update).

    Args:
        groups: Number of layers kept side by side, each with moments of its own.
        size: Number of columns.
        device: Where the statistics live; they are float32.
    """

    def __init__(self, groups: int, size: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(groups, 1, size, device=device)
        self.squares = torch.zeros(groups, 1, size, device=device)

    def update(self, rows: Tensor) -> None:
        """Adds groups × n × size rows."""
        rows = rows.float()
        n = rows.shape[1]
        total = self.count + n
        mean = rows.mean(1, keepdim=True)
        delta = mean - self.mean
        # New tensors, never in place: saved states hold the old ones.
        scatter = (rows - mean).square().sum(1, keepdim=True)
        self.squares = self.squares + scatter + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def normalise(self, rows: Tensor, places: list[int]) -> Tensor:
        """Rows with the mean taken away, over the standard deviation (n − 1); float32.

        After a single row there is no deviation from the mean yet. The mean is then taken to be 0,
        so the deviation is the row's own size: its signs are left, and not nothing.

        Args:
            rows: len(places) × T × size.
            places: Which of the layers kept here the rows belong to.
        """
        tiny = torch.finfo(torch.float32).eps
        mean = picked(self.mean, places)
        if self.count == 1:
            return rows.float() / (mean.abs() + tiny)
        deviation = (picked(self.squares, places) / max(self.count - 1, 1)).sqrt()
        return (rows.float() - mean) / (deviation + tiny)

    def scale(self, rows: Tensor, places: list[int], start: int) -> Tensor:
        """Rows over the standard deviation of the columns from ``start`` on; no mean is taken away.

        Args:
            rows: len(places) × T × (size − start).
            places: Which of the layers kept here the rows belong to.
            start: First column.
        """
        variance = picked(self.squares, places)[..., start:] / max(self.count - 1, 1)
        return rows.float() / (variance.sqrt() + torch.finfo(torch.float32).eps)

    def state_dict(self) -> dict[str, Any]:
        """The statistics; the tensors are never written in place."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self.count = int(state["count"])
        self.mean, self.squares = state["mean"], state["squares"]


def picked(rows: Tensor, places: list[int]) -> Tensor:
    """Some of the layers kept side by side; the tensor itself, not copied, where it is all."""
    return rows if len(places) == len(rows) else rows[places]
