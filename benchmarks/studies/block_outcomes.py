"""Outcomes of recorded choices of a block, on two halves of each fact's prompts.

What is chosen by noise is not there again on other prompts. So the prompts of a fact are parted:
the first half has the fact in the first form it was asked in and every second paraphrase and
unrelated prompt from the first one on, the other half the fact in the last form and the others. An
oracle chooses on one half and is scored on the other, and the two ways round are averaged; whoever
chooses without looking at outcomes is scored on both.

The outcome of a half is the harmonic mean of its three parts: fact, paraphrases, agreement. They
are read in two ways: ``generated`` (greedy continuations that are the answer; tokens of the
unedited model's own answers that are still the argmax) and ``smooth``, with less noise
(probabilities per token, as geometric means over an answer; of unrelated prompts over the unedited
model's, at most 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hiedit_benchmarks.studies.block_records import FactRecord, Measured
from hiedit_env.errors import SettingsError

Reading = Literal["smooth", "generated"]
READINGS: tuple[Reading, ...] = ("smooth", "generated")
#: Names of the three parts of an outcome.
PARTS = ("fact", "paraphrases", "agreement")


@dataclass(frozen=True, slots=True)
class OutcomeTable:
    """N facts with M options each.

    Args:
        parts: N × 2 × (M + 1) × 3 in [0, 1]: by half, option and part; the last option is no edit.
        outcomes: N × 2 × (M + 1), harmonic means of the parts.
        facts: N × G, what is seen of a fact before the choice.
        options: N × M × F, what is seen of an option before the choice.
        option_names: F names.
        relations: N.
        is_train: N bool, whether a fact is there to learn from.
        costs: N × (M + 1) × 2: share of control prompts at which what is written fires; seconds.
    """

    parts: NDArray[np.float64]
    outcomes: NDArray[np.float64]
    facts: NDArray[np.float64]
    options: NDArray[np.float64]
    option_names: tuple[str, ...]
    relations: NDArray[np.str_]
    is_train: NDArray[np.bool_]
    costs: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def whole(self) -> NDArray[np.float64]:
        """N × M, mean outcome of both halves, without no edit."""
        found: NDArray[np.float64] = self.outcomes[:, :, :-1].mean(1)
        return found


def outcome_table(records: Sequence[FactRecord], reading: Reading) -> OutcomeTable:
    """The outcomes of records.

    Args:
        records: Of one study, so that all have the same options and numbers.
        reading: How the parts are read.

    Raises:
        SettingsError: no records, or one without two paraphrases and two unrelated prompts, which
            names the fact.
    """
    if not records:
        raise SettingsError("there are no recorded facts yet")
    for record in records:
        if min(len(record.before.paraphrases), len(record.before.neighbours)) < 2:
            raise SettingsError(
                f"{record.prompt!r} has fewer than two paraphrases or unrelated prompts, so it "
                "cannot be parted into halves; record with --paraphrases 2 --neighbours 2 or more"
            )
    parts = np.array(
        [
            [
                [half_of(m, half, reading) for m in (*(o.measured for o in r.options), r.before)]
                for half in (0, 1)
            ]
            for r in records
        ]
    )
    names = tuple(records[0].seen_of_options[0])
    return OutcomeTable(
        parts,
        harmonic(parts),
        np.array([list(r.seen.values()) for r in records]),
        np.array([[[o[name] for name in names] for o in r.seen_of_options] for r in records]),
        names,
        np.array([r.relation for r in records]),
        np.array([r.role == "train" for r in records]),
        np.array([[*((o.fires, o.seconds) for o in r.options), (0.0, 0.0)] for r in records]),
    )


def half_of(measured: Measured, half: int, reading: Reading) -> tuple[float, float, float]:
    """Fact, paraphrases and agreement on one half of the prompts, each in [0, 1].

    >>> once = [0.0, 1.0]
    >>> given = Measured([once, [2.0, 0.0]], [[once], [[1.0, 0.0]]], [[[0.5, 0.8]], [once]])
    >>> half_of(given, 0, "generated"), half_of(given, 1, "generated")
    ((1.0, 1.0, 0.8), (0.0, 0.0, 1.0))
    """
    fact = [measured.fact[-half]]  # the first form, or the last one
    paraphrases = [form for one in measured.paraphrases[half::2] for form in one]
    neighbours = [form for one in measured.neighbours[half::2] for form in one]
    if reading == "generated":
        found = [np.mean([x[1] for x in group]) for group in (fact, paraphrases, neighbours)]
    else:
        found = [np.mean(np.exp([-x[0] for x in group])) for group in (fact, paraphrases)]
        found.append(np.mean(np.exp([min(0.0, -x[0]) for x in neighbours])))
    return float(found[0]), float(found[1]), float(found[2])


def harmonic(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Harmonic mean over the last axis; 0 where any is 0.

    >>> harmonic(np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.5, 1.0, 1.0]])).tolist()
    [1.0, 0.0, 0.75]
    """
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = parts.shape[-1] / (1 / parts).sum(-1)
    return found


@dataclass(frozen=True, slots=True)
class Interaction:
    """How much the outcome depends on the pair of fact and option.

    Args:
        of_options: Variance of the options' means.
        of_pairs: Mean variance that fact and option do not explain each by itself, of one half.
        correlation: Of that remainder between the halves; the share of ``of_pairs`` that is not
            noise of the prompts.
    """

    of_options: float
    of_pairs: float
    correlation: float


def interaction(outcomes: NDArray[np.float64]) -> Interaction:
    """The parts of the variance of N × 2 × M outcomes (no edit left out).

    >>> pairs = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> found = interaction(np.stack([pairs, pairs], 1))
    >>> found.of_options, found.of_pairs, round(found.correlation, 6)
    (0.0, 0.25, 1.0)
    """
    means = outcomes.mean((0, 1))
    rest = outcomes - outcomes.mean(2, keepdims=True) - outcomes.mean(0, keepdims=True)
    rest = rest + outcomes.mean((0, 2))[None, :, None]
    first, second = rest[:, 0].ravel(), rest[:, 1].ravel()
    scale = float(np.sqrt(np.square(first).mean() * np.square(second).mean()))
    return Interaction(
        float(means.var()),
        float(np.square(rest).mean()),
        float((first * second).mean() / scale) if scale > 0 else 0.0,
    )
