"""Second moments of what layers are given, taken once and saved small.

Of every moment the leading directions are kept, and the rest as its diagonal, in half precision:
what is saved is a few per cent of the whole and equal to what is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture

#: Leading directions of a second moment that are kept.
RANK = 128


def key_moments(
    captures: Iterable[Capture], shapes: Sequence[tuple[int, int]], device: torch.device
) -> dict[str, Tensor]:
    """Second moments of the layers' inputs at all tokens of some prompts.

    Args:
        captures: At the unedited weights.
        shapes: ``(d_in, d_out)`` per layer.
        device: Device of the model.

    Returns:
        Per layer i ``total.i`` (the mean diagonal of the sum over tokens, float32), and in units of
        it ``leading.i`` (rank × d_in) and ``diagonal.i`` (d_in), half precision; ``sensitivity``
        (L float32): mean squared value gradient per layer, over its mean over the layers.

    Raises:
        SettingsError: no captures.
    """
    sums = [torch.zeros(d_in, d_in, device=device) for d_in, _ in shapes]
    pulls = torch.zeros(len(shapes), device=device)
    count = 0
    for capture in captures:
        count += 1
        for total, rows in zip(sums, capture.keys, strict=True):
            total += rows.float().mT @ rows.float()
        pulls += torch.stack([v.float().square().sum() for v in capture.value_gradients])
    if not count:
        raise SettingsError("a calibration needs at least one prompt")
    # Means of squares are tiny; their ratios count.
    moments = {"sensitivity": pulls / pulls.mean().clamp_min(1e-30)}
    for i, total in enumerate(sums):
        # A layer that was given nothing but zeros has no scale of its own.
        mean = total.diagonal().mean().clamp_min(1e-30)
        leading, rest = _compress(total / mean, RANK)
        moments |= {f"total.{i}": mean, f"leading.{i}": leading, f"diagonal.{i}": rest}
    return moments


def inverses(
    moments: Mapping[str, Tensor], layers: int, prior: float, device: torch.device
) -> list[Tensor]:
    """Inverse second moments, d_in × d_in float32 each.

    Args:
        moments: From :func:`key_moments`.
        layers: L.
        prior: Share of the mean diagonal that is added to each moment.
        device: Where they go.
    """
    found = []
    for i in range(layers):
        leading, rest = (
            moments[f"{name}.{i}"].to(device).float() for name in ("leading", "diagonal")
        )
        whole = leading.mT @ leading + (rest + prior).diag()
        found.append(symmetric(torch.linalg.inv(whole)) / float(moments[f"total.{i}"]))
    return found


def symmetric(matrix: Tensor) -> Tensor:
    """A matrix that is symmetric but for rounding, without the rounding."""
    return (matrix + matrix.mT) / 2


def _compress(moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A symmetric d × d moment as its leading part and a diagonal, in half precision.

    Returns:
        F, at most ``rank`` × d, and g, d, with FᵀF + diag(g) about the moment: equal in its
        leading directions and on its diagonal.
    """
    # Randomised subspace iteration (Halko, Martinsson and Tropp 2011), with draws of its own: a
    # full decomposition takes seconds a layer.
    rank = min(rank, len(moment))
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(len(moment), min(len(moment), rank + 32), generator=generator)
    basis = torch.linalg.qr(moment @ draws.to(moment)).Q
    for _ in range(2):
        basis = torch.linalg.qr(moment @ basis).Q
    values, inner = torch.linalg.eigh(symmetric(basis.mT @ moment @ basis))
    directions = basis @ inner
    kept = values[-rank:].clamp_min(0).sqrt()[:, None] * directions[:, -rank:].mT
    leading = kept.half()
    rest = moment.diagonal() - leading.float().square().sum(0)
    return leading, rest.clamp_min(0).half()
