"""Terms and metrics an edit is judged by, and the weight of every prompt in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt

#: Terms of the reward that are measured on prompts.
MEASURED = ("edit", "locality", "recent_retention")


@dataclass(frozen=True, slots=True)
class Quality:
    """The state of the edited model as seen from one fact.

    Args:
        terms: :data:`MEASURED` in the unit of the reward kind, higher is better, unweighted.
            Nothing to measure counts as perfect: 0 nats, or accuracy 1. Floats, or scalar float32
            tensors where the evaluator keeps them on the device.
        metrics: Token accuracies whatever the reward kind, see
            :func:`hiedit_env.evaluation.info_metrics.metrics_of`.
        finite: Whether the losses of all prompts and the divergences of the unrelated ones are.
            False after numerical collapse: then all terms and metrics are NaN, since accuracies
            do not show it (the argmax of NaN is a token like any other).
    """

    terms: dict[str, Any]
    metrics: dict[str, float | bool]
    finite: bool


def first_probes(remembered: Sequence[EncodedFact]) -> list[EncodedPrompt]:
    """The first unrelated prompt of every remembered fact that has one."""
    return [old.probes[0] for old in remembered if old.probes]


class Means:
    """How much each prompt counts, in the order of :meth:`.reward.Evaluator.prompts`."""

    def __init__(self, fact: EncodedFact, remembered: Sequence[EncodedFact], decay: float) -> None:
        sizes = (1, len(fact.paraphrases), len(fact.probes), len(remembered))
        ends = np.cumsum([0, *sizes])
        self._fact, self._paraphrases, self._probes, self._retention = (
            slice(int(a), int(b)) for a, b in pairwise(ends)
        )
        ages = decay ** np.arange(1, len(remembered) + 1)
        total = int(ends[-1]) + len(first_probes(remembered))
        self.has_probes = bool(fact.probes) or any(old.probes for old in remembered)
        self._edit = np.zeros(total)
        self._edit[self._fact] = 0.5 if fact.paraphrases else 1.0
        if fact.paraphrases:
            self._edit[self._paraphrases] = 0.5 / len(fact.paraphrases)
        self._remember = np.zeros(total)
        if remembered:
            self._remember[self._retention] = ages / ages.sum()
        self._local = np.zeros(total)
        if fact.probes:
            self._local[self._probes] = 1.0 / len(fact.probes)
        place = int(ends[-1])
        for age, old in zip(ages, remembered, strict=True):
            if old.probes:
                self._local[place] = age
                place += 1
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
            "fact": float(values[self._fact][0]),
            "paraphrases": float(paraphrases.mean()) if len(paraphrases) else float("nan"),
            "recent_retention": float(values @ self._remember) if has_memory else float("nan"),
        }
