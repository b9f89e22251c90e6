"""Forks of a resident model, and passes that several of them share, against one at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_env.envs.scheduler import Pass, Read, run, run_together
from hiedit_env.errors import NonFiniteUpdateError, SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.batched import read_together
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import PROMPTS, all_bits, prompt, random_updates, resident

KINDS = ("llama", "gpt2", "gemma2")


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def edited(llm: ResidentLLM, seed: int) -> ResidentLLM:
    """A fork with random updates; every other layer is left alone where the seed is odd."""
    fork = llm.fork()
    updates = random_updates(llm, seed)
    if seed % 2:
        updates[::2] = [None] * len(updates[::2])
    fork.commit(updates)
    return fork


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fork_is_the_model_with_the_updates_written(kind: str, seed: int) -> None:
    written, shared = resident(kind), resident(kind)
    before = all_bits(shared.model)
    fork = edited(shared, seed)
    written.commit(_updates(fork))
    for request in PROMPTS:
        one, two = fork.read(request), written.read(request)
        assert one.loss == pytest.approx(two.loss, rel=1e-4)
        close(one.logits, two.logits)
        for name in ("keys", "value_gradients"):
            for a, b in zip(
                getattr(one.capture(), name), getattr(two.capture(), name), strict=True
            ):
                close(a, b)
    batch = shared.batch(PROMPTS)
    close(fork.answer_logits(batch), written.answer_logits(batch))
    overlay = random_updates(shared, 7)
    close(fork.answer_logits(batch, overlay), written.answer_logits(batch, overlay))
    texts = ["w3 w4", "w9"]
    assert fork.generate(texts, [4, 5]) == written.generate(texts, [4, 5])
    assert fork.weights_fingerprint() == written.weights_fingerprint()
    assert all_bits(shared.model) == before


def _updates(fork: ResidentLLM) -> Sequence[LowRankUpdate | None]:
    """The fork's accumulated changes as updates: I and Δ."""
    changes = [fork.change(i) for i in range(len(fork.layers))]
    return [None if c is None else LowRankUpdate(torch.eye(len(c)), c) for c in changes]


def test_forks_are_independent_and_leave_no_trace() -> None:
    llm = resident()
    before, clean = all_bits(llm.model), llm.weights_fingerprint()
    base = llm.read(PROMPTS[0]).loss
    one, two = edited(llm, 0), edited(llm, 2)
    assert len({one.read(PROMPTS[0]).loss, two.read(PROMPTS[0]).loss, base}) == 3
    assert len({one.weights_fingerprint(), two.weights_fingerprint(), clean}) == 3
    snapshot = one.snapshot()
    state = one.weights_fingerprint()
    one.commit(random_updates(llm, 3))
    assert one.weights_fingerprint() != state
    one.restore(snapshot)
    assert one.weights_fingerprint() == state
    one.restore_unedited()
    assert one.read(PROMPTS[0]).loss == base
    assert one.weights_fingerprint() == clean
    assert all_bits(llm.model) == before
    assert not any(layer.module._forward_hooks for layer in llm.layers)


def test_a_fork_runs_unedited_when_asked_to() -> None:
    llm = resident()
    fork = edited(llm, 0)
    state, base = fork.weights_fingerprint(), llm.read(PROMPTS[0]).loss
    with fork.unedited():
        assert fork.read(PROMPTS[0]).loss == base
        assert fork.weights_fingerprint() == llm.weights_fingerprint()
        with pytest.raises(RuntimeError, match="unedited"):
            fork.commit(random_updates(llm, 1))
    assert fork.weights_fingerprint() == state
    assert fork.read(PROMPTS[0]).loss != base


def test_only_an_unedited_model_is_forked() -> None:
    llm = resident()
    fork = edited(llm, 0)
    assert fork.fork().weights_fingerprint() == llm.weights_fingerprint()
    llm.commit(random_updates(llm))
    with pytest.raises(SettingsError, match="restore_unedited"):
        llm.fork()


def test_a_fork_refuses_what_is_not_finite() -> None:
    llm = resident()
    fork = edited(llm, 0)
    state = fork.weights_fingerprint()
    bad = random_updates(llm)
    assert bad[-1] is not None
    bad[-1].right[0, 0] = torch.nan
    with pytest.raises(NonFiniteUpdateError):
        fork.commit(bad)
    assert fork.weights_fingerprint() == state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 14, 1024])
def test_reading_together_is_reading_one_by_one(kind: str, limit: int) -> None:
    llm = resident(kind, max_batch_tokens=limit)
    forks = [edited(llm, seed) for seed in range(3)] + [llm.fork()]
    requests = [*PROMPTS, PROMPTS[0]]
    found = read_together([(fork, [p]) for fork, p in zip(forks, requests, strict=True)])
    for fork, request, reading in zip(forks, requests, found, strict=True):
        alone = fork.read(request)
        assert reading.prompt == request
        assert reading.loss == pytest.approx(alone.loss, rel=1e-4)
        assert reading.answered == alone.answered
        close(reading.logits, alone.logits)
    # In any order, and whether or not the others' are wanted.
    for i in (2, 0, 3):
        one, alone = found[i].capture(), forks[i].read(requests[i]).capture()
        for name in ("keys", "value_gradients"):
            for a, b in zip(getattr(one, name), getattr(alone, name), strict=True):
                assert a.shape == b.shape
                close(a, b)


def test_environments_in_step_get_their_own_answers_and_readings_come_first() -> None:
    llm = resident()
    forks = [edited(llm, seed) for seed in range(3)]
    log: list[str] = []

    def fork(i: int, count: int) -> Generator[Pass, Any, list[float]]:
        losses = []
        for k in range(count):
            reading = yield Read(forks[i], [PROMPTS[(i + k) % 3]])
            log.append(f"{i}.{k}")
            losses.append(reading.loss)
        return losses

    results = run_together([fork(0, 2), fork(1, 0), fork(2, 1)])
    assert log == ["0.0", "2.0", "0.1"]
    wanted = [[(0, 0), (0, 1)], [], [(2, 2)]]
    for losses, pairs in zip(results, wanted, strict=True):
        assert losses == pytest.approx([forks[i].read(PROMPTS[p]).loss for i, p in pairs], rel=1e-4)


def test_a_failed_pass_is_raised_inside_every_environment_that_waited_for_it() -> None:
    llm = resident()
    undone: list[int] = []

    def fork(i: int, request: EncodedPrompt) -> Generator[Pass, Any, str]:
        try:
            yield Read(llm.fork(), [request])
        except IndexError:
            undone.append(i)
            raise
        return "fine"

    bad = prompt([1, 2], [99])  # outside the vocabulary of 32
    results = run_together([fork(0, PROMPTS[0]), fork(1, bad)])
    assert undone == [0, 1]
    assert all(isinstance(result, IndexError) for result in results)
    with pytest.raises(IndexError):
        run(fork(2, bad))
    assert run(fork(3, PROMPTS[0])) == "fine"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_large_changes_are_not_stacked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product per environment says what one product over the stack of their changes says."""
    llm = resident(kind)
    forks = [edited(llm, 0), edited(llm, 1), llm.fork()]
    asked = [(fork, [request]) for fork, request in zip(forks, PROMPTS, strict=True)]
    stacked = read_together(asked)
    monkeypatch.setattr("hiedit_env.resident.low_rank.STACKED_NUMBERS", 0)
    real = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts, *dim: real(_no_weights(llm, parts), *dim))
    for one, two in zip(stacked, read_together(asked), strict=True):
        close(one.logits, two.logits)
        for a, b in zip(one.capture().keys, two.capture().keys, strict=True):
            close(a, b)


def _no_weights(llm: ResidentLLM, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    assert not {tuple(part.shape) for part in parts} & set(llm.shapes)
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_goes_on_from_the_present_changes(kind: str) -> None:
    trunk, written = resident(kind), resident(kind)
    first, second = (random_updates(trunk, seed) for seed in (1, 2))
    request = PROMPTS[0]
    plain = written.read(request).loss
    for llm in (trunk, written):
        llm.commit(first)
    branch, bits = trunk.branch(), trunk.weights_fingerprint()
    assert branch.weights_fingerprint() == bits
    before = written.read(request).loss
    assert branch.read(request).loss == pytest.approx(before, abs=1e-5)
    branch.commit(second)
    written.commit(second)
    # Both counts: what was there, and what came; and the trunk knows nothing of it.
    one, two = branch.read(request), written.read(request)
    assert one.loss == pytest.approx(two.loss, abs=1e-4)
    close(one.capture().value_gradients[0], two.capture().value_gradients[0])
    for i in range(len(trunk.layers)):
        close(branch.change(i), written.change(i))
    assert trunk.weights_fingerprint() == bits
    with branch.unedited():
        assert branch.read(request).loss == pytest.approx(plain, abs=1e-5)
    branch.restore_unedited()
    assert branch.read(request).loss == pytest.approx(plain, abs=1e-4)
    assert trunk.weights_fingerprint() == bits
