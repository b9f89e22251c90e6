"""Which neurons are to be written for some facts: where, for which prompts, and when they fire."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiedit_agents.hierarchy.detectors import Readings, inputs
from hiedit_agents.hierarchy.fact_memory import Unit, subject_of
from hiedit_agents.hierarchy.neuron_shape import NeuronShape
from hiedit_env.errors import HieditWarning
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM

#: What stands in the place of a subject's first tokens where a neuron must not fire.
NAMES = (
    "North", "Maria", "Grand", "Johann", "New", "Saint", "Ali", "Royal",
    "Petra", "Black", "Kim", "Upper", "Marc", "Golden", "Ivan", "Lake",
)  # fmt: skip

#: Smallest threshold, in order not to fire where nothing was asked.
LOWEST = 0.3

#: Smallest score of a fact's own prompts at which the threshold is the usual one.
_USUAL = 0.9

#: Largest threshold, and how far it is above the score of an earlier fact's subject.
_HIGHEST, _ABOVE = 0.75, 0.05

#: Threshold of a neuron for a single prompt, whose own score is 1 whatever stands around it; how
#: many tokens behind a subject are looked at. SmolLM2, block 7: a subject of one token that begins
#: a text has a spread of 3.8 to 4.1 over √d, the next token 1.3, the prompt's end 2.6 to 2.8.
_ALONE, _NEXT = 0.7, 8

#: Score from which a neuron is kept from an earlier fact's subject; how many facts are looked at.
_NEAR, _ALIKE = 0.25, 16

#: How much the reading of an earlier fact's subject counts, over d, where all tokens elsewhere
#: together count 1; tried from the first on. The neuron of one river (SmolLM2, block 7) has a score
#: of 0.2, 0.4 and 0.6 at another one with 6, 1.7 and 0.6, for spreads of 1.4, 1.25 and 1.1 over √d,
#: and of 0.86 for 0.84 without.
_WEIGHTS = (6.0, 3.0, 1.5, 0.7)

#: Where the rows of each prompt of a capture begin.
Starts = Mapping[EncodedPrompt, int]


@dataclass(frozen=True, slots=True)
class Target:
    """A neuron that is to be written.

    Args:
        fact: Tokens of the first prompt it is for, which name it.
        home: Index of its MLP.
        prompts: What is to be answered with it, earlier facts about the same subject last.
        shape: When it fires.
        besides: Other prompts of the fact, which other neurons answer.
    """

    fact: tuple[int, ...]
    home: int
    prompts: tuple[EncodedPrompt, ...]
    shape: NeuronShape
    besides: tuple[EncodedPrompt, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """What one MLP reads, each … × d float32.

    Args:
        own: Where a neuron is to fire.
        others: At the other tokens of the same prompts.
        swapped: At other names that end in the subject's last token.
        alike: At subjects of earlier facts that it would fire at.
    """

    own: Tensor
    others: Tensor
    swapped: Tensor
    alike: Tensor


@dataclass(frozen=True, slots=True)
class ShapeForm:
    """What all neurons have in common.

    Args:
        threshold, sharpness: As of :class:`NeuronShape`.
        swaps: Number of :data:`NAMES` that each must not fire at.
        widest: Largest spread of a score at that threshold, over 1/√d.
    """

    threshold: float
    sharpness: float
    swaps: int
    widest: float


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
        home: Callable[[tuple[int, ...]], int],
        past: Sequence[Unit],
        companions: int,
    ) -> list[Target]:
        """One neuron for every subject, or several where its prompts read too differently.

        One that reads all prompts of a fact at the subject does not fire at the subject of an
        earlier fact that ends in the same token, as two rivers do. A prompt in which nothing can be
        told from what is read elsewhere has none.

        Args:
            capture: Of the present prompts.
            units: The same prompts by fact.
            home: From the tokens of a prompt to the index of an MLP.
            past: Earlier facts.
            companions: How many of those about the same subject are sought again.
        """
        lengths = itertools.accumulate((p.length for p in capture.prompts), initial=0)
        starts = dict(zip(capture.prompts, lengths, strict=False))
        # One reading can only be given one vector, so facts about one subject share it.
        subjects: dict[object, list[EncodedPrompt]] = {}
        for unit in units:
            key = subject_of(self._llm, unit[0]) or unit[0].prompt_ids
            subjects.setdefault(key, []).extend(unit)
        found: list[Target] = []
        known = list(past)
        for name, prompts in subjects.items():
            alike = self._alike(
                prompts[0], [u for u in known if subject_of(self._llm, u[0]) != name]
            )
            known.append(tuple(prompts))
            same = [u for u in past if subject_of(self._llm, u[0]) == name]
            earlier = [p for unit in same[max(0, len(same) - companions) :] for p in unit]
            # What a text begins with reads like every text's beginning.
            inside = [p for p in prompts if p.positions("subject")[0] > 0]
            groups = [inside] if inside else []
            if inside:
                place = home(inside[0].prompt_ids)
                rows = self._rows(capture, place, inside, starts, alike)
                shape = self._firm(place, rows)
                if shape is not None:
                    own = (*inside, *earlier)
                    besides = _besides(inside[0], inside, units)
                    found.append(Target(inside[0].prompt_ids, place, own, shape, besides))
                    groups = []
            alone = [p for p in prompts if p not in inside or groups]
            for prompt in alone:
                one = self._alone(capture, prompt, home(prompt.prompt_ids), starts, alike)
                if one is None:
                    warnings.warn(
                        f"{_end_of(prompt)!r}: what the model reads at the subject and behind it "
                        "is like much else, so no neuron is written for it; name the fact's "
                        "subject, or put a word before it",
                        HieditWarning,
                        stacklevel=2,
                    )
                else:
                    found.append(replace(one, besides=_besides(prompt, [prompt], units)))
        return found

    def _alone(
        self,
        capture: Capture,
        prompt: EncodedPrompt,
        home: int,
        starts: Starts,
        alike: Sequence[EncodedPrompt],
    ) -> Target | None:
        """A neuron for one prompt: at its subject, or behind it where the subject says little.

        Behind it, at the token that is read least like what is read elsewhere. None where all are
        read like much else, since it would fire everywhere.
        """
        if prompt.positions("subject")[0] > 0:
            shape = self._shape(home, self._rows(capture, home, [prompt], starts, alike))
            if self._is_apart(shape):
                return Target(prompt.prompt_ids, home, (prompt,), shape)
        apart = []
        for place in _behind(prompt):
            # Its spans stay known, for other names in their place.
            rows = self._rows(capture, home, [prompt], starts, place=place)
            shape = replace(self._shape(home, rows), threshold=_ALONE)
            if self._is_apart(shape):
                apart.append((shape.detector.spread, place, shape))
        if not apart:
            return None
        _, place, shape = min(apart, key=lambda one: one[:2])
        moved = replace(prompt, subject_spans=((place, place + 1),), subject_missing=True)
        return Target(prompt.prompt_ids, home, (moved,), shape)

    def _firm(self, home: int, rows: _Rows) -> NeuronShape | None:
        """The first shape that is apart and fires in all own prompts; None where there is none.

        An earlier fact's subject counts as much as it can, and the threshold is put above its score
        if need be. A name that reads like others with its last token is told from the rest alone.
        """
        for weight in (*(_WEIGHTS if len(rows.alike) else ()), 0.0):
            for swapped in (True, False):
                shape = self._shape(home, rows, weight, swapped)
                lowest = float(shape.detector.scores(rows.own).min())
                fires = lowest > max(1.5 * LOWEST, shape.threshold + 2 * _ABOVE)
                if fires and self._is_apart(shape):
                    return shape
        return None

    def _rows(
        self,
        capture: Capture,
        home: int,
        prompts: Sequence[EncodedPrompt],
        starts: Starts,
        alike: Sequence[EncodedPrompt] = (),
        place: int | None = None,
    ) -> _Rows:
        """What an MLP reads at the subjects, or at one place, of some prompts, and elsewhere."""
        mlp = self._mlps[home]
        keys = capture.keys[mlp.gate.layer]
        here = [p.positions("subject")[0] if place is None else place for p in prompts]
        own = keys[[starts[p] + at for p, at in zip(prompts, here, strict=True)]].float()
        others = keys[[starts[p] + i for p in prompts for i in _elsewhere(p, place)]].float()
        swapped = self._ends(mlp, self._swapped(prompts[0], place))
        near = self._ends(mlp, alike)
        if len(near):
            detector = self._readings[home].detector(own, torch.cat((others, swapped)))
            near = near[detector.scores(near) > _NEAR]
        return _Rows(own, others, swapped, near)

    def _shape(
        self, home: int, rows: _Rows, weight: float = 0.0, swapped: bool = True
    ) -> NeuronShape:
        mlp, form, known = self._mlps[home], self._form, self._readings[home]
        others = [rows.others, *([rows.swapped] if swapped else [])]
        if weight:
            others.append(known.mean + math.sqrt(weight / mlp.hidden) * (rows.alike - known.mean))
        if len(rows.own) > 1:
            # What the own readings differ in, as plain and chat form do, has no part in the score.
            others.append(known.mean + rows.own - rows.own.mean(0))
        detector = known.detector(rows.own, torch.cat(others))
        lowest = float(detector.scores(rows.own).min())
        threshold = min(form.threshold, max(form.threshold * lowest / _USUAL, LOWEST))
        if weight:
            highest = float(detector.scores(rows.alike).max()) + _ABOVE
            threshold = max(threshold, min(highest, _HIGHEST))
        return NeuronShape(mlp, detector, rows.own.mean(0), threshold, form.sharpness)

    def _ends(self, mlp: CandidateMLP, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """What an MLP reads at the last token of P prompts: P × d float32."""
        if not prompts:
            return torch.zeros(0, mlp.hidden, device=self._llm.device)
        batches = inputs(self._llm, [mlp.gate.layer], prompts)
        with torch.inference_mode():
            return torch.cat([_last(read, part.lengths).float() for part, (read,) in batches])

    def _alike(self, prompt: EncodedPrompt, known: Sequence[Unit]) -> tuple[EncodedPrompt, ...]:
        """Earlier facts' prompts, up to their subjects, that end in a subject's last token."""
        last = _subject_ids(prompt)[-1:]
        if not last:
            return ()
        units = [u for u in known if any(_subject_ids(p)[-1:] == last for p in u)]
        return tuple(
            replace(p, prompt_ids=p.prompt_ids[: p.subject_spans[-1][1]], answer_ids=last)
            for unit in units[-_ALIKE:]
            for p in unit
            if _subject_ids(p)[-1:] == last
        )

    def _is_apart(self, shape: NeuronShape) -> bool:
        """Whether what the neuron fires at is as far from what is read elsewhere as usual.

        A neuron with a lower threshold has to be further away.
        """
        usual = self._form.widest / math.sqrt(shape.mlp.hidden)
        return shape.detector.spread < usual * shape.threshold / self._form.threshold

    def _swapped(self, prompt: EncodedPrompt, place: int | None) -> list[EncodedPrompt]:
        """The prompt with other names, up to the token that is read.

        At the subject (``place`` None), names that end in the subject's own last token.
        """
        if prompt.subject_missing or not prompt.subject_spans:
            return []
        start, stop = prompt.subject_spans[-1]
        # The end of a prompt that ends with its subject is the subject's own last token.
        place = None if place is not None and place < stop else place
        if place is None and stop - start < 2:
            return []
        before, subject = prompt.prompt_ids[:start], prompt.prompt_ids[start:stop]
        after = subject[-1:] if place is None else prompt.prompt_ids[stop : place + 1]
        if not after:
            return []
        found = []
        for name in NAMES[: self._form.swaps]:
            text = f" {name}" if start else name
            ids = tuple(self._llm.tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in (subject, subject[:-1]):
                found.append(EncodedPrompt(name, name, (*before, *ids, *after), after[-1:]))
        return found


def _subject_ids(prompt: EncodedPrompt) -> tuple[int, ...]:
    """The tokens of the subject's last mention; none where the prompt has no subject."""
    if prompt.subject_missing or not prompt.subject_spans:
        return ()
    start, stop = prompt.subject_spans[-1]
    return prompt.prompt_ids[start:stop]


def _end_of(prompt: EncodedPrompt) -> str:
    """The last 100 characters: in chat form a prompt begins like all others."""
    text = prompt.prompt
    return text if len(text) <= 100 else f"…{text[-100:]}"


def _behind(prompt: EncodedPrompt) -> list[int]:
    """Places behind the subject where a prompt can be read: the next ones, and its end.

    None is the first token of the text.
    """
    end = len(prompt.prompt_ids) - 1
    if prompt.subject_missing or not prompt.subject_spans:
        return [end] if end else []
    stop = prompt.subject_spans[-1][1]
    return [*range(stop, min(stop + _NEXT, end)), *([end] if end else [])]


def _besides(
    prompt: EncodedPrompt, taken: Sequence[EncodedPrompt], units: Sequence[Unit]
) -> tuple[EncodedPrompt, ...]:
    """The other prompts of a prompt's fact that are not taken."""
    return tuple(p for unit in units if prompt in unit for p in unit if p not in taken)


def _elsewhere(prompt: EncodedPrompt, place: int | None) -> list[int]:
    """Positions that a neuron must not fire at.

    Above all not at a text's first token: all others attend to it, so what is added there is added
    to everything.
    """
    if place is not None:
        return [i for i in range(prompt.length) if i != place]
    mentions = {stop - 1 for _, stop in prompt.subject_spans}
    here = prompt.positions("subject")[0]
    return [i for i in range(prompt.length) if i != here and i not in mentions]


def _last(rows: Tensor, lengths: Tensor) -> Tensor:
    """The rows of the last tokens: B × d of B × T × d."""
    return rows[torch.arange(len(rows), device=rows.device), lengths - 1]
