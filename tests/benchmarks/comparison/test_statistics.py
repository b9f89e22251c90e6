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
    harmonic_mean,
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


# -- forms, neighbours, portability, harmonic mean ------------------------------------------------


def test_harmonic_mean_by_hand() -> None:
    # 3 / (1/100 + 1/50 + 1/25) = 3 / 0.07.
    assert harmonic_mean([100.0, 50.0, 25.0]) == pytest.approx(3 / 0.07)
    assert harmonic_mean([90.0, 0.0, 80.0]) == 0.0
    assert np.isnan(harmonic_mean([90.0, float("nan"), 80.0]))


def asked(seed: int, **more: Any) -> dict[str, Any]:
    found = row("a", seed, 50.0)
    found["metrics"]["efficacy"] = {"token_accuracy": 99.0, "generation": 100.0}
    found["metrics"]["generalization"] = {"token_accuracy": 99.0, "generation": 50.0}
    found["metrics"]["specificity"] = {"token_accuracy": 99.0, "agreement": 75.0}
    found["metrics"] |= more
    return found


def test_summary_of_neighbours_portability_and_chat() -> None:
    chat = {
        "chat_efficacy": {"token_accuracy": 40.0, "generation": 30.0},
        "chat_generalization": {"token_accuracy": 20.0, "generation": 60.0},
        "chat_specificity": {"token_accuracy": 10.0, "agreement": 60.0},
    }
    kinds = {
        "portability": {"token_accuracy": 8.0, "generation": 4.0},
        "portability/multi-hop": {"token_accuracy": 6.0, "generation": 2.0},
    }
    near = {"neighbours": {"agreement": 25.0}, "unrelated": {"agreement": 95.0}}
    found = {
        name: entry["mean"]
        for name, entry in summarise([asked(0, **chat, **kinds, **near)])["a"].items()
    }
    wanted = {
        "paraphrases_generated": 50.0,
        "neighbour_agreement": 25.0,
        "unrelated_agreement": 95.0,
        "harmonic_mean": 3 / 0.07,
        "chat_generated": 30.0,
        "chat_paraphrases_generated": 60.0,
        "chat_agreement": 60.0,
        "chat_harmonic_mean": 3 / (1 / 30 + 2 / 60),
        "chat_efficacy": 40.0,
        "portability": 8.0,
        "portability_generated": 4.0,
        "portability/multi-hop": 6.0,
        "portability_generated/multi-hop": 2.0,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    # Without neighbours, all unrelated prompts; without generated answers, nothing.
    plain = summarise([asked(0), asked(1, **near)])["a"]["harmonic_mean"]
    assert plain["mean"] == pytest.approx((3 / (1 / 100 + 1 / 50 + 1 / 75) + 3 / 0.07) / 2)
    assert plain["seeds"] == 2
    silent = summarise([row("a", 0, 50.0)])["a"]
    assert "harmonic_mean" not in silent
    assert "chat_harmonic_mean" not in silent


def stream_of(facts: Any, paraphrases: Any, near: Any) -> dict[str, Any]:
    return {
        "efficacy": {"token_accuracy": [0.0] * len(facts), "generation": list(facts)},
        "generalization": {"generation": list(paraphrases)},
        "specificity": {"agreement": [1.0] * len(facts)},
        "neighbours": {"agreement": list(near)},
    }


def test_paired_harmonic_means_are_of_the_streams_means() -> None:
    ours = stream_of([100, 100], [100, 0], [None, 25.0])
    theirs = stream_of([100, 100], [50, 50], [20.0, 80.0])
    found = paired_differences([ours], [theirs])
    # Means 100, 50, 25 against 100, 50, 50.
    assert found["harmonic_mean"]["difference"] == pytest.approx(3 / 0.07 - 3 / 0.05)
    assert found["neighbour_agreement"]["difference"] == pytest.approx(25 - 80)
    assert found["paraphrases_generated"]["difference"] == 0


def test_the_interval_of_a_harmonic_mean_against_every_resample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 40_000)
    generator = np.random.default_rng(5)
    columns = generator.uniform(5, 100, (2, 3, 4)).round(1)
    ours, theirs = (stream_of(*parts) for parts in columns.tolist())
    found = paired_differences([ours], [theirs])["harmonic_mean"]

    def harmonic(parts: np.ndarray, facts: list[int]) -> float:
        return float(stats.hmean(parts[:, facts].mean(axis=1)))

    possible = [
        harmonic(columns[0], list(facts)) - harmonic(columns[1], list(facts))
        for facts in itertools.product(range(4), repeat=4)
    ]
    everything = harmonic(columns[0], [0, 1, 2, 3]) - harmonic(columns[1], [0, 1, 2, 3])
    assert found["difference"] == pytest.approx(everything)
    lowest, low, high, highest = np.percentile(possible, (1.5, 3.5, 96.5, 98.5))
    assert lowest <= found["low"] <= low
    assert high <= found["high"] <= highest
    # The same facts are drawn for both sides, or the interval would be wider.
    apart = [
        harmonic(columns[0], list(a)) - harmonic(columns[1], list(b))
        for a in itertools.product(range(4), repeat=4)
        for b in [generator.integers(4, size=4)]
    ]
    assert np.percentile(apart, 97.5) - np.percentile(apart, 2.5) > found["high"] - found["low"]


def test_paired_chat_is_there_where_both_have_it() -> None:
    values = np.array([10.0, 30.0])
    chat = {"chat_efficacy": {"token_accuracy": values.tolist(), "generation": [100.0, 0.0]}}
    both = paired_differences([per_fact(values) | chat], [per_fact(values) | chat])
    assert {"chat_efficacy", "chat_generated"} <= set(both)
    assert "chat_efficacy" not in paired_differences([per_fact(values) | chat], [per_fact(values)])
