"""The candidate weights of a model: unedited values, accumulated changes, and the way back.

Weights are written in two methods only: :meth:`EditableWeights.commit` and
:meth:`EditableWeights.restore`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hiedit_env.errors import UpdateShapeError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.resident.low_rank import LowRankUpdate, Updates, check_updates


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Bit-exact state of candidate weights, by layer index.

    Args:
        changes: The accumulated changes, float32 in the weight's own layout; None for a layer
            that was never edited. They are never written in place.
    """

    changes: Mapping[int, Tensor | None]


class EditableWeights:
    """The candidate layers' weights, as the unedited ones plus accumulated float32 changes.

    So small updates add up in half precision too, and the way back is exact.

    Args:
        layers: Candidate layers in forward order.
    """

    def __init__(self, layers: Sequence[CandidateLayer]) -> None:
        self.layers = tuple(layers)
        self.names = tuple(layer.name for layer in self.layers)
        self.shapes = tuple((layer.d_in, layer.d_out) for layer in self.layers)
        weight = self._weight(0)
        self.device, self.dtype = weight.device, weight.dtype
        #: Whether changes are written into the model; if not, whoever runs it adds them.
        self.is_resident = True
        #: Unedited weights of the layers that are edited; the others have their own still. Shared
        #: with forks, which write nothing.
        self._kept: dict[int, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        """Begins with no change, without writing anything."""
        self._changes: list[Tensor | None] = [None] * len(self.layers)
        #: The changes that are in the weights it runs on already; not None for a branch only.
        self._origin: list[Tensor | None] = [None] * len(self.layers)
        self._trunk: EditableWeights | None = None
        self._grown: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._digests: dict[int, tuple[tuple[object, ...], bytes]] = {}
        self._is_suspended = False

    # Never inference tensors, wherever this is called from: a change outlives the caller's mode.
    @torch.inference_mode(False)
    def commit(self, updates: Updates) -> WeightSnapshot:
        """Writes updates into the weights: all of them, or none if anything fails on the way.

        Args:
            updates: One per layer; None leaves a layer alone.

        Returns:
            The weights of the changed layers as they were, for :meth:`restore`.

        Raises:
            NonFiniteUpdateError, UpdateShapeError: before anything is written.
        """
        self._check(updates)
        changed = {i: update for i, update in enumerate(updates) if update is not None}
        before = self.snapshot(changed)
        try:
            with torch.no_grad():
                for i, update in changed.items():
                    # A new tensor: snapshots hold the old one.
                    self._changes[i] = accumulated(
                        self._changes[i], update, self.layers[i].is_transposed
                    )
                    self._write(i)
        except BaseException:
            self.restore(before)
            raise
        return before

    def snapshot(self, indices: Iterable[int] | None = None) -> WeightSnapshot:
        """Bit-exact state of the weights of some layers (all by default); copies nothing."""
        chosen = range(len(self.layers)) if indices is None else indices
        return WeightSnapshot({i: self._changes[i] for i in chosen})

    @torch.inference_mode(False)
    def restore(self, snapshot: WeightSnapshot) -> None:
        """Puts the weights of a snapshot back, bit for bit."""
        for i, change in snapshot.changes.items():
            if change is not self._changes[i]:
                self._changes[i] = change
                self._write(i)

    @torch.inference_mode(False)
    def restore_unedited(self) -> None:
        """Puts the weights of the unedited model back, bit for bit."""
        for i, change in enumerate(self._changes):
            if change is not None:
                self._changes[i] = None
                self._write(i)

    @torch.inference_mode(False)
    def rebase(self, weights: Sequence[Tensor]) -> None:
        """Takes other weights for the unedited ones; the model has them, and nothing is edited.

        Args:
            weights: One per layer, in its weight's own layout, dtype and device; kept.
        """
        for i, weight in enumerate(weights):
            expected = self._weight(i)
            if weight.shape != expected.shape or weight.dtype != expected.dtype:
                raise UpdateShapeError(
                    f"unedited weight of {self.names[i]} has shape {tuple(weight.shape)} and "
                    f"{weight.dtype}; expected {tuple(expected.shape)} and {expected.dtype}"
                )
        self._forget()
        self._kept.clear()
        for i, weight in enumerate(weights):
            self._weight(i).data = weight

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Runs the body with the unedited weights; copies nothing, switches back, may be nested."""
        with nullcontext() if self._trunk is None else self._trunk.unedited():
            yield from self._suspended()

    def _suspended(self) -> Iterator[None]:
        edited = {i: self._weight(i).data for i in self._written()}
        outside = self._is_suspended
        self._is_suspended = True
        try:
            for i in edited:
                self._weight(i).data = self._kept[i]
            yield
        finally:
            for i, weight in edited.items():
                self._weight(i).data = weight
            self._is_suspended = outside

    def change(self, index: int) -> Tensor | None:
        """Edited minus unedited weight of one layer, d_in × d_out float32; None if never edited."""
        change = self._changes[index]
        if change is None:
            return None
        return change.mT if self.layers[index].is_transposed else change

    def unedited_weight(self, index: int) -> Tensor:
        """One layer's unedited weight in its own layout: the tensor itself, not to be written.

        It keeps these values whatever is committed later.
        """
        return self._kept.get(index, self._weight(index).detach())

    def weight(self, index: int) -> Tensor:
        """Present weight of one layer, d_in × d_out float32, before it is rounded; a new tensor."""
        own, change = self.unedited_weight(index).float(), self._changes[index]
        whole = own.clone() if change is None else own + change
        return whole.mT if self.layers[index].is_transposed else whole

    def base_norm(self, index: int) -> float:
        """Frobenius norm of one layer's unedited weight."""
        return float(torch.linalg.vector_norm(self.unedited_weight(index).float()))

    def weights_fingerprint(self) -> str:
        """16 hexadecimal digits that change when any single bit of a candidate weight changes.

        Row and column sums of the weights' bits as integers, hashed: equal weights give equal
        fingerprints on every machine, and a layer is read again only after it was written.
        """
        digest = hashlib.blake2b(digest_size=8)
        for i in range(len(self.layers)):
            version = self.version(i)
            known = self._digests.get(i)
            if known is None or not same_version(known[0], version):
                known = (version, digest_of_bits(self.present_weight(i)))
                self._digests[i] = known
            digest.update(known[1])
        return digest.hexdigest()

    # -- inside -------------------------------------------------------------------------------

    def _written(self) -> list[int]:
        """Layers whose change is in the model's own weights."""
        changed = [i for i, change in enumerate(self._changes) if change is not None]
        return changed if self.is_resident else []

    def version(self, index: int) -> tuple[object, ...]:
        """Differs whenever one layer's weight differs, see :func:`same_version`."""
        if not self.is_resident:
            return (self._held(index),)
        weight = self._weight(index)
        # The version alone does not tell the unedited weights of :meth:`unedited` apart.
        return weight.data_ptr(), weight._version

    def present_weight(self, index: int) -> Tensor:
        """One layer's weight as the model runs with it, in its own layout."""
        if self.is_resident:
            return self._weight(index)
        change, base = self._held(index), self.unedited_weight(index)
        return base if change is None else (base + change).to(base.dtype)

    def _held(self, index: int) -> Tensor | None:
        """The change of one layer that counts at present."""
        return None if self._is_suspended else self._changes[index]

    def _added(self, index: int) -> Tensor | None:
        """The change that has to be added to one layer's output as it runs."""
        if self.is_resident or self._is_suspended:
            return None
        change, origin = self._changes[index], self._origin[index]
        if origin is None:
            return change
        if change is origin:
            return None
        known = self._grown.get(index)
        if known is None or known[0] is not change:
            known = change, -origin if change is None else change - origin
            self._grown[index] = known
        return known[1]

    def _check(self, updates: Updates) -> None:
        check_updates(updates, self.shapes, self.names, self.device, torch.finfo(self.dtype).max)

    def _weight(self, index: int) -> Tensor:
        return cast(Tensor, self.layers[index].module.weight)

    def _write(self, index: int) -> None:
        """Makes one weight the unedited one plus its accumulated change."""
        if self._is_suspended:
            raise RuntimeError("weights cannot be written inside ResidentLLM.unedited()")
        if not self.is_resident:
            return
        weight, change = self._weight(index), self._changes[index]
        if change is None:
            # The very tensor that was there; nothing is written.
            if index in self._kept:
                weight.data = self._kept.pop(index)
            return
        if index not in self._kept:
            # Whoever holds the unedited tensor goes on holding the unedited values.
            self._kept[index] = weight.data
            weight.data = torch.empty_like(weight.data)
        base = self._kept[index]
        # The weights need no gradient, so that none is recorded in any mode of the caller's.
        if weight.dtype == torch.float32:
            torch.add(base, change, out=weight)
        else:
            # In float32, or in float64 for float64 weights.
            weight.copy_(base + change)


def accumulated(
    change: Tensor | None, update: LowRankUpdate, is_transposed: bool, *, in_place: bool = False
) -> Tensor:
    """A layer's accumulated change with one more update: the sum that every commit computes.

    Args:
        change: The change so far, float32 in the weight's own layout; None for none.
        update: What is added.
        is_transposed: Whether the weight is stored as d_out × d_in.
        in_place: Whether ``change`` itself is written; the same bits, without a new tensor.

    Returns:
        Float32 in the weight's own layout, without gradient.
    """
    left, right = update.left.detach().float(), update.right.detach().float()
    if is_transposed:
        left, right = right, left
    if change is None:
        return left.mT @ right
    return change.addmm_(left.mT, right) if in_place else torch.addmm(change, left.mT, right)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


#: Numbers that are summed at once.
_AT_ONCE = 2**20


def digest_of_bits(weight: Tensor) -> bytes:
    """A digest that changes when any single bit of a tensor of any shape changes."""
    rows = len(weight) if weight.ndim > 1 else 1
    matrix = weight.detach().reshape(rows, weight.numel() // max(rows, 1))
    bits = matrix.contiguous().view(_BITS[weight.element_size()])
    columns, by_row = bits.new_zeros(bits.shape[1], dtype=torch.int64), []
    # Sums as int64 make a copy of what they sum: of some rows at a time.
    for part in torch.split(bits, max(1, _AT_ONCE // max(1, bits.shape[1]))):
        columns += part.sum(0, dtype=torch.int64)
        by_row.append(part.sum(1, dtype=torch.int64))
    sums = torch.cat([columns, *by_row])
    return hashlib.blake2b(sums.cpu().numpy().tobytes()).digest()


def same_version(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two versions are of the same weights."""
    # Tensors by identity: == would compare their entries.
    return len(one) == len(other) and all(
        a is b or (isinstance(a, int) and a == b) for a, b in zip(one, other, strict=True)
    )
