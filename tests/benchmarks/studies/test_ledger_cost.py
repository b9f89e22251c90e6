"""The study of what a ledger costs runs and reports what it did."""

from __future__ import annotations

import json

import pytest

from hiedit_benchmarks.studies.ledger_cost import main


def test_it_reports_appends_and_a_revoke(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--edits", "6", "--late", "12", "--layers", "2", "--rank", "3"]
    assert main([*words, "--d-in", "5", "--d-out", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    appends = result["appends"]
    assert appends["ratio"] == appends["append_ms_after_12"] / appends["append_ms_after_10"]
    # Two layers of rank 3 in float32, and no more than a few pages beside them.
    assert 2 * 3 * (5 + 4) * 4 <= appends["bytes_per_edit"] < 10_000
    assert result["revoke"]["edits"] == 6
    assert result["revoke"]["revoke_seconds"] > 0
