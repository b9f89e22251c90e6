"""The study of what a ledger costs runs and reports what it did."""

from __future__ import annotations

import json

import pytest

from hiedit_benchmarks.studies.ledger_cost import Options, main, shapes_of
from hiedit_env.errors import SettingsError


def test_it_reports_appends_and_a_revoke(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--edits", "6", "--late", "12", "--updates", "5x4x3", "4x5x2"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    appends = result["appends"]
    assert appends["ratio"] == appends["append_ms_after_12"] / appends["append_ms_after_10"]
    # Ranks 3 and 2 in float32, and no more than a few pages beside them.
    assert (3 + 2) * (5 + 4) * 4 <= appends["bytes_per_edit"] < 10_000
    assert result["revoke"]["edits"] == 6
    assert result["revoke"]["seconds"] > 0 < result["revoke"]["processor_seconds"]
    assert "model" not in result


def test_a_saved_folder_and_a_live_editor_come_to_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shapes = ["32x96x1", "32x96x1", "96x32x2"]
    words = ["--edits", "6", "--late", "12", "--model", "tiny", "--updates", *shapes]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["same_weights"] is True
    assert found["editor"]["seconds"] > 0 < found["folder"]["seconds"]


def test_shapes_that_are_none() -> None:
    assert [(s.d_in, s.d_out, s.rank) for s in shapes_of(Options())] == [
        (576, 1536, 1),
        (576, 1536, 1),
        (1536, 576, 2),
    ]
    for text in ("5x4", "5x4x0", "axbxc", "", "5x-4x1"):
        with pytest.raises(SettingsError, match="updates must be like 576x1536x1"):
            shapes_of(Options(updates=(text,)))
    with pytest.raises(SettingsError, match="the candidates of tiny begin with"):
        main(["--edits", "2", "--late", "11", "--model", "tiny", "--updates", "5x4x1"])
