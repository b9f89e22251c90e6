"""Names of agents as they are typed, and spec files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hiedit_agents.named.grammar import read_spec_file, split_label, split_settings
from hiedit_agents.registry import labelled, make_agent, spec_agent
from hiedit_env.errors import SettingsError

SHIPPED = Path(__file__).parents[3] / "agents" / "trained" / "hiedit-planted"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hiedit", ("hiedit", [])),
        (
            "policy,size=learned,history=false",
            ("policy", [("size", "learned"), ("history", False)]),
        ),
        ("x,a=1e+2,b=[3,1],c=3:1", ("x", [("a", 100.0), ("b", [3, 1]), ("c", [3, 1])])),
        ("x,own=module:Class", ("x", [("own", "module:Class")])),
    ],
)
def test_settings_follow_commas(text: str, parts: tuple[str, list[Any]]) -> None:
    assert split_settings(text) == parts


@pytest.mark.parametrize("text", ["hiedit,facts", "hiedit,=3", "hiedit,"])
def test_a_setting_needs_name_and_value(text: str) -> None:
    with pytest.raises(SettingsError, match="must be name=value, such as facts=0"):
        split_settings(text)


def test_labels() -> None:
    def folder(name: str) -> bool:
        return name == "a=b"

    assert split_label("mine=hiedit,facts=0", folder) == ("mine", "hiedit,facts=0")
    assert split_label("hiedit,facts=0", folder) == (None, "hiedit,facts=0")
    assert split_label("a=b", folder) == (None, "a=b")
    assert split_label("a=b,facts=0", folder) == (None, "a=b,facts=0")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hiedit?facts=0&high.history=false", "hiedit,facts=0,high.history=false"),
        ("policy?size=learned+ridge?ridge=2", "policy,size=learned+ridge,ridge=2"),
        ("fixed-layers?layers_per_edit=[3,1]+ridge", "fixed-layers,layers_per_edit=3:1+ridge"),
        ("ppo:runs/x?max_steps_per_edit=1", "ppo:runs/x,max_steps_per_edit=1"),
    ],
)
def test_the_old_way_is_refused_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(SettingsError) as raised:
        make_agent(old)
    assert str(raised.value).endswith(f"write {new}")
    # On a command line the first "=" could be that of a label.
    with pytest.raises(SettingsError) as raised:
        make_agent(labelled(old)[1])
    assert str(raised.value).endswith(f"write {new}")


def test_settings_follow_their_part() -> None:
    spec = spec_agent("policy,size=learned+rehearsal,facts=4").spec
    assert dict(spec.high_settings) == {"size": "learned"}
    assert dict(spec.low_settings) == {"facts": 4}
    spec = spec_agent("hiedit,facts=0,high.history=false,max_steps_per_edit=2").spec
    assert spec.low_settings["facts"] == 0
    assert spec.high_settings["history"] is False
    assert spec.max_steps_per_edit == 2


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_spec_file_stands_for_a_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine.{suffix}"
    content = {
        "name": "mine",
        "high": {"name": "policy", "settings": {"size": "learned"}},
        "low": {"name": "rehearsal", "settings": {"facts": 2, "probes": 1}},
        "settings": {"facts": 3, "high.history": False, "max_steps_per_edit": 2},
        "train": {"window": 3},
    }
    # JSON is YAML too; this one is written as people write it.
    text = json.dumps(content) if suffix == "json" else _yaml(content)
    path.write_text(text, encoding="utf-8")
    assert labelled(str(path)) == ("mine", str(path))
    assert labelled(f"other={path}") == ("other", str(path))
    spec = spec_agent(f"{path},probes=0").spec
    assert (spec.name, spec.high, spec.low) == ("mine", "policy", "rehearsal")
    assert dict(spec.high_settings) == {"size": "learned", "history": False}
    assert dict(spec.low_settings) == {"facts": 3, "probes": 0}
    assert spec.max_steps_per_edit == 2
    assert spec.train["window"] == 3
    # One of its levels.
    assert spec_agent(f"random-layers+{path}").spec.low_settings["facts"] == 3
    assert spec_agent(f"{path}+ridge").spec.high_settings["size"] == "learned"


def _yaml(content: dict[str, Any]) -> str:
    return (
        f"name: {content['name']}\nhigh:\n  name: policy\n  settings: {{size: learned}}\n"
        "low:\n  name: rehearsal\n  settings:\n    facts: 2\n    probes: 1\n"
        "settings:\n  facts: 3\n  high.history: false\n  max_steps_per_edit: 2\n"
        "train: {window: 3}\n"
    )


def test_a_spec_file_names_folders_that_hold_a_comma(tmp_path: Path) -> None:
    folder = tmp_path / "a,b=c+d?e"
    shutil.copytree(SHIPPED, folder)
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"agent": str(folder), "settings": {"step_size": 0.5}}))
    agent = spec_agent(str(path))
    assert agent.identity["weights"] == spec_agent(str(SHIPPED)).identity["weights"]
    assert agent.spec.low_settings["step_size"] == 0.5
    path.write_text(json.dumps({"high": str(folder), "low": "ridge"}))
    assert spec_agent(str(path)).spec.low == "ridge"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold an agent"),
        ("{a: [", "is no YAML or JSON"),
        ("{}", "needs either 'agent', or 'high' and 'low'"),
        ("{agent: hiedit, high: policy}", "needs either 'agent', or 'high' and 'low'"),
        ("{high: policy}", "with 'high' needs 'low'"),
        ("{agent: hiedit, colour: red}", "no setting 'colour'; there are name, agent"),
        ("{agent: hiedti}", "unknown agent 'hiedti'"),
        ("{high: polcy, low: ridge}", "unknown high level 'polcy'"),
        ("{high: policy, low: rigde}", "unknown low level 'rigde'"),
        ("{high: {name: policy, setings: {}}, low: ridge}", "did you mean 'settings'"),
        ("{agent: hiedit, settings: {fact: 1}}", "has no argument 'fact'"),
        ("{agent: hiedit, settings: {max_steps_per_edit: 0}}", "at least 1"),
    ],
)
def test_wrong_spec_files_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message) as raised:
        spec_agent(str(path))
    assert "\n" not in str(raised.value)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("agent: hiedit\n")
    assert read_spec_file(str(path)).agent == "hiedit"
