"""Statistics of a comparison: against scipy, and against every possible resample counted out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hiedit_benchmarks.comparison import statistics
from hiedit_benchmarks.comparison.statistics import (
    MEASURES,
    baseline_of,
    paired_differences,
    summarise,
    t_interval,
)


def test_t_interval() -> None:
    assert t_interval([5.0]) == (5.0, None)
    # Standard deviation √2, over √2, times t(1) = 12.706: with one degree of freedom Student's t is
    # Cauchy's distribution, whose quantiles are tan(π (p − ½)).
    assert t_interval([1.0, 3.0]) == (2.0, pytest.approx(np.tan(0.475 * np.pi)))
    # t(40) = 2.021 in the usual tables; 41 values of variance 41/40.
    values = [1.0, -1.0] * 20 + [0.0]
    assert t_interval(values)[1] == pytest.approx(2.021 / 41**0.5, rel=2e-3)


def per_fact(values: np.ndarray) -> dict[str, dict[str, list[float | None]]]:
    column: list[float | None] = values.tolist()
    third = [v if i < len(column) // 3 else None for i, v in enumerate(column)]
    return {
        "efficacy": {"token_accuracy": column, "exact_match": column},
        "generalization": {"token_accuracy": column},
        "specificity": {"token_accuracy": column, "agreement": column},
        "retention": {"token_accuracy": third},
    }


def test_paired_differences_of_constants_are_exact() -> None:
    theirs = [np.arange(9.0), np.arange(9.0) * 2]
    found = paired_differences(
        [per_fact(values + 3) for values in theirs], [per_fact(values) for values in theirs]
    )
    assert set(found) == {
        "efficacy", "generalization", "specificity", "retention", "agreement", "exact_match",
        "average",
    }  # fmt: skip
    for interval in found.values():
        assert interval == pytest.approx({"difference": 3, "low": 3, "high": 3})


def test_paired_differences_have_the_normal_interval_for_many_facts() -> None:
    generator = np.random.default_rng(1)
    theirs = generator.uniform(0, 100, 900)
    ours = theirs + generator.normal(1.0, 2.0, 900)
    found = paired_differences([per_fact(ours)], [per_fact(theirs)])
    # 1.96 · 2 / √900 for all facts, and √3 times that for the first third.
    for name, size in (("efficacy", 900), ("retention", 300)):
        difference = (ours - theirs)[:size]
        half = 1.96 * difference.std() / size**0.5
        assert found[name]["difference"] == pytest.approx(difference.mean())
        assert found[name]["low"] == pytest.approx(difference.mean() - half, abs=0.1 * half)
        assert found[name]["high"] == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_seeds_that_disagree_widen_the_interval() -> None:
    base = np.zeros(30)
    found = paired_differences(
        [per_fact(base - 1), per_fact(base + 3)], [per_fact(base), per_fact(base)]
    )
    # Two seeds drawn from two: means −1, 1 and 3 with chances ¼, ½, ¼.
    assert found["efficacy"] == pytest.approx({"difference": 1, "low": -1, "high": 3})


def test_t_interval_is_scipys() -> None:
    for size in (2, 3, 7, 200):
        values = np.random.default_rng(size).normal(size=size)
        low, high = stats.t.interval(0.95, size - 1, values.mean(), stats.sem(values))
        mean, half = t_interval(values.tolist())
        assert half is not None
        assert (mean - half, mean + half) == pytest.approx((low, high))


@pytest.mark.parametrize("size", [8, 40])
def test_one_stream_has_scipys_bootstrap_interval(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 40_000)
    generator = np.random.default_rng(3)
    theirs = generator.uniform(0, 100, size)
    ours = theirs + generator.exponential(10.0, size)
    found = paired_differences([per_fact(ours)], [per_fact(theirs)])["efficacy"]
    wanted = stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=40_000, method="percentile", rng=1
    ).confidence_interval
    width = wanted.high - wanted.low
    assert found["low"] == pytest.approx(wanted.low, abs=0.03 * width)
    assert found["high"] == pytest.approx(wanted.high, abs=0.03 * width)


def test_two_levels_against_every_possible_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 40_000)
    # Two seeds of three facts: 2² draws of seeds, and for each 3³ draws of facts twice.
    seeds = [np.array([0.0, 1.0, 7.0]), np.array([20.0, 22.0, 50.0])]
    means = [[np.mean(facts) for facts in itertools.product(values, repeat=3)] for values in seeds]
    possible = [
        (a + b) / 2
        for first, second in itertools.product(range(2), repeat=2)
        for a, b in itertools.product(means[first], means[second])
    ]
    assert len(possible) == 4 * 27 * 27
    zero = per_fact(np.zeros(3))
    found = paired_differences([per_fact(values) for values in seeds], [zero, zero])["efficacy"]
    # The distribution has steps, so that the bounds are those of a few tenths of a percent around.
    lowest, low, high, highest = np.percentile(possible, (2.1, 2.9, 97.1, 97.9))
    assert found["difference"] == pytest.approx((8 / 3 + 92 / 3) / 2)
    assert lowest <= found["low"] <= low
    assert high <= found["high"] <= highest
    assert (highest - high) + (low - lowest) < 0.2 * (high - low)
    # Drawing from all six facts at once, as if the seeds were one stream, is much narrower.
    pooled = stats.bootstrap(
        (np.concatenate(seeds),), np.mean, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    assert found["high"] - found["low"] > 1.15 * (pooled.high - pooled.low)


def row(agent: str, seed: int, value: float) -> dict[str, Any]:
    metric = {"token_accuracy": value, "exact_match": value + 1}
    names = ("efficacy", "generalization", "specificity", "retention")
    right_after = {"token_accuracy": value + 2, "exact_match": 0.0}
    return {
        "agent": agent,
        "seed": seed,
        "metrics": {
            **dict.fromkeys(names, metric),
            "efficacy_right_after": right_after,
            "forgetting": 2.0,
            "regret": None,
        },
        "layers_per_edit": 2.0,
        "steps_per_edit": 1.0,
        "seconds_per_edit": 0.5,
    }


def test_summary_has_names_as_keys_and_means_over_seeds() -> None:
    summary = summarise([row("no-edit", 0, 10.0), row("no-edit", 1, 12.0), row("a", 0, 50.0)])
    assert summary["no-edit"]["average"] == {
        "mean": 11.0,
        "half_width": pytest.approx(np.tan(0.475 * np.pi)),
        "seeds": 2,
    }
    means = {measure: found["mean"] for measure, found in summary["a"].items()}
    four = ("efficacy", "generalization", "specificity", "retention")
    assert means == {
        **dict.fromkeys(four, 50.0),
        "average": 50.0,
        "exact_match": 51.0,
        "right_after": 52.0,
        "forgetting": 2.0,
        "layers_per_edit": 2.0,
        "steps_per_edit": 1.0,
        "seconds_per_edit": 0.5,
    }
    assert set(means) < set(MEASURES)


def test_the_baseline_is_all_layers_or_the_first_that_edits() -> None:
    assert baseline_of(["no-edit", "a", "all-layers"]) == "all-layers"
    assert baseline_of(["no-edit", "b", "a"]) == "b"
    assert baseline_of(["no-edit"]) is None
