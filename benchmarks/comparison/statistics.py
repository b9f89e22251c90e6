"""Statistics of a comparison: means over seeds, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from hiedit_benchmarks.comparison.results import UNEDITED, Row
from hiedit_env.evaluation.names import METRICS

#: Measures of a summary, by name, and where a row holds the value of each.
MEASURES: Mapping[str, tuple[str, ...]] = {
    "efficacy": ("metrics", "efficacy", "token_accuracy"),
    "generalization": ("metrics", "generalization", "token_accuracy"),
    "specificity": ("metrics", "specificity", "token_accuracy"),
    "retention": ("metrics", "retention", "token_accuracy"),
    "average": ("average",),
    "exact_match": ("metrics", "efficacy", "exact_match"),
    "generated": ("metrics", "efficacy", "generation"),
    "right_after": ("metrics", "efficacy_right_after", "token_accuracy"),
    "forgetting": ("metrics", "forgetting"),
    "agreement": ("metrics", "specificity", "agreement"),
    "regret": ("metrics", "regret"),
    "one_step_regret": ("metrics", "one_step_regret"),
    "true_layer_share": ("metrics", "true_layer_share"),
    "true_layer_exact_share": ("metrics", "true_layer_exact_share"),
    "layers_per_edit": ("layers_per_edit",),
    "steps_per_edit": ("steps_per_edit",),
    "seconds_per_edit": ("seconds_per_edit",),
}
#: Agent → measure → ``{"mean", "half_width", "seeds"}``.
Summary = Mapping[str, Mapping[str, Mapping[str, float | None]]]
#: Agent → measure → ``{"difference", "low", "high"}``.
PairedDifferences = Mapping[str, Mapping[str, Mapping[str, float]]]

#: Measures of which paired differences are taken: metric and reading of a run's per-fact numbers.
PAIRED: Mapping[str, tuple[str, str]] = {
    **{metric: (metric, "token_accuracy") for metric in METRICS},
    "agreement": ("specificity", "agreement"),
    "exact_match": ("efficacy", "exact_match"),
    "generated": ("efficacy", "generation"),
}
RESAMPLES = 2000


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the 95 % confidence interval (Student's t); None for a single value.

    >>> mean, half = t_interval([1.0, 2.0, 3.0])  # 4.303 · 1 / √3
    >>> mean, round(half, 4)
    (2.0, 2.4841)
    """
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    quantile = float(stdtrit(len(array) - 1, 0.975))
    return float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(len(array))


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Means over seeds with 95 % intervals; a measure without any value is absent.

    Args:
        rows: See :class:`~hiedit_benchmarks.comparison.results.ResultsFolder`.

    Returns:
        Agent → measure → ``{"mean", "half_width", "seeds"}``.
    """
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for agent in dict.fromkeys(row["agent"] for row in rows):
        measures: dict[str, dict[str, float | None]] = {}
        for measure, path in MEASURES.items():
            found = [_value(row, path) for row in rows if row["agent"] == agent]
            values = [value for value in found if value is not None]
            if values:
                mean, half = t_interval(values)
                measures[measure] = {"mean": mean, "half_width": half, "seeds": len(values)}
        summary[agent] = measures
    return summary


def baseline_of(agents: Sequence[str]) -> str | None:
    """The agent that the others are compared with: ``all-layers``, else the first that edits."""
    edited = [agent for agent in agents if agent != UNEDITED]
    if "all-layers" in edited:
        return "all-layers"
    return edited[0] if edited else None


def paired_differences(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Ours minus theirs on the same facts, with 95 % bootstrap intervals.

    The bootstrap has two levels: it draws seeds with replacement, then facts within each drawn
    seed (``RESAMPLES`` resamples, percentile intervals). ``scipy.stats.bootstrap`` draws from one
    level only; with one seed the two agree, and the interval then speaks of that stream only.

    Args:
        ours: Per seed, the ``per_fact`` numbers of a run.
        theirs: The same seeds in the same order, so the same facts.
        seed: Seeds the resampling.

    Returns:
        Measure of :data:`PAIRED`, and ``average`` of the four metrics → ``{"difference", "low",
        "high"}`` in percentage points; measures without numbers are absent.
    """
    names = [
        name
        for name, (metric, reading) in PAIRED.items()
        if all(_known(run, metric, reading) for run in (*ours, *theirs))
    ]
    differences = [
        np.stack([_array(a, name) - _array(b, name) for name in names], axis=1)
        for a, b in zip(ours, theirs, strict=True)
    ]
    generator = np.random.default_rng(seed)
    point = np.mean([_means(d, np.ones((1, len(d)))) for d in differences], axis=0)[0]
    drawn = np.zeros((RESAMPLES, len(names)))
    seeds = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    for chosen in seeds.T:
        for i, d in enumerate(differences):
            rows = np.flatnonzero(chosen == i)
            counts = generator.multinomial(len(d), np.full(len(d), 1 / len(d)), size=len(rows))
            drawn[rows] += _means(d, counts.astype(float)) / len(differences)
    result = {name: _interval(point[k], drawn[:, k]) for k, name in enumerate(names)}
    four = [names.index(metric) for metric in METRICS if metric in names]
    if len(four) == len(METRICS):
        result["average"] = _interval(point[four].mean(), drawn[:, four].mean(axis=1))
    return result


def _interval(point: float, drawn: NDArray[np.float64]) -> dict[str, float]:
    finite = drawn[np.isfinite(drawn)]
    low, high = np.percentile(finite, (2.5, 97.5)) if len(finite) else (np.nan, np.nan)
    return {"difference": float(point), "low": float(low), "high": float(high)}


def _means(values: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of F × M values with B × F counts over the facts that have one; B × M."""
    known = np.isfinite(values)
    totals = counts @ known
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = (counts @ np.where(known, values, 0.0)) / totals
    return means


def _known(run: Mapping[str, Any], metric: str, reading: str) -> bool:
    values = run[metric].get(reading)
    return values is not None and any(value is not None for value in values)


def _array(run: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    metric, reading = PAIRED[name]
    return np.array([np.nan if v is None else v for v in run[metric][reading]], np.float64)


def _value(row: Row, path: Sequence[str]) -> float | None:
    if path == ("average",):
        four = [row["metrics"][metric]["token_accuracy"] for metric in METRICS]
        return None if any(value is None for value in four) else float(np.mean(four))
    value: Any = row
    for key in path:
        value = value.get(key)
        if value is None:
            return None
    return float(value)
