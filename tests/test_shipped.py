"""The trained agents that ship with the project."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from agents.checkpoints import JSON_FILE, TENSOR_FILE, read_record
from agents.registry import SHIPPED, default_agent, make_agent, spec_agent
from benchmarks.demo import default_agents

FOLDERS = sorted(SHIPPED.iterdir())


def test_hiedit_ships_for_smollm2_and_is_the_default() -> None:
    assert "hiedit-smollm2-135m" in [folder.name for folder in FOLDERS]
    assert default_agent("smollm2-135m") == "hiedit"
    assert default_agent("tiny") == default_agent("") == "all-layers"
    assert default_agents("smollm2-135m")[0] == "hiedit"
    assert make_agent("hiedit").name == "hiedit"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_small_and_says_where_it_comes_from(folder: Path) -> None:
    record = read_record(folder)
    files = sorted(path.name for path in folder.iterdir())
    assert files == [JSON_FILE, TENSOR_FILE]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10e6
    run = record["training"]["run"]
    # Trained on what ships, and not on the half that the demo asks.
    assert (run["dataset"], run["exclude"]) == ("world-facts-train", "world-facts-test")
    assert "/" not in run["agent"]
    assert folder.name == f"{record['name']}-{run['model']}"


def test_at_most_half_of_its_candidates_are_edited() -> None:
    layers = spec_agent("hiedit").candidate_layers("smollm2-135m")
    assert layers is not None
    with safe_open(SHIPPED / "hiedit-smollm2-135m" / TENSOR_FILE, "pt") as file:
        assert file.get_tensor("high.bias").shape == (len(layers),)
    assert spec_agent("hiedit").spec.high_settings["share"] <= 0.5
