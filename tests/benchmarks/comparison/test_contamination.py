"""Agents that are measured on what they were trained on are warned of, once each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.named.checkpoints import fact_hashes, read_record, trained_facts
from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import split_by_subject

QUICK = TrainSettings(
    episodes=1, edits_per_episode=2, evaluation_edits=0, held_out=0.0, calibration=4
)
FACTS = load_requests("tiny-facts")


def write(file: Path, facts: list[Request]) -> str:
    rows = [
        {
            "prompt": f.prompt,
            "answer": f.answer,
            "subject": f.subject,
            "locality": [{"prompt": p.prompt, "answer": p.answer} for p in f.locality],
        }
        for f in facts
    ]
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained on facts 0-9, on 10-14, over the first on 20-21, and a high level on 0-9."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for name, start, stop, agent in (
        ("one", 0, 10, "policy+step-sizes"),
        ("two", 10, 15, "policy+step-sizes"),
        ("over", 20, 22, "policy+DIR"),
        ("high", 0, 10, "policy+outer-product"),
    ):
        dataset = write(folder / f"{name}.json", FACTS[start:stop])
        agent = agent.replace("DIR", str(folder / "one"))
        run = TrainingRun(agent=agent, model="tiny", dataset=dataset)
        train(run, QUICK, folder / name, progress=False)
        found[name] = folder / name
    return found


def test_a_training_records_its_facts(folders: dict[str, Path]) -> None:
    wanted = {
        "one": FACTS[:10],
        "high": FACTS[:10],
        "two": FACTS[10:15],
        "over": FACTS[:10] + FACTS[20:22],
    }
    for name, facts in wanted.items():
        hashes = trained_facts(read_record(folders[name]))
        assert hashes == fact_hashes(facts)
        assert len(hashes) == len(facts)
        assert all(len(text) == 8 for text in hashes)


def test_what_is_held_out_is_not_recorded(tmp_path: Path) -> None:
    run = TrainingRun(agent="policy", model="tiny")
    train(run, replace(QUICK, held_out=0.25, seed=3), tmp_path / "out", progress=False)
    kept, held = split_by_subject(FACTS, held_out=0.25, seed=3)
    hashes = trained_facts(read_record(tmp_path / "out"))
    assert not hashes & fact_hashes(held)
    # Less those whose prompt is an unrelated one of a held-out fact.
    assert 0 < len(hashes) <= len(kept)


def test_facts_are_recognised_by_subject_and_prompt() -> None:
    one = Request("Rome is in", "Peru", "Rome")
    assert fact_hashes([one]) == fact_hashes([Request("ROME is  in", "Chad", "rome ")])
    others = [Request("Rome is in", "Peru", "City"), Request("Rome lies in", "Peru", "Rome")]
    assert not fact_hashes([one]) & fact_hashes(others)


def test_every_agent_is_warned_of_once(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "facts.json", FACTS[5:17])
    settings = CompareSettings(model="tiny", dataset=dataset, num_edits=12, generation=())
    settings = replace(settings, max_steps_per_edit=1)
    one, two = folders["one"], folders["two"]
    # Of either folder only the level that is taken counts, and only where it was trained.
    agents = {
        "one": f"{one}",
        "both": f"{one}+{two}",
        "low": f"random-layers+{two}",
        "over": f"{folders['over']}",
        "none": "all-layers",
        "untrained": f"random-layers+{folders['high']}",
        "rule": "random-layers+ridge",
    }
    labelled = [f"{label}={name}" for label, name in agents.items()]
    out = tmp_path / "out"
    for resume in (False, True):
        result = compare(settings, labelled, [0, 1], out, resume=resume, progress=False)
        wanted = {"one": 5, "both": 10, "low": 5, "over": 5}
        assert capsys.readouterr().err.splitlines() == [
            f"hiedit: warning: agent {name!r} was trained on {count} of the 12 facts of this table"
            for name, count in wanted.items()
        ]
        summary = json.loads((out / "summary.json").read_text())
        found = {name: {"facts": count, "of": 12} for name, count in wanted.items()}
        assert summary["trained_on"] == found
    assert len(result.rows) == 16


def test_the_facts_of_the_table_are_those_of_its_streams(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CompareSettings(model="tiny", num_edits=20, generation=(), max_steps_per_edit=1)
    result = compare(settings, [f"x={folders['one']}"], [0, 1], tmp_path / "out", progress=False)
    asked = {prompt for run in result.details.values() for prompt in run["prompts"]}
    count = len(asked & {fact.prompt for fact in FACTS[:10]})
    assert count > 0
    assert f"trained on {count} of the {len(asked)} facts" in capsys.readouterr().err


def test_no_record_no_warning(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in ("agent.json", "agent.safetensors"):
        (old / name).write_bytes((folders["one"] / name).read_bytes())
    record: dict[str, Any] = json.loads((old / "agent.json").read_text())
    del record["training"]["fact_hashes"]
    (old / "agent.json").write_text(json.dumps(record))
    command = ["compare", "--model", "tiny", "--num-edits", "2", "--no-generation"]
    assert hiedit([*command, "--agents", str(old), "--out", str(tmp_path / "out")]) == 0
    assert "trained on" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["trained_on"] == {}
