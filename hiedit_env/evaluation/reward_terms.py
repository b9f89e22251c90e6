"""Terms and metrics an edit is judged by, and the weight of every prompt in them.

An edit unit is one fact or several that one step edits. Each fact of it is judged as if it were
alone, against the same remembered facts, and the unit by the mean over its facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import numpy as np

from hiedit_env.evaluation.info_metrics import mean_of, metrics_of
from hiedit_env.model.encoded import AskedForm
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.reading import Reading

#: Terms of the reward that are measured on prompts.
MEASURED = ("edit", "locality", "recent_retention")
FORMS: tuple[AskedForm, ...] = get_args(AskedForm)

Metrics = dict[str, float | bool]


@dataclass(frozen=True, slots=True)
class UnitMetrics:
    """Token accuracies of an edit unit, see :func:`hiedit_env.evaluation.info_metrics.metrics_of`.

    Args:
        unit: Means over its facts.
        facts: Of every fact, in order.
        forms: Means over its facts of what is asked in one form; empty where that was not wanted.
    """

    unit: Metrics
    facts: tuple[Metrics, ...]
    forms: Mapping[AskedForm, Metrics] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quality:
    """The state of the edited model as seen from one edit unit.

    Args:
        terms: :data:`MEASURED` in the unit of the reward kind, higher is better, unweighted.
            Nothing to measure counts as perfect: 0 nats, or accuracy 1. Floats, or scalar float32
            tensors where the evaluator keeps them on the device.
        measured: Token accuracies whatever the reward kind.
        finite: Whether the losses of all prompts and the divergences of the unrelated ones are.
            False after numerical collapse: then all terms and metrics are NaN, since accuracies
            do not show it (the argmax of NaN is a token like any other).
    """

    terms: dict[str, Any]
    measured: UnitMetrics
    finite: bool

    @property
    def metrics(self) -> Metrics:
        """Those of the unit as a whole."""
        return self.measured.unit


class Memory:
    """How much the prompts of remembered facts count, the same for every fact of a unit.

    Args:
        remembered: Facts edited before, latest first.
        decay: Weight of a fact per step of age.
        start: Number of prompts that stand before those of the remembered facts.

    Attributes:
        retention: Weights that add up to 1, one per prompt; all 0 where nothing is remembered.
        locality: Weights of the first unrelated prompts; those of a fact add up to its own weight.
    """

    def __init__(self, remembered: Sequence[EncodedFact], decay: float, start: int) -> None:
        ages = decay ** np.arange(1, len(remembered) + 1)
        counts = [len(old.prompts) for old in remembered]
        first = start + sum(counts)
        total = first + sum(len(old.first_probes) for old in remembered)
        self.retention, self.locality = np.zeros(total), np.zeros(total)
        if remembered:
            self.retention[start:first] = np.repeat(ages / ages.sum() / counts, counts)
        place = first
        for age, old in zip(ages, remembered, strict=True):
            count = len(old.first_probes)
            if count:
                self.locality[place : place + count] = age / count
            place += count


class Means:
    """How much each prompt counts for one fact, in the order of :func:`prompts_of`.

    Args:
        prompts: Where the fact's own prompts stand.
        paraphrases: Where its paraphrases stand.
        probes: Where its unrelated prompts stand.
        memory: Of the remembered facts.
    """

    def __init__(self, prompts: slice, paraphrases: slice, probes: slice, memory: Memory) -> None:
        self._prompts, self._paraphrases = prompts, paraphrases
        sizes = [part.stop - part.start for part in (prompts, paraphrases, probes)]
        self._edit = np.zeros(len(memory.retention))
        self._edit[prompts] = (0.5 if sizes[1] else 1.0) / sizes[0]
        if sizes[1]:
            self._edit[paraphrases] = 0.5 / sizes[1]
        self._remember = memory.retention
        self._local = memory.locality.copy()
        if sizes[2]:
            self._local[probes] = 1.0 / sizes[2]
        self.has_probes = bool(self._local.any())
        if self.has_probes:
            self._local /= self._local.sum()

    def coefficients(self) -> dict[str, np.ndarray]:
        """Coefficient of every prompt in each of :data:`MEASURED`."""
        return {"edit": self._edit, "locality": self._local, "recent_retention": self._remember}

    def locality(self, values: np.ndarray) -> float:
        """Weighted mean over unrelated prompts; NaN where there are none."""
        return float(values @ self._local) if self.has_probes else float("nan")

    def split(self, values: np.ndarray) -> dict[str, float]:
        """Means over the fact, its paraphrases and the remembered prompts; NaN where none."""
        paraphrases = values[self._paraphrases]
        has_memory = self._remember.any()
        return {
            "fact": float(values[self._prompts].mean()),
            "paraphrases": float(paraphrases.mean()) if len(paraphrases) else float("nan"),
            "recent_retention": float(values @ self._remember) if has_memory else float("nan"),
        }


def prompts_of(
    unit: Sequence[EncodedFact], remembered: Sequence[EncodedFact]
) -> list[EncodedPrompt]:
    """All that a unit is judged by.

    The facts' own prompts, their paraphrases, their unrelated prompts, then the remembered facts'
    own prompts and their first unrelated ones: in this order, each fact after fact.
    """
    return [
        *(prompt for fact in unit for prompt in fact.prompts),
        *(prompt for fact in unit for prompt in fact.paraphrases),
        *(prompt for fact in unit for prompt in fact.probes),
        *(prompt for old in remembered for prompt in old.prompts),
        *first_probes(remembered),
    ]


def first_probes(remembered: Sequence[EncodedFact]) -> list[EncodedPrompt]:
    """The first unrelated prompt of every remembered fact that has one, in every form."""
    return [prompt for old in remembered for prompt in old.first_probes]


def means_of(
    unit: Sequence[EncodedFact], remembered: Sequence[EncodedFact], decay: float
) -> list[Means]:
    """How much each of :func:`prompts_of` counts, fact by fact."""
    kinds = [[fact.prompts, fact.paraphrases, fact.probes] for fact in unit]
    sizes = [len(kinds[i][kind]) for kind in range(3) for i in range(len(unit))]
    ends = np.cumsum([0, *sizes])
    places = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    memory = Memory(remembered, decay, int(ends[-1]))
    count = len(unit)
    return [
        Means(places[i], places[count + i], places[2 * count + i], memory) for i in range(count)
    ]


def measure(
    unit: Sequence[EncodedFact],
    means: Sequence[Means],
    correct: np.ndarray,
    equal: np.ndarray,
    greedy: np.ndarray,
) -> tuple[Metrics, ...]:
    """The token accuracies of every fact of a unit.

    Args:
        unit: F facts.
        means: Of :func:`means_of`.
        correct: Token accuracy of :func:`prompts_of`.
        equal: Share of equal argmaxes there, for unrelated prompts.
        greedy: Token accuracy of the unedited model's greedy answers to the unit's unrelated
            prompts.
    """
    found: list[Metrics] = []
    start = 0
    for fact, mean in zip(unit, means, strict=True):
        own = greedy[start : start + len(fact.probes)]
        start += len(fact.probes)
        accuracy = mean.split(correct)
        found.append(
            metrics_of(
                efficacy=accuracy["fact"],
                generalization=accuracy["paraphrases"],
                agreement=float(own.mean()) if len(own) else np.nan,
                argmax_match=mean.locality(equal),
                recent_retention=accuracy["recent_retention"],
            )
        )
    return tuple(found)


def measure_forms(
    unit: Sequence[EncodedFact],
    remembered: Sequence[EncodedFact],
    decay: float,
    correct: np.ndarray,
    equal: np.ndarray,
    greedy: np.ndarray,
) -> dict[AskedForm, Metrics]:
    """Means over the facts of a unit of what is asked in one form, by form.

    Args:
        unit: F facts.
        remembered: Facts edited before, latest first.
        decay: Weight of a remembered fact per step of age.
        correct: As for :func:`measure`.
        equal: As there.
        greedy: As there.
    """
    places = {prompt: i for i, prompt in enumerate(prompts_of(unit, remembered))}
    probes = [probe for fact in unit for probe in fact.probes]
    found: dict[AskedForm, Metrics] = {}
    for form in FORMS:
        own, old = _in_form(unit, form), _in_form(remembered, form)
        rows = np.array([places[prompt] for prompt in prompts_of(own, old)], np.int64)
        shares = np.array([x for x, p in zip(greedy, probes, strict=True) if p.form == form])
        means = means_of(own, old, decay) if own else []
        found[form] = mean_of(measure(own, means, correct[rows], equal[rows], shares))
    return found


def _in_form(facts: Sequence[EncodedFact], form: AskedForm) -> list[EncodedFact]:
    found = (fact.in_form(form) for fact in facts)
    return [fact for fact in found if fact is not None]


def as_read(unit: Sequence[EncodedFact], reading: Reading, by_form: bool) -> UnitMetrics:
    """What a reading alone says: the efficacy of the unit, its facts and their forms.

    Args:
        unit: F facts.
        reading: Of their own prompts, fact after fact.
        by_form: Whether forms are told apart.
    """
    pairs = list(zip(reading.prompts, reading.accuracies, strict=True))
    facts: list[Metrics] = []
    parts: dict[AskedForm, list[Metrics]] = {form: [] for form in FORMS if by_form}
    start = 0
    for fact in unit:
        own = pairs[start : start + len(fact.prompts)]
        start += len(fact.prompts)
        facts.append(metrics_of(efficacy=float(np.mean([share for _, share in own]))))
        for form, found in parts.items():
            shares = [share for prompt, share in own if prompt.form == form]
            if shares:
                found.append(metrics_of(efficacy=float(np.mean(shares))))
    return UnitMetrics(mean_of(facts), tuple(facts), {f: mean_of(m) for f, m in parts.items()})


def not_measured(count: int, by_form: bool) -> UnitMetrics:
    """Nothing is known of a unit of some facts."""
    forms = {form: metrics_of() for form in FORMS if by_form}
    return UnitMetrics(metrics_of(), tuple(metrics_of() for _ in range(count)), forms)
