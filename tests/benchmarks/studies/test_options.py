"""The study of ``try_options`` runs, compares equal things, and reports their ratio."""

from __future__ import annotations

import json

import pytest

from hiedit_benchmarks.studies.options import draw, main


def test_options_are_a_quarter_of_the_layers() -> None:
    masks = draw(5, 12)
    assert masks.sum(1).tolist() == [3] * 5
    assert (masks == draw(5, 12)).all()


def test_it_reports_a_ratio_before_and_after_edits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--options", "4", "--edits", "1", "--one-by-one", "2"]
    assert main([*words, "--rounds", "1", "--max-steps-per-edit", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["after_edits"]) == {"0", "1"}
    for one in found["after_edits"].values():
        assert one["ratio"] == one["seconds_one_by_one"] / one["seconds_together"]
        assert one["largest_difference"] < 1e-4
