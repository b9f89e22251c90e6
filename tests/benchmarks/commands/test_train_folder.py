"""``hiedit train``: one process per folder, and a training that collapsed says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hiedit_benchmarks.commands import train as command
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.train import TRAINING_COLLAPSED, collapse
from hiedit_benchmarks.commands.train_folder import TrainingFolder
from hiedit_env.errors import OutputError, ResultsExistError
from hiedit_env.model.saving import find_folder

TRAIN = [
    *("train", "all-layers+hypernetwork", "--model", "tiny", "--dataset", "tiny-facts"),
    *("--episodes", "1", "--edits-per-episode", "2", "--held-out", "0.5"),
    *("--calibration", "2", "--evaluation-edits", "2", "--no-tensorboard"),
]


def test_two_processes_do_not_train_into_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert main([*TRAIN, "--out", str(out)]) == 2
    assert "another process is writing into" in capsys.readouterr().err
    assert not (out / "agent.json").exists()
    # The other one has ended.
    assert main([*TRAIN, "--out", str(out)]) == 0
    assert json.loads((out / "train.jsonl").read_text())["collapsed"] == 0.0


def test_a_folder_is_let_go_after_an_error(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path, {}, resume=False)
    other = TrainingFolder(tmp_path, {}, resume=False)
    with folder.held(), pytest.raises(OutputError), other.held():
        raise AssertionError("two hold it")
    with pytest.raises(KeyError), folder.held():
        raise KeyError
    with other.held():
        pass


def test_a_folder_is_looked_at_again_when_it_is_held(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path, {}, resume=False)
    (tmp_path / "agent.json").write_text("{}")
    with pytest.raises(ResultsExistError, match="holds a trained agent already"), folder.held():
        raise AssertionError("a result of another process would be overwritten")


def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert main([*TRAIN, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds 'model.safetensors' and is no folder of a training; give another --out" in said
    assert "loading" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_a_training_left_before_its_first_checkpoint_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "train.jsonl").touch()
    TrainingFolder(tmp_path, {}, resume=False)


def test_a_training_that_collapsed_ends_with_another_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*TRAIN, "--out", str(out), "--step-size", "1e30"]) == TRAINING_COLLAPSED == 3
    assert "the training collapsed: 1 of 1 episodes" in capsys.readouterr().err
    assert (out / "agent.json").exists(), "what was trained is kept"


def test_what_collapsed(tmp_path: Path) -> None:
    assert collapse(tmp_path) is None
    rows = [{"collapsed": 1.0}, {"collapsed": 0.0}, {}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert collapse(tmp_path) is None, "it recovered"
    (tmp_path / "evaluation.json").write_text('{"error_type": "non_finite"}')
    assert collapse(tmp_path) == "the episode on held-out facts ended early (non_finite)"
    (tmp_path / "train.jsonl").write_text('{"collapsed": 1.0}\n{"collapsed": 1.0}\n')
    found = collapse(tmp_path)
    assert found == "2 of 2 episodes, the last one among them, ended early"
    assert command.TRAINING_COLLAPSED != 0


def test_the_form_and_the_end_token_reach_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_folder("tiny")
    assert source is not None
    model = Path(shutil.copytree(source, tmp_path / "model"))
    asked = [*TRAIN, "--model", str(model), "--prompt-form", "both", "--end-token"]
    assert main([*asked, "--out", str(tmp_path / "out")]) == 2
    assert "--prompt-form both needs a chat template" in capsys.readouterr().err
    template = "It is black. {% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    seen = []
    inner = command.unwrapped

    def noted(env: Any) -> Any:
        found = inner(env)
        seen.append((found.episode.evaluator.prompt_form, found.llm.encoder.end_id))
        return found

    monkeypatch.setattr(command, "unwrapped", noted)
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    assert set(seen) == {("both", 2)}  # the id of <eos>
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert {"efficacy", "chat_efficacy"} <= set(metrics)


def test_a_training_killed_at_its_first_checkpoint_names_the_way_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-000001").mkdir()
    assert main([*TRAIN, "--out", str(tmp_path)]) == 2
    assert "--resume to go on" in capsys.readouterr().err
    assert main([*TRAIN, "--out", str(tmp_path), "--resume"]) == 0


def test_facts_that_are_all_excluded_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--out", str(tmp_path / "a"), "--exclude", "tiny-facts"]) == 2
    assert "--exclude tiny-facts leaves no fact of tiny-facts" in capsys.readouterr().err
