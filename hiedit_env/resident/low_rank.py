"""Low-rank updates of candidate layers: arithmetic only, nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit_env.errors import NonFiniteUpdateError, UpdateShapeError

#: A product whose entries are bounded below this is safe to add to weights of any float type that
#: spans the float32 range; half precision is bounded by its own maximum in :func:`check_updates`.
_LARGEST_ENTRY = 1e30


#: Numbers in several changes up to which they are stacked and multiplied as one.
STACKED_NUMBERS = 2**18


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A change ``leftᵀ right`` of one layer's weight, read as d_in × d_out.

    Args:
        left: r × d_in float tensor.
        right: r × d_out float tensor, same dtype and device; carries sign and step size.

    >>> u = LowRankUpdate(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0, 1.0]]))
    >>> u.dense().tolist()
    [[3.0, 0.0, 1.0], [6.0, 0.0, 2.0]]
    >>> u.squared_norm().item()
    50.0
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The full d_in × d_out change."""
        return self.left.mT @ self.right

    def apply(self, inputs: Tensor) -> Tensor:
        """What the change adds to the layer's output: ``inputs`` … × d_in gives … × d_out."""
        left, right = self.left.to(inputs.dtype), self.right.to(inputs.dtype)
        return (inputs @ left.mT) @ right

    def squared_norm(self) -> Tensor:
        """‖leftᵀ right‖²_F from the two r × r Gram matrices, a scalar tensor; differentiable."""
        return ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum()

    def scaled(self, factor: float) -> LowRankUpdate:
        """The same change times ``factor``."""
        return LowRankUpdate(self.left, self.right * factor)

    def detach(self) -> LowRankUpdate:
        """The same change, cut from the autograd graph."""
        return LowRankUpdate(self.left.detach(), self.right.detach())


#: One entry per layer in forward order; None where the layer is left alone.
Updates = Sequence[LowRankUpdate | None]


def check_updates(
    updates: Updates,
    shapes: Sequence[tuple[int, int]],
    names: Sequence[str],
    device: torch.device,
    largest: float,
) -> None:
    """Refuses updates that do not fit or are not finite, before anything is written.

    Args:
        updates: One entry per layer.
        shapes: ``(d_in, d_out)`` per layer.
        names: Layer names for messages.
        device: Where the layers are.
        largest: Largest magnitude the weights' dtype can hold.

    Raises:
        UpdateShapeError: no sequence of updates, a wrong number of them, wrong shapes, or factors
            that are no float tensors of one dtype on the layers' device.
        NonFiniteUpdateError: a factor holds NaN or infinity, or the product would overflow.
    """
    if not isinstance(updates, Sequence):
        raise UpdateShapeError(
            f"updates must be a list of one LowRankUpdate or None per layer, got {updates!r:.200}"
        )
    if len(updates) != len(shapes):
        raise UpdateShapeError(
            f"got {len(updates)} updates for {len(shapes)} candidate layers; give one per layer, "
            "None where a layer is left alone"
        )
    factors: list[Tensor] = []
    bounded: list[str] = []
    for update, (d_in, d_out), name in zip(updates, shapes, names, strict=True):
        if update is None:
            continue
        _check_factors(update, name, device)
        left, right = update.left, update.right
        fits = left.ndim == right.ndim == 2 and left.shape[0] == right.shape[0]
        if not fits or left.shape[1] != d_in or right.shape[1] != d_out:
            raise UpdateShapeError(
                f"update of {name} has left {tuple(left.shape)} and right {tuple(right.shape)}; "
                f"expected (r, {d_in}) and (r, {d_out})"
            )
        if left.shape[0]:  # of rank 0 it changes nothing
            factors += (left, right)
            bounded.append(name)
    if not bounded:
        return
    limit = min(_LARGEST_ENTRY, largest / 2)
    norms = _norms(factors)
    for name, left_norm, right_norm in zip(bounded, norms[::2], norms[1::2], strict=True):
        # Cauchy and Schwarz: no entry of the product is larger than the product of the norms.
        bound = left_norm * right_norm
        if not math.isfinite(bound) or bound > limit:
            raise NonFiniteUpdateError(
                f"update of {name} is not finite (entries up to {bound:g} are possible, at most "
                f"{limit:g} are safe); nothing was written. A smaller step size usually helps"
            )


def _check_factors(update: object, name: str, device: torch.device) -> None:
    """Refuses what is no pair of float tensors of one dtype on the layers' device."""
    if not isinstance(update, LowRankUpdate):
        raise UpdateShapeError(
            f"update of {name} must be a LowRankUpdate or None, got {update!r:.200}"
        )
    factors = (update.left, update.right)
    if not all(isinstance(factor, Tensor) for factor in factors):
        kinds = [type(factor).__name__ for factor in factors]
        raise UpdateShapeError(f"update of {name} must be made of two tensors, got {kinds}")
    dtypes, devices = ([getattr(f, what) for f in factors] for what in ("dtype", "device"))
    if not dtypes[0].is_floating_point or dtypes[0] != dtypes[1]:
        raise UpdateShapeError(
            f"update of {name} has factors of {dtypes[0]} and {dtypes[1]}; both must be of the "
            "same float type"
        )
    if set(devices) != {device}:
        raise UpdateShapeError(
            f"update of {name} has factors on {devices[0]} and {devices[1]}, but the layer is on "
            f"{device}; move them there"
        )


def _norms(factors: Sequence[Tensor]) -> list[float]:
    """Frobenius norms of factors with at least one entry, or a little more.

    Without float64, which not every device has: where squares may have left the range of float32,
    the norm is bounded by the largest entry times the root of their number.
    """
    # As commit will see them: what float32 cannot hold is infinite.
    singles = [factor.detach().float() for factor in factors]
    norms: list[float] = torch.stack([torch.linalg.vector_norm(x) for x in singles]).tolist()
    for i, numbers in enumerate(singles):
        if not 1e-15 < norms[i] < math.inf:
            largest = torch.linalg.vector_norm(numbers, ord=torch.inf)
            norms[i] = float(largest) * math.sqrt(numbers.numel())
    return norms


def layer_groups(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices of the layers of equal shape, so that they can be computed side by side.

    >>> layer_groups([(2, 3), (3, 2), (2, 3)])
    [[0, 2], [1]]
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return list(groups.values())


def products(rows: Tensor, changes: Sequence[Tensor | None], d_out: int) -> Tensor:
    """Several blocks of rows, each through a change of its own.

    Args:
        rows: N × T × d_in.
        changes: N dense changes, d_in × d_out; None for one that is zero.
        d_out: Columns of the result.

    Returns:
        N × T × d_out in the rows' dtype, differentiable in the rows.
    """
    if all(change is None for change in changes):
        return rows.new_zeros(*rows.shape[:2], d_out)
    if rows.shape[2] * d_out * len(changes) <= STACKED_NUMBERS:
        empty = rows.new_zeros(rows.shape[2], d_out)
        whole = torch.stack([empty if change is None else change for change in changes])
        return rows @ whole.to(rows.dtype)
    # What is stacked is a copy, and a backward pass would keep those of all layers.
    none = rows.new_zeros(rows.shape[1], d_out)
    return torch.stack(
        [
            none if change is None else block @ change.to(rows.dtype)
            for block, change in zip(rows, changes, strict=True)
        ]
    )
