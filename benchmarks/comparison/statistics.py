"""Statistics of a comparison: means over seeds, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from hiedit_benchmarks.comparison.results import UNEDITED, Row
from hiedit_env.evaluation.names import METRICS, AskedForm, metric_in, portability_of

#: Measures of a summary, by name, and where a row holds the value of each.
MEASURES: Mapping[str, tuple[str, ...]] = {
    "efficacy": ("metrics", "efficacy", "token_accuracy"),
    "generalization": ("metrics", "generalization", "token_accuracy"),
    "specificity": ("metrics", "specificity", "token_accuracy"),
    "retention": ("metrics", "retention", "token_accuracy"),
    "average": ("average",),
    "exact_match": ("metrics", "efficacy", "exact_match"),
    "generated": ("metrics", "efficacy", "generation"),
    "paraphrases_generated": ("metrics", "generalization", "generation"),
    "harmonic_mean": ("harmonic_mean",),
    "right_after": ("metrics", "efficacy_right_after", "token_accuracy"),
    "forgetting": ("metrics", "forgetting"),
    "agreement": ("metrics", "specificity", "agreement"),
    "neighbour_agreement": ("metrics", "neighbours", "agreement"),
    "unrelated_agreement": ("metrics", "unrelated", "agreement"),
    "portability": ("metrics", "portability", "token_accuracy"),
    "portability_generated": ("metrics", "portability", "generation"),
    "chat_generated": ("metrics", "chat_efficacy", "generation"),
    "chat_paraphrases_generated": ("metrics", "chat_generalization", "generation"),
    "chat_harmonic_mean": ("chat_harmonic_mean",),
    "chat_agreement": ("metrics", "chat_specificity", "agreement"),
    "chat_neighbour_agreement": ("metrics", "chat_neighbours", "agreement"),
    "chat_portability_generated": ("metrics", "chat_portability", "generation"),
    "chat_efficacy": ("metrics", "chat_efficacy", "token_accuracy"),
    "chat_generalization": ("metrics", "chat_generalization", "token_accuracy"),
    "chat_specificity": ("metrics", "chat_specificity", "token_accuracy"),
    "chat_retention": ("metrics", "chat_retention", "token_accuracy"),
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
    "paraphrases_generated": ("generalization", "generation"),
    "neighbour_agreement": ("neighbours", "agreement"),
    "unrelated_agreement": ("unrelated", "agreement"),
    "portability": ("portability", "token_accuracy"),
    "portability_generated": ("portability", "generation"),
    "chat_efficacy": ("chat_efficacy", "token_accuracy"),
    "chat_generalization": ("chat_generalization", "token_accuracy"),
    "chat_generated": ("chat_efficacy", "generation"),
    "chat_paraphrases_generated": ("chat_generalization", "generation"),
    "chat_agreement": ("chat_specificity", "agreement"),
    "chat_neighbour_agreement": ("chat_neighbours", "agreement"),
}
#: Harmonic means by name, and the form that they are of.
_HARMONIC: Mapping[str, AskedForm] = {"harmonic_mean": "plain", "chat_harmonic_mean": "chat"}
#: What the measures of single kinds of portability begin with, and the reading of each.
PORTABILITY: Mapping[str, str] = {
    "portability": "token_accuracy",
    "portability_generated": "generation",
}
#: What the names of their metrics begin with.
PREFIX = portability_of("")
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


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of numbers ≥ 0: 0 if one of them is, NaN if one is.

    >>> harmonic_mean([100.0, 50.0, 25.0]), harmonic_mean([100.0, 0.0])
    (42.857142857142854, 0.0)
    """
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Means over seeds with 95 % intervals; a measure without any value is absent.

    Args:
        rows: See :class:`~hiedit_benchmarks.comparison.results.ResultsFolder`.

    Returns:
        Agent → measure of :data:`MEASURES`, or ``portability/KIND`` and
        ``portability_generated/KIND`` → ``{"mean", "half_width", "seeds"}``.
    """
    paths = {**MEASURES, **_kinds_of_portability(rows)}
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for agent in dict.fromkeys(row["agent"] for row in rows):
        measures: dict[str, dict[str, float | None]] = {}
        for measure, path in paths.items():
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
        Measure of :data:`PAIRED`, ``average`` of the four metrics, and ``harmonic_mean`` (of the
        stream's means, so not a mean over facts) → ``{"difference", "low", "high"}`` in percentage
        points; measures without numbers are absent.
    """
    names = [
        name
        for name, (metric, reading) in PAIRED.items()
        if all(_known(run, metric, reading) for run in (*ours, *theirs))
    ]
    pairs = list(zip(ours, theirs, strict=True))
    differences = [
        np.stack([_array(a, *PAIRED[name]) - _array(b, *PAIRED[name]) for name in names], axis=1)
        for a, b in pairs
    ]
    harmonic = {
        name: [(_thirds(a, form), _thirds(b, form)) for a, b in pairs]
        for name, form in _HARMONIC.items()
        if all(all(_known(run, *part) for part in _parts(run, form)) for run in (*ours, *theirs))
    }
    columns = [*names, *harmonic]
    generator = np.random.default_rng(seed)

    def means(i: int, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """B × columns: the differences of one seed with B draws of its facts."""
        further = [
            _harmonic_means(_means(pair[i][0], counts))
            - _harmonic_means(_means(pair[i][1], counts))
            for pair in harmonic.values()
        ]
        return np.column_stack([_means(differences[i], counts), *further])

    everything = [means(i, np.ones((1, len(d)))) for i, d in enumerate(differences)]
    point = np.mean(everything, axis=0)[0]
    drawn = np.zeros((RESAMPLES, len(columns)))
    seeds = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    for chosen in seeds.T:
        for i, d in enumerate(differences):
            rows = np.flatnonzero(chosen == i)
            counts = generator.multinomial(len(d), np.full(len(d), 1 / len(d)), size=len(rows))
            drawn[rows] += means(i, counts.astype(float)) / len(differences)
    result = {name: _interval(point[k], drawn[:, k]) for k, name in enumerate(columns)}
    four = [names.index(metric) for metric in METRICS if metric in names]
    if len(four) == len(METRICS):
        result["average"] = _interval(point[four].mean(), drawn[:, four].mean(axis=1))
    return result


def _parts(run: Mapping[str, Any], form: AskedForm) -> list[tuple[str, str]]:
    """Metric and reading of what a harmonic mean is of.

    The fact, its paraphrases, and agreement on neighbours, or on all unrelated prompts where the
    data names no neighbours.
    """
    near = metric_in(form, "neighbours")
    local = near if _known(run, near, "agreement") else metric_in(form, "specificity")
    return [
        (metric_in(form, "efficacy"), "generation"),
        (metric_in(form, "generalization"), "generation"),
        (local, "agreement"),
    ]


def _thirds(run: Mapping[str, Any], form: AskedForm) -> NDArray[np.float64]:
    """F × 3, what a harmonic mean is of."""
    return np.stack([_array(run, *part) for part in _parts(run, form)], axis=1)


def _harmonic_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every row of B × 3."""
    return np.array([harmonic_mean(row) for row in values.tolist()])


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
    values = run.get(metric, {}).get(reading)
    return values is not None and any(value is not None for value in values)


def _array(run: Mapping[str, Any], metric: str, reading: str) -> NDArray[np.float64]:
    return np.array([np.nan if v is None else v for v in run[metric][reading]], np.float64)


def _kinds_of_portability(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Measures of the kinds that the data has, and where a row holds the value of each."""
    metrics = dict.fromkeys(m for row in rows for m in row["metrics"] if m.startswith(PREFIX))
    return {
        f"{begin}/{metric.removeprefix(PREFIX)}": ("metrics", metric, reading)
        for begin, reading in PORTABILITY.items()
        for metric in metrics
    }


def _value(row: Row, path: Sequence[str]) -> float | None:
    if path == ("average",):
        four = [row["metrics"][metric]["token_accuracy"] for metric in METRICS]
        return None if any(value is None for value in four) else float(np.mean(four))
    if path[0] in _HARMONIC:
        return _harmonic_of(row, _HARMONIC[path[0]])
    value: Any = row
    for key in path:
        value = value.get(key)
        if value is None:
            return None
    return float(value)


def _harmonic_of(row: Row, form: AskedForm) -> float | None:
    near = metric_in(form, "neighbours")
    given = _value(row, ("metrics", near, "agreement")) is not None
    values = [
        _value(row, ("metrics", metric_in(form, "efficacy"), "generation")),
        _value(row, ("metrics", metric_in(form, "generalization"), "generation")),
        _value(row, ("metrics", near if given else metric_in(form, "specificity"), "agreement")),
    ]
    known = [value for value in values if value is not None]
    return harmonic_mean(known) if len(known) == len(values) else None
