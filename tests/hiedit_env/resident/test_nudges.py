"""Nudges: losses under added vectors, against the model's own forward with the vectors put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident import nudges as nudges_module
from hiedit_env.resident.nudges import Nudges, answer_losses
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.upper_half import Compared
from tests.support.models import normal, prompt, random_updates, resident

PROMPTS = [prompt((5, 6, 7, 8, 9), (3, 4)), prompt((2, 9), (6,)), prompt((4, 4, 7), (5, 8, 2))]
POSITIONS = (2, 1, 0)
LAYERS = (0, 2)


def own_loss(llm: ResidentLLM, one: EncodedPrompt, at: int, vectors: list[Tensor]) -> Tensor:
    """By the whole model, one prompt at a time, with the vectors added by plain hooks."""

    def hook(vector: Tensor) -> Any:
        def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
            added = torch.zeros_like(output)
            added[0, at] = vector
            return output + added

        return add

    handles = [
        llm.layers[layer].module.register_forward_hook(hook(vector))
        for layer, vector in zip(LAYERS, vectors, strict=True)
    ]
    try:
        ids = torch.tensor([[*one.prompt_ids, *one.answer_ids]])
        logits = llm.model(ids).logits[0, one.first_position : -1]
    finally:
        for handle in handles:
            handle.remove()
    return F.cross_entropy(logits, torch.tensor(one.answer_ids))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("whole", [False, True])
def test_losses_and_gradients_are_those_of_the_model(model_type: str, whole: bool) -> None:
    llm = resident(model_type)
    if whole:
        llm.upper.run_ends.update({(llm.dtype, packed): Compared(0, 0) for packed in (True, False)})
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    vectors = [
        normal(i, 3, llm.shapes[layer][1]).requires_grad_() for i, layer in enumerate(LAYERS)
    ]
    found = nudges.losses(vectors)
    wanted = torch.stack(
        [
            own_loss(llm, one, at, [v[i] for v in vectors])
            for i, (one, at) in enumerate(zip(PROMPTS, POSITIONS, strict=True))
        ]
    )
    assert any(one.right for one in llm.upper.run_ends.values()) is (not whole)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for one, two in zip(
        torch.autograd.grad(found.sum(), vectors),
        torch.autograd.grad(wanted.sum(), vectors),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alone", [False, True])
def test_worst_is_that_of_the_least_probable_answer_token(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = resident("llama")
    if alone:
        monkeypatch.setattr(ResidentLLM, "can_share", lambda self, batch: len(batch.prompts) == 1)
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    worst = answer_losses(nudges.logits(zeros(llm)), PROMPTS)[1]
    wanted = []
    for one in PROMPTS:
        ids = torch.tensor([[*one.prompt_ids, *one.answer_ids]])
        chances = llm.model(ids).logits[0, one.first_position : -1].log_softmax(-1)
        wanted.append(-chances[range(len(one.answer_ids)), list(one.answer_ids)].min())
    assert any(len(one.answer_ids) > 1 for one in PROMPTS)
    torch.testing.assert_close(worst, torch.stack(wanted).detach(), atol=1e-5, rtol=1e-5)


def test_keys_are_what_the_layers_were_given() -> None:
    llm = resident("llama")
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    nudges.losses([torch.zeros(1, llm.shapes[layer][1]) for layer in LAYERS])
    for i, (one, at) in enumerate(zip(PROMPTS, POSITIONS, strict=True)):
        capture = llm.read(one).capture()
        for place, layer in enumerate(LAYERS):
            torch.testing.assert_close(
                nudges.keys[place][i], capture.keys[layer][at], atol=1e-5, rtol=1e-5
            )


def test_a_fork_is_run_with_its_changes() -> None:
    llm = resident("llama")
    fork = llm.fork()
    fork.commit(random_updates(fork))
    before = Nudges(llm, PROMPTS, POSITIONS, LAYERS).losses(zeros(llm))
    after = Nudges(fork, PROMPTS, POSITIONS, LAYERS).losses(zeros(llm))
    assert not torch.allclose(before, after)
    llm.commit(random_updates(llm))
    torch.testing.assert_close(
        after, Nudges(llm, PROMPTS, POSITIONS, LAYERS).losses(zeros(llm)), atol=1e-5, rtol=1e-5
    )


def zeros(llm: ResidentLLM) -> list[Tensor]:
    return [torch.zeros(1, llm.shapes[layer][1]) for layer in LAYERS]


def test_prompts_that_cannot_share_a_batch_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    wanted = Nudges(llm, PROMPTS, POSITIONS, LAYERS).losses(zeros(llm))
    monkeypatch.setattr(ResidentLLM, "can_share", lambda self, batch: len(batch.prompts) == 1)
    alone = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    torch.testing.assert_close(alone.losses(zeros(llm)), wanted, atol=1e-5, rtol=1e-5)
    assert [len(rows) for rows in alone.keys] == [3, 3]
    assert alone.lengths.shape == (3,)


def test_many_prompts_in_batches_of_like_lengths_are_as_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = resident("llama")
    monkeypatch.setattr(nudges_module, "packing_pays", lambda *_: False)
    prompts = [*PROMPTS, prompt((3, 3, 3, 3, 3, 3, 8), (2,)), prompt((9, 1), (7, 7))]
    positions, rows = [*POSITIONS, 0, 1], (0, 1, 3, 4)
    vectors = [normal(i, 5, llm.shapes[layer][1]) for i, layer in enumerate(LAYERS)]

    def asked(chosen: tuple[int, ...]) -> tuple[Tensor, ...]:
        nudges = Nudges(llm, prompts, positions, LAYERS)
        before = (*nudges.keys, nudges.lengths)
        given = [v[list(chosen)].clone().requires_grad_() for v in vectors]
        losses = nudges.losses(given, chosen)
        gradients = torch.autograd.grad((losses * torch.arange(1.0, 1 + len(chosen))).sum(), given)
        logits = nudges.logits([v.detach() for v in given], chosen)
        worst = answer_losses(logits, [prompts[i] for i in chosen])[1]
        kept = losses, worst, *nudges.keys
        return (*before, *kept, nudges.logits(given, chosen), *gradients)

    wanted = [asked(tuple(range(5))), asked(rows)]
    monkeypatch.setattr(nudges_module, "TOGETHER", 2)
    assert len(Nudges(llm, prompts, positions, LAYERS)._parts) == 3
    for chosen, want in zip([tuple(range(5)), rows], wanted, strict=True):
        for got, one in zip(asked(chosen), want, strict=True):
            torch.testing.assert_close(got, one, atol=1e-5, rtol=1e-5)


def test_prompts_of_different_kinds_share_no_batch() -> None:
    llm = resident("llama")
    vectors: list[Tensor | None] = [normal(i, 3, llm.shapes[x][1]) for i, x in enumerate(LAYERS)]
    together = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    apart = Nudges(llm, PROMPTS, POSITIONS, LAYERS, kinds=(5, 0, 5))
    assert [places for places, _ in apart._parts] == [(1,), (0, 2)]
    torch.testing.assert_close(apart.lengths, together.lengths, atol=1e-5, rtol=1e-5)
    for rows in ((0, 1, 2), (0, 2), (1, 2)):
        given = [None if v is None else v[list(rows)] for v in vectors]
        wanted = together.losses(given, rows), together.logits(given, rows), *together.keys
        found = apart.losses(given, rows), apart.logits(given, rows), *apart.keys
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_lengths_are_those_of_the_hidden_states_behind_the_blocks() -> None:
    llm = resident("llama")
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    nudges.losses([normal(i, 3, llm.shapes[layer][1]) * 0 for i, layer in enumerate(LAYERS)])
    blocks = sorted({llm.layers[layer].block for layer in LAYERS})
    for i, (one, at) in enumerate(zip(PROMPTS, POSITIONS, strict=True)):
        output = llm.model(torch.tensor([one.input_ids]), output_hidden_states=True)
        own = [output.hidden_states[block + 1][0, at].norm() for block in blocks]
        torch.testing.assert_close(nudges.lengths[i], torch.stack(own).mean(), atol=1e-5, rtol=1e-5)


def test_a_model_without_such_a_cache_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    wanted = Nudges(llm, PROMPTS, POSITIONS, LAYERS).losses(zeros(llm))
    other = resident("llama")

    def refuse(*args: Any, **named: Any) -> None:
        raise TypeError("no cache here")

    monkeypatch.setattr("hiedit_env.resident.ends.Ends._run", refuse)
    found = Nudges(other, PROMPTS, POSITIONS, LAYERS).losses(zeros(other))
    assert not any(one.right for one in other.upper.run_ends.values())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_position_outside_the_prompt_is_refused() -> None:
    llm = resident("llama")
    with pytest.raises(SettingsError, match="position 5 is not in the prompt"):
        Nudges(llm, PROMPTS[:1], (5,), LAYERS)
