"""Options for all agents: applied to each, refused by name, and recorded as what ran."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.registry import make_agent, refuse_unused_options
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.edit import NONE_GIVEN
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.errors import SettingsError

SETTINGS = CompareSettings(model="tiny", num_edits=3, generation=())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An agent with a trained high and a trained low level, and a horizon of its own."""
    out = tmp_path_factory.mktemp("trained") / "agent"
    quick = TrainSettings(episodes=1, edits_per_episode=2, evaluation_edits=0)
    run = TrainingRun(agent="policy+step-sizes", model="tiny", max_steps_per_edit=3)
    train(run, quick, out, progress=False)
    return str(out)


def row(agent: str, out: Path, **changes: Any) -> dict[str, Any]:
    found = compare(replace(SETTINGS, **changes), [agent], [0], out, progress=False)
    return dict(found.rows[-1])


def test_a_trained_agent_takes_the_given_horizon_and_size(trained: str, tmp_path: Path) -> None:
    # A step size that does nothing: every step is spent.
    still = {"step_size": 1e-9}
    own = row(trained, tmp_path / "own", **still)
    assert own["steps_per_edit"] == 3
    changed = row(trained, tmp_path / "changed", **still, max_steps_per_edit=1, layers_per_edit=2)
    assert changed["steps_per_edit"] == 1
    assert changed["layers_per_edit"] == 2
    identity = changed["settings"]["agents"][trained]
    assert identity["max_steps_per_edit"] == 1
    assert identity["low"]["settings"]["step_size"] == 1e-9
    assert identity["high"]["settings"]["layers_per_edit"] == 2
    # What the name says goes before what is given for all.
    named = row(
        f"{trained},max_steps_per_edit=2,high.layers_per_edit=4",
        tmp_path / "named",
        **still,
        max_steps_per_edit=1,
        layers_per_edit=2,
    )
    assert (named["steps_per_edit"], named["layers_per_edit"]) == (2, 4)


def test_two_fixed_sets_stay_two(tmp_path: Path) -> None:
    agents = ["fixed-layers,layers_per_edit=4:5+ridge", "fixed-layers,layers_per_edit=1:2+ridge"]
    settings = replace(SETTINGS, layers_per_edit=1)
    found = compare(settings, agents, [0], tmp_path / "out", progress=False)
    written = []
    for agent in agents:
        edits = found.details[agent, 0]["edits"]
        written.append({tuple(np.asarray(edit["layers"]).tolist()) for edit in edits})
    assert written == [{(4, 5)}, {(1, 2)}]


@pytest.mark.parametrize(
    ("agents", "changes", "message"),
    [
        (["all-layers"], {"layers_per_edit": 99}, "changes nothing about all-layers"),
        (["all-layers", "random-layers"], {"layers_per_edit": 99}, "from 1 to 6"),
        (["hiedit"], {"update_rule": "ridge"}, "'hiedit' has a low level of its own"),
        (["TRAINED"], {"update_rule": "ridge"}, "has a low level of its own"),
        (["policy,size=learned+ridge"], {"layers_per_edit": 2}, "has learned how many layers"),
        (["memit"], {"step_size": 3.0}, r"=3\.0 would change nothing about memit: settings"),
        (["locft-bf", "in-context"], {"max_steps_per_edit": 2}, "nothing about locft-bf, in-cont"),
        (["no-edit", "alphaedit"], {"update_rule": "ridge"}, "nothing about alphaedit"),
    ],
)
def test_what_would_change_nothing_is_refused_by_name(
    trained: str, tmp_path: Path, agents: list[str], changes: dict[str, Any], message: str
) -> None:
    agents = [agent.replace("TRAINED", trained) for agent in agents]
    with pytest.raises(SettingsError, match=message):
        compare(replace(SETTINGS, **changes), agents, [0], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_edit_records_what_ran(trained: str, tmp_path: Path) -> None:
    def edit(*options: str) -> tuple[dict[str, Any], bytes]:
        out = tmp_path / "-".join(("out", *options))
        command = ["edit", "--facts", str(facts), "--model", "tiny", "--agent", trained]
        # An agent that was hardly trained gives none of the facts.
        assert main([*command, "--out", str(out), *options]) in (0, NONE_GIVEN)
        record = json.loads((out / "edits.json").read_text())
        return record, (out / "model.safetensors").read_bytes()

    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"subject": "Belka", "prompt": "Belka lives in", "answer": "Oz"}]))
    own, weights = edit()
    assert own["settings"]["max_steps_per_edit"] == 3
    assert own["settings"]["num_edits"] == 1
    changed, others = edit("--max-steps-per-edit", "1", "--step-size", "0.5")
    assert changed["settings"]["max_steps_per_edit"] == 1
    assert changed["settings"]["step_size"] == 0.5
    assert {fact["steps"] for fact in changed["facts"]} == {1}
    assert weights != others


OWN = """
class Plain:
    name = "plain"
    def __init__(self, colour="blue"):
        self.colour = colour
    def reset(self, env, seed):
        self.count = env.action_space.n
    def select_action(self, observation, info):
        import numpy as np
        return np.ones(self.count, np.int8)
    def update(self, *transition):
        pass
"""


def test_a_class_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_agents_here.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--model", "tiny", "--num-edits", "1", "--no-generation"]
    command += ["--agents", "own_agents_here:Plain"]
    assert main([*command, "--out", "out"]) == 0
    assert main([*command, "--layers-per-edit", "2", "--out", "none"]) == 2
    assert "takes no layers_per_edit" in capsys.readouterr().err
    made: Any = make_agent("own_agents_here:Plain,colour=red")
    assert made.colour == "red"
    with pytest.raises(SettingsError, match=r"cannot be made.*'shape'"):
        make_agent("own_agents_here:Plain,shape=round")


def test_an_agent_that_writes_in_its_own_way_refuses_what_does_not_reach_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", "--facts", "tiny-facts", "--model", "tiny", "--out", str(tmp_path / "out")]
    assert main([*words, "--agent", "fine-tuning-kl", "--step-size", "0.02"]) == 2
    assert "step_size=0.02 would change nothing about fine-tuning-kl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_reaches_one_agent_of_a_table_is_taken() -> None:
    given: dict[str, Any] = {"max_steps_per_edit": 1, "step_size": 0.1, "update_rule": "ridge"}
    for name in ("all-layers", "fixed-best", "policy+ridge"):
        refuse_unused_options([make_agent("memit"), make_agent(name)], **given)
    refuse_unused_options([make_agent("no-edit")], **given)
