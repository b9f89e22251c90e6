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
from hiedit_agents.hierarchy.other_names import with_other_names
from hiedit_agents.hierarchy.other_sentences import other_sentences
from hiedit_agents.hierarchy.reading_places import (
    beginnings,
    behind,
    elsewhere,
    subject_ids,
    where_met,
)
from hiedit_agents.hierarchy.rewordings import behind_leads, rewordings
from hiedit_env.errors import HieditWarning
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM

#: Smallest threshold, in order not to fire where nothing was asked.
LOWEST = 0.3

#: Smallest score of a fact's own prompts at which the threshold is the usual one.
_USUAL = 0.9

#: How far the threshold is above the score of an earlier fact's token.
_ABOVE = 0.05

#: What the usual threshold is multiplied by where a neuron has read the subject in its own prompts
#: alone, neither in rewordings nor behind other words.
#: SmolLM2, block 7: paraphrases score less than 0.75 for 22 % of such neurons, for 3 % of others.
_UNSURE = 2 / 3

#: Threshold of a neuron for a single prompt, whose own score is 1 whatever stands around it.
#: SmolLM2, block 7: a subject of one token that begins a text has a spread of 3.8 to 4.1 over √d,
#: the next token 1.3, the prompt's end 2.6 to 2.8.
_ALONE = 0.7

#: Score from which a neuron is kept from a token of an earlier fact; how many tokens are looked at.
_NEAR, _ALIKE = 0.25, 32

#: How much the reading of an earlier fact's token counts, over d, where all tokens elsewhere
#: together count 1; tried from the first on. The neuron of one river (SmolLM2, block 7) has a score
#: of 0.2, 0.4 and 0.6 at another one with 6, 1.7 and 0.6, for spreads of 1.4, 1.25 and 1.1 over √d,
#: and of 0.86 for 0.84 without.
_WEIGHTS = (6.0, 3.0, 1.5, 0.7)

#: The same for other names that end in the subject's last token. For "Hull Glacier" (SmolLM2, block
#: 7) eight further glaciers score 0.99 at most without these names, 0.79, 0.65 and 0.54 with 0.1,
#: 0.3 and 0.7, for spreads of 0.73, 1.43, 1.85 and 2.14 over √d.
_NAME_WEIGHTS = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.0)

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
        rewordings: The fact in other words, which the value is sought for as well.
        kept: Sentences that ask something else about the subject, up to it; what follows stands as
            their answers. In them the model is to say what it says without the neuron.
    """

    fact: tuple[int, ...]
    home: int
    prompts: tuple[EncodedPrompt, ...]
    shape: NeuronShape
    rewordings: tuple[EncodedPrompt, ...] = ()
    kept: tuple[EncodedPrompt, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """What one MLP reads, each … × d float32.

    Args:
        own: Where a neuron is to fire, in the prompts and in rewordings.
        others: At the other tokens of the same prompts.
        named: At other names that end in the subject's last token, or that are asked the same.
        alike: In earlier facts and their answers, at tokens that it would fire at.
        reworded: Whether there are rewordings among them.
    """

    own: Tensor
    others: Tensor
    named: Tensor
    alike: Tensor
    reworded: bool = False

    @property
    def weights(self) -> tuple[float, ...]:
        """How much the other names may count, most first; once 0 where there are none."""
        return _NAME_WEIGHTS if len(self.named) else (0.0,)


@dataclass(frozen=True, slots=True)
class ShapeForm:
    """What all neurons have in common.

    Args:
        threshold, sharpness: As of :class:`NeuronShape`.
        names: Largest number of other names that each is kept from.
        widest: Largest spread of a score at that threshold, over 1/√d.
        reworded: Whether neurons are made for rewordings of their facts as well.
        kept: Whether what is said otherwise about their subjects is kept.
    """

    threshold: float
    sharpness: float
    names: int
    widest: float
    reworded: bool = True
    kept: bool = True


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

        One that reads all prompts of a fact at the subject does not fire in earlier facts and their
        answers where the subject's last token stands, as it does in the names of two rivers. A
        prompt in which nothing can be told from what is read elsewhere has none.

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
            others = [u for u in known if subject_of(self._llm, u[0]) != name]
            alike = where_met(subject_ids(prompts[0])[-1:], others, _ALIKE)
            known.append(tuple(prompts))
            same = [u for u in past if subject_of(self._llm, u[0]) == name]
            earlier = [p for unit in same[max(0, len(same) - companions) :] for p in unit]
            # What a text begins with reads like every text's beginning.
            inside = [p for p in prompts if p.positions("subject")[0] > 0]
            groups = [inside] if inside else []
            if inside:
                place = home(inside[0].prompt_ids)
                sentences = self._reworded(units, inside)
                led = self._behind_leads(units, inside)
                # Sentences in which the subject reads too differently are left out.
                shape = None
                for read in dict.fromkeys(((*sentences, *led), sentences, led, ())):
                    rows = self._rows(capture, place, inside, starts, alike, read)
                    shape = self._firm(place, rows)
                    if shape is not None:
                        break
                if shape is not None:
                    own = (*inside, *earlier)
                    kept = self._others((*units, *same), own)
                    found.append(Target(inside[0].prompt_ids, place, own, shape, sentences, kept))
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
                    sentences = self._reworded(units, [prompt], one.prompts)
                    # Sentences end at their subjects, where a neuron that reads behind is silent.
                    here = one.prompts == (prompt,)
                    kept = self._others(units, [prompt]) if here else ()
                    found.append(replace(one, rewordings=sentences, kept=kept))
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

        Behind it, at the token where other names may count most, and of several such at the one
        that is read least like what is read elsewhere. None where all are read like much else,
        since it would fire everywhere.
        """
        if prompt.positions("subject")[0] > 0:
            rows = self._rows(capture, home, [prompt], starts, alike)
            for names in rows.weights:
                shape = self._shape(home, rows, names)
                if self._is_apart(shape):
                    return Target(prompt.prompt_ids, home, (prompt,), shape)
        apart = []
        for place in behind(prompt):
            # Its spans stay known, for other names in their place.
            rows = self._rows(capture, home, [prompt], starts, place=place)
            most = float(self._mlps[home].hidden)
            for names in (most, *_WEIGHTS) if len(rows.named) else (0.0,):
                shape = self._shape(home, rows, names)
                shape = replace(shape, threshold=max(_ALONE, shape.threshold))
                if self._is_apart(shape):
                    apart.append((-names, shape.detector.spread, place, shape))
                    break
        if not apart:
            return None
        *_, place, shape = min(apart, key=lambda one: one[:3])
        moved = replace(prompt, subject_spans=((place, place + 1),), subject_missing=True)
        return Target(prompt.prompt_ids, home, (moved,), shape)

    def _reworded(
        self,
        units: Sequence[Unit],
        taken: Sequence[EncodedPrompt],
        read: Sequence[EncodedPrompt] = (),
    ) -> tuple[EncodedPrompt, ...]:
        """The facts of some prompts in other words, in the forms of these prompts.

        Args:
            units: All prompts by fact.
            taken: The prompts that one neuron answers.
            read: They as it reads them, where that is another place; whose words are not known.
        """
        found: list[EncodedPrompt] = []
        for unit in units if self._form.reworded else ():
            own = [p for p in unit if p in taken]
            forms = tuple(dict.fromkeys(p.form for p in own))
            words = (*(p for p in unit if p not in taken), *(read or own))
            found += rewordings(self._llm.encoder, words, forms) if own else []
        return tuple(found)

    def _others(
        self, units: Sequence[Unit], taken: Sequence[EncodedPrompt]
    ) -> tuple[EncodedPrompt, ...]:
        """Other sentences about the subject of some prompts, in the forms of these prompts."""
        own = [p for unit in units if any(p in taken for p in unit) for p in unit]
        forms = tuple(dict.fromkeys(p.form for p in taken))
        made = other_sentences(self._llm.encoder, own, forms) if self._form.kept else []
        return tuple(made)

    def _behind_leads(
        self, units: Sequence[Unit], taken: Sequence[EncodedPrompt]
    ) -> tuple[EncodedPrompt, ...]:
        """The subject of some prompts behind other words, for what a neuron reads alone.

        Facts about one subject have one neuron, so what any of them gives counts.
        """
        own = [unit for unit in units if self._form.reworded and any(p in taken for p in unit)]
        return tuple(one for unit in own for one in behind_leads(self._llm.encoder, unit))

    def _firm(self, home: int, rows: _Rows) -> NeuronShape | None:
        """The first shape that is apart and fires in all own prompts; None where there is none.

        A token of an earlier fact counts as much as it can, and the threshold is put above its
        score if need be; then other names with the subject's last token do.
        """
        for weight in (*(_WEIGHTS if len(rows.alike) else ()), 0.0):
            for names in rows.weights:
                shape = self._shape(home, rows, names, weight)
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
        sentences: Sequence[EncodedPrompt] = (),
        place: int | None = None,
    ) -> _Rows:
        """What an MLP reads at the subjects, or at one place, of some prompts, and elsewhere.

        The sentences, which the capture does not have, are read up to their subjects.
        """
        mlp = self._mlps[home]
        keys = capture.keys[mlp.gate.layer]
        here = [p.positions("subject")[0] if place is None else place for p in prompts]
        own = keys[[starts[p] + at for p, at in zip(prompts, here, strict=True)]].float()
        own = torch.cat((own, self._ends(mlp, beginnings(sentences, prompts))))
        others = keys[[starts[p] + i for p in prompts for i in elsewhere(p, place)]].float()
        tokenizer, number = self._llm.tokenizer, self._form.names
        named = self._ends(mlp, with_other_names(tokenizer, prompts[0], place, number))
        near = self._ends(mlp, alike)
        if len(near):
            detector = self._readings[home].detector(own, others)
            near = near[detector.scores(near) > _NEAR]
        return _Rows(own, others, named, near, bool(sentences))

    def _shape(self, home: int, rows: _Rows, names: float, weight: float = 0.0) -> NeuronShape:
        mlp, form, known = self._mlps[home], self._form, self._readings[home]
        both = (names, rows.named), (weight, rows.alike)
        kept = [(much, found) for much, found in both if much and len(found)]
        others = [rows.others]
        for much, found in kept:
            others.append(known.mean + math.sqrt(much / mlp.hidden) * (found - known.mean))
        if len(rows.own) > 1:
            # What the own readings differ in, as plain and chat form do, has no part in the score.
            others.append(known.mean + rows.own - rows.own.mean(0))
        detector = known.detector(rows.own, torch.cat(others))
        lowest = float(detector.scores(rows.own).min())
        # Without rewordings, it is not known how much less the subject scores in them.
        usual = form.threshold * (1 if rows.reworded else _UNSURE)
        threshold = min(usual, max(usual * lowest / _USUAL, LOWEST))
        for _, found in kept:
            highest = float(detector.scores(found).max()) + _ABOVE
            threshold = max(threshold, min(highest, (1 + usual) / 2))
        return NeuronShape(mlp, detector, rows.own.mean(0), threshold, form.sharpness)

    def _ends(self, mlp: CandidateMLP, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """What an MLP reads at the last token of P prompts: P × d float32."""
        if not prompts:
            return torch.zeros(0, mlp.hidden, device=self._llm.device)
        batches = inputs(self._llm, [mlp.gate.layer], prompts)
        with torch.inference_mode():
            return torch.cat([_last(read, part.lengths).float() for part, (read,) in batches])

    def _is_apart(self, shape: NeuronShape) -> bool:
        """Whether what the neuron fires at is as far from what is read elsewhere as usual.

        A neuron with a lower threshold has to be further away.
        """
        usual = self._form.widest / math.sqrt(shape.mlp.hidden)
        return shape.detector.spread < usual * shape.threshold / self._form.threshold


def _end_of(prompt: EncodedPrompt) -> str:
    """The last 100 characters: in chat form a prompt begins like all others."""
    text = prompt.prompt
    return text if len(text) <= 100 else f"…{text[-100:]}"


def _last(rows: Tensor, lengths: Tensor) -> Tensor:
    """The rows of the last tokens: B × d of B × T × d."""
    return rows[torch.arange(len(rows), device=rows.device), lengths - 1]
