"""What training refuses: arguments that would change nothing, numbers that are none, and resuming
what cannot be gone on with."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hiedit_agents.hierarchy.train_settings import TrainSettings, defaults
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.named.checkpoints import save_agent
from hiedit_agents.registry import make_agent, spec_agent
from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError
from tests.support.episodes import SELECTION, make

QUICK = TrainSettings(episodes=2, edits_per_episode=2, evaluation_edits=2)
RUN = TrainingRun(agent="policy+step-sizes", model="tiny", layers_per_edit=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "agent"
    train(RUN, QUICK, out, progress=False)
    return out


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rledit", "--max-steps-per-edit", "0"], "max_steps_per_edit must be ≥ 1"),
        (["policy", "--max-steps-per-edit", "-2"], "max_steps_per_edit must be ≥ 1"),
        (["rledit", "--layers-per-edit", "3"], "'all-layers' has no such setting"),
        (["DIR", "--layers-per-edit", "3"], "keeps the size it was trained with"),
        (["DIR+hypernetwork", "--layers-per-edit", "3"], "keeps the size it was trained with"),
        (["no-edit+hypernetwork"], "no layer is ever written"),
        (["all-layers"], "'all-layers' has nothing to train"),
        (["oracle"], "'oracle' has no levels, so nothing to train"),
    ],
)
def test_what_would_change_nothing_is_refused_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hiedit_benchmarks.commands.train.make_env", lambda *_: 1 / 0)
    agent, *rest = arguments
    agent = agent.replace("DIR", str(trained))
    out = tmp_path / "out"
    assert hiedit(["train", agent, *rest, "--model", "tiny", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_the_horizon_that_was_given_is_the_one_that_is_used(tmp_path: Path) -> None:
    run = replace(RUN, max_steps_per_edit=1)
    train(run, replace(QUICK, evaluation_edits=0), tmp_path / "out", progress=False)
    record = json.loads((tmp_path / "out" / "agent.json").read_text())
    assert record["max_steps_per_edit"] == 1
    assert record["log"]["steps"] <= 1


def test_a_size_is_for_high_levels_that_are_trained_and_have_one(trained: Path) -> None:
    env = make(SELECTION)
    for name, wanted in (
        (f"policy+{trained}", 3),
        ("random-layers+ridge", 3),
        (str(trained), 2),
        (f"{trained},high.layers_per_edit=4", 4),
        ("all-layers+ridge", 6),
    ):
        editor = spec_agent(name, 3)
        assert (editor.keeps_size is None) == (wanted == 3), name
        editor.reset(env, 0)
        observation, info = env.reset(seed=0)
        assert editor.select_action(observation, info).sum() == wanted


# -- numbers --------------------------------------------------------------------------------------

_REALS = [name for name, default in defaults().items() if isinstance(default, float)]


@pytest.mark.parametrize("name", _REALS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-3])
def test_settings_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be"):
        TrainSettings(**{name: value})


def test_zero_is_a_weight() -> None:
    names = [name for name in _REALS if name.endswith("_weight")]
    assert len(names) == 5
    TrainSettings(**dict.fromkeys([*names, "l2", "held_out"], 0.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(value: float, tmp_path: Path) -> None:
    spec = spec_agent("policy").spec
    state: dict[str, Any] = {"low": {"a": 1.0}, "high": {"first.weight": torch.ones(2, 2)}}
    state["high"]["first.weight"][0, 1] = value
    with pytest.raises(CheckpointError, match=r"'first\.weight' of the high level is not finite"):
        save_agent(tmp_path / "out", spec, state, {})
    with pytest.raises(CheckpointError, match="'a' of the low level is not finite"):
        save_agent(tmp_path / "out", spec, {"low": {"a": value}}, {})
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer.episode

    def broken(self: Trainer, number: int, on_fact: Any = None) -> Any:
        row = own(self, number, on_fact)
        if number == 1:
            with torch.no_grad():
                self.high.bias[0] = torch.nan  # type: ignore[attr-defined]
        return row

    monkeypatch.setattr(Trainer, "episode", broken)
    with pytest.raises(CheckpointError, match="'bias' of the high level"):
        train(RUN, QUICK, tmp_path / "out", progress=False)
    assert [f.name for f in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-000001"]
    assert not (tmp_path / "out" / "agent.json").exists()


# -- resuming -------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {file.name: file.read_bytes() for file in trained.iterdir() if file.is_file()}
    monkeypatch.setattr(Trainer, "episode", lambda *_: 1 / 0)
    found = train(RUN, QUICK, trained, resume=True, progress=False)
    assert found == json.loads((trained / "evaluation.json").read_text())
    assert "is finished already; nothing is trained" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in trained.iterdir() if f.is_file()} == before
    with pytest.raises(SettingsError, match="seed was 0 and is now 1"):
        train(RUN, replace(QUICK, seed=1), trained, resume=True, progress=False)
    for number, word in ((3, "more"), (1, "fewer")):
        with pytest.raises(SettingsError, match=f"finished after 2 episodes, and what {word}"):
            train(RUN, replace(QUICK, episodes=number), trained, resume=True, progress=False)
    with pytest.raises(ResultsExistError, match="--resume to see"):
        train(RUN, QUICK, trained, progress=False)


def test_the_documented_command_can_be_given_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "policy", "--model", "tiny", "--episodes", "1", "--no-tensorboard"]
    command += ["--edits-per-episode", "2", "--evaluation-edits", "2", "--resume"]
    command += ["--out", str(tmp_path / "out")]
    printed = []
    for _ in range(2):
        assert hiedit(command) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out != ""
    assert "finished" in printed[1].err


def test_fewer_episodes_than_there_are_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("hiedit_benchmarks.commands.train._evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(RUN, replace(QUICK, episodes=3), out, progress=False)
    with pytest.raises(SettingsError, match=r"3 episodes are done.* is now 2"):
        train(RUN, QUICK, out, resume=True, progress=False)
    # As many, or more, go on.
    more = tmp_path / "more"
    shutil.copytree(out, more)
    assert train(RUN, replace(QUICK, episodes=3), out, resume=True, progress=False)
    train(RUN, replace(QUICK, episodes=4), more, resume=True, progress=False)
    assert len((out / "train.jsonl").read_text().splitlines()) == 3
    assert len((more / "train.jsonl").read_text().splitlines()) == 4


def test_what_parameters_were_trained_for_cannot_be_changed(trained: Path) -> None:
    for given, name in (
        ("high.normalize=true", "normalize"),
        ("keys=raw", "keys"),
        ("gradients=scaled", "gradients"),
    ):
        with pytest.raises(SettingsError, match=rf"'{name}' of .* was fixed when it was trained"):
            make_agent(f"{trained},{given}")


def test_nor_of_an_agent_that_ships() -> None:
    for given in ("gradients=scaled", "keys=raw", "high.normalize=false"):
        agent = spec_agent(f"hiedit,{given}")
        with pytest.raises(SettingsError, match="that ships for smollm2-135m was fixed"):
            agent.training_facts("smollm2-135m")
        # To be trained it takes them.
        assert agent.training_facts("smollm2-135m", trained=False) == frozenset()
    assert spec_agent("hiedit,step_size=1e-4").training_facts("smollm2-135m")
