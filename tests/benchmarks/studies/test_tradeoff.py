"""Efficacy against agreement from results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hiedit_agents.command_line import run_script
from hiedit_benchmarks.comparison.results import FORMAT_VERSION
from hiedit_benchmarks.studies.tradeoff import Point, main, points
from hiedit_env.errors import SettingsError


def results(
    folder: Path,
    rows: list[tuple[str, int, float | None, float]],
    stream: str = "s",
    dtype: str = "float32",
) -> Path:
    folder.mkdir()
    lines = [
        {
            "format_version": FORMAT_VERSION,
            "agent": agent,
            "seed": seed,
            "num_edits": 2,
            "error_type": None,
            "layers_per_edit": 1.0,
            "steps_per_edit": 1.0,
            "seconds_per_edit": 0.1,
            "stream_fingerprint": f"{stream}{seed}",
            "settings": {
                "model": "tiny",
                "dtype": dtype,
                "candidate_layers": ["a"],
                "num_edits": 2,
            },
            "metrics": {
                "specificity": {"agreement": agreement},
                "efficacy": {"token_accuracy": efficacy},
            },
        }
        for agent, seed, agreement, efficacy in rows
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_points_are_means_over_seeds_of_all_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = results(tmp_path / "one", [("a@1", 0, 10.0, 90.0), ("a@1", 1, 30.0, 80.0)])
    two = results(tmp_path / "two", [("a@2", 0, 50.0, 60.0), ("a@2", 1, 60.0, 60.0)])
    wanted = [Point("a@1", 20.0, 85.0, 2), Point("a@2", 55.0, 60.0, 2)]
    assert points([one, two]) == wanted
    picture = tmp_path / "curve.png"
    assert main([str(one), str(two), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "a@1: agreement 20.0, efficacy 85.0 (2 seeds)" in capsys.readouterr().out


def test_the_unedited_model_of_every_folder_counts_once(tmp_path: Path) -> None:
    unedited = ("no-edit", 0, 100.0, 20.0)
    one = results(tmp_path / "one", [unedited, ("a", 0, 10.0, 90.0)])
    two = results(tmp_path / "two", [unedited, ("b", 0, 50.0, 60.0)])
    assert [point.agent for point in points([one, two])] == ["no-edit", "a", "b"]
    with pytest.raises(SettingsError, match="a, seed 0, is there twice"):
        points([one, one])


def test_other_facts_are_not_mixed(tmp_path: Path) -> None:
    one = results(tmp_path / "one", [("a", 0, 10.0, 90.0)])
    two = results(tmp_path / "two", [("b", 0, 10.0, 90.0)], stream="other")
    with pytest.raises(SettingsError, match="other facts"):
        points([one, two])
    with pytest.raises(SettingsError, match="no results"):
        points([tmp_path])
    half = results(tmp_path / "half", [("c", 0, 10.0, 90.0)], dtype="bfloat16")
    with pytest.raises(SettingsError, match="was measured with"):
        points([one, half])
    with pytest.raises(SettingsError, match="there twice"):
        points([one, one])
    more = results(tmp_path / "more", [("d", 0, 10.0, 90.0), ("d", 1, 10.0, 90.0)])
    with pytest.raises(SettingsError, match="different seeds"):
        points([one, more])


def test_mistakes_are_one_line_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curve.png"

    def error(*folders: Path, out: Path = picture) -> str:
        assert run_script(lambda: main([*map(str, folders), "--out", str(out)])) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    assert "nosuch holds no results" in error(tmp_path / "nosuch")
    none = results(tmp_path / "none", [("a", 0, None, 90.0)])
    assert "a has no agreement of specificity" in error(none)
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "results.jsonl").write_text('{"agent": "a"}\n')
    assert "rubbish holds no results" in error(tmp_path / "rubbish")
    old = results(tmp_path / "old", [("a", 0, 10.0, 90.0)])
    rows = (old / "results.jsonl").read_text()
    (old / "results.jsonl").write_text(rows.replace(f'"format_version": {FORMAT_VERSION}, ', ""))
    assert "results in format 1" in error(old)
    good = results(tmp_path / "good", [("a", 0, 10.0, 90.0)])
    assert "nowhere" in error(good, out=tmp_path / "nowhere" / "curve.png")
    assert not picture.exists()
