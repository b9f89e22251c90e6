"""The compact observation: pooled activations of every layer, bounded, as one float32 vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.capture import Capture
from hiedit_env.resident import ResidentLLM
from hiedit_env.updates import layer_groups

#: Random projections of the pooled key and of the pooled value gradient, this many each.
PROJECTIONS = 8
#: Numbers per layer, see :class:`Observer`.
LAYER_FEATURES = 6 + 2 * PROJECTIONS
#: Numbers about the fact and the stream, see :class:`Observer`.
GLOBAL_FEATURES = 5

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class View:
    """What one life shows: the arguments of :meth:`Observer.__call__`, and its model."""

    llm: ResidentLLM
    capture: Capture
    written_share: NDArray[np.float32]
    steps_share: float
    stream_share: float


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
    steps of this fact already used, share of the stream already done.

    Args:
        llm: The model whose layers are observed.
        seed: Seed of the ±1 projection, which depends on nothing but it and the layer's size.
    """

    def __init__(self, llm: ResidentLLM, seed: int = 0) -> None:
        self.llm = llm
        self.size = len(llm.layers) * LAYER_FEATURES + GLOBAL_FEATURES
        norms = [max(llm.base_norm(i), _TINY) for i in range(len(llm.layers))]
        self._base_norms = torch.tensor(norms, device=llm.device)
        self._signs: dict[int, Tensor] = {}
        for size in sorted({size for shape in llm.shapes for size in shape}):
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (size, PROJECTIONS), generator=generator) * 2 - 1
            self._signs[size] = signs.float().to(llm.device)
        # Layers of one shape are stacked, so that a step costs a few kernels and not L times that.
        self._groups = layer_groups(llm.shapes)
        order = np.argsort([i for group in self._groups for i in group])
        self._order = torch.from_numpy(order).to(llm.device)

    def __call__(
        self,
        capture: Capture,
        written_share: NDArray[np.float32],
        steps_share: float,
        stream_share: float,
    ) -> NDArray[np.float32]:
        """The observation of one fact at the present weights.

        Args:
            capture: The fact's keys and value gradients.
            written_share: L numbers in [0, 1], feature 5.
            steps_share: In [0, 1], share of the fact's primitive steps used.
            stream_share: In [0, 1], share of the stream done.

        Returns:
            ``size`` float32 numbers in [−1, 1].
        """
        view = View(self.llm, capture, written_share, steps_share, stream_share)
        observation: NDArray[np.float32] = self.batch([view])[0].cpu().numpy()
        return observation

    def batch(self, views: Sequence[View]) -> Tensor:
        """Observations of several lives of one model, in few kernels.

        Args:
            views: N of them; their models are forks of one, or there is one life.

        Returns:
            N × ``size`` float32 in [−1, 1], on the model's device.
        """
        count, num_layers = len(views), len(self.llm.layers)
        lengths = torch.tensor([len(v.capture.keys[0]) for v in views], device=self.llm.device)
        with torch.no_grad():
            parts: list[Tensor] = []
            for group in self._groups:
                # Zeros in the place of missing tokens add nothing to any sum below.
                keys = _padded([[v.capture.keys[i] for i in group] for v in views])
                gradients = _padded([[v.capture.value_gradients[i] for i in group] for v in views])
                grams = (keys @ keys.mT) * (gradients @ gradients.mT)
                norms = grams.sum((2, 3)).clamp_min(0).sqrt()
                sizes, conflicts = self._changes(group, views, keys, gradients)
                columns = (
                    _log_rms(keys, lengths) / 6,
                    _log_rms(gradients, lengths) / 12,
                    norms,
                    sizes / self._base_norms[group],
                    conflicts / (norms * sizes + _TINY),
                )
                projections = (self._project(keys), self._project(gradients))
                parts.append(torch.cat((torch.stack(columns, 2), *projections), 2))
            rows = torch.cat(parts, 1)
            if len(parts) > 1:
                rows = rows[:, self._order]
            share = rows[..., 2:3] / (rows[..., 2:3].sum(1, keepdim=True) + _TINY)
            written = torch.from_numpy(np.stack([v.written_share for v in views])).to(rows)
            table = torch.cat(
                (rows[..., :2], share, rows[..., 3:5], written[..., None], rows[..., 5:]), 2
            )
            facts = torch.stack([v.capture.numbers() for v in views])
            answered = (facts[:, 1:] == 1).float()
            shares = torch.tensor([(v.steps_share, v.stream_share) for v in views]).to(rows)
            last = (facts[:, :1] / 10, facts[:, 1:], answered, shares)
            flat = torch.cat((table.reshape(count, num_layers * LAYER_FEATURES), *last), 1)
            # What is not finite, after numerical collapse, becomes 0 or a bound.
            return flat.nan_to_num().clamp(-1.0, 1.0)

    def _changes(
        self, group: list[int], views: Sequence[View], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Norm of every layer's accumulated change, and its inner product with the gradient.

        N × G each.
        """
        sizes, inner = [], []
        nothing = keys.new_zeros(len(views))
        for place, i in enumerate(group):
            changes = [view.llm.change(i) for view in views]
            known = next((change for change in changes if change is not None), None)
            if known is None:
                sizes.append(nothing)
                inner.append(nothing)
                continue
            stacked = torch.stack([torch.zeros_like(known) if c is None else c for c in changes])
            sizes.append(torch.linalg.vector_norm(stacked, dim=(1, 2)))
            inner.append(((keys[:, place] @ stacked) * gradients[:, place]).sum((1, 2)))
        return torch.stack(sizes, 1), torch.stack(inner, 1)

    def _project(self, rows: Tensor) -> Tensor:
        """Of N × G × T × size: the direction of the mean row, N × G × projections."""
        total = rows.sum(2)
        unit = total / (torch.linalg.vector_norm(total, dim=2, keepdim=True) + _TINY)
        projected: Tensor = unit @ self._signs[rows.shape[3]]
        return projected / 3


def _padded(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """N lives × G layers of T_n × size as one N × G × T × size, float32, with zeros at the end."""
    flat = [tensor for row in tensors for tensor in row]
    if len(tensors) == 1:
        return torch.stack(flat).float()[None]
    padded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True).float()
    return padded.view(len(tensors), len(tensors[0]), *padded.shape[1:])


def _log_rms(rows: Tensor, lengths: Tensor) -> Tensor:
    mean = rows.square().sum((2, 3)) / (lengths[:, None] * rows.shape[3])
    return (mean.sqrt() + 1e-12).log10()
