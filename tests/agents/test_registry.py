"""Agents by name: trained ones in comparisons, with the layers they were trained for."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_agents.hierarchy.routers import PolicyRouter
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.registry import AGENTS, SHIPPED, make_agent, spec_agent
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.errors import CheckpointError, LayerError, SettingsError
from hiedit_env.rules.closed_form import DecorrelatedRule, RidgeRule
from tests.support.episodes import SELECTION, make

QUICK = TrainSettings(episodes=1, edits_per_episode=2, evaluation_edits=0)
UP = tuple(f"model.layers.{i}.mlp.up_proj" for i in (1, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two agents, trained for two layers and for all six."""
    folder = tmp_path_factory.mktemp("trained")
    run = TrainingRun(agent="policy+step-sizes", model="tiny", max_steps_per_edit=3)
    train(replace(run, layers=UP), QUICK, folder / "two", progress=False)
    train(run, QUICK, folder / "six", progress=False)
    return folder / "two", folder / "six"


def test_a_comparison_takes_the_layers_a_trained_agent_needs(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    two, six = trained
    settings = CompareSettings(model="tiny", num_edits=2, generation=())
    agents = [f"mine={two}", f"random-layers+{two}", "all-layers"]
    result = compare(settings, agents, [0], tmp_path / "out", progress=False)
    assert [row["agent"] for row in result.rows] == [
        "no-edit",
        "mine",
        f"random-layers+{two}",
        "all-layers",
    ]
    for row in result.rows:
        assert tuple(row["settings"]["candidate_layers"]) == UP
        assert row["settings"]["agents"]["mine"]["agent"] == str(two)
    assert result.rows[1]["layers_per_edit"] <= 1
    with pytest.raises(SettingsError, match="different candidate layers"):
        compare(settings, [str(two), str(six)], [0], tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_an_agent_for_a_model_with_other_layers_says_so(tmp_path: Path) -> None:
    folder = SHIPPED / "hiedit-smollm2-135m"
    settings = CompareSettings(model="tiny", num_edits=2, generation=())
    with pytest.raises(CheckpointError, match="was trained for a model with other layers than 'ti"):
        compare(settings, [f"mine={folder}"], [0], tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    # Layers that were asked for are complained about as what they are.
    settings = CompareSettings(model="tiny", num_edits=2, generation=(), layers=("nowhere",))
    with pytest.raises(LayerError, match="matches no module"):
        compare(settings, [f"mine={folder}"], [0], tmp_path / "none", progress=False)


def test_agents_after_a_trained_one_get_the_environments_own_rule_and_steps(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = CompareSettings(model="tiny", num_edits=2, generation=(), step_size=1e-9)
    agents = [str(trained[1]), "all-layers"]
    rows = compare(settings, agents, [0], tmp_path / "out", progress=False).rows
    # With a step size that does nothing all five of the environment's steps are spent, not three.
    assert rows[2]["agent"] == "all-layers"
    assert rows[2]["steps_per_edit"] == 5


def test_named_agents_say_where_their_settings_come_from() -> None:
    assert set(PRESETS) == {"hiedit", "hiedit-paper", "rledit", "mend", "malmen", "ultraedit"}
    for name, spec in PRESETS.items():
        assert AGENTS[name] == spec.source
        assert spec.source
        TrainSettings(**spec.train)
    for name in ("rledit", "mend", "malmen", "hiedit-paper", "ultraedit"):
        assert PRESETS[name].max_steps_per_edit == 1
        assert "arXiv" in PRESETS[name].source


def test_every_high_level_meets_every_low_level() -> None:
    env = make(SELECTION, num_edits=1)
    highs = ("random-layers", "gradient-norm", "straight-through", "policy")
    lows = (
        "decorrelated",
        "fine-tuning",
        "hypernetwork",
        "step-sizes",
        "hiedit_env.rules.closed_form:RidgeRule",
    )
    for high in highs:
        for low in lows:
            agent = make_agent(f"{high}+{low}", layers_per_edit=2)
            agent.reset(env, 0)
            action = agent.select_action(*env.reset(seed=0))
            assert action.sum() == 2
            _, _, _, _, info = env.step(action)
            assert info["edit_over"]
    assert isinstance(env.episode.rule, RidgeRule)


def test_models_have_nominal_step_sizes_of_their_own() -> None:
    env = make(SELECTION)
    for name, wanted in (("hypernetwork", 2e-3), ("step-sizes", 1e-3), ("fine-tuning", 0.03)):
        agent = spec_agent(f"all-layers+{name}")
        low = agent.build(env.llm, "tiny").low
        assert low is not None
        assert low.step_size == wanted
        other = agent.build(env.llm, "another").low
        assert other is not None
        assert other.step_size != wanted


def test_a_spec_goes_to_json_and_back() -> None:
    for spec in PRESETS.values():
        text = json.dumps(spec.to_json())
        again = type(spec).from_json(json.loads(text))
        assert again == spec


def test_arguments_of_the_low_level_can_be_given_with_the_name(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    env = make(SELECTION)
    rule = spec_agent("all-layers+decorrelated,ridge=0.25,step_size=0.5").build(env.llm).low
    assert isinstance(rule, DecorrelatedRule)
    assert (rule.ridge, rule.step_size) == (0.25, 0.5)
    again = spec_agent(f"{trained[1]},step_size=0.125").build(env.llm).low
    assert again is not None
    assert again.step_size == 0.125
    with pytest.raises(SettingsError, match="name=value"):
        spec_agent("all-layers+ridge,ridge")
    router = spec_agent("policy,size=learned,history=false+ridge,ridge=2").build(env.llm)
    assert isinstance(router.high, PolicyRouter)
    assert (router.high.size, router.high.history) == ("learned", False)
    assert isinstance(router.low, RidgeRule)
    assert router.low.ridge == 2
    assert spec_agent("hiedit,facts=0,high.history=false").spec.high_settings["history"] is False
    for name, message in (
        ("all-layers+hypernetwork,form=mend", "form='mend': Input should be 'outer'"),
        ("all-layers+rehearsal,facts=1.5", "facts=1.5: Input should be a valid integer"),
        ("all-layers+rehearsal,seed=-1", "rehearsal"),
        ("all-layers,x=1+ridge", "x"),
    ):
        with pytest.raises(SettingsError, match=message):
            spec_agent(name).build(env.llm)
    for name in ("all-layers+ridge,max_steps_per_edit=2", f"{trained[1]},max_steps_per_edit=2"):
        assert spec_agent(name).build(env.llm).max_steps_per_edit == 2
        assert spec_agent(name).identity["max_steps_per_edit"] == 2
    assert spec_agent("all-layers+rledit,max_steps_per_edit=3").spec.max_steps_per_edit == 3
    for name, message in (
        ("all-layers+ridge,max_steps_per_edit=0", "at least 1"),
        ("policy,max_steps_per_edit=2+ridge", "changes the other level"),
    ):
        with pytest.raises(SettingsError, match=message):
            spec_agent(name)
    with pytest.raises(SettingsError, match="fixed when it was trained"):
        spec_agent(f"{trained[1]},rule=ridge")
    assert spec_agent("fixed-layers,layers_per_edit=[3,1]+ridge").spec.high_settings == {
        "layers_per_edit": [3, 1]
    }
    # Whether a low level is trained is said by its own preset.
    for name, trains in (("hiedit", False), ("hiedit+rledit", True), ("policy+hiedit", False)):
        assert spec_agent(name).spec.train.get("train_low", True) is trains
    for name, message in (
        ("nobody+ridge", "unknown high level 'nobody'"),
        # A folder that is missing is no part of the value before it.
        ("random-layers,layers_per_edit=2+no/folder", "unknown low level 'no/folder'"),
        ("policy,size=fixed+no/folder", "unknown low level 'no/folder'"),
    ):
        with pytest.raises(SettingsError, match=message):
            spec_agent(name)
    with pytest.raises(SettingsError, match="layers_per_edit must be ≥ 1 and a whole number, got"):
        spec_agent("random-layers,layers_per_edit=two+ridge").build(env.llm)
    assert spec_agent("random-layers+ridge,step_size=1e+2").spec.low_settings["step_size"] == 100
    with pytest.raises(SettingsError, match="colour"):
        spec_agent("all-layers+ridge,colour=red").build(env.llm)
    settings = CompareSettings(model="tiny", num_edits=1, generation=())
    names = ["all-layers+ridge,ridge=2", "mine=all-layers+ridge,ridge=3"]
    rows = compare(settings, names, [0], tmp_path / "out", progress=False).rows
    assert [row["agent"] for row in rows] == ["no-edit", names[0], "mine"]
    for agents, message in (
        (["mine=all-layers+ridge", "mine=all-layers"], "two agents are called 'mine'"),
        (["no-edit=all-layers"], "two agents are called 'no-edit'"),
    ):
        with pytest.raises(SettingsError, match=message):
            compare(settings, agents, [0], tmp_path / "none", progress=False)
    with pytest.raises(SettingsError, match="is of another agent"):
        compare(
            settings, ["mine=all-layers+ridge"], [0], tmp_path / "out", resume=True, progress=False
        )


def test_folders_may_be_called_anything(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "a+b=c:d"
    shutil.copytree(trained[1], folder)
    env = make(SELECTION)
    names = (
        str(folder), f"{folder}+ridge", f"random-layers+{folder}", f"{folder},step_size=0.125"
    )  # fmt: skip
    for name in names:
        agent = make_agent(name)
        agent.reset(env, 0)
    settings = CompareSettings(model="tiny", num_edits=1, generation=())
    rows = compare(settings, [str(folder)], [0], tmp_path / "out", progress=False).rows
    assert rows[1]["agent"] == str(folder)
    data = (trained[0] / "agent.safetensors").read_bytes()
    (folder / "agent.safetensors").write_bytes(data)
    record = json.loads((folder / "agent.json").read_text())
    record["tensors"] = {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "agent.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="does not fit its own settings"):
        make_agent(str(folder)).reset(make(SELECTION), 0)


@pytest.mark.parametrize(
    "name",
    [
        "hiedit,history=false+ridge",
        "hiedit,low.facts=0+ridge",
        "random-layers+hiedit,high.layers_per_edit=4",
        "policy,low.ridge=1+ridge",
    ],
)
def test_arguments_of_a_level_that_is_not_taken_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="changes the other level"):
        spec_agent(name)


def test_arguments_reach_the_level_that_is_taken() -> None:
    spec = spec_agent("hiedit,high.history=false+hiedit,facts=0").spec
    assert spec.high_settings["history"] is False
    assert spec.low_settings["facts"] == 0


def test_a_folder_that_is_called_like_a_named_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TrainingRun(agent="hiedit", model="tiny"), QUICK, tmp_path / "hiedit", progress=False)
    monkeypatch.chdir(tmp_path)
    for name in ("hiedit", "hiedit,facts=1", "random-layers+hiedit"):
        with pytest.raises(SettingsError, match=r"write './hiedit' for the folder"):
            make_agent(name)
    agent = make_agent("random-layers+./hiedit,facts=1")
    assert agent.identity["weights"]  # type: ignore[attr-defined]


def test_what_ships_keeps_the_settings_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Presets move on; what was trained before they did is built as it was trained.
    monkeypatch.setattr("hiedit_agents.named.fitting.SHIPPED", tmp_path)
    agent = "hiedit,high.normalize=false,rank=8,facts=3"
    run = TrainingRun(agent=agent, name="hiedit", model="tiny")
    train(run, QUICK, tmp_path / "hiedit-tiny", progress=False)
    env = make(SELECTION, model="tiny", num_edits=1)
    assert PRESETS["hiedit"].high_settings["normalize"]
    built = spec_agent("hiedit,facts=1").build(env.llm, "tiny")
    assert isinstance(built.high, PolicyRouter)
    assert isinstance(built.low, Rehearsal)
    assert built.high.moments is None
    assert (built.low.facts, built.low.probes) == (1, 4)
    # What is given by name counts also where the preset has the same.
    for query, facts in (("", 3), (f",facts={PRESETS['hiedit'].low_settings['facts']}", 4)):
        low = spec_agent(f"hiedit{query}").build(env.llm, "tiny").low
        assert isinstance(low, Rehearsal)
        assert low.facts == facts
    # A fresh one, to be trained, follows the preset.
    fresh = spec_agent("hiedit").build(env.llm, "tiny", trained=False).high
    assert isinstance(fresh, PolicyRouter)
    assert fresh.moments is not None
