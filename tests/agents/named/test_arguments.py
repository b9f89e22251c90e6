"""Arguments given as text: refused before a model is loaded, with the name and what was wrong."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_agents.named.spec import AgentSpec, check_arguments
from hiedit_agents.registry import make_agent
from hiedit_env.errors import CheckpointError, SettingsError


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hiedit,look_ahead=2x", "look_ahead='2x': Input should be a valid boolean"),
        ("hiedit,facts=2.5", "facts=2.5: Input should be a valid integer"),
        ("hiedit,facts=true", "facts=True: Input should be a valid integer"),
        ("hiedit,form=square", "form='square': Input should be 'outer'"),
        ("hiedit,step_size=big", "step_size='big': Input should be a valid number"),
        ("hiedit,stepsize=1", "has no argument 'stepsize'; it has facts, probes"),
        ("hiedit,fact=0", "did you mean 'facts'?"),
        ("hiedit,high.size=5", "high level 'policy': size=5"),
        ("all-layers+step-sizes,hidden=many", "low level 'step-sizes': hidden='many'"),
    ],
)
def test_wrong_arguments_of_a_learned_level_are_named(name: str, said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        make_agent(name)
    assert said in str(raised.value)


def test_whole_numbers_pass_as_numbers_and_none_where_it_may_be() -> None:
    check_arguments(Rehearsal, {"step_size": 1, "ridge": None, "prior": 2}, "rule")


def test_arguments_of_the_class_below_count_where_they_are_passed_on() -> None:
    class Below:
        def __init__(self, first: int, *, a: int = 0) -> None: ...

    class Above(Below):
        def __init__(self, *, b: int = 0, **rest: int) -> None: ...

    class Closed(Below):
        def __init__(self, *, b: int = 0) -> None: ...

    check_arguments(Above, {"a": 1, "b": 2}, "rule")
    for kind, name in ((Closed, "a"), (Above, "first")):
        with pytest.raises(SettingsError, match=f"has no argument '{name}'"):
            check_arguments(kind, {name: 1}, "rule")


def test_a_record_with_an_argument_that_is_none_is_refused_as_a_checkpoint() -> None:
    record = AgentSpec("mine", "all-layers", "rehearsal").to_json()
    record["low"]["settings"]["later"] = 1
    with pytest.raises(CheckpointError, match="has no argument 'later'"):
        AgentSpec.from_json(record)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("policy,hidden=9+ridge", "PolicyRouter.__init__"),
        ("all-layers+hypernetwork,rank=9", "Hypernetwork.__init__"),
    ],
)
@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), MemoryError()]
)
def test_sizes_for_which_there_is_no_memory(
    name: str, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = gym.make("hiedit/LayerSelection-v1", num_edits=1)
    agent = make_agent(name)

    def too_large(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"hiedit_agents.named.spec.{place}", too_large)
    with pytest.raises(SettingsError, match="not enough memory for its sizes; give smaller ones"):
        agent.reset(env, 0)
