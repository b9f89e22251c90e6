"""What the rows of a comparison say: means over seeds, paired differences, the printed table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hiedit_benchmarks.comparison.results import Row
from numpy.typing import NDArray

from hiedit_env.evaluation.names import METRICS

#: Columns of the table: heading and where a row holds the value.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "effic.": ("metrics", "efficacy", "token_accuracy"),
    "general.": ("metrics", "generalization", "token_accuracy"),
    "specif.": ("metrics", "specificity", "token_accuracy"),
    "retent.": ("metrics", "retention", "token_accuracy"),
    "average": ("average",),
    "exact": ("metrics", "efficacy", "exact_match"),
    "generated": ("metrics", "efficacy", "generation"),
    "right after": ("metrics", "efficacy_right_after", "token_accuracy"),
    "agreement": ("metrics", "specificity", "agreement"),
    "regret": ("metrics", "regret"),
    "one step": ("metrics", "one_step_regret"),
    "true layer": ("metrics", "true_layer_share"),
    "exactly": ("metrics", "true_layer_exact_share"),
    "layers/edit": ("layers_per_edit",),
    "s/edit": ("seconds_per_edit",),
}
LEGEND = """\
Percent, mean over seeds (± half of the 95 % t-interval). effic., general., specif., retent.:
teacher-forced token accuracy at the end of the stream on the requests, paraphrases, unrelated
prompts, and the first third of the requests; average: of these four. exact: all answer tokens of a
request right; generated: its greedy continuation is the answer; both at the end. right after:
efficacy of each fact right after its own edit. agreement: with the unedited model's own answers to
unrelated prompts."""

ORACLE_LEGEND = """\
regret: reward per fact that the oracle's own episode was paid more (from the fact on at which an
episode ended early, what was paid there counts); one step: that the best choice of layers would
have been paid more at each of the agent's states, with its low level (little where all is ruined
already);
true layer: facts, of those not answered beforehand, of which the layer that holds them was written;
exactly: and no other."""

#: What paired differences are taken of: name → metric and reading of a run's per-fact numbers.
PAIRED: Mapping[str, tuple[str, str]] = {
    **{metric: (metric, "token_accuracy") for metric in METRICS},
    "agreement": ("specificity", "agreement"),
    "exact_match": ("efficacy", "exact_match"),
    "generation": ("efficacy", "generation"),
}
RESAMPLES = 2000

# 97.5 % quantiles of Student's t for 1 … 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the 95 % confidence interval (Student's t); None for a single value.

    >>> mean, half = t_interval([1.0, 2.0, 3.0])  # 4.303 · 1 / √3
    >>> mean, round(half, 4)
    (2.0, 2.4843)
    """
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    freedom = len(array) - 1
    # Beyond the table, the first terms of the expansion around the normal quantile.
    quantile = _T[freedom - 1] if freedom <= len(_T) else 1.960 + 2.372 / freedom
    return float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(len(array))


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Agent → column → ``{"mean", "half_width", "seeds"}``; absent where there is no value."""
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for agent in dict.fromkeys(row["agent"] for row in rows):
        columns: dict[str, dict[str, float | None]] = {}
        for heading, path in COLUMNS.items():
            found = [_value(row, path) for row in rows if row["agent"] == agent]
            values = [value for value in found if value is not None]
            if values:
                mean, half = t_interval(values)
                columns[heading] = {"mean": mean, "half_width": half, "seeds": len(values)}
        summary[agent] = columns
    return summary


def table(summary: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """The summary as aligned text, one line per agent."""
    shown = [name for name in COLUMNS if any(name in columns for columns in summary.values())]
    lines = [["agent", *shown]]
    for agent, columns in summary.items():
        lines.append([agent, *(_cell(name, columns.get(name)) for name in shown)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def baseline_of(agents: Sequence[str]) -> str | None:
    """Whom agents are compared with: all layers, else the first that edits."""
    edited = [agent for agent in agents if agent != "no-edit"]
    if "all-layers" in edited:
        return "all-layers"
    return edited[0] if edited else None


def paired_differences(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Ours minus theirs on the same facts, with 95 % bootstrap intervals.

    Seeds are drawn with replacement, then facts within each seed (percentile bootstrap with
    ``RESAMPLES`` resamples); with one seed the interval speaks of that stream only.

    Args:
        ours: Per seed, the ``per_fact`` numbers of a run.
        theirs: The same seeds in the same order, so the same facts.
        seed: Of the resampling.

    Returns:
        Name of :data:`PAIRED`, and ``average`` of the four metrics → ``{"difference", "low",
        "high"}`` in percentage points; names without numbers are absent.
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


def _cell(heading: str, entry: Mapping[str, float | None] | None) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    digits = {"s/edit": 2, "regret": 3, "one step": 3}.get(heading, 1)
    half = entry["half_width"]
    spread = "" if half is None else f"±{half:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{spread}"
