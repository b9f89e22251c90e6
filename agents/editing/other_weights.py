"""Whether somebody else has changed a model: its edited weights, or those that no edit writes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import nn

from hiedit_env.errors import LedgerError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.weights import digest_of_bits


class OtherWeights:
    """All parameters of a model but the weights of its candidate layers.

    Args:
        model: The model; its parameters are looked up at every call.
        layers: Its candidate layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[CandidateLayer]) -> None:
        self._model, self._layers = model, layers

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        written = {id(layer.module.weight) for layer in self._layers}
        named = sorted(self._model.named_parameters(), key=lambda pair: pair[0])
        return [(name, p) for name, p in named if id(p) not in written]

    def version(self) -> tuple[tuple[int, ...], ...]:
        """Differs whenever one of them was written, moved or replaced; reads no weight."""
        return tuple(
            (id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for _, p in self._weights()
        )

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any single bit of one of them changes."""
        digest = hashlib.blake2b(digest_size=8)
        for name, parameter in self._weights():
            digest.update(name.encode() + b"\0" + digest_of_bits(parameter))
        return digest.hexdigest()


class Watch:
    """A model whose weights nobody else is to change between the calls of its editor.

    Args:
        llm: The model.
        others: The :meth:`OtherWeights.fingerprint` of its other weights; empty where it is not
            known yet.
    """

    def __init__(self, llm: ResidentLLM, others: str = "") -> None:
        self._llm = llm
        self._others = OtherWeights(llm.model, llm.layers)
        self._known, self._version = others or self._others.fingerprint(), self._others.version()
        self.note()

    def note(self) -> None:
        """Takes the edited weights for right as they are now."""
        self._fingerprint = self._llm.weights_fingerprint()

    def refuse_changes(self) -> None:
        """Checks that all weights are where and as they were.

        What is written through ``.data`` into a weight that no edit writes is not noticed.

        Raises:
            LedgerError: they are not.
        """
        moved = self._llm.layers[0].module.weight.device != self._llm.device
        written = moved or self._llm.weights_fingerprint() != self._fingerprint
        version = self._others.version()
        # Weights that were moved about, as to another dtype and back, may have their bits still.
        if not written and version != self._version:
            written = self._others.fingerprint() != self._known
            self._version = self._version if written else version
        if written:
            raise LedgerError(
                "the model's weights, dtype or device were changed outside of the editor since its "
                "last call; make a new Editor for the model as it is now"
            )
