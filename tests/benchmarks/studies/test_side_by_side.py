"""Several comparisons in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hiedit_agents.command_line import run_script
from hiedit_benchmarks.comparison.compare import Comparison, compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_benchmarks.studies.side_by_side import join, main
from hiedit_env.errors import SettingsError

TINY = CompareSettings(model="tiny", dataset="tiny-facts", num_edits=2, retention_window=0)
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Comparison]:
    """Two comparisons of one agent each, and one of both."""
    root = tmp_path_factory.mktemp("comparisons")
    for name, agents in (("one", ["all-layers"]), ("other", ["random-layers"])):
        compare(TINY, agents, SEEDS, root / name, progress=False)
    both = ["all-layers", "random-layers"]
    return root / "one", root / "other", compare(TINY, both, SEEDS, root / "both", progress=False)


def test_joined_is_what_one_comparison_of_all_agents_says(
    folders: tuple[Path, Path, Comparison],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other, both = folders
    joined = join([one, other])
    assert joined.baseline == "all-layers"
    assert joined.paired == dict(both.paired)
    for agent, measures in both.summary.items():
        for measure, numbers in measures.items():
            if measure != "seconds_per_edit":
                assert joined.summary[agent][measure] == numbers, (agent, measure)
    out = tmp_path / "joined.json"
    assert main([str(one), str(other), "--out", str(out)]) == 0
    assert "random-layers" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["paired_differences"] == json.loads(json.dumps(joined.paired))
    assert run_script(lambda: main([str(one), str(other), "--out", str(out)])) == 2
    assert "exists already" in capsys.readouterr().err


def changed(folder: Path, to: Path, old: str, new: str) -> Path:
    """A copy of a folder with one text in its table replaced."""
    shutil.copytree(folder, to)
    table = to / "results.jsonl"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))
    return to


def test_what_cannot_be_joined(folders: tuple[Path, Path, Comparison], tmp_path: Path) -> None:
    one, other, _ = folders
    with pytest.raises(SettingsError, match="all-layers, seed 0, is there twice"):
        join([one, one])
    with pytest.raises(SettingsError, match="baseline 'rledit' is none of the agents: no-edit, "):
        join([one, other], "rledit")
    with pytest.raises(SettingsError, match="holds no results of hiedit compare"):
        join([one, tmp_path])
    asked = changed(other, tmp_path / "asked", '"prompt_form": "plain"', '"prompt_form": "chat"')
    with pytest.raises(SettingsError, match="prompt_form is 'chat', and 'plain' in"):
        join([one, asked])
    stream = json.loads((other / "results.jsonl").read_text().splitlines()[0])["stream_fingerprint"]
    moved = changed(other, tmp_path / "moved", stream, "0" * 16)
    with pytest.raises(SettingsError, match="seed 0 saw other facts"):
        join([one, moved])
    fewer = changed(other, tmp_path / "fewer", '"random-layers", "seed": 1', '"no-edit", "seed": 1')
    with pytest.raises(SettingsError, match="random-layers was not measured with seed 1"):
        join([one, fewer])


def test_no_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(lambda: main([])) == 2
    assert "DIR must be given" in capsys.readouterr().err
