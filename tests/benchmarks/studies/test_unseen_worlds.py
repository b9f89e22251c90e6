"""The study of unseen worlds: intervals by hand, and a small study from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hiedit_agents.registry import make_agent
from hiedit_benchmarks.studies.unseen_report import draw, interval, rows_of, summarise, table
from hiedit_benchmarks.studies.unseen_worlds import Options, main, study
from hiedit_env.errors import ResultsExistError, SettingsError

SMALL = "plain,layers=2,home_layers=2,relations=2,subjects=10"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "worlds"))


def test_an_interval_is_as_wide_as_worlds_and_seeds_differ() -> None:
    generator = np.random.default_rng(0)
    worlds = generator.normal(size=40)
    # All seeds alike: the standard error of a mean over 40 worlds.
    found = interval(np.tile(worlds, (5, 1)))
    error = 1.96 * worlds.std() / np.sqrt(40)
    assert found["mean"] == pytest.approx(worlds.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.06)
    # All worlds alike: that over 40 seeds. More worlds would not help.
    found = interval(np.tile(worlds[:, None], (1, 30)))
    assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.06)


def test_a_summary_by_hand() -> None:
    references = {"oracle": [2.0, 4.0], "best-constant": [1.0, 3.0], "no-edit": [-6.0, -6.0]}
    outcomes = {
        "hiedit": [[1.5, 3.5], [2.0, 4.0]],
        "random": [[-3.0, -1.0], [-3.0, -1.0]],
        "random-layers": [[-4.0, -2.0], [-4.0, -2.0]],
    }
    found = summarise(references, outcomes)
    assert found["regret"]["hiedit"]["mean"] == 0.25
    assert found["regret"]["no-edit"]["mean"] == 9.0
    assert found["ours_minus"]["best-constant"]["mean"] == 0.75
    assert found["ours_minus"]["random"]["low"] == 4.5
    assert found["share_of_random"] == 0.05
    assert found["headroom"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["share_of_headroom"] == 0.75
    flat = summarise({**references, "best-constant": [2.0, 4.0]}, outcomes)
    assert flat["share_of_headroom"] is None


def test_a_small_study_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        *("--difficulty", SMALL, "--worlds", "2", "--worlds-per-seed", "1"),
        *("--test-worlds", "1", "--num-edits", "3", "--training-seeds", "2", "--ppo-steps", "0"),
        *("--router-steps", "20"),
    ]
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["test_seeds"] == [1_000_000]
    assert rows_of(results)[:3] == ["oracle", "hiedit", "best-constant"]
    assert printed.strip() == (tmp_path / "one" / "table.md").read_text().strip() == table(results)
    assert (tmp_path / "one" / "regret.png").read_bytes() == draw(results)
    # The routers are agents.
    assert make_agent(str(tmp_path / "one" / "router-1")).name.endswith("router-1")
    # Nothing is random but what follows from the seeds.
    assert main([*given, "--out", str(tmp_path / "two")]) == 0
    again = json.loads((tmp_path / "two" / "results.json").read_text())
    assert again["outcomes"] == results["outcomes"]
    # What was recorded is used again, unless it is of other settings.
    with pytest.raises(ResultsExistError, match="holds other recordings"):
        study(
            Options(
                out=tmp_path / "one", difficulty=SMALL, worlds=3, worlds_per_seed=1, num_edits=3
            )
        )


def test_more_worlds_per_seed_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="worlds_per_seed is 16, but only 2 worlds"):
        study(Options(out=tmp_path / "x", worlds=2))
    assert not (tmp_path / "x").exists()
