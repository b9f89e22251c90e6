"""A copy of a built-in model is edited like that model, whatever its folder is called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.envs.settings import EnvSettings
from hiedit_env.model.relatives import belongings, cosine, environment_for, known_as, sample
from hiedit_env.model.saving import find_folder


def copy_of(name: str, place: Path) -> Path:
    """A built-in model as a folder of another name."""
    source = find_folder(name)
    assert source is not None
    return Path(shutil.copytree(source, place))


def change(folder: Path, how: Any) -> None:
    file = folder / "model.safetensors"
    save_file({k: how(k, v) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["tiny", "planted"])
def test_an_environment_of_a_copy_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "mine")
    one, two = (
        gym.make(environment_for(model), model=model, num_edits=2).unwrapped
        for model in (name, str(folder))
    )
    assert type(one) is type(two)
    for what in ("dataset", "requests"):
        assert getattr(one, what) == getattr(two, what)
    assert one.llm.names == two.llm.names  # type: ignore[attr-defined]
    rules = [env.rule for env in (one, two)]  # type: ignore[attr-defined]
    assert type(rules[0]) is type(rules[1])
    assert vars(rules[0])["step_size"] == vars(rules[1])["step_size"]


def test_a_given_step_size_goes_before_the_one_of_the_model(tmp_path: Path) -> None:
    folder = copy_of("planted", tmp_path / "mine")
    settings = EnvSettings(model=str(folder), step_size=0.5)
    assert settings.rule == "gradient"
    assert settings.rule_settings == {"step_size": 0.5, "max_grad_norm": 4.0}
    other = EnvSettings(model=str(folder), update_rule="ridge")
    assert other.rule_settings == {}


def test_relatives_and_strangers(tmp_path: Path) -> None:
    folder = copy_of("tiny", tmp_path / "mine")
    generator = torch.Generator().manual_seed(0)

    def noise(_: str, value: torch.Tensor) -> torch.Tensor:
        return value + 0.05 * value.std() * torch.randn(value.shape, generator=generator)

    change(folder, noise)
    assert belongings(str(folder)) is belongings("tiny")
    # The same folder with other weights is seen anew.
    change(folder, lambda _, value: torch.randn(value.shape, generator=generator))
    assert known_as(str(folder)) == str(folder)
    assert belongings(str(folder)) is belongings("some/model")


@pytest.mark.parametrize(
    ("extra", "related"),
    [
        ({"mtp.fc.weight": (3, 2)}, True),
        ({"lm_head.weight": (4, 4)}, True),  # beside tied weights, as some programs save them
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}, True),
        ({"model.layers.7.mlp.up_proj.weight": (4, 4)}, False),  # of a deeper model
    ],
)
def test_what_else_a_file_holds_changes_nothing_but_another_block_does(
    extra: dict[str, tuple[int, ...]], related: bool, tmp_path: Path
) -> None:
    folder = copy_of("tiny", tmp_path / "mine")
    file = folder / "model.safetensors"
    more = {name: torch.ones(shape) for name, shape in extra.items()}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    assert (known_as(str(folder)) == "tiny") is related


def test_weights_saved_without_the_head_are_relatives(tmp_path: Path) -> None:
    folder = copy_of("tiny", tmp_path / "mine")
    file = folder / "model.safetensors"
    values = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    save_file(values, file, metadata={"format": "pt"})
    assert known_as(str(folder)) == "tiny"


@pytest.mark.parametrize("damage", ["cut", "empty", "no weights", "no folder"])
def test_a_damaged_folder_is_nobody(damage: str, tmp_path: Path) -> None:
    """What is wrong with it is said when it is loaded."""
    folder = copy_of("tiny", tmp_path / "mine")
    file = folder / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no weights":
        file.unlink()
    else:
        shutil.rmtree(folder)
    assert known_as(str(folder)) == str(folder)


def test_a_comparison_is_the_same_by_name_and_by_path(tmp_path: Path) -> None:
    folder = copy_of("tiny", tmp_path / "mine")
    rows = []
    for number, model in enumerate(("tiny", str(folder))):
        settings = CompareSettings(model=model, num_edits=3, generation=())
        out = tmp_path / f"out{number}"
        found = compare(settings, ["all-layers", "all-layers+ridge"], [0], out, progress=False)
        rows.append([(row["agent"], row["metrics"], row["num_edits"]) for row in found.rows])
    assert rows[0] == rows[1]


def test_a_training_is_the_same_by_name_and_by_path(tmp_path: Path) -> None:
    folder = copy_of("tiny", tmp_path / "mine")
    settings = TrainSettings(episodes=1, edits_per_episode=2, held_out=0.5)
    kept = []
    for number, model in enumerate(("tiny", str(folder))):
        out = tmp_path / f"out{number}"
        run = TrainingRun(agent="all-layers+step-sizes", model=model)
        train(run, settings, out, progress=False, tensorboard=False)
        record = json.loads((out / "agent.json").read_text())
        kept.append((record["low"], load_file(out / "agent.safetensors")))
    assert kept[0][0] == kept[1][0]
    assert kept[0][1].keys() == kept[1][1].keys()
    assert all(torch.equal(kept[0][1][key], kept[1][1][key]) for key in kept[0][1])


def test_cosine_and_sample_by_hand() -> None:
    assert cosine([0.0, 0.0], [1.0, 0.0]) == 0.0
    assert cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(0.5**0.5)
    assert sample(torch.arange(16.0).reshape(4, 4)) == list(range(16))


def test_a_name_is_known_without_torch() -> None:
    """Help texts and settings of built-in models cost no import of torch."""
    code = (
        "import sys; from hiedit_env.envs.settings import EnvSettings; "
        "assert EnvSettings(model='tiny').facts == 'tiny-facts'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
