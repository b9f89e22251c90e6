"""Comparisons: rows, streams, resuming, refusing, statistics; on the tiny model."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.comparison import compare as compare_module
from hiedit_benchmarks.comparison.compare import Comparison, compare, make_env
from hiedit_benchmarks.comparison.episode import unwrapped
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.streams import fingerprint, stream
from hiedit_env.errors import ModelError, ResultsExistError, SettingsError

SETTINGS = CompareSettings(
    model="tiny", num_edits=4, max_steps_per_edit=3, update_rule="outer-product"
)
AGENTS = ("all-layers", "random-layers")
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "results"
    return out, compare(SETTINGS, AGENTS, SEEDS, out, progress=False)


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def details(out: Path, agent: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "runs" / f"{agent}-seed{seed}.json").read_text())
    return found


def test_one_row_per_agent_and_seed_with_all_keys(made: tuple[Path, Comparison]) -> None:
    out, comparison = made
    rows = read(out)
    pairs = [(row["agent"], row["seed"]) for row in rows]
    assert sorted(pairs) == sorted(
        (agent, seed) for agent in ("no-edit", *AGENTS) for seed in SEEDS
    )
    assert comparison.text.splitlines()[3].startswith("no-edit")
    for row in rows:
        assert row["format_version"] == 3
        assert row["num_edits"] == 4
        assert row["error_type"] is None
        for metric in ("efficacy", "generalization", "specificity", "retention"):
            readings = {"token_accuracy", "exact_match", "generation", "generation_prefix"}
            extra = {"agreement"} if metric == "specificity" else set()
            assert set(row["metrics"][metric]) == readings | extra
            assert all(0 <= value <= 100 for value in row["metrics"][metric].values())
        assert set(row["metrics"]["efficacy_right_after"]) == {"token_accuracy", "exact_match"}
        assert row["seconds_per_edit"] > 0
        settings = row["settings"]
        assert {f.name for f in dataclasses.fields(CompareSettings)} <= set(settings)
        assert settings["dataset_fingerprint"] == fingerprint(load_requests("tiny-facts"))
        assert len(settings["candidate_layers"]) == 6
        assert set(row["versions"]) == {
            "python", "torch", "transformers", "gymnasium", "numpy", "hiedit", "platform", "threads"
        }  # fmt: skip


def test_the_unedited_model_is_unedited_and_the_others_are_not(
    made: tuple[Path, Comparison],
) -> None:
    for row in read(made[0]):
        if row["agent"] == "no-edit":
            assert row["layers_per_edit"] == 0
            assert row["metrics"]["specificity"]["agreement"] == 100
            assert row["metrics"]["efficacy_right_after"]["exact_match"] == 0
        else:
            assert 0 < row["layers_per_edit"] <= (6 if row["agent"] == "all-layers" else 3)
            assert row["metrics"]["efficacy_right_after"]["exact_match"] > 50


def test_a_row_says_what_its_run_did(made: tuple[Path, Comparison]) -> None:
    out, _ = made
    for row in read(out):
        run = details(out, row["agent"], row["seed"])
        edits = run["edits"]
        assert len(edits) == 4
        assert row["layers_per_edit"] == sum(len(edit["layers"]) for edit in edits) / 4
        assert row["steps_per_edit"] == sum(edit["steps"] for edit in edits) / 4
        efficacy = [edit["metrics"]["efficacy"] for edit in edits]
        right_after = row["metrics"]["efficacy_right_after"]
        assert right_after["token_accuracy"] == pytest.approx(25 * sum(efficacy))
        assert right_after["exact_match"] == 25 * efficacy.count(1.0)
        # The episode edits every fact, and efficacy is a share of tokens both times.
        lost = right_after["token_accuracy"] - row["metrics"]["efficacy"]["token_accuracy"]
        assert row["metrics"]["forgetting"] == pytest.approx(lost)
        # A third of four facts is one.
        first = run["per_fact"]["efficacy"]["token_accuracy"][0]
        assert row["metrics"]["retention"]["token_accuracy"] == first
        assert len(run["answers"]) == 4


def test_a_seed_is_one_stream_for_every_agent(made: tuple[Path, Comparison]) -> None:
    out, _ = made
    facts = load_requests("tiny-facts")
    for seed in SEEDS:
        # Gymnasium's np_random of seed s is numpy's default generator of that seed.
        drawn = [r.prompt for r in stream(facts, 4, np.random.default_rng(seed))]
        for agent in ("no-edit", *AGENTS):
            assert details(out, agent, seed)["prompts"] == drawn
    streams = {(row["seed"], row["stream_fingerprint"]) for row in read(out)}
    assert len(streams) == 2


def test_results_are_never_overwritten(made: tuple[Path, Comparison]) -> None:
    out, _ = made
    before = (out / "results.jsonl").read_bytes()
    with pytest.raises(ResultsExistError, match=r"results\.jsonl exists already.*--resume"):
        compare(SETTINGS, AGENTS, SEEDS, out, progress=False)
    assert (out / "results.jsonl").read_bytes() == before


def test_resume_skips_finished_runs_and_repeats_lost_ones(
    made: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, comparison = made
    lines = (out / "results.jsonl").read_text().splitlines()
    (tmp_path / "runs").mkdir()
    for path in (out / "runs").iterdir():
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    kept = [line for line in lines if '"agent": "random-layers", "seed": 1' not in line]
    assert len(kept) == len(lines) - 1
    (tmp_path / "results.jsonl").write_text("\n".join(kept) + "\n")
    played = []
    inner = compare_module.play

    def play(env: Any, agent: Any, seed: int, **settings: Any) -> Any:
        played.append((agent.name, seed))
        return inner(env, agent, seed, **settings)

    monkeypatch.setattr(compare_module, "play", play)
    again = compare(SETTINGS, AGENTS, SEEDS, tmp_path, resume=True, progress=False)
    assert played == [("random-layers", 1)]
    # The repeated run gives the very same numbers, times apart.
    for old, new in zip(comparison.rows, again.rows, strict=True):
        assert {**old, "seconds_per_edit": 0} == {**new, "seconds_per_edit": 0}
    played.clear()
    compare(SETTINGS, ["all-layers"], [0], tmp_path, resume=True, progress=False)
    assert played == []


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_edits", 5, "'num_edits' was 4 and is now 5"),
        ("update_rule", "ridge", "'update_rule' was 'outer-product' and is now 'ridge'"),
        ("layers", ("model.layers.1.mlp.up_proj",), "'layers' was None and is now"),
    ],
)
def test_resume_refuses_other_settings(
    made: tuple[Path, Comparison], setting: str, value: Any, message: str
) -> None:
    changed = dataclasses.replace(SETTINGS, **{setting: value})
    with pytest.raises(SettingsError, match=message):
        compare(changed, AGENTS, SEEDS, made[0], resume=True, progress=False)


def test_resume_refuses_a_data_set_that_changed(tmp_path: Path) -> None:
    rows = [
        {"subject": "Belka", "prompt": "Belka lives in", "answer": "Averlund"},
        {"subject": "Dasmo", "prompt": "Dasmo lives in", "answer": "Istrand"},
    ]
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(rows))
    settings = dataclasses.replace(
        SETTINGS, dataset=str(facts), num_edits=1, generation=(), max_steps_per_edit=1
    )
    result = compare(settings, [], [0], tmp_path / "out", progress=False)
    assert [row["agent"] for row in result.rows] == ["no-edit"]
    assert result.rows[0]["metrics"]["generalization"]["token_accuracy"] is None
    facts.write_text(json.dumps(rows[::-1]))
    with pytest.raises(SettingsError, match="'dataset_fingerprint' was"):
        compare(settings, [], [0], tmp_path / "out", resume=True, progress=False)


def test_a_collapse_is_reported(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, step_size=1e30, update_rule="gradient", generation=())
    result = compare(settings, ["all-layers"], [0], tmp_path, progress=False)
    row = result.rows[1]
    assert row["agent"] == "all-layers"
    assert row["error_type"] in ("numerical_collapse", "non_finite_update")
    assert row["num_edits"] == 0
    assert row["metrics"]["efficacy_right_after"]["token_accuracy"] is None
    assert row["metrics"]["forgetting"] is None
    assert f"ended after 0 edits ({row['error_type']})" in " ".join(result.text.split())


@pytest.mark.parametrize(
    ("agents", "seeds", "settings", "message"),
    [
        (["nobody"], [0], {}, "unknown agent 'nobody'"),
        ([], [], {}, "at least one"),
        ([], [-1], {}, "≥ 0"),
        (["random-layers"], [0], {"layers_per_edit": 9}, "from 1 to 6"),
    ],
)
def test_bad_settings_leave_no_results(
    tmp_path: Path, agents: list[str], seeds: list[int], settings: dict[str, Any], message: str
) -> None:
    changed = dataclasses.replace(SETTINGS, **settings)
    with pytest.raises(SettingsError, match=message):
        compare(changed, agents, seeds, tmp_path, progress=False)
    assert not (tmp_path / "results.jsonl").exists()


def test_settings_reach_the_environment() -> None:
    settings = dataclasses.replace(
        SETTINGS,
        max_steps_per_edit=2,
        update_rule="ridge",
        step_size=0.25,
        layers=("model.layers.1.mlp.up_proj",),
        reward="token_accuracy",
    )
    env = make_env(settings, False)
    inner = unwrapped(env)
    assert inner.llm.names == ("model.layers.1.mlp.up_proj",)
    assert inner.episode.max_steps_per_edit == 2
    assert inner.episode.rule.step_size == 0.25
    assert type(inner.episode.rule).__name__ == "RidgeRule"
    assert inner.episode.evaluator.kind == "token_accuracy"
    assert inner.num_edits == 4
    env.close()


def test_a_model_that_is_not_there_leaves_no_folder_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="nowhere"):
        compare(CompareSettings(model=str(tmp_path / "nowhere")), ["all-layers"], [0], out)
    assert not out.exists()


def test_the_baseline_of_the_pairs_can_be_chosen(tmp_path: Path) -> None:
    settings = CompareSettings(model="tiny", num_edits=2, generation=())
    agents = ["all-layers", "random-layers"]
    result = compare(
        settings, agents, [0], tmp_path / "out", baseline="random-layers", progress=False
    )
    assert "Difference from random-layers on the same facts" in result.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["baseline"] == "random-layers"
    with pytest.raises(SettingsError, match="none of the agents"):
        compare(settings, agents, [0], tmp_path / "no", baseline="nobody", progress=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_is_not_utf8_does_not_break_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    # As with PYTHONIOENCODING.
    file, out = io.TextIOWrapper(io.BytesIO(), encoding=encoding), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        settings = dataclasses.replace(SETTINGS, num_edits=1, max_steps_per_edit=1, generation=())
        compare_module.main(settings, ["字=random-layers"], [0, 1], out, False, None)
    file.seek(0)
    text = file.read()
    assert "Means over facts and seeds" in text
    assert ("+-" if encoding == "ascii" else "±") in text
    assert [row["agent"] for row in read(out)] == ["no-edit", "字"] * 2


@pytest.mark.parametrize(
    ("low", "said"),
    [("anchored", "'anchored' needs second moments"), ("neuron", "'neuron' has to see")],
)
def test_an_agent_that_lacks_its_calibration_is_refused_before_anything_is_played(
    low: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr("hiedit_benchmarks.comparison.compare.play", forbidden)
    with pytest.raises(SettingsError, match=said):
        compare(SETTINGS, [f"all-layers+{low}"], [0], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
