"""Policies of libraries that are kept as plain networks, and what their scripts share."""

from __future__ import annotations

import builtins
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from hiedit_agents.policies import Task, save_policy
from hiedit_agents.policies.coins import LayerCoins, as_multi_discrete
from hiedit_agents.policies.networks import describe, load
from hiedit_agents.registry import make_agent
from hiedit_agents.rl.hyperparameters import replaced
from hiedit_benchmarks.comparison.episode import play
from hiedit_env.errors import CheckpointError, MissingLibraryError, SettingsError

TOY = {"id": "hiedit/Toy-v1", "num_layers": 3, "num_edits": 4}
EXTRAS = {"rllib": "ray", "skrl": "skrl", "tianshou": "tianshou", "torchrl": "torchrl"}


def chain(size: int, outputs: int) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(size, 4), nn.Tanh(), nn.Linear(4, outputs, bias=False))
    generator = torch.Generator().manual_seed(0)
    for value in network.parameters():
        nn.init.normal_(value, generator=generator)
    return network


def keep(out: Path, *modules: nn.Module, head: str = "coins", library: str = "skrl") -> None:
    task = Task("layers", TOY)
    policy, tensors = describe(*modules, head=head)
    save_policy(
        out,
        library=library,
        algorithm="ppo",
        task=task,
        sizes=task.sizes(task.make_env()),
        policy=policy,
        tensors=tensors,
        training={},
    )


def size() -> int:
    return Task("layers", TOY).make_env().observation_space.shape[0]  # type: ignore[index]


@pytest.mark.parametrize("head", ["coins", "pairs"])
def test_a_network_acts_as_it_did_in_its_library(head: str, tmp_path: Path) -> None:
    # In two modules, as RLlib has encoder and head.
    network = chain(size(), 3 if head == "coins" else 6)
    keep(tmp_path / "policy", network[:2], network[2:], head=head, library="rllib")
    agent = make_agent(f"rllib:{tmp_path / 'policy'}")
    env = Task("layers", TOY).make_env()
    agent.reset(env, 0)
    seen = set()
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        scores = network(torch.from_numpy(observation)).detach()
        expected = scores > 0 if head == "coins" else scores.view(3, 2).argmax(1)
        action = agent.select_action(observation, info)
        assert action.dtype == np.int8
        assert action.tolist() == expected.int().tolist()
        seen.add(tuple(action.tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("library", EXTRAS)
def test_every_prefix_is_known_and_belongs_to_its_library(library: str, tmp_path: Path) -> None:
    keep(tmp_path, chain(size(), 3), library=library)
    assert make_agent(f"{library}:{tmp_path}").name == f"{library}:{tmp_path}"
    other = "skrl" if library != "skrl" else "rllib"
    with pytest.raises(CheckpointError, match=f"trained by {library}, not by {other}; name it"):
        make_agent(f"{other}:{tmp_path}")


def test_an_agent_of_a_network_plays_whole_episodes(tmp_path: Path) -> None:
    task = Task("layers", {"model": "tiny", "num_edits": 3, "max_steps_per_edit": 2})
    env = gym.make("hiedit/LayerSelection-v1", **task.settings)
    sizes = task.sizes(env)
    policy, tensors = describe(chain(sizes.observation, sizes.layers), head="coins")
    rest: dict[str, Any] = {"policy": policy, "tensors": tensors, "training": {}}
    save_policy(tmp_path, library="torchrl", algorithm="ppo", task=task, sizes=sizes, **rest)
    assert len(play(env, make_agent(f"torchrl:{tmp_path}"), 0, progress=False).edits) == 3


def test_only_networks_that_can_be_kept_are_kept() -> None:
    with pytest.raises(SettingsError, match=r"made of Linear and Tanh.*it holds Dropout"):
        describe(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), head="coins")
    with pytest.raises(SettingsError, match="unknown head 'softmax'"):
        describe(nn.Linear(2, 2), head="softmax")


def test_damaged_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no policy"):
        load(tmp_path)
    keep(tmp_path, chain(size(), 4))
    with pytest.raises(CheckpointError, match=r"has \(4,\) outputs; 3 layers need 3"):
        load(tmp_path)
    record = json.loads((tmp_path / "agent.json").read_text())
    for change in ({"network": ["Linear", "Conv2d"]}, {"head": "softmax"}, {}):
        policy = {**record["policy"], **change} if change else {}
        (tmp_path / "agent.json").write_text(json.dumps({**record, "policy": policy}))
        with pytest.raises(CheckpointError, match="does not fit its description"):
            load(tmp_path)
    (tmp_path / "agent.json").write_text(json.dumps(record))
    tensors = load_file(tmp_path / "agent.safetensors")
    data = save({"0.weight": tensors["0.weight"]})
    (tmp_path / "agent.safetensors").write_bytes(data)
    record["tensors"] = {"sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "agent.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="does not fit its description"):
        load(tmp_path)


def test_other_forms_are_refused(tmp_path: Path) -> None:
    keep(tmp_path, chain(size(), 3))
    record = json.loads((tmp_path / "agent.json").read_text())
    record["task"]["form"] = "box"
    (tmp_path / "agent.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="in the form 'box'; networks choose 'layers'"):
        load(tmp_path)


def test_coins_by_hand() -> None:
    # Even odds, 3 : 1 for and 3 : 1 against.
    coins = LayerCoins(torch.tensor([[0.0, np.log(3.0), -np.log(3.0)]]))
    assert coins.mode.tolist() == coins.deterministic_sample.tolist() == [[0, 1, 0]]
    chance = coins.log_prob(torch.tensor([[1, 1, 1]], dtype=torch.int8)).exp()
    assert chance.tolist() == pytest.approx([0.5 * 0.75 * 0.25])
    entropy = np.log(2) + 2 * (0.25 * np.log(4) + 0.75 * np.log(4 / 3))
    assert coins.entropy().tolist() == pytest.approx([entropy])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = coins.sample(torch.Size([4000]))
    assert drawn.dtype == coins.mode.dtype == torch.int8
    assert drawn.float().mean((0, 1)).tolist() == pytest.approx([0.5, 0.75, 0.25], abs=0.03)


def test_pairs_of_a_vector_environment_are_its_layers() -> None:
    task = Task("layers", TOY)
    plain, shown = task.make_vec(2), as_multi_discrete(task.make_vec(2))
    assert shown.single_action_space == gym.spaces.MultiDiscrete([2, 2, 2])
    assert plain.reset(seed=0)[0].tolist() == shown.reset(seed=0)[0].tolist()
    actions = np.array([[1, 0, 1], [0, 1, 1]])
    expected, found = plain.step(actions.astype(np.int8)), shown.step(actions)
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].tolist()


def test_unknown_hyperparameters_are_named() -> None:
    with pytest.raises(SettingsError, match="--set has no lrate; it has lr, gamma"):
        replaced({"lr": 1.0, "gamma": 0.5}, {"lrate": 1})


@pytest.mark.parametrize("library", EXTRAS)
def test_a_script_without_its_library_names_the_extra(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] in (*EXTRAS.values(), "tensordict"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, f"hiedit_agents.rl.train_{library}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingLibraryError, match=rf"pip install '\.\[{library}\]'"):
        importlib.import_module(f"hiedit_agents.rl.train_{library}")
