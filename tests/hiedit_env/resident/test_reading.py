"""Edit units of several prompts, against the same prompts one by one and a plain loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_env.model.batches import PromptBatch
from hiedit_env.resident.batched import read_together
from hiedit_env.resident.reading import PassGraph
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import (
    PROMPTS,
    fake_capture,
    mean_losses,
    prompt,
    random_updates,
    resident,
)

KINDS = ("llama", "gpt2")
SHAPES = ((3, 2), (3, 2), (2, 3))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def edited(llm: ResidentLLM, seed: int) -> ResidentLLM:
    fork = llm.fork()
    fork.commit(random_updates(llm, seed))
    return fork


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 8, 1024])
def test_a_unit_is_its_prompts_joined_and_its_loss_their_mean(kind: str, limit: int) -> None:
    llm = resident(kind, max_batch_tokens=limit)
    llm.commit(random_updates(llm))
    reading = llm.read(*PROMPTS)
    alone = [llm.read(request) for request in PROMPTS]
    assert reading.prompts == reading.capture().prompts == PROMPTS
    assert reading.prompt == PROMPTS[0]
    assert reading.loss == pytest.approx(sum(one.loss for one in alone) / 3, rel=1e-5)
    assert reading.accuracy == pytest.approx(sum(one.accuracy for one in alone) / 3)
    close(reading.logits, torch.cat([one.logits for one in alone]))
    close(reading.summaries, torch.cat([one.summaries for one in alone]))
    capture, parts = reading.capture(), [one.capture() for one in alone]
    close(capture.numbers(), torch.stack([one.numbers() for one in parts]).mean(0))
    # By another way: one backward pass of the loss written out, padding left out.
    rows = llm.gradients(PROMPTS, lambda logits, batch: mean_losses(logits, batch) / 3)
    for i in range(len(llm.layers)):
        close(capture.keys[i], torch.cat([one.keys[i] for one in parts]))
        close(capture.keys[i], rows.keys[i])
        close(capture.value_gradients[i], torch.cat([one.value_gradients[i] for one in parts]) / 3)
        close(capture.value_gradients[i], rows.value_gradients[i])


def test_a_unit_is_answered_if_every_prompt_is() -> None:
    llm = resident()
    right = []
    for request in PROMPTS:
        ids = list(request.prompt_ids)
        with torch.no_grad():
            ids.append(int(llm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        right.append(prompt(ids[:-1], ids[-1:]))
    assert llm.read(*right).answered
    wrong = replace(right[1], answer_ids=((right[1].answer_ids[0] + 1) % 32,))
    mixed = llm.read(right[0], wrong, right[2])
    assert (mixed.answered, mixed.accuracy) == (False, pytest.approx(2 / 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 14, 1024])
def test_units_of_several_forks_are_read_as_alone(kind: str, limit: int) -> None:
    llm = resident(kind, max_batch_tokens=limit)
    forks = [edited(llm, 0), llm.fork(), edited(llm, 1)]
    units = [PROMPTS[:2], PROMPTS[2:], PROMPTS[::-1]]
    found = read_together(list(zip(forks, units, strict=True)))
    for i in (1, 2, 0):
        one, alone = found[i], forks[i].read(*units[i])
        assert one.prompts == units[i]
        assert one.loss == pytest.approx(alone.loss, rel=1e-4)
        for name in ("keys", "value_gradients"):
            pairs = zip(getattr(one.capture(), name), getattr(alone.capture(), name), strict=True)
            for a, b in pairs:
                close(a, b)


def test_the_parts_of_a_unit_are_its_facts_own_captures() -> None:
    llm = resident()
    llm.commit(random_updates(llm))
    whole = llm.read(*PROMPTS).capture()
    assert whole.parts([3]) == (whole,)
    for part, own in zip(whole.parts([1, 2]), (PROMPTS[:1], PROMPTS[1:]), strict=True):
        alone = llm.read(*own).capture()
        assert part.prompts == own
        assert part.loss == pytest.approx(alone.loss, rel=1e-5)
        assert torch.equal(part.correct, alone.correct)
        assert torch.equal(part.predictions, alone.predictions)
        close(part.numbers(), alone.numbers())
        for name in ("keys", "value_gradients"):
            for a, b in zip(getattr(part, name), getattr(alone, name), strict=True):
                close(a, b)


def test_rows_of_some_tokens_by_hand() -> None:
    # 4 prompt tokens and 2 answer tokens, then 3 and 1: 5 and 3 are read.
    one = replace(prompt([1, 5, 9, 4], [7, 3]), subject_spans=((0, 1), (1, 3)))
    two = replace(prompt([6, 2, 8], [5]), subject_spans=((2, 3),), subject_missing=True)
    capture = replace(fake_capture(SHAPES, one), prompts=(one, two))
    wanted = {"answer": [3, 4, 7], "all": slice(0, 8), "last": [3, 7], "subject": [2, 7]}
    assert {tokens: capture.rows(tokens) for tokens in wanted} == wanted  # type: ignore[arg-type]
    # Rows side by side are a view: nothing is copied.
    assert fake_capture(SHAPES, one).rows("answer") == slice(3, 5)
    assert fake_capture(SHAPES, one).rows("subject") == slice(2, 3)
    # A prompt that was given without a subject has its last token in the subject's place.
    assert fake_capture(SHAPES, PROMPTS[0]).rows("subject") == slice(3, 4)


def test_a_capture_without_summaries_counts_every_prompt_once() -> None:
    capture = replace(
        fake_capture(SHAPES, PROMPTS[0]),
        prompts=PROMPTS[:2],
        correct=torch.tensor([True, False, True]),
    )
    assert capture.numbers().tolist() == [2.5, 0.75]


def test_the_loss_of_a_batch_weighs_prompts_and_not_tokens() -> None:
    llm = resident()

    def summed(logits: Tensor, batch: PromptBatch) -> Tensor:
        losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        return (losses / torch.tensor([2 * 3, 2 * 3, 1 * 3, 3 * 3, 3 * 3, 3 * 3])).sum()

    rows, own = llm.gradients(PROMPTS, summed), llm.read(*PROMPTS).capture()
    for a, b in zip(own.value_gradients, rows.value_gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize(("limit", "waiting"), [(1, 0), (1024, 1)])
def test_long_prompts_do_not_keep_their_graphs_beside_each_other(limit: int, waiting: int) -> None:
    llm = resident(max_batch_tokens=limit)
    made: list[PassGraph] = []
    begin = PassGraph.__init__

    def noted(graph: PassGraph, *args: Any) -> None:
        assert all(one._losses is None for one in made), "two graphs at a time"
        begin(graph, *args)
        made.append(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassGraph, "__init__", noted)
        reading = llm.read(*PROMPTS)
    assert sum(one._losses is not None for one in made) == waiting
    assert len(made) == (3 if limit == 1 else 1)
    assert len(reading.capture().value_gradients) == len(llm.layers)
    # Without gradients there is nothing to run backward.
    assert not llm.read(*PROMPTS, gradients=False).capture().value_gradients
