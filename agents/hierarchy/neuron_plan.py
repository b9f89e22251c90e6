"""Which neurons are to be written for some facts: where, for which prompts, and when they fire."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit_agents.hierarchy.detectors import Detector, Readings, inputs
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM

#: The score at which a neuron with a gate fires most, between what a fact's own prompts score (1)
#: and what other words for it score.
PEAK = 0.85


@dataclass(frozen=True, slots=True)
class NeuronShape:
    """When a neuron fires, and how strongly.

    With a gate, activation(β (s − θ)) (c − s), where c puts the peak at :data:`PEAK`; without one,
    activation(β (s − θ)). Both over their value at the reading itself.

    Args:
        mlp: Its MLP.
        detector: Gives the score s.
        reading: d float32, the reading it is made for, where s is 1.
        threshold: θ.
        sharpness: β.
    """

    mlp: CandidateMLP
    detector: Detector
    reading: Tensor
    threshold: float
    sharpness: float

    def _raw(self, readings: Tensor) -> Tensor:
        fires = self.mlp.activation(readings @ self.gate_row())
        return fires if self.mlp.up is None else fires * (readings @ self.up_row())

    @property
    def _ceiling(self) -> float:
        return 2 * PEAK - self.threshold

    @property
    def full(self) -> float:
        """What the two rows give at the reading, before the second is scaled."""
        return float(self._raw(self.reading[None]).clamp_min(1e-6))

    def firing(self, readings: Tensor) -> Tensor:
        """Strength at P × d readings, 1 at the reading itself: P float32."""
        return self._raw(readings) / self.full

    def gate_row(self) -> Tensor:
        """D float32."""
        return self.sharpness * (self.detector.row - self.threshold * self.detector.constant)

    def up_row(self) -> Tensor:
        """As long as :meth:`gate_row`; its scale is free, since the column is divided by it."""
        return self._ceiling * self.detector.constant - self.detector.row


#: What stands in the place of a subject's first tokens where a neuron must not fire.
NAMES = (
    "North", "Maria", "Grand", "Johann", "New", "Saint", "Ali", "Royal",
    "Petra", "Black", "Kim", "Upper", "Marc", "Golden", "Ivan", "Lake",
)  # fmt: skip

#: Smallest threshold, in order not to fire where nothing was asked.
LOWEST = 0.3

#: The prompts of one fact, in every form asked.
Unit = tuple[EncodedPrompt, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A neuron that is to be written.

    Args:
        fact: Tokens of the first prompt it is for, which name it.
        home: Index of its MLP.
        prompts: What is to be answered with it, earlier facts about the same subject last.
        shape: When it fires.
    """

    fact: tuple[int, ...]
    home: int
    prompts: tuple[EncodedPrompt, ...]
    shape: NeuronShape


@dataclass(frozen=True, slots=True)
class ShapeForm:
    """What all neurons have in common.

    Args:
        threshold, sharpness: As of :class:`NeuronShape`.
        swaps: Number of :data:`NAMES` that each must not fire at.
    """

    threshold: float
    sharpness: float
    swaps: int


def subject_of(llm: ResidentLLM, prompt: EncodedPrompt) -> str:
    """The subject as it is written in the prompt, in lower case; empty where it is not in it."""
    if prompt.subject_missing or not prompt.subject_spans:
        return ""
    start, stop = prompt.subject_spans[-1]
    return llm.encoder.decode(prompt.prompt_ids[start:stop]).strip().casefold()


class Planner:
    """Plans neurons at the present weights.

    Args:
        llm: The model.
        mlps: Its MLPs.
        readings: Of each.
        form: What neurons have in common.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        mlps: Sequence[CandidateMLP],
        readings: Sequence[Readings],
        form: ShapeForm,
    ) -> None:
        self._llm, self._mlps, self._readings, self._form = llm, mlps, readings, form

    def targets(
        self,
        capture: Capture,
        units: Sequence[Unit],
        home: Callable[[Sequence[int]], int],
        past: Sequence[Unit],
        companions: int,
    ) -> list[Target]:
        """One neuron for every subject, or several where its prompts read too differently.

        Args:
            capture: Of the present prompts.
            units: The same prompts by fact.
            home: From the tokens of a prompt to the index of an MLP.
            past: Earlier facts.
            companions: How many of those about the same subject are sought again.
        """
        rows = dict(zip(capture.prompts, _rows(capture), strict=True))
        # One reading can only be given one vector, so facts about one subject share it.
        subjects: dict[object, list[EncodedPrompt]] = {}
        for unit in units:
            name = subject_of(self._llm, unit[0]) or unit[0].prompt_ids
            subjects.setdefault(name, []).extend(unit)
        found: list[Target] = []
        for name, prompts in subjects.items():
            same = [u for u in past if subject_of(self._llm, u[0]) == name]
            earlier = [p for unit in same[max(0, len(same) - companions) :] for p in unit]
            place = home(prompts[0].prompt_ids)
            shape = self._shape(capture, place, prompts, rows)
            scores = shape.detector.scores(self._read(capture, place, prompts, rows))
            if len(prompts) == 1 or float(scores.min()) > 1.5 * LOWEST:
                own = (*prompts, *earlier)
                found.append(Target(prompts[0].prompt_ids, place, own, shape))
                continue
            for prompt in prompts:
                place = home(prompt.prompt_ids)
                shape = self._shape(capture, place, [prompt], rows)
                found.append(Target(prompt.prompt_ids, place, (prompt,), shape))
        return found

    def _read(
        self,
        capture: Capture,
        home: int,
        prompts: Sequence[EncodedPrompt],
        rows: dict[EncodedPrompt, tuple[int, list[int]]],
    ) -> Tensor:
        """What an MLP reads at the subjects of some prompts, P × d float32."""
        keys = capture.keys[self._mlps[home].gate.layer]
        return keys[[rows[prompt][0] for prompt in prompts]].float()

    def _shape(
        self,
        capture: Capture,
        home: int,
        prompts: Sequence[EncodedPrompt],
        rows: dict[EncodedPrompt, tuple[int, list[int]]],
    ) -> NeuronShape:
        mlp, form = self._mlps[home], self._form
        own = self._read(capture, home, prompts, rows)
        elsewhere = [row for prompt in prompts for row in rows[prompt][1]]
        others = [capture.keys[mlp.gate.layer][elsewhere].float()]
        if swapped := self._swapped(prompts[0]):
            batches = inputs(self._llm, [mlp.gate.layer], swapped)
            with torch.inference_mode():
                others += [_last(read, part.lengths).float() for part, (read,) in batches]
        detector = self._readings[home].detector(own, torch.cat(others))
        lowest = float(detector.scores(own).min())
        threshold = min(form.threshold, max(lowest / 2, LOWEST))
        return NeuronShape(mlp, detector, own.mean(0), threshold, form.sharpness)

    def _swapped(self, prompt: EncodedPrompt) -> list[EncodedPrompt]:
        """The prompt up to its subject, with other names that end in the subject's last token."""
        if prompt.subject_missing or not prompt.subject_spans:
            return []
        start, stop = prompt.subject_spans[-1]
        if stop - start < 2:
            return []
        before, last = prompt.prompt_ids[:start], prompt.prompt_ids[stop - 1]
        found = []
        for name in NAMES[: self._form.swaps]:
            text = f" {name}" if start else name
            ids = self._llm.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and list(ids) != list(prompt.prompt_ids[start : stop - 1]):
                tokens = (*before, *ids, last)
                found.append(EncodedPrompt(name, name, tokens, (last,)))
        return found


def _rows(capture: Capture) -> list[tuple[int, list[int]]]:
    """Per prompt the row of its subject in a capture, and those that are no mention of it.

    A text's first token reads like no other, and is left out.
    """
    starts = itertools.accumulate((p.length for p in capture.prompts), initial=0)
    found = []
    for start, prompt in zip(starts, capture.prompts, strict=False):
        ends = {stop - 1 for _, stop in prompt.subject_spans}
        place = prompt.positions("subject")[0]
        rest = [start + i for i in range(1, prompt.length) if i != place and i not in ends]
        found.append((start + place, rest))
    return found


def _last(rows: Tensor, lengths: Tensor) -> Tensor:
    """The rows of the last tokens: B × d of B × T × d."""
    return rows[torch.arange(len(rows), device=rows.device), lengths - 1]
