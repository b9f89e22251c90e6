"""The throughput benchmark: what its plain loop computes, and that its clock waits for the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiedit_benchmarks.studies import throughput
from hiedit_benchmarks.studies.throughput import (
    PassTimer,
    PlainLoop,
    clock,
    measure_model,
    measure_training,
    measure_vector,
    peak_device_memory,
)
from hiedit_env.envs.base import EditingEnv
from hiedit_env.testing import assert_no_hooks_left
from tests.support.episodes import (
    SELECTION,
    L,
    PlainModel,
    act,
    bits,
    make,
    plain_likeness,
    same_bits,
)

CUDA = torch.device("cuda")


@pytest.fixture
def edited() -> EditingEnv:
    """On its third fact, after two edits strong enough to harm unrelated answers."""
    env = make(SELECTION, step_size=1e-2, max_steps_per_edit=1)
    env.reset(seed=0)
    for _ in range(2):
        env.step(act(SELECTION))
    return env


def test_the_plain_loop_computes_what_it_says(edited: EditingEnv) -> None:
    fact, remembered = edited.episode.fact, edited.episode.remembered
    before = bits(edited)
    # The other way: the capture and the rule of the environment, dense weights, float64.
    updates = edited.episode.rule.propose(edited.capture, np.ones(L, bool))
    weights = {name: value.double() for name, value in before.items()}
    for name, update in zip(edited.llm.names, updates, strict=True):
        assert update is not None
        weights[f"{name}.weight"] += update.dense().double().T
    now, unedited = PlainModel(weights), PlainModel()
    learned = [fact.prompt, *fact.paraphrases, *(old.prompt for old in remembered)]
    probes = [*fact.probes, *(old.probes[0] for old in remembered)]
    wanted = sum(now.nats(p.prompt, p.answer) for p in learned)
    drift = sum(plain_likeness(unedited, now, p.prompt, p.answer, "loss") for p in probes)
    assert drift < -0.1
    runs: list[None] = []
    handle = edited.llm.model.register_forward_hook(lambda *_: runs.append(None))
    total = PlainLoop(edited).step(fact, remembered)
    handle.remove()
    assert total == pytest.approx(wanted - drift, rel=1e-3)
    # Unrelated prompts twice, the fact before and after, the rest after: nothing runs needlessly.
    assert len(runs) == 2 * len(probes) + 1 + len(learned)
    assert same_bits(bits(edited), before)
    assert_no_hooks_left(edited)


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, edited: EditingEnv) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: events.append("read") or 0.0)
    clock(torch.device("cpu"))
    assert events == ["read"]
    events.clear()
    clock(CUDA)
    assert events == ["wait", "read"]
    events.clear()
    edited.llm.device = CUDA
    timer = PassTimer(edited.llm)

    def inner() -> None:
        events.append("pass")

    # A pass inside a pass belongs to the outer one.
    timer._timed(lambda: timer._timed(inner)())()
    assert events == ["wait", "read", "pass", "wait", "read"]


def test_the_gpus_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    assert peak_device_memory(CUDA) == {"peak_device_memory_mb": 3.0}
    assert peak_device_memory(torch.device("cpu")) == {}


def test_what_is_measured() -> None:
    result: dict[str, Any] = measure_model("tiny", None, 2, "cpu")
    assert result["remembered_edits"] == 10
    assert 0 < result["pass_seconds"] < result["step_seconds"]
    assert result["plain_seconds"] > 0
    assert "peak_device_memory_mb" not in result


@pytest.mark.parametrize("agent", ["rledit", "hiedit"])
def test_training_steps_are_timed_with_a_full_memory(agent: str) -> None:
    found = measure_training(agent, "tiny", None, 2, "cpu")
    assert found["agent"] == agent
    assert found["remembered_edits"] == 10
    assert 0 < found["step_seconds"] <= found["longest_step_seconds"]


def test_environments_together_are_timed_against_environments_apart() -> None:
    found = measure_vector(num_envs=2, steps=2)
    assert found["num_envs"] == 2
    assert found["times_faster"] > 0
    assert found["largest_difference_of_rewards"] < 1e-3
