"""The benchmark of many environments: what it counts."""

from __future__ import annotations

import pytest

from hiedit_benchmarks.studies.vector_memory import main, measure
from tests.support.episodes import SELECTION, make


def test_updates_are_one_float32_matrix_per_environment_and_layer() -> None:
    found = measure("tiny", 3, 2)
    llm = make(SELECTION).llm
    assert found["updates_mb"] == 3 * sum(4 * a * b for a, b in llm.shapes) / 2**20
    assert len(found["edited_mb"]) == len(found["seconds"]) == 2
    assert found["unedited_mb"] > 50


def test_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "tiny", "--num-envs", "2", "--steps", "1"])
    assert '"num_envs": 2' in capsys.readouterr().out
