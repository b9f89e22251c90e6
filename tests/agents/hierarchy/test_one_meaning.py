"""One meaning for a name: ``statistics`` are of an episode, ``state_dict`` is what was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy.anchored import Anchored
from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_agents.hierarchy.routers import PolicyRouter, StraightThroughRouter
from hiedit_agents.hierarchy.step_sizes import StepSizePolicy
from hiedit_agents.named.spec import LEARNED_LOW, ROUTERS
from hiedit_agents.protocol import Trainable
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.closed_form import GradientRule
from hiedit_env.rules.names import RULES, make_rule
from tests.support.episodes import SELECTION, L, make

ALL = np.ones(L, bool)
Make = Callable[[EditingEnv], Any]

RULE_MAKERS: dict[str, Make] = {
    name: lambda env, name=name: make_rule(name, env.llm.shapes, env.llm.device)  # type: ignore[misc]
    for name in RULES
}
LEVEL_MAKERS: dict[str, Make] = {
    "hypernetwork": lambda env: Hypernetwork(env.llm.shapes, env.llm.device, rank=2),
    "hypernetwork, ridge": lambda env: Hypernetwork(
        env.llm.shapes, env.llm.device, form="ridge", rank=2
    ),
    "hypernetwork, decorrelated": lambda env: Hypernetwork(
        env.llm.shapes, env.llm.device, form="decorrelated", network="tokens", rank=2
    ),
    "rehearsal": lambda env: Rehearsal(env.llm, network="tokens", rank=2, facts=1, probes=1),
    "anchored": lambda env: calibrated(Anchored(env.llm, openings=0, search_steps=2)),
    "neuron": lambda env: shown(Neuron(env.llm, search_steps=2)),
    "step-sizes": lambda env: StepSizePolicy(env.llm.shapes, env.llm.device),
    "straight-through": lambda env: StraightThroughRouter(env.llm.shapes, env.llm.device, hidden=2),
    "policy": lambda env: PolicyRouter(L, env.llm.device, hidden=2),
    "policy, normalised": lambda env: PolicyRouter(L, env.llm.device, hidden=2, normalize=True),
}


def calibrated(low: Anchored) -> Anchored:
    """What has been shown some prompts, which belong to its trained numbers."""
    prompts = [low.llm.encode(text, "x") for text in ("Lomri lives in", "The home of Lomri is in")]
    low.calibrate(low.llm.read(prompt).capture() for prompt in prompts)
    return low


def shown(low: Neuron) -> Neuron:
    """As :func:`calibrated`."""
    texts = ("Lomri lives in", "The home of Lomri is in")
    low.calibrate_on([low.llm.encode(text, "x") for text in texts])
    return low


MAKERS = {**RULE_MAKERS, **LEVEL_MAKERS}


@pytest.fixture(scope="module")
def env() -> EditingEnv:
    env = make(SELECTION, num_edits=3)
    env.reset(seed=0)
    return env


@pytest.fixture(scope="module")
def captures(env: EditingEnv) -> list[Capture]:
    prompts = [env.llm.encode(r.prompt, r.answer) for r in env.requests[:3]]
    return [env.llm.read(prompt).capture() for prompt in prompts]


def leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        for value in state.values():
            yield from leaves(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from leaves(value)
    else:
        yield state


def same(one: Any, two: Any) -> bool:
    first, second = list(leaves(one)), list(leaves(two))
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def shaken(level: Any) -> Any:
    with torch.no_grad():
        for parameter in level.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return level


def test_every_rule_and_every_level_is_looked_at(env: EditingEnv) -> None:
    kinds = {type(maker(env)) for maker in MAKERS.values()}
    assert kinds == {*RULES.values(), *LEARNED_LOW.values(), *ROUTERS.values()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_class_has_the_names_of_what_it_keeps(name: str, env: EditingEnv) -> None:
    made = MAKERS[name](env)
    # Statistics belong to rules, trained numbers to whatever has parameters; nothing else says so.
    assert isinstance(made, Trainable) == hasattr(made, "state_dict") == (name in LEVEL_MAKERS)
    assert isinstance(made, UpdateRule) == hasattr(made, "statistics")
    assert not {"state", "load_state"} & set(dir(made))


@pytest.mark.parametrize("name", LEVEL_MAKERS)
def test_a_state_dict_holds_every_parameter(name: str, env: EditingEnv) -> None:
    level = shaken(LEVEL_MAKERS[name](env))
    parameters = list(level.parameters())
    # Some levels are calibrated only.
    assert parameters or isinstance(level, Anchored | Neuron)
    saved = [value for value in leaves(level.state_dict()) if isinstance(value, Tensor)]
    for parameter in parameters:
        assert any(
            value.shape == parameter.shape and torch.equal(value, parameter) for value in saved
        )
    other = LEVEL_MAKERS[name](env)
    other.load_state_dict(level.state_dict())
    for one, two in zip(parameters, other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert same(level.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", [n for n in MAKERS if "policy" not in n and "through" not in n])
def test_an_episode_changes_statistics_and_no_trained_number(
    name: str, env: EditingEnv, captures: list[Capture]
) -> None:
    rule = MAKERS[name](env)
    if isinstance(rule, Hypernetwork):
        rule.calibrate(captures[2:])
    trained = dict(rule.state_dict()) if name in LEVEL_MAKERS else {}
    parameters = [p.detach().clone() for p in rule.parameters()] if trained else []
    rule.reset()
    before = rule.statistics()
    rule.observe(captures[0])
    rule.propose(captures[0], ALL)
    if not isinstance(rule, GradientRule):  # which keeps nothing
        assert not same(before, rule.statistics())
    if trained:
        assert same(trained, rule.state_dict())
        tensors = [value for value in leaves(rule.statistics()) if isinstance(value, Tensor)]
        for parameter in parameters:
            assert not any(
                parameter.shape == t.shape and torch.equal(parameter, t) for t in tensors
            )
    rule.load_statistics(before)
    assert same(before, rule.statistics())


@pytest.mark.parametrize("name", [n for n in MAKERS if "policy" not in n and "through" not in n])
def test_a_clone_goes_on_as_the_rule_would_and_leaves_it_alone(
    name: str, env: EditingEnv, captures: list[Capture]
) -> None:
    rule = MAKERS[name](env)
    if isinstance(rule, Hypernetwork):
        rule.calibrate(captures[2:])
    rule.reset()
    rule.observe(captures[0])
    kept = rule.statistics()
    twin = rule.clone_for(env.llm)
    assert type(twin) is type(rule)
    twin.observe(captures[1])
    found = twin.propose(captures[1], ALL)
    assert same(kept, rule.statistics())
    rule.observe(captures[1])
    for one, two in zip(rule.propose(captures[1], ALL), found, strict=True):
        if one is None:  # nothing is written there
            assert two is None
            continue
        assert torch.equal(one.left, two.left)
        assert torch.equal(one.right, two.right)


def test_a_clone_that_runs_the_model_runs_the_given_one(env: EditingEnv) -> None:
    low = Rehearsal(env.llm, rank=2)
    env.llm.restore_unedited()
    fork = env.llm.fork()
    twin = low.clone_for(fork)
    assert (twin.llm, twin._unedited.llm) == (fork, fork)
    assert (low.llm, low._unedited.llm) == (env.llm, env.llm)


class HoldsAModel(GradientRule):
    """A rule of one's own that forgets to say how it is cloned."""

    name = "holds-a-model"


def test_a_rule_with_a_model_has_to_say_how_it_is_cloned(env: EditingEnv) -> None:
    rule = HoldsAModel(env.llm.shapes, env.llm.device)
    rule.llm = env.llm  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match=r"'holds-a-model' holds a model in 'llm'.*clone_for"):
        rule.clone_for(env.llm)
