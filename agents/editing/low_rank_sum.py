"""The sum of recorded low-rank updates as one pair of factors per layer, exact or truncated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit_agents.editing.ledger import Ledger
from hiedit_env.resident.low_rank import LowRankUpdate, Updates


@dataclass(frozen=True, slots=True)
class LayerSum:
    """The change of one layer.

    Args:
        factors: leftᵀ right is the change, d_in × d_out.
        needed: Rank at which it is exact.
        error: ‖change − leftᵀ right‖_F; 0 where nothing was cut.
        norm: ‖change‖_F.
    """

    factors: LowRankUpdate
    needed: int
    error: float
    norm: float


def sum_of(ledger: Ledger, edits: Sequence[int], max_rank: int | None) -> dict[int, LayerSum]:
    """The summed updates of some edits.

    Args:
        ledger: Where they are recorded.
        edits: Ids.
        max_rank: Largest rank; None for as much as it takes.

    Returns:
        Layer index → its change; layers that no edit changed are left out. While the summed rank
        fits, the factors are the recorded ones, one below the other. Otherwise they are the best
        approximation of that rank, by singular values in float64.
    """
    lefts: dict[int, list[Tensor]] = {}
    rights: dict[int, list[Tensor]] = {}
    for number in edits:
        for updates in ledger.steps(number):
            for i, update in enumerate(updates):
                if update is not None and len(update.left):
                    lefts.setdefault(i, []).append(update.left)
                    rights.setdefault(i, []).append(update.right)
    return {
        i: truncated(torch.cat(lefts[i]), torch.cat(rights[i]), max_rank) for i in sorted(lefts)
    }


def truncated(left: Tensor, right: Tensor, max_rank: int | None) -> LayerSum:
    """A change of at most some rank.

    Args:
        left: R × d_in float32.
        right: R × d_out float32.
        max_rank: Largest rank; None for the smallest that is exact.
    """
    needed = min(left.shape[0], left.shape[1], right.shape[1])
    rank = needed if max_rank is None else min(max_rank, needed)
    if left.shape[0] <= rank:
        own = LowRankUpdate(left, right)
        return LayerSum(own, needed, 0.0, float(own.squared_norm().clamp_min(0).sqrt()))
    u, s, v = _singular_values(left.double(), right.double())
    # Half of each singular value on either side keeps both factors in one range.
    half = s[:rank].sqrt()
    pair = LowRankUpdate((u[:, :rank] * half).mT.float(), (half[:, None] * v[:rank]).float())
    return LayerSum(
        LowRankUpdate(pair.left.contiguous(), pair.right.contiguous()),
        needed,
        float(s[rank:].square().sum().sqrt()),
        float(s.square().sum().sqrt()),
    )


def compacted(steps: Sequence[Updates], max_error: float) -> tuple[LowRankUpdate | None, ...]:
    """Several steps as one, of the smallest rank that keeps most of every layer's change.

    Args:
        steps: At least one; L entries each.
        max_error: Largest ‖change − kept‖_F / ‖change‖_F of a layer.

    Returns:
        L entries; None for layers that no step changed. A layer is left as it is where a smaller
        rank saves nothing.
    """
    made: list[LowRankUpdate | None] = []
    for parts in zip(*steps, strict=True):
        found = [part for part in parts if part is not None and len(part.left)]
        if not found:
            made.append(None)
            continue
        left = torch.cat([part.left.detach().float() for part in found])
        right = torch.cat([part.right.detach().float() for part in found])
        u, s, v = _singular_values(left.double(), right.double())
        # tail[r]: what is cut off by rank r.
        tail = s.square().flip(0).cumsum(0).flip(0).sqrt()
        rank = max(1, int((tail > max_error * tail[0]).sum()))
        if rank < len(left):
            half = s[:rank].sqrt()
            left = (u[:, :rank] * half).mT.float().contiguous()
            right = (half[:, None] * v[:rank]).float().contiguous()
        made.append(LowRankUpdate(left, right))
    return tuple(made)


def ranks(updates: Updates) -> int:
    """The number of rows of all factors together."""
    return sum(len(update.left) for update in updates if update is not None)


def _singular_values(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V with U diag(S) V = leftᵀ right; S falls."""
    count, d_in = left.shape
    if count >= min(d_in, right.shape[1]):
        u, s, v = torch.linalg.svd(left.mT @ right, full_matrices=False)
        return u, s, v
    # Of two thin factors: the small middle of their orthogonal bases.
    q1, r1 = torch.linalg.qr(left.mT)
    q2, r2 = torch.linalg.qr(right.mT)
    u, s, v = torch.linalg.svd(r1 @ r2.mT)
    return q1 @ u, s, v @ q2.mT
