"""The candidate weights of a model as an editor found them, and its ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from hiedit_agents.editing.ledger import Ledger
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.weights import WeightSnapshot


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """What a model's candidate weights were before anything was edited.

    Args:
        snapshot: Their state.
        loaded: By layer index, weights that were loaded from files of half precision as the
            rounding of those in ``snapshot``, in their own layout and dtype. The others had the
            bits of ``snapshot``.
    """

    snapshot: WeightSnapshot
    loaded: Mapping[int, Tensor] = field(default_factory=dict)

    def weights(self, llm: ResidentLLM) -> dict[str, Tensor]:
        """Copies of them by parameter, in their own layout; the model stays as it is."""
        with self.in_place(llm):
            found = {
                f"{name}.weight": cast(Tensor, llm.model.get_submodule(name).weight).detach()
                for name in llm.names
            }
            for i, weight in self.loaded.items():
                found[f"{llm.names[i]}.weight"] = weight
            return {name: weight.clone() for name, weight in found.items()}

    @contextmanager
    def in_place(self, llm: ResidentLLM) -> Iterator[None]:
        """Runs the body with the weights of ``snapshot``."""
        present = llm.snapshot()
        llm.restore(self.snapshot)
        try:
            yield
        finally:
            llm.restore(present)

    def put_back(self, llm: ResidentLLM) -> None:
        """Gives them to the model again, bit for bit; where it was loaded rounded, as unedited."""
        llm.restore(self.snapshot)
        if self.loaded:
            present = [llm.present_weight(i).detach() for i in range(len(llm.layers))]
            llm.rebase([self.loaded.get(i, weight) for i, weight in enumerate(present)])


@dataclass(frozen=True, slots=True)
class Opened:
    """The ledger of an editor, and its model.

    Args:
        ledger: The ledger, open for appending.
        found: The model's weights as they were before.
    """

    ledger: Ledger
    found: FoundWeights
