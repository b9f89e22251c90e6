"""The resident model's passes, against the model's own full forward and plain autograd."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hiedit_env.errors import NonFiniteUpdateError, UpdateShapeError
from hiedit_env.model.architectures import block_list
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import (
    HIDDEN,
    PROMPTS,
    SETTINGS,
    all_bits,
    build_random,
    normal,
    prompt,
    random_updates,
    resident,
)

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LONG = PROMPTS[2]


def own_logits(model: PreTrainedModel, prompts: Sequence[EncodedPrompt]) -> Tensor:
    """The model's own forward on each prompt alone, at the answer positions."""
    rows = []
    with torch.no_grad():
        for p in prompts:
            logits = model(input_ids=torch.tensor([p.input_ids]), use_cache=False).logits[0]
            rows.append(logits[len(p.prompt_ids) - 1 :])
    return torch.cat(rows)


def hook_counts(model: nn.Module) -> dict[str, int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {n: sum(len(getattr(m, k)) for k in kinds) for n, m in model.named_modules()}


def assert_clean(model: nn.Module) -> None:
    assert not any(hook_counts(model).values())
    for parameter in model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert parameter.grad_fn is None


# -- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SETTINGS)
@pytest.mark.parametrize("blocks", [(0, 1), (2,)])
def test_answer_logits_are_the_models_own(model_type: str, blocks: tuple[int, ...]) -> None:
    llm = resident(model_type, blocks)
    assert llm.first_block == blocks[0]
    expected = own_logits(llm.model, PROMPTS)
    batch = llm.batch(PROMPTS)
    for _ in range(2):  # computed, then from the cache
        torch.testing.assert_close(llm.answer_logits(batch), expected, **TOLERANCE)
    torch.testing.assert_close(llm.answer_logits(batch, remember=False), expected, **TOLERANCE)
    # A batch of one has no padding.
    alone = llm.answer_logits(llm.batch([LONG]))
    torch.testing.assert_close(alone, expected[3:], **TOLERANCE)
    assert expected.std() > 0.2  # far more than the tolerance


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_windows_are_kept(model_type: str) -> None:
    model = build_random(model_type, sliding_window=2)
    wide = own_logits(build_random(model_type), PROMPTS)
    expected = own_logits(model, PROMPTS)
    assert not torch.allclose(wide, expected, atol=1e-2)  # the window is what matters here
    llm = resident(model_type, (1,), model=model)
    torch.testing.assert_close(llm.answer_logits(llm.batch(PROMPTS)), expected, **TOLERANCE)


def test_final_softcapping_is_kept() -> None:
    model = build_random("gemma2", final_logit_softcapping=0.5)
    expected = own_logits(model, PROMPTS)
    assert expected.abs().max() <= 0.5
    llm = resident("gemma2", (1, 2), model=model)
    torch.testing.assert_close(llm.answer_logits(llm.batch(PROMPTS)), expected, **TOLERANCE)


def test_logits_that_are_scaled_after_the_projection_are_the_models_own() -> None:
    model = build_random("granite", logits_scaling=8.0)
    expected = own_logits(model, PROMPTS)
    llm = resident("llama", model=model)  # granite's layers have llama's names
    torch.testing.assert_close(llm.answer_logits(llm.batch(PROMPTS)), expected, **TOLERANCE)


def test_answers_show_the_present_weights() -> None:
    llm = resident("gpt2", (1, 2))
    batch = llm.batch(PROMPTS)
    before = llm.answer_logits(batch)
    llm.commit(random_updates(llm))
    expected = own_logits(llm.model, PROMPTS)
    assert not torch.allclose(before, expected, atol=0.1)
    torch.testing.assert_close(llm.answer_logits(batch), expected, **TOLERANCE)


# -- prefix cache -------------------------------------------------------------------------------


def count_runs(llm: ResidentLLM, block: int) -> list[int]:
    """A list that grows by the number of rows whenever a block runs."""
    runs: list[int] = []
    module = block_list(llm.model)[0][block]
    module.register_forward_hook(lambda _m, inputs, _o: runs.append(inputs[0].shape[0]))
    return runs


def test_lower_blocks_run_once_per_prompt() -> None:
    llm = resident("llama", (1, 2))
    lower, upper = count_runs(llm, 0), count_runs(llm, 1)
    llm.answer_logits(llm.batch(PROMPTS[:2]))
    assert (sum(lower), sum(upper)) == (2, 2)
    llm.answer_logits(llm.batch(PROMPTS))
    llm.read(LONG)
    assert (sum(lower), sum(upper)) == (3, 2 + 3 + 1)
    llm.answer_logits(llm.batch(PROMPTS), remember=False)
    assert sum(lower) == 3 + 3
    # The prompts have 5, 1 and 8 tokens to read: all but the last of the answer.
    assert (len(llm.cache), llm.cache.currsize) == (3, (5 + 1 + 8) * HIDDEN * 4)


def test_eviction_keeps_the_bound_and_the_answers() -> None:
    bound = 10 * HIDDEN * 4  # the prompts have 5, 1 and 8 tokens
    llm, free = resident("llama", (1, 2), cache_bytes=bound), resident("llama", (1, 2))
    lower = count_runs(llm, 0)
    for prompts in ([PROMPTS[0]], [PROMPTS[2]], [PROMPTS[0]], PROMPTS, PROMPTS[::-1]):
        got = llm.answer_logits(llm.batch(prompts))
        assert torch.equal(got, free.answer_logits(free.batch(prompts)))
        assert llm.cache.currsize <= bound
    assert len(lower) > 3  # something was evicted and computed again
    nothing = resident("llama", (1, 2), cache_bytes=0)
    expected = own_logits(nothing.model, PROMPTS)
    torch.testing.assert_close(nothing.answer_logits(nothing.batch(PROMPTS)), expected, **TOLERANCE)
    assert len(nothing.cache) == 0


def test_an_answer_does_not_depend_on_what_its_prompt_was_first_batched_with() -> None:
    first, second = resident("gpt2", (2,)), resident("gpt2", (2,))
    second.answer_logits(second.batch(PROMPTS))
    for p in PROMPTS:
        mine, other = first.answer_logits(first.batch([p])), second.answer_logits(second.batch([p]))
        assert torch.equal(mine, other)


def test_what_was_cached_without_gradients_serves_gradients() -> None:
    llm = resident("llama", (1,))
    with torch.inference_mode():
        llm.answer_logits(llm.batch([LONG]))
    assert all(v.abs().sum() > 0 for v in llm.read(LONG).capture().value_gradients)


# -- capture ------------------------------------------------------------------------------------


def plain_autograd(
    llm: ResidentLLM, p: EncodedPrompt
) -> tuple[float, list[Tensor], list[Tensor], list[Tensor]]:
    """Loss, layer inputs, gradients at layer outputs and weight gradients of a full pass."""
    model = copy.deepcopy(llm.model).requires_grad_(True)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        inputs.append(args[0].detach()[0])
        outputs.append(output)

    modules = [model.get_submodule(name) for name in llm.names]
    for module in modules:
        module.register_forward_hook(keep)
    logits = model(input_ids=torch.tensor([p.input_ids]), use_cache=False).logits[0].double()
    places = range(len(p.prompt_ids) - 1, len(p.input_ids))
    terms = [
        torch.logsumexp(logits[place], 0) - logits[place, label]
        for place, label in zip(places, p.answer_ids, strict=True)
    ]
    loss = torch.stack(terms).mean()
    loss.backward()
    gradients = [output.grad[0] for output in outputs if output.grad is not None]
    return loss.item(), inputs, gradients, [module.weight.grad for module in modules]


@pytest.mark.parametrize("model_type", SETTINGS)
@pytest.mark.parametrize("blocks", [(0, 2), (1, 2)])
def test_capture_is_what_plain_hooks_and_autograd_give(
    model_type: str, blocks: tuple[int, int]
) -> None:
    llm = resident(model_type, blocks)
    llm.commit(random_updates(llm, scale=0.05))  # at the present weights, not the unedited ones
    loss, keys, gradients, weight_gradients = plain_autograd(llm, LONG)
    reading = llm.read(LONG)
    assert math.isclose(reading.loss, loss, rel_tol=1e-5)
    capture = reading.capture()
    assert capture.loss == reading.loss
    assert len(capture.keys) == len(capture.value_gradients) == len(llm.layers) == len(keys)
    for i, layer in enumerate(llm.layers):
        u, v = capture.keys[i], capture.value_gradients[i]
        assert (u.shape, v.shape) == ((LONG.length, layer.d_in), (LONG.length, layer.d_out))
        scale = float(gradients[i].abs().max())
        assert scale > 1e-4  # otherwise the comparison says nothing
        torch.testing.assert_close(u, keys[i], **TOLERANCE)
        torch.testing.assert_close(v, gradients[i], rtol=1e-4, atol=1e-5 * scale)
        stored = weight_gradients[i].mT if layer.is_transposed else weight_gradients[i]
        size = float(stored.abs().max())
        torch.testing.assert_close(u.mT @ v, stored, rtol=1e-4, atol=1e-5 * size)
        assert not u.requires_grad
        assert not v.requires_grad
    norms = torch.stack([g.norm() for g in weight_gradients])
    torch.testing.assert_close(capture.gradient_norms(), norms, rtol=1e-4, atol=0.0)
    assert_clean(llm.model)


def test_predictions_and_whether_they_are_right() -> None:
    llm = resident("llama", (1, 2))
    said = own_logits(llm.model, [LONG]).argmax(-1).tolist()
    reading = llm.read(LONG)
    assert reading.predictions.tolist() == said
    assert reading.correct.tolist() == [a == b for a, b in zip(said, LONG.answer_ids, strict=True)]
    assert not reading.answered
    # An answer made of the argmax tokens, one by one, is answered.
    answer: list[int] = []
    for _ in range(3):
        ids = torch.tensor([[*LONG.prompt_ids, *answer]])
        answer.append(int(llm.model(input_ids=ids).logits[0, -1].argmax()))
    right = llm.read(prompt(LONG.prompt_ids, answer))
    assert (right.answered, right.capture().answered) == (True, True)
    partly = llm.read(prompt(LONG.prompt_ids, [*answer[:2], (answer[2] + 1) % 32])).capture()
    assert partly.correct.tolist() == [True, True, False]
    assert not partly.answered


def test_backward_runs_only_when_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama", (1, 2))
    calls: list[None] = []
    original = torch.autograd.grad

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    reading = llm.read(LONG)
    assert not calls
    capture = reading.capture()
    assert reading.capture() is capture
    assert len(calls) == 1


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_reading_leaves_nothing_behind(grad_mode: Callable[[], Any]) -> None:
    llm = resident("gpt2", (0, 1))
    before = all_bits(llm.model)
    with grad_mode():
        reading = llm.read(LONG)
        assert_clean(llm.model)
        reading.capture()
        llm.read(PROMPTS[0]).release()
    assert_clean(llm.model)
    assert all_bits(llm.model) == before
    hidden = llm.cache.get(LONG.input_ids)
    assert hidden is not None
    assert not hidden.requires_grad


def test_reading_that_fails_removes_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama", (1, 2))
    with pytest.raises(IndexError):
        llm.read(prompt([1, 2], [3, 99, 4]))  # 99 is outside the vocabulary of 32
    monkeypatch.setattr(llm.model.lm_head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.read(LONG)
    assert_clean(llm.model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_norms_of_tiny_gradients(dtype: torch.dtype) -> None:
    # Squares of 1e-4 vanish in float16. ‖uᵀv‖ of all-equal rows: T a b √(d_in d_out).
    keys, gradients = torch.full((3, 4), 0.5).to(dtype), torch.full((3, 9), 1e-4).to(dtype)
    flags = torch.tensor([False])
    capture = Capture((prompt([1], [2]),), (keys,), (gradients,), 1.0, torch.tensor([3]), flags)
    norms = capture.gradient_norms()
    assert norms.dtype == torch.float32
    assert math.isclose(float(norms), 3 * 0.5 * 1e-4 * 6, rel_tol=5e-3)


# -- overlay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SETTINGS)
def test_overlay_equals_commit(model_type: str) -> None:
    llm = resident(model_type, (1, 2))
    llm.commit(random_updates(llm, 1, scale=0.05))
    updates = random_updates(llm, 2, scale=0.2)
    updates[1] = None
    batch = llm.batch(PROMPTS)
    before, plain = all_bits(llm.model), llm.answer_logits(batch)
    overlaid = llm.answer_logits(batch, updates)
    assert all_bits(llm.model) == before
    assert_clean(llm.model)
    assert torch.equal(llm.answer_logits(batch), plain)
    llm.commit(updates)
    torch.testing.assert_close(overlaid, own_logits(llm.model, PROMPTS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(overlaid, plain, atol=0.01)


# The norms of Llama and its kin compute in float32 always, which bounds what differences can tell.
@pytest.mark.parametrize(
    ("model_type", "step", "tolerance"),
    [("gpt2", 1e-5, 1e-5), ("phi", 1e-5, 1e-5), ("llama", 1e-2, 2e-2), ("phi3", 1e-2, 2e-2)],
)
def test_overlay_is_differentiable(model_type: str, step: float, tolerance: float) -> None:
    llm = resident(model_type, (1, 2), dtype=torch.float64)
    batch = llm.batch(PROMPTS)

    def loss(factors: Sequence[Tensor]) -> Tensor:
        pairs = zip(factors[::2], factors[1::2], strict=True)
        updates = [LowRankUpdate(left, right) for left, right in pairs]
        return nn.functional.cross_entropy(llm.answer_logits(batch, updates), batch.labels)

    shapes = [(2, size) for shape in llm.shapes for size in shape]
    factors = [0.2 * normal(i, *s, dtype=torch.float64) for i, s in enumerate(shapes)]
    gradients = torch.autograd.grad(
        loss([f.requires_grad_() for f in factors]), factors, allow_unused=False
    )
    for i, gradient in enumerate(gradients):
        direction = normal(100 + i, *gradient.shape, dtype=torch.float64)

        def moved(by: float, i: int = i, direction: Tensor = direction) -> float:
            with torch.no_grad():
                return float(loss([*factors[:i], factors[i] + by * direction, *factors[i + 1 :]]))

        difference = (moved(step) - moved(-step)) / (2 * step)
        assert abs(difference) > 1e-4
        assert math.isclose(float((gradient * direction).sum()), difference, rel_tol=tolerance)
    assert_clean(llm.model)


def test_overlay_leaves_no_trace_after_an_exception() -> None:
    llm = resident("llama", (1, 2))
    batch = llm.batch(PROMPTS)
    before = all_bits(llm.model)
    outside = dataclasses.replace(batch, positions=batch.positions + 100)
    with pytest.raises(IndexError):
        llm.answer_logits(outside, random_updates(llm))
    assert_clean(llm.model)
    assert all_bits(llm.model) == before
    expected = own_logits(llm.model, PROMPTS)
    torch.testing.assert_close(llm.answer_logits(batch), expected, **TOLERANCE)


def test_overlay_refuses_what_commit_refuses() -> None:
    llm = resident("llama", (1,))
    batch = llm.batch(PROMPTS)
    good = random_updates(llm)
    d_in, d_out = llm.shapes[1]
    cases: list[tuple[type[Exception], Updates]] = [
        (UpdateShapeError, good[:2]),
        (
            UpdateShapeError,
            [good[0], LowRankUpdate(torch.ones(1, d_out), torch.ones(1, d_in)), None],
        ),
        (NonFiniteUpdateError, [good[0], good[1].scaled(math.nan) if good[1] else None, None]),
    ]
    for error, updates in cases:
        with pytest.raises(error):
            llm.answer_logits(batch, updates)
    assert_clean(llm.model)


def test_a_model_type_that_is_in_no_table() -> None:
    model = build_random("olmo2")
    expected = own_logits(model, PROMPTS)
    llm = resident("llama", (1, 2), model=model)
    torch.testing.assert_close(llm.answer_logits(llm.batch(PROMPTS)), expected, **TOLERANCE)
