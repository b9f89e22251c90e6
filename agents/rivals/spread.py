"""One change of the residual stream, spread over the last matrices of several MLPs.

What MEMIT (arXiv 2210.07229) and AlphaEdit (arXiv 2410.02355) have in common. For the facts of an
edit unit, at the present weights:

1. A vector per fact is sought behind the last of the blocks (:mod:`.values`).
2. Block by block, first to last, with the blocks before already written: K are the inputs of the
   block's ``down_proj`` at the subjects, R what is still missing behind the last block, divided by
   the number of blocks that are left. The change is the ridge solution Kᵀ R in a metric M:
   (M⁻¹ + Kᵀ K)⁻¹ Kᵀ R, that is, with A = K M, Aᵀ (A Kᵀ + 1)⁻¹ R.

A row of K is one form (plain, chat) of one fact. It is the mean of the input at the bare prompt and
of the mean input behind some opening words, as in the released code (``memit/memit_main.py`` of
kmeng01/memit, commit b86d971; ``AlphaEdit/AlphaEdit_main.py`` of jianghoucheng/AlphaEdit, commit
2ff0e4e), where a fact has one form and the model writes the opening words itself. The two methods
differ in M, and in whether it takes in what was written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.detectors import inputs
from hiedit_agents.hierarchy.fact_memory import Unit, units_of
from hiedit_agents.hierarchy.key_moments import symmetric
from hiedit_agents.hierarchy.openings import OPENINGS, behind
from hiedit_agents.rivals.values import Place, ValueSearch
from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import WholeRule


@dataclass(frozen=True, slots=True)
class Asked:
    """Where the facts of a unit are looked up.

    Args:
        places: P prompts with the position of the subject's last token.
        facts: P int64, the fact of each.
        forms: P int64, the row of K of each: one form of one fact.
        bare: For every row, the place of its prompt without opening words.
    """

    places: tuple[Place, ...]
    facts: Tensor
    forms: Tensor
    bare: Tensor

    def rows(self, given: Tensor) -> Tensor:
        """Rows of K from P × d inputs: half the bare prompt, half the mean behind openings."""
        bare = given[self.bare]
        counts = torch.bincount(self.forms, minlength=len(bare)).float()[:, None] - 1
        others = torch.zeros_like(bare).index_add(0, self.forms, given) - bare
        return torch.where(counts > 0, (bare + others / counts.clamp_min(1)) / 2, bare)


def asked(llm: ResidentLLM, units: Sequence[Unit], openings: int) -> Asked:
    """The prompts of some facts, the plain ones behind opening words as well.

    Args:
        llm: The model.
        units: The prompts of each fact.
        openings: Number of opening words.
    """
    places: list[Place] = []
    facts: list[int] = []
    forms: list[int] = []
    bare: list[int] = []
    for number, unit in enumerate(units):
        for prompt in unit:
            at = prompt.positions("subject")[0]
            bare.append(len(places))
            found = [one for text in OPENINGS[:openings] for one in behind(llm, text, prompt, at)]
            places += [(prompt, at), *found]
            facts += [number] * (1 + len(found))
            forms += [len(bare) - 1] * (1 + len(found))
    numbers = [torch.tensor(one, device=llm.device) for one in (facts, forms, bare)]
    return Asked(tuple(places), *numbers)


def ridge(metric: Tensor, keys: Tensor, wanted: Tensor) -> LowRankUpdate:
    """The change D that minimises ‖K D − R‖² + tr(Dᵀ M⁻¹ D), and is 0 where M is.

    Args:
        metric: M, d_in × d_in float32, symmetric and positive semidefinite.
        keys: K, P × d_in float32.
        wanted: R, P × d_out float32.
    """
    addresses = keys @ metric
    inner = symmetric(addresses @ keys.mT).double()
    inner = inner + torch.eye(len(keys), dtype=torch.float64, device=keys.device)
    return LowRankUpdate(addresses, torch.linalg.solve(inner, wanted.double()).float())


def lessened(metric: Tensor, keys: Tensor) -> Tensor:
    """(M⁻¹ + Kᵀ K)⁻¹ by Woodbury's identity, d_in × d_in float32; 0 where M is."""
    change = ridge(metric, keys, keys @ metric)
    return symmetric(metric - change.dense())


def second_moments(
    llm: ResidentLLM, layers: Sequence[int], prompts: Sequence[EncodedPrompt]
) -> dict[int, Tensor]:
    """Mean of kᵀ k over the tokens of some prompts at the unedited weights, by layer.

    The first token of a text reads like no other and does not count.

    Returns:
        d_in × d_in float32 each.

    Raises:
        SettingsError: no prompts.
    """
    if not prompts:
        raise SettingsError("second moments need at least one prompt")
    totals = {i: torch.zeros(llm.shapes[i][0], llm.shapes[i][0], device=llm.device) for i in layers}
    count = 0
    with llm.unedited(), torch.inference_mode():
        for part, given in inputs(llm, layers, prompts):
            tokens = torch.arange(part.longest, device=llm.device)
            real = (tokens < part.lengths[:, None]) & (tokens > 0)
            count += int(real.sum())
            for total, rows in zip(totals.values(), given, strict=True):
                total += rows[real].float().mT @ rows[real].float()
    return {i: total / max(count, 1) for i, total in totals.items()}


def looked_up(
    llm: ResidentLLM, layers: Sequence[int], places: Sequence[Place]
) -> tuple[list[Tensor], Tensor]:
    """Inputs of some layers, and hidden states behind the last one's block, at the subjects.

    Args:
        llm: The model, at its present weights.
        layers: Indices of the layers, the last one in the last block.
        places: P prompts with positions.

    Returns:
        Per layer P × d_in, and P × hidden size, float32.
    """
    # What stands behind the subject is read by no token before it.
    starts = [replace(p, prompt_ids=p.prompt_ids[: at + 1], answer_ids=(0,)) for p, at in places]
    block = llm.layers[layers[-1]].block
    found: dict[tuple[int, ...], list[Tensor]] = {}
    with torch.no_grad():
        for part, given in inputs(llm, layers, list(dict.fromkeys(starts)), block):
            for row, start in enumerate(part.prompts):
                at = start.first_position
                found[start.prompt_ids] = [one[row, at].float() for one in given]
    columns = zip(*(found[start.prompt_ids] for start in starts), strict=True)
    *keys, hidden = (torch.stack(column) for column in columns)
    return keys, hidden


class Spread(WholeRule):
    """Seeks one vector per fact and spreads it over the layers that it was made for.

    Args:
        llm: The model, on which vectors are sought.
        metrics: By layer, in forward order, M at the unedited weights: d_in × d_in float32.
        search: How vectors are sought.
        openings: Number of opening words that prompts are read behind.
        remembers: Whether M takes in the keys of what was written, as AlphaEdit's does.
    """

    name: ClassVar[str] = "spread"
    default_step_size: ClassVar[float] = 1.0
    default_tokens = "subject"
    uses_gradients: ClassVar[bool] = False

    def __init__(
        self,
        llm: ResidentLLM,
        metrics: Mapping[int, Tensor],
        search: ValueSearch,
        *,
        openings: int,
        remembers: bool,
    ) -> None:
        self.llm, self.search, self.openings = llm, search, openings
        self.remembers = remembers
        self._first = dict(metrics)
        super().__init__(llm.shapes, llm.device)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that it writes, in forward order."""
        return tuple(self._first)

    def reset(self) -> None:
        """Forgets what was written in this episode."""
        self._metrics: Mapping[int, Tensor] = self._first

    def statistics(self) -> dict[str, Any]:
        """The metrics; none is written in place."""
        return {"metrics": self._metrics}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self._metrics = statistics["metrics"]

    def clone_for(self, llm: ResidentLLM) -> Self:
        """As in the base class; the copy seeks on ``llm`` and shares the metrics."""
        # They are large and never written in place.
        shared: Iterable[Tensor] = (*self._first.values(), *self._metrics.values())
        return copy.deepcopy(self, {id(self.llm): llm, **{id(one): one for one in shared}})

    @torch.inference_mode(False)
    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The changes that give the facts of the capture.

        Args:
            capture: Its prompts are what is edited; its gradients are not used.
            layers: L bool; layers the rule was not made for stay as they are.
            multipliers: Not used: a part of the residual is no part of the fact.

        Returns:
            L entries, None for a layer that is left alone. Float32.
        """
        updates: list[LowRankUpdate | None] = [None] * len(self.shapes)
        chosen = [i for i in self._first if layers[i]]
        if not chosen:
            return tuple(updates)
        facts = asked(self.llm, units_of(self.llm, capture.prompts), self.openings)
        bare = [facts.places[i] for i in facts.bare.tolist()]
        _, hidden = looked_up(self.llm, chosen[-1:], bare)
        owners = facts.facts[facts.bare]
        firsts = torch.tensor([owners.tolist().index(i) for i in range(int(owners.max()) + 1)])
        sizes = hidden.norm(dim=1)[firsts.to(self.device)].clamp_min(1e-12)
        vectors = self.search.seek(self.llm, chosen[-1], facts.places, facts.facts, sizes)
        targets = hidden + vectors[owners]
        branch = self.llm.branch()
        for place, layer in enumerate(chosen):
            keys, present = looked_up(branch, [layer, chosen[-1]], facts.places)
            residual = (targets - present[facts.bare]) / (len(chosen) - place)
            change = ridge(self._metrics[layer], facts.rows(keys[0]), residual)
            updates[layer] = change
            branch.commit([change if i == layer else None for i in range(len(self.shapes))])
        if self.remembers:
            keys, _ = looked_up(branch, chosen, facts.places)
            pairs = zip(chosen, keys, strict=True)
            seen = {i: lessened(self._metrics[i], facts.rows(rows)) for i, rows in pairs}
            self._metrics = {**self._metrics, **seen}
        return tuple(updates)
