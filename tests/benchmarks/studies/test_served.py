"""The study of what serving costs runs and reports what it did."""

from __future__ import annotations

import json

import pytest

from hiedit_benchmarks.studies.served import main


def test_it_reports_answers_idle_and_in_edits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeats", "3", "--tokens", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["answers"], found["tokens"]) == ("tiny", 3, 4)
    # Serving does what "generate" does, and more.
    assert found["ratio_of_processor_time"] > 1
    assert 0 < found["generate_ms"] < 10_000
    assert 0 < found["served_while_editing_ms"] < 10_000
    assert found["new_snapshot_ms"] > 0
