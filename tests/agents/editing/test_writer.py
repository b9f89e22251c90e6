"""Writing one fact: what is run for it, and what is recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiedit_agents.editing.levels import Levels
from hiedit_agents.editing.writer import FactWriter, Written
from hiedit_agents.hierarchy.options import UntrainedChoice
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import make_rule
from tests.agents.hierarchy.test_neuron import FACTS, model, neuron


def fact(llm: ResidentLLM) -> EncodedPrompt:
    prompt, answer, subject = FACTS[0]
    return llm.encoder.with_subject(llm.encode(prompt, answer), prompt, subject)


def written(
    monkeypatch: pytest.MonkeyPatch, high: str, low: str, error: float = 0.01
) -> tuple[Written, list[Capture], list[bool], ResidentLLM]:
    """One fact, the captures its low level saw, and for every reading whether with gradients."""
    llm = model()
    level: UpdateRule = neuron(llm) if low == "neuron" else make_rule(low, llm.shapes, llm.device)
    seen: list[Capture] = []
    reads: list[bool] = []
    propose, read = level.propose, llm.read

    def note(capture: Capture, *args: Any) -> Any:
        seen.append(capture)
        return propose(capture, *args)

    def note_read(*prompts: EncodedPrompt, gradients: bool = True) -> Any:
        reads.append(gradients)
        return read(*prompts, gradients=gradients)

    monkeypatch.setattr(level, "propose", note)
    monkeypatch.setattr(llm, "read", note_read)
    choice = UntrainedChoice(high, len(llm.layers), None if high == "all-layers" else 3)
    levels = Levels("test", "", choice, level, 1, {})
    return FactWriter(llm, levels, error).write([fact(llm)]), seen, reads, llm


def test_no_gradients_are_computed_that_nobody_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        one, (capture,), reads, llm = written(patch, "fixed-layers", "neuron")
        assert reads == [False, False]
    assert capture.value_gradients == ()
    assert one.answered
    for high, low in (("gradient-norm", "neuron"), ("fixed-layers", "gradient")):
        with monkeypatch.context() as patch:
            _, (capture,), reads, _ = written(patch, high, low)
        assert all(reads)
        assert len(capture.value_gradients) == len(llm.layers)


def test_what_is_written_is_the_same_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        *_, one = written(patch, "fixed-layers", "neuron")
    monkeypatch.setattr(UntrainedChoice, "looks", True)
    *_, other = written(monkeypatch, "fixed-layers", "neuron")
    for i in range(len(one.layers)):
        mine, its = one.change(i), other.change(i)
        if mine is None or its is None:
            assert mine is its
        else:
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)


def test_a_step_that_becomes_smaller_is_written_as_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a gradient over several tokens little is kept where much may be lost."""
    with monkeypatch.context() as patch:
        one, _, reads, llm = written(patch, "all-layers", "gradient", error=0.5)
    assert len(reads) == 3
    for i in range(len(llm.layers)):
        [updates], change = one.updates, llm.change(i)
        assert updates[i] is not None
        assert change is not None
        np.testing.assert_allclose(change, updates[i].left.mT @ updates[i].right, atol=1e-6)
