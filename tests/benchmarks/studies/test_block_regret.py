"""Choices of a block: outcomes by hand, who takes headroom that is there, and who invents none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.studies import block_agents
from hiedit_benchmarks.studies.block_agents import AGENTS, ORACLE, REFERENCE, Task, play
from hiedit_benchmarks.studies.block_outcomes import (
    half_of,
    harmonic,
    interaction,
    outcome_table,
)
from hiedit_benchmarks.studies.block_records import FactRecord, Measured, RecordFile
from hiedit_benchmarks.studies.block_regret import FEWEST, compare, main, study
from hiedit_benchmarks.studies.block_report import _number, draw, report
from hiedit_env.errors import SettingsError
from tests.benchmarks.studies.block_worlds import (
    OPTIONS,
    World,
    all_alike,
    by_number,
    hidden,
    one_better,
    records,
)

LEARNERS = {"linear bandit", "shared ridge", "shared router"}
BELIEVING = f"{ORACLE}, as they come"
HINDSIGHT = "oracle, same prompts"


#: Those that learn in no time.
QUICK = {name: agent for name, agent in AGENTS.items() if name != "shared router"}


def over_constant(made: list[FactRecord], folds: int = 0) -> dict[str, Any]:
    """Agent → its outcome over the best constant, an interval."""
    agents = QUICK if folds else AGENTS
    found = compare(outcome_table(made, "smooth"), folds, 0, agents)["agents"]
    return {name: entry["outcome_over_constant"] for name, entry in found.items()}


def test_the_halves_hold_different_prompts() -> None:
    given = Measured(
        [[0.1, 1.0], [0.2, 0.0]],
        [[[1.0, 1.0], [2.0, 0.0]], [[3.0, 0.0], [4.0, 0.0]], [[5.0, 1.0], [6.0, 1.0]]],
        [[[-0.5, 1.0], [0.5, 0.6]], [[1.0, 0.2], [2.0, 0.4]]],
    )
    assert half_of(given, 0, "generated") == pytest.approx((1.0, 0.75, 0.8))
    assert half_of(given, 1, "generated") == pytest.approx((0.0, 0.0, 0.3))
    # A gain in probability of the unedited model's own answer is no gain.
    assert half_of(given, 0, "smooth") == pytest.approx(
        (
            np.exp(-0.1),
            np.exp([-1.0, -2.0, -5.0, -6.0]).mean(),
            (1 + np.exp(-0.5)) / 2,
        )
    )
    assert half_of(given, 1, "smooth") == pytest.approx(
        (np.exp(-0.2), np.exp([-3.0, -4.0]).mean(), np.exp([-1.0, -2.0]).mean())
    )


def test_a_harmonic_mean_is_zero_where_a_part_is() -> None:
    assert harmonic(np.array([0.5, 0.25, 1.0])) == pytest.approx(3 / 7)
    assert harmonic(np.array([0.0, 1.0, 1.0])) == 0.0


def test_the_interaction_is_told_from_noise() -> None:
    generator = np.random.default_rng(0)
    effect = generator.normal(size=(4000, 1, 3))
    noise = generator.normal(size=(4000, 2, 3))
    found = interaction(effect + noise + np.array([0.0, 3.0, 6.0]))
    # Means 0, 3, 6; of unit variances, a third goes with the fact's mean.
    assert found.of_options == pytest.approx(6.0, rel=0.05)
    assert found.of_pairs == pytest.approx(2 * 2 / 3, rel=0.05)
    assert found.correlation == pytest.approx(0.5, abs=0.03)
    assert abs(interaction(noise).correlation) < 0.03


@pytest.mark.parametrize("folds", [0, 5])
def test_learners_take_what_depends_on_what_is_seen(folds: int) -> None:
    made = records(by_number, 120, noise=0.1)
    found = over_constant(made, folds)
    # 0.9 at the right end; always 0.6; or 0.9 for the facts of one end and 0.3 for the others.
    right, middle, wrong = (3 / (2 / p + 1) for p in (0.9, 0.6, 0.3))
    first = np.mean([r.seen["x"] < 0 for r in made if folds or r.role == "evaluate"])
    constants = [middle, *(p * right + (1 - p) * wrong for p in (first, 1 - first))]
    headroom = right - max(constants)
    assert found[ORACLE]["mean"] == pytest.approx(headroom, abs=0.02)
    # 60 facts do not place the border exactly, near which a wrong choice costs all.
    for name in LEARNERS & found.keys():
        assert found[name]["mean"] > 0.75 * headroom, name
    # Two relations, one per best option.
    assert found["best per relation"]["mean"] > 0.9 * headroom
    random = np.mean([3 / (2 / p + 1) for p in (0.9, 0.6, 0.55, 0.3)]) - max(constants)
    assert found["random"]["mean"] == pytest.approx(random, abs=0.02)
    # What the oracle sees is all there is.
    assert found[HINDSIGHT]["mean"] == pytest.approx(headroom, abs=0.03)


@pytest.mark.parametrize("world", [all_alike, one_better])
@pytest.mark.parametrize("folds", [0, 5])
def test_nobody_takes_what_is_not_there(
    world: World, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_agents, "ROUTER_STEPS", 100)
    means: dict[str, list[float]] = {}
    for seed in range(3):
        for name, entry in over_constant(records(world, 80, noise=1.0, seed=seed), folds).items():
            means.setdefault(name, []).append(entry["mean"])
    # In hindsight noise is a gain, and not a small one.
    assert np.mean(means[HINDSIGHT]) > 0.08
    for name in (*(LEARNERS & means.keys()), "best per relation", BELIEVING, ORACLE):
        assert np.mean(means[name]) < 0.02, name
    assert np.mean(means[ORACLE]) > -0.01
    # What is found on other facts is no better than what is best in hindsight.
    assert max(means["best fixed"]) <= 1e-9


def test_an_oracle_sees_what_no_learner_can() -> None:
    found = over_constant(records(hidden, 120, noise=0.3))
    assert found[ORACLE]["low"] > 0.1
    assert found[ORACLE]["mean"] >= found[BELIEVING]["mean"] - 0.01
    for name in (*LEARNERS, "best per relation"):
        assert found[name]["mean"] < 0.05, name


def test_an_oracle_that_sees_only_noise_is_the_best_fixed_option() -> None:
    # The halves contradict each other, so nothing of a difference may be believed.
    table = outcome_table(records(one_better, 40), "smooth")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=table.outcomes[:, :, :-1].shape) * 0.1
    noise[:, 1] = -noise[:, 0]
    table.outcomes[:, :, :-1] += noise
    _, weights = play(table, AGENTS[ORACLE], 0)
    assert (weights[:, :, 1] == 1).all()
    _, believed = play(table, AGENTS[BELIEVING], 0)
    assert believed[:, :, 1].mean() < 1


@pytest.mark.parametrize("folds", [0, 3])
def test_nobody_learns_from_what_it_is_evaluated_on(folds: int) -> None:
    table = outcome_table(records(by_number, 10), "smooth")
    chosen_for: list[int] = []

    def spy(task: Task) -> Any:
        assert not set(task.train) & set(task.test)
        if folds:
            assert len(task.train) + len(task.test) == 10
        else:
            assert list(task.train) == [0, 2, 4, 6, 8]
        assert len(task.evaluated) == (10 if folds else 5)
        chosen_for.extend(task.test)
        return task.nothing() + task.test[:, None, None]

    test, weights = play(table, spy, folds)
    assert sorted(chosen_for) == (list(range(10)) if folds else [1, 3, 5, 7, 9])
    # What was chosen for a fact is scored on it.
    assert list(test) == sorted(chosen_for)
    assert (weights == test[:, None, None]).all()


@pytest.mark.parametrize("name", [*sorted(LEARNERS), "best fixed", "best per relation"])
def test_no_outcome_of_a_fact_decides_what_is_chosen_for_it(name: str) -> None:
    table = outcome_table(records(by_number, 24, noise=0.3), "smooth")
    train, test = np.arange(0, 24, 2), np.arange(1, 24, 2)
    first = AGENTS[name](Task(table, train, test, test, 0))
    # On the facts to choose for, the option that was chosen least is now the only good one.
    changed = table.outcomes.copy()
    changed[test] = 0
    changed[test, :, first[:, :, :-1].sum((0, 1)).argmin()] = 1
    other = replace(table, outcomes=changed)
    np.testing.assert_array_equal(AGENTS[name](Task(other, train, test, test, 0)), first)
    # Told the same of the facts to learn from, it would choose otherwise.
    told = AGENTS[name](Task(other, np.arange(24), test, test, 0))
    assert (told != first).any()


def test_the_share_of_the_headroom_and_no_share_of_none() -> None:
    agents = compare(outcome_table(records(by_number, 80), "smooth"), 0, 0)["agents"]
    assert agents[REFERENCE]["share"] == 0
    assert agents[ORACLE]["share"] == pytest.approx(1)
    none = compare(outcome_table(records(all_alike, 80, noise=0.5), "smooth"), 0, 0)["agents"]
    assert all(entry["share"] is None for entry in none.values())


def test_no_edit_is_scored_and_never_chosen() -> None:
    made = records(by_number, 40)
    found = compare(outcome_table(made, "smooth"), 0, 0)["agents"]
    assert found["no edit"]["parts"]["fact"] == pytest.approx(0.01)
    assert found["no edit"]["parts"]["agreement"] == 1
    assert found["no edit"]["fires"] == 0
    assert all(entry["chosen"][OPTIONS] == 0 for name, entry in found.items() if name != "no edit")
    assert found["random"]["fires"] == pytest.approx(0.015)


def test_harmonic_means_of_means_by_hand() -> None:
    found = compare(outcome_table(records(one_better, 10), "smooth"), 0, 0)
    fixed = found["agents"][REFERENCE]
    assert fixed["parts"] == pytest.approx({"fact": 0.7, "paraphrases": 0.7, "agreement": 1.0})
    assert fixed["of_means"]["mean"] == pytest.approx(3 / (1 / 0.7 + 1 / 0.7 + 1))
    assert fixed["of_means_over_constant"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["blocks"][1]["of_means"] == pytest.approx(fixed["of_means"])


def test_relations_whose_best_blocks_differ_by_hand() -> None:
    table = outcome_table(records(by_number, 120), "smooth")
    found = compare(table, 3, 0, QUICK)
    right, middle, near, wrong = (3 / (2 / p + 1) for p in (0.9, 0.6, 0.55, 0.3))
    first, last = found["relations"]["r0"], found["relations"]["r1"]
    assert first["blocks"] == pytest.approx([right, middle, near, wrong])
    assert last["blocks"] == pytest.approx([wrong, middle, near, right])
    # The block for all is the one of the relation with more facts, which so has no headroom.
    assert first["facts"] + last["facts"] == 120
    more, fewer = sorted((first, last), key=lambda entry: -int(entry["facts"]))
    best = (more["facts"] * right + fewer["facts"] * wrong) / 120
    gains = (0, right - wrong) if best > middle else (right - middle, right - middle)
    for entry, gain in zip((more, fewer), gains, strict=True):
        for key in ("headroom", "at_most"):
            assert entry[key] == pytest.approx({"mean": gain, "low": gain, "high": gain})
    # Together they are the headroom of all facts.
    parts = [entry["facts"] * entry["headroom"]["mean"] / 120 for entry in (first, last)]
    assert sum(parts) == pytest.approx(found["headroom"]["mean"])
    # Of one or two facts nothing is said.
    few = compare(outcome_table(records(by_number, 12, relations=6), "smooth"), 3, 0, QUICK)
    assert all(entry["facts"] >= FEWEST for entry in few["relations"].values())
    assert len(few["relations"]) < 6


def test_tables_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = RecordFile(tmp_path / "part-0.jsonl", {"blocks": [3, 5, 7, 9]})
    for record in records(by_number, 24, noise=0.2):
        file.append(record)
    file.close()
    out = tmp_path / "out"
    assert main([str(tmp_path / "part-0.jsonl"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert (out / "table.md").read_text() == shown
    assert "12 facts, learned from 12 others" in shown
    for name in ("| 3 |", "| 9 |", *(f"| {agent} |" for agent in AGENTS)):
        assert name in shown
    results = json.loads((out / "results.json").read_text())
    assert report(results) + "\n" == shown
    assert "| relation | facts | block 3 | block 5 | block 7 | block 9 |" in shown
    assert sum(f"| {relation} |" in shown for relation in ("r0", "r1")) == 2
    assert (out / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert draw(results).startswith(b"\x89PNG")
    assert main([str(tmp_path / "part-0.jsonl"), "--out", str(out), "--folds", "4"]) == 0
    assert "24 facts" in capsys.readouterr().out


def test_what_is_rounded_to_zero_has_no_sign() -> None:
    assert [_number(value) for value in (-1e-5, 0.0, -0.0006, 0.5)] == [
        "0.0",
        "0.0",
        "−0.1",
        "50.0",
    ]


def test_bad_input_is_told(tmp_path: Path) -> None:
    made = records(by_number, 4)
    with pytest.raises(SettingsError, match="no recorded facts"):
        outcome_table([], "smooth")
    only = [record for record in made if record.role == "train"]
    with pytest.raises(SettingsError, match="2 facts to learn from and 0 to evaluate"):
        study({"blocks": [1, 2, 3, 4]}, only, 0, 0)
    with pytest.raises(SettingsError, match="9 folds of 4 facts"):
        study({"blocks": [1, 2, 3, 4]}, made, 9, 0)
    short = Measured(made[0].before.fact, made[0].before.paraphrases[:1], [])
    bad = FactRecord(**{**{n: getattr(made[0], n) for n in made[0].__slots__}, "before": short})
    with pytest.raises(SettingsError, match="'p0' has fewer than two"):
        outcome_table([bad], "smooth")
