"""Settings: one declaration behind constructors, docstrings and the table of built-in models."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args

import gymnasium
import pytest

from hiedit_agents.registry import default_agent
from hiedit_env.envs.lifelong_edit import LifelongEdit
from hiedit_env.envs.planted import Planted
from hiedit_env.envs.settings import (
    EnvSettings,
    LayerChoiceName,
    PlantedSettings,
    StepSizeSettings,
)
from hiedit_env.envs.step_size import StepSize
from hiedit_env.errors import HieditError, SettingsError
from hiedit_env.model.architectures import PRESETS
from hiedit_env.model.built_in import BUILT_IN, built_in
from hiedit_env.model.relatives import environment_for
from hiedit_env.rules.layer_choice import CHOICES


def test_the_specification_lists_every_argument() -> None:
    text = inspect.getdoc(LifelongEdit) or ""
    part = text.partition("## Arguments")[2].partition("## Version History")[0]
    listed = {
        name
        for line in part.splitlines()
        if line.startswith("- ")
        for name in re.findall(r"``(\w+)``", line.partition(":")[0])
    }
    assert listed == {field.name for field in fields(EnvSettings)}  # type: ignore[arg-type]


def test_constructors_show_their_arguments() -> None:
    for env, declared in ((LifelongEdit, EnvSettings), (StepSize, StepSizeSettings)):
        names = list(inspect.signature(env).parameters)
        assert names == [field.name for field in fields(declared)]  # type: ignore[arg-type]
    assert inspect.signature(Planted).parameters["model"].default == "planted"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"modle": "tiny"}, "there is no setting 'modle'; did you mean 'model'?"),
        ({"layers": 5}, "layers must be a pattern, several patterns or None, got 5"),
        ({"device": 5}, "device must be text, got 5"),
        ({"step_size": 10**400}, "step_size must be a positive number, got 1000"),
        ({"num_edits": True}, "num_edits must be ≥ 1 and a whole number, got True"),
    ],
)
def test_what_is_wrong_is_one_line(named: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        EnvSettings(**named)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_the_rule_and_the_facts_follow_the_model() -> None:
    assert (EnvSettings().rule, EnvSettings().facts) == ("decorrelated", "tiny-facts")
    planted = PlantedSettings()
    assert (planted.rule, planted.facts) == ("gradient", "planted-facts")
    assert planted.rule_settings == {"step_size": 1.5, "max_grad_norm": 4.0}
    other = EnvSettings(model="some/model", update_rule="ridge", step_size=0.5)
    assert (other.rule, other.facts) == ("ridge", "world-facts")
    assert other.rule_settings == {"step_size": 0.5}


@pytest.mark.parametrize(
    ("model", "dataset", "name"),
    [
        ("planted", None, "Planted"),
        ("planted", "planted-facts-test", "Planted"),
        ("planted", "mine.json", "LayerSelection"),
        ("tiny", None, "LayerSelection"),
        ("tiny", "planted-facts", "LayerSelection"),
        (None, None, "LayerSelection"),
    ],
)
def test_which_environment(model: str | None, dataset: str | None, name: str) -> None:
    assert environment_for(model, dataset) == f"hiedit/{name}-v1"


def test_the_table_agrees_with_what_is_there() -> None:
    for name, known in BUILT_IN.items():
        assert default_agent(name) == known.agent
        assert PRESETS[name].layers
    assert built_in("some/model") == built_in(None)
    assert get_args(LayerChoiceName) == CHOICES


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys, hiedit_env.envs.settings, hiedit_env.model.built_in\n"
        "import hiedit_benchmarks.comparison.settings\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize(
    "name", ["num_edits", "step_size", "max_steps_per_edit", "retention_window", "edits_per_step"]
)
def test_numbers_of_many_digits_are_shown_in_short(name: str, digits: int) -> None:
    """Python refuses to write a number of more than 4300 digits."""
    for value in (10**digits, -(10**digits)):
        if value > 0 and name not in ("num_edits", "step_size"):
            continue  # it is a number, and nothing is made of it
        with pytest.raises(HieditError, match=rf"10000.*\({digits + 1} digits\)") as caught:
            gymnasium.make("hiedit/LayerSelection-v1", model="tiny", **{name: value})
        assert len(str(caught.value)) < 200
