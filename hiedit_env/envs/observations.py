"""The compact observation: pooled activations of every layer, bounded, as one float32 vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.envs.reward_weights import Version
from hiedit_env.evaluation.reward_terms import Metrics
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import layer_groups, products
from hiedit_env.resident.resident import ResidentLLM

#: Random projections of the pooled key and of the pooled value gradient, this many each.
PROJECTIONS = 8
#: Numbers per layer, see :class:`Observer`.
LAYER_FEATURES = 6 + 2 * PROJECTIONS
#: Numbers about the fact and the stream, see :class:`Observer`.
GLOBAL_FEATURES = 5

#: Numbers about the model as it was last judged, in version 2.
STANDING_FEATURES = 2

_TINY = 1e-30
#: Widths of the columns of :meth:`Observer._measure`.
_COLUMNS = [2, 1, 1, 1, 2, 2 * PROJECTIONS, 1]


@dataclass(frozen=True, slots=True)
class View:
    """What one observation is made of.

    Args:
        llm: The model, for the state of its weights.
        capture: The unit's keys and value gradients.
        written_share: L numbers in [0, 1], feature 5.
        steps_share: In [0, 1], share of the fact's primitive steps used.
        stream_share: In [0, 1], share of the stream done.
        counts: How many of the capture's prompts each fact of the unit has; None for one fact.
        standing: Metrics of the model as it was last judged on the unit; version 2 only.
    """

    llm: ResidentLLM
    capture: Capture
    written_share: NDArray[np.float32]
    steps_share: float
    stream_share: float
    counts: tuple[int, ...] | None = None
    standing: Metrics | None = None

    def facts(self) -> list[View]:
        """A view of every fact of the unit, with its own capture."""
        if self.counts is None or len(self.counts) == 1:
            return [self]
        parts = self.capture.parts(self.counts)
        return [replace(self, capture=part, counts=None) for part in parts]


def size_of(num_layers: int, version: Version = 1) -> int:
    """Numbers of an observation.

    >>> size_of(6), size_of(6, 2)
    (137, 145)
    """
    size = num_layers * LAYER_FEATURES + GLOBAL_FEATURES
    return size if version == 1 else size + num_layers + STANDING_FEATURES


class Observer:
    """Turns a capture and the state of the weights into an observation in [−1, 1].

    The vector is L × ``LAYER_FEATURES`` numbers, layer after layer, then ``GLOBAL_FEATURES``.

    Per layer:

    ====== ==============================================================================
    0      log10 of the root mean square of the keys, over 6
    1      log10 of the root mean square of the value gradients, over 12
    2      the layer's share of the summed gradient norms, ‖u_lᵀ v_l‖ / Σ ‖u_mᵀ v_m‖
    3      accumulated change of the weight relative to its norm, ‖W − W₀‖ / ‖W₀‖, at most 1
    4      cosine between the plain gradient and the accumulated change (positive: descending
           on this fact undoes earlier edits)
    5      share of the facts edited so far in which this layer was written
    6–13   signs-projected mean key, unit length before projection, over 3
    14–21  the same of the value gradient
    ====== ==============================================================================

    At the end: loss of the fact over 10, token accuracy, 1 if answered, share of the primitive
    steps of this fact already used, share of the stream already done. A loss above 10 nats per
    token reads as 10, and where one step is a whole option, the share of steps used is always 0.
    Other features would be other inputs to trained agents, so both stay.

    Where one step edits several facts, the observation is the mean of the facts' own observations:
    each that of a step that edits this fact alone, from the same weights and place in the stream.
    So it has one shape for every number of facts, and features mean what they meant in training.

    In version 2 there follow, at the end, L + 2 numbers more: per layer the overlap of this fact's
    keys with what the layer has stored, ‖u Δ‖ / (‖u‖ ‖Δ‖) with Δ the accumulated change (1 if all
    that is stored lies along one key, and it is this one; 0 if no stored key has a part in common
    with it, or nothing is stored), then recent retention and agreement of the model as it was last
    judged on this fact, 1 where there is nothing to measure.

    Args:
        llm: The model whose layers are observed.
        seed: Seed of the ±1 projection, which depends on nothing but it and the layer's size.
        version: Of the ids.
    """

    def __init__(self, llm: ResidentLLM, seed: int = 0, version: Version = 1) -> None:
        self.llm, self.version = llm, version
        self.size = size_of(len(llm.layers), version)
        norms = [max(llm.base_norm(i), _TINY) for i in range(len(llm.layers))]
        self._base_norms = torch.tensor(norms, device=llm.device)[:, None]
        self._sizes = torch.tensor(llm.shapes, device=llm.device)
        self._log_units = torch.tensor([6.0, 12.0], device=llm.device)
        self._signs: dict[int, Tensor] = {}
        for size in sorted({size for shape in llm.shapes for size in shape}):
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (size, PROJECTIONS), generator=generator) * 2 - 1
            self._signs[size] = signs.float().to(llm.device)
        # Layers of one shape are stacked, so that a step costs a few kernels and not L times that.
        self._groups = layer_groups(llm.shapes)
        order = np.argsort([i for group in self._groups for i in group])
        self._order = torch.from_numpy(order).to(llm.device)

    def batch(self, views: Sequence[View]) -> Tensor:
        """Observations of several environments of one model, in few kernels.

        Args:
            views: N of them; their models are forks of one, or there is one environment.

        Returns:
            N × ``size`` float32 in [−1, 1], on the model's device.
        """
        sizes = [len(view.counts or (1,)) for view in views]
        if max(sizes) > 1:
            rows = self.batch([part for view in views for part in view.facts()])
            return torch.stack([part.mean(0) for part in torch.split(rows, sizes)])
        lengths = [len(view.capture.keys[0]) for view in views]
        with torch.no_grad():
            parts = [self._measure(group, views, max(lengths)) for group in self._groups]
            rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, self._order]
            keys, norms, inner, changes, totals, projections, answers = torch.split(
                rows, _COLUMNS, 2
            )
            tokens = torch.tensor(lengths, device=rows.device)[:, None, None]
            written = torch.from_numpy(np.stack([v.written_share for v in views])).to(rows)
            # What is projected has unit length: over 3, hardly any number leaves [−1, 1].
            directions = projections.view(*projections.shape[:2], 2, -1) / (
                3 * (totals + _TINY)[..., None]
            )
            columns = (
                (keys / (tokens * self._sizes).sqrt() + 1e-12).log10() / self._log_units,
                norms / (norms.sum(1, keepdim=True) + _TINY),
                changes / self._base_norms,
                inner / (norms * changes + _TINY),
                written[..., None],
                directions.flatten(2),
            )
            facts = torch.stack([v.capture.numbers() for v in views])
            answered = (facts[:, 1:] == 1).float()
            shares = torch.tensor([(v.steps_share, v.stream_share) for v in views]).to(rows)
            last: tuple[Tensor, ...] = (facts[:, :1] / 10, facts[:, 1:], answered, shares)
            if self.version == 2:
                last += (
                    (answers / (keys[..., :1] * changes + _TINY)).flatten(1),
                    torch.tensor([_known(v.standing) for v in views]).to(rows),
                )
            flat = torch.cat((torch.cat(columns, 2).flatten(1), *last), 1)
            # What is not finite, after numerical collapse, becomes 0 or a bound.
            return flat.nan_to_num().clamp(-1.0, 1.0)

    def _measure(self, group: list[int], views: Sequence[View], longest: int) -> Tensor:
        """Of the G layers of one shape, N × G × ``_COLUMNS`` float32.

        Norms of keys and of value gradients, norm of the gradient, its inner product with the
        accumulated change, norm of that change, norms of the summed key and of the summed value
        gradient, the projections of these two sums, and the norm of the change's answer to the
        keys.
        """
        stacks = [view.capture.stacked(group) for view in views]
        # (N G) × T × size. Zeros in the place of missing tokens add nothing to any sum.
        keys, gradients = (_padded([stack[side] for stack in stacks], longest) for side in (0, 1))
        grams = (keys @ keys.mT) * (gradients @ gradients.mT)
        changes = [view.llm.change(i) for view in views for i in group]
        # Facts that one step edits share a model, whose norms are taken once.
        nothing, norms = keys.new_zeros(()), dict[tuple[int, int], Tensor]()
        places = [(id(view.llm), i) for view in views for i in group]
        for place, change in zip(places, changes, strict=True):
            if place not in norms:
                norms[place] = nothing if change is None else torch.linalg.vector_norm(change)
        moved = products(keys, changes, gradients.shape[2])
        sums = (keys.sum(1), gradients.sum(1))
        columns = (
            torch.linalg.vector_norm(keys, dim=(1, 2)),
            torch.linalg.vector_norm(gradients, dim=(1, 2)),
            grams.sum((1, 2)).clamp_min(0).sqrt(),
            (moved * gradients).sum((1, 2)),
            torch.stack([norms[place] for place in places]),
            *(torch.linalg.vector_norm(total, dim=1) for total in sums),
        )
        projections = (total @ self._signs[total.shape[1]] for total in sums)
        answers = torch.linalg.vector_norm(moved, dim=(1, 2))[:, None]
        table = torch.cat((torch.stack(columns, 1), *projections, answers), 1)
        return table.view(len(views), len(group), -1)


def _known(standing: Metrics | None) -> tuple[float, float]:
    """Recent retention and agreement, 1 where there is nothing to measure."""
    found = [1.0 if standing is None else standing[n] for n in ("recent_retention", "agreement")]
    return found[0] if np.isfinite(found[0]) else 1.0, found[1] if np.isfinite(found[1]) else 1.0


def _padded(blocks: Sequence[Tensor], longest: int) -> Tensor:
    """N environments' G × T_n × size as (N G) × T × size, with zeros at the end."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat([F.pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows in blocks])
