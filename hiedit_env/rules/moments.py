"""Lifelong statistics: running mean and variance of rows, one set per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hiedit_env.errors import SettingsError, shown, whole_number

#: Up to here a float holds every whole number.
_MOST = 2**53
_TINY = torch.finfo(torch.float32).eps


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
        self._deviation: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Adds groups × n × size rows."""
        rows = rows.float()
        n = rows.shape[1]
        total = self.count + n
        mean = rows.sum(1, keepdim=True) / n
        delta = mean - self.mean
        # New tensors, never in place: saved states hold the old ones.
        squares = self.squares + (rows - mean).square().sum(1, keepdim=True)
        self.squares = squares.addcmul(delta, delta, value=self.count * n / total)
        self.mean = self.mean.add(delta, alpha=n / total)
        self.count = total
        self._deviation = None

    @property
    def deviation(self) -> Tensor:
        """Standard deviation (n − 1) of every column and a little more; groups × 1 × size."""
        if self._deviation is None:
            self._deviation = (self.squares / max(self.count - 1, 1)).sqrt() + _TINY
        return self._deviation

    def normalise(self, rows: Tensor, places: list[int]) -> Tensor:
        """Rows with the mean taken away, over the standard deviation (n − 1); float32.

        After a single row there is no deviation from the mean yet. The mean is then taken to be 0,
        so the deviation is the row's own size: its signs are left, and not nothing.

        Args:
            rows: len(places) × T × size.
            places: Which of the layers kept here the rows belong to.
        """
        if self.count == 1:
            return rows.float() / (picked(self.mean, places).abs() + _TINY)
        return (rows.float() - picked(self.mean, places)) / picked(self.deviation, places)

    def scale(self, rows: Tensor, places: list[int], start: int) -> Tensor:
        """Rows over the standard deviation of the columns from ``start`` on; no mean is taken away.

        After a single row the deviation is that row's own size, as in :meth:`normalise`.

        Args:
            rows: len(places) × T × (size − start).
            places: Which of the layers kept here the rows belong to.
            start: First column.
        """
        size = self.mean.abs() + _TINY if self.count == 1 else self.deviation
        return rows.float() / picked(size, places)[..., start:]

    def unscale(self, rows: Tensor, places: list[int]) -> Tensor:
        """Rows times the standard deviation of their columns, which are the first ones.

        Args:
            rows: len(places) × T × up to size columns.
            places: Which of the layers kept here the rows belong to.
        """
        return rows * picked(self.deviation, places)[..., : rows.shape[2]]

    def statistics(self) -> dict[str, Any]:
        """The statistics; the tensors are never written in place."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit.

        Raises:
            SettingsError: the number of rows is none.
        """
        count = whole_number(statistics["count"], "the number of rows seen", 0)
        if count > _MOST:
            raise SettingsError(f"the number of rows seen must be ≤ 2**53, got {shown(count)}")
        self.count = count
        self.mean, self.squares = statistics["mean"], statistics["squares"]
        self._deviation = None


def picked(rows: Tensor, places: list[int]) -> Tensor:
    """Some of the layers kept side by side; the tensor itself, not copied, where it is all."""
    return rows if len(places) == len(rows) else rows[places]
