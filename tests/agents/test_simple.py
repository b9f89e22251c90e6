"""Agents: the layers each one chooses, worked out by hand or from dense gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.hierarchy.simple import LayerChoiceAgent
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.protocol import Agent
from hiedit_agents.registry import AGENTS, RIVALS, make_agent
from hiedit_env.errors import SettingsError
from hiedit_env.model.loading import load_model
from hiedit_env.rules.layer_choice import CHOICES


class OwnAgent(LayerChoiceAgent):
    def __init__(self, layers_per_edit: int | None = None) -> None:
        super().__init__("fixed-layers", layers_per_edit)


class NoAgent:
    def __init__(self, layers_per_edit: int | None = None) -> None:
        pass


@pytest.fixture(scope="module")
def env() -> Iterator[gym.Env[Any, Any]]:
    made = gym.make("hiedit/LayerSelection-v1", num_edits=4)
    yield made
    made.close()


def choices(env: gym.Env[Any, Any], agent: Agent, seed: int, count: int) -> list[list[int]]:
    agent.reset(env, seed)
    observation, info = env.reset(seed=0)
    return [agent.select_action(observation, info).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "size", "wanted"),
    [
        ("no-edit", None, [0, 0, 0, 0, 0, 0]),
        ("all-layers", 2, [1, 1, 1, 1, 1, 1]),
        ("fixed-layers", 2, [1, 1, 0, 0, 0, 0]),
        ("fixed-layers", None, [1, 1, 1, 0, 0, 0]),
    ],
)
def test_constant_choices(
    env: gym.Env[Any, Any], name: str, size: int | None, wanted: list[int]
) -> None:
    agent = make_agent(name, layers_per_edit=size)
    assert agent.name == name
    assert choices(env, agent, 0, 2) == [wanted, wanted]
    assert env.action_space.contains(agent.select_action(np.zeros(0, np.float32), {}))


def test_random_layers_are_uniform_and_follow_the_seed(env: gym.Env[Any, Any]) -> None:
    agent = make_agent("random-layers", layers_per_edit=2)
    drawn = choices(env, agent, 5, 3000)
    assert {sum(mask) for mask in drawn} == {2}
    # Binomial with p = 2/6: mean 1000, standard deviation 25.8; five of them are allowed.
    assert np.abs(np.sum(drawn, axis=0) - 1000).max() < 129
    assert choices(env, agent, 5, 20) == drawn[:20]
    assert choices(env, agent, 6, 20) != drawn[:20]


def test_random_layers_do_not_touch_the_stream(env: gym.Env[Any, Any]) -> None:
    inner: Any = env.unwrapped
    streams = []
    for name in ("random-layers", "all-layers"):
        choices(env, make_agent(name), 3, 5)
        streams.append([fact.request for fact in inner.episode.facts])
    assert streams[0] == streams[1]


def test_random_layers_do_not_follow_the_generator_that_draws_the_stream() -> None:
    agent = LayerChoiceAgent("random-layers")
    env = gym.make("hiedit/LayerSelection-v1", num_edits=1)
    for seed in (0, 3):
        agent.reset(env, seed)
        env.reset(seed=seed)
        # All 64-bit numbers that the environment may draw first, and the agent's first ones.
        theirs = np.random.default_rng(seed).integers(2**63, size=1000)
        assert env.unwrapped.np_random.integers(2**63) in theirs
        assert not np.isin(agent.high._generator.integers(2**63, size=1000), theirs).any()


def test_gradient_norm_takes_the_largest_dense_gradients(env: gym.Env[Any, Any]) -> None:
    inner: Any = env.unwrapped
    loaded = load_model("tiny", progress=False)
    weights = [loaded.model.get_parameter(f"{name}.weight") for name in inner.llm.names]
    for weight in weights:
        weight.requires_grad_(True)
    agent = make_agent("gradient-norm", layers_per_edit=2)
    seen = set()
    for request in inner.requests[:12]:
        agent.reset(env, 0)
        observation, info = env.reset(seed=0, options={"requests": [request]})
        chosen = agent.select_action(observation, info)
        # The whole model on the whole text, the loss of the answer's tokens only.
        prompt = loaded.tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        whole = loaded.tokenizer(f"{request.prompt} {request.answer}", return_tensors="pt")
        labels = whole["input_ids"].clone()
        labels[:, : prompt.shape[1]] = -100
        loss = loaded.model(**whole, labels=labels).loss
        norms = torch.stack([g.norm() for g in torch.autograd.grad(loss, weights)])
        assert set(np.flatnonzero(chosen)) == set(norms.topk(2).indices.tolist())
        torch.testing.assert_close(inner.capture.gradient_norms(), norms, rtol=1e-4, atol=1e-6)
        seen.add(tuple(chosen))
    assert len(seen) > 1, "the facts must not all have the same largest gradients"


@pytest.mark.parametrize("size", [0, 7])
def test_sizes_that_do_not_fit_are_refused(env: gym.Env[Any, Any], size: int) -> None:
    with pytest.raises(SettingsError, match=f"from 1 to 6.*got {size}"):
        make_agent("random-layers", layers_per_edit=size).reset(env, 0)


def test_other_action_spaces_are_refused() -> None:
    agent = make_agent("all-layers")
    with pytest.raises(SettingsError, match="must be reset"):
        agent.select_action(np.zeros(0, np.float32), {})
    with (
        gym.make("hiedit/StepSize-v1", num_edits=1) as other,
        pytest.raises(SettingsError, match="LayerSelection"),
    ):
        agent.reset(other, 0)


def test_registry_knows_names_and_imports_classes() -> None:
    assert set(AGENTS) == {*CHOICES, *PRESETS, *RIVALS, "oracle"}
    assert all(isinstance(make_agent(name), Agent) for name in AGENTS)
    own = make_agent("tests.agents.test_simple:OwnAgent", layers_per_edit=4)
    assert type(own).__name__ == "OwnAgent"
    assert isinstance(own, LayerChoiceAgent)
    assert own.layers_per_edit == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("all-layer", "unknown agent 'all-layer'; choose one of no-edit, all-layers"),
        ("tests.agents.test_simple:Missing", "cannot be imported"),
        ("no_such_module:Agent", "cannot be imported"),
        (":Agent", "cannot be imported"),
        ("tests.agents.test_simple:NoAgent", "is no agent"),
        ("tests.agents.test_simple:__name__", "is not a class"),
    ],
)
def test_registry_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_agent(name)
