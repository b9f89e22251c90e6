"""The weights that no edit writes: whether they are still those that a ledger was begun with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import nn

from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.resident.weights import digest_of_bits


class OtherWeights:
    """All parameters of a model but the weights of its candidate layers.

    Args:
        model: The model.
        layers: Its candidate layers.
    """

    def __init__(self, model: nn.Module, layers: Iterable[CandidateLayer]) -> None:
        written = {id(layer.module.weight) for layer in layers}
        named = sorted(model.named_parameters(), key=lambda pair: pair[0])
        self._weights = [(name, p) for name, p in named if id(p) not in written]

    def version(self) -> tuple[tuple[int, ...], ...]:
        """Differs whenever one of them was written or moved; reads no weight."""
        return tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version) for _, p in self._weights
        )

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any single bit of one of them changes."""
        digest = hashlib.blake2b(digest_size=8)
        for name, parameter in self._weights:
            digest.update(name.encode() + b"\0" + digest_of_bits(parameter))
        return digest.hexdigest()
