"""The ends of prompts, in the model's own precision and in another, against whole prompts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_env.errors import ModelError, SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident import nudges as nudges_module
from hiedit_env.resident.ends import Ends, WholePrompts
from hiedit_env.resident.nudges import Nudges, answer_losses
from hiedit_env.resident.packed_ends import PackedEnds, Row
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.upper_half import Compared, UpperHalf, cast_all, quick_dtype
from tests.support.models import normal, prompt, random_updates, resident

PROMPTS = [prompt((5, 6, 7, 8, 9), (3, 4)), prompt((2, 9), (6,)), prompt((4, 4, 7), (5, 8, 2))]
POSITIONS = (2, 1, 0)
LAYERS = (0, 2)
ROUGH = torch.bfloat16


def ends(llm: ResidentLLM, dtype: torch.dtype = torch.float32, packed: bool = False) -> Ends:
    return (PackedEnds if packed else Ends)(llm, PROMPTS, POSITIONS, LAYERS, dtype)


def whole(llm: ResidentLLM) -> WholePrompts:
    return WholePrompts(llm, PROMPTS, POSITIONS, LAYERS)


@pytest.mark.parametrize(
    ("model_type", "packed"),
    [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("gemma2", False)],
)
@pytest.mark.parametrize("chosen", [(0, 1, 2), (1,), (2,), (0, 2)])
def test_logits_of_some_prompts_are_those_of_the_whole_prompts(
    model_type: str, packed: bool, chosen: tuple[int, ...]
) -> None:
    llm = resident(model_type)
    wanted = torch.cat([llm.answer_logits(llm.batch([PROMPTS[i]])) for i in chosen])
    found = ends(llm, packed=packed).logits(chosen)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_packed_ends_run_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    seen: list[tuple[int, ...]] = []
    own = UpperHalf.features

    def note(self: UpperHalf, arguments: Any, hidden: Tensor) -> Tensor:
        seen.append(tuple(hidden.shape[:2]))
        return own(self, arguments, hidden)

    monkeypatch.setattr(UpperHalf, "features", note)
    for packed in (True, False):
        ends(llm, packed=packed).logits((0, 2))
    # From position 2 of 6 tokens on, and from position 0 of 5 tokens on.
    assert seen == [(1, 9), (2, 5)]


def test_prompts_that_begin_alike_share_their_beginning() -> None:
    # The third one has the second token of the others at its place, but behind another one.
    some = [
        prompt((5, 6, 7, 8, 9), (3, 4)),
        prompt((5, 6, 7, 8, 2), (6, 1)),
        prompt((2, 6, 4), (3,)),
    ]
    positions = (4, 3, 2)
    row = Row.of(some, positions)
    assert row.ids == (5, 6, 7, 8, 2, 6, 9, 3, 8, 2, 6, 4)
    assert row.order == (0, 1, 2, 3, 0, 1, 4, 5, 3, 4, 5, 2)
    assert row.shared == 6
    assert [own.tolist() for own in row.ahead] == [[0, 1, 2, 3], [0, 1, 2], [4, 5]]
    assert [own.tolist() for own in row.ends] == [[6, 7], [8, 9, 10], [11]]
    llm = resident("llama")
    found = PackedEnds(llm, some, positions, LAYERS, torch.float32)
    for chosen in ((0, 1, 2), (1, 2), (0, 1), (1,)):
        wanted = torch.cat([llm.answer_logits(llm.batch([some[i]])) for i in chosen])
        torch.testing.assert_close(found.logits(chosen), wanted, atol=5e-5, rtol=1e-5)


def test_a_row_that_shares_a_beginning_is_as_long_as_what_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = resident("llama")
    monkeypatch.setattr(nudges_module, "packing_pays", lambda *_: True)
    alike = [prompt((*range(2, 10), token), (3,)) for token in (10, 11, 12, 13)]
    some = [prompt((token, token + 1, *[token] * i), (3,)) for i, token in enumerate((2, 5, 8, 11))]
    Nudges(llm, alike, (8,) * 4, LAYERS)
    state = llm.upper.run_ends[torch.float32, True]
    # Eight tokens once and four ends, and not four times nine.
    assert state.right == 12
    Nudges(llm, some, (1,) * 4, LAYERS)
    assert state.right == sum(p.length for p in some) == 14


def test_the_tokens_of_a_beginning_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    seen: list[tuple[int, ...]] = []
    own = PackedEnds._run

    def note(self: PackedEnds, ids: Tensor, *rest: Any) -> None:
        seen.append(tuple(ids[0].tolist()))
        own(self, ids, *rest)

    monkeypatch.setattr(PackedEnds, "_run", note)
    alike = [prompt((5, 6, 7, token), (3,)) for token in (8, 9, 2)]
    PackedEnds(llm, alike, (3, 3, 3), LAYERS, torch.float32)
    assert seen == [(5, 6, 7, 8, 9, 2)]


def test_a_model_with_a_window_is_not_packed() -> None:
    # Which tokens a window lets through is up to places in the row, not in the prompt.
    with pytest.raises(ModelError, match="drops tokens"):
        ends(resident("gemma2"), packed=True)


def hooks(llm: ResidentLLM) -> list[int]:
    """Numbers of hooks on every module of a model."""
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llm.model.modules()]


@pytest.mark.parametrize("broken", ["Row.mask", "PackedEnds._run", "through"])
def test_a_first_pass_that_fails_leaves_no_hooks(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = resident("llama")
    before = hooks(llm)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(f"hiedit_env.resident.packed_ends.{broken}", fail)
    with pytest.raises(torch.OutOfMemoryError):
        ends(llm, packed=True)
    assert hooks(llm) == before


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_longer_than_all_before_is_compared_again(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = resident("llama")
    monkeypatch.setattr(nudges_module, "packing_pays", lambda *_: packed)
    kind = PackedEnds if packed else Ends
    own = kind.logits

    def windowed(self: Ends, chosen: Any) -> Tensor:
        long = any(p.length > 6 for p in self.prompts)
        return own(self, chosen) * (3.0 if long else 1.0)

    monkeypatch.setattr(kind, "logits", windowed)
    vectors = [torch.zeros(1, llm.shapes[layer][1]) for layer in LAYERS]
    longer = [*PROMPTS[:2], prompt((4, 4, 7, 4, 4, 7, 8), (5, 8, 2))]
    # The short ones are right before and after the long ones, which are run in another way.
    for prompts, kinds in ((PROMPTS, True), (longer, False), (PROMPTS, True), (longer, False)):
        nudges = Nudges(llm, prompts, POSITIONS, LAYERS)
        assert (type(nudges._run) is kind) is kinds
        wanted = Nudges(resident("llama"), prompts, POSITIONS, LAYERS).losses(vectors)
        if not kinds:
            torch.testing.assert_close(nudges.losses(vectors), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
# Of the second block of three alone, and of the last one as well, behind which nothing is left.
@pytest.mark.parametrize("layers", [(0, 1), (1, 3)])
def test_nudges_of_packed_ends_are_those_of_padded_ones(
    model_type: str, layers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for packed in (True, False):
        llm = resident(model_type)
        monkeypatch.setattr(nudges_module, "packing_pays", lambda *_, packed=packed: packed)
        nudges = Nudges(llm, PROMPTS, POSITIONS, layers)
        row = sum(p.length for p in PROMPTS) if packed else max(p.length for p in PROMPTS)
        assert llm.upper.run_ends == {(torch.float32, packed): Compared(row)}
        vectors = [normal(i, 2, llm.shapes[layer][1]) for i, layer in enumerate(layers)]
        vectors = [vector.requires_grad_() for vector in vectors]
        before = (*nudges.keys, nudges.lengths)
        losses = nudges.losses(vectors, (0, 2))
        gradients = torch.autograd.grad((losses * torch.tensor([1.0, 2.0])).sum(), vectors)
        logits = nudges.logits(vectors, (0, 2))
        worst = answer_losses(logits, [PROMPTS[0], PROMPTS[2]])[1]
        found.append((*before, losses, worst, *nudges.keys, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_keys_and_lengths_are_measured_by_both() -> None:
    llm = resident("llama")
    one, other = ends(llm, ROUGH), whole(llm)
    other.measured()
    torch.testing.assert_close(one.lengths, other.lengths, atol=1e-5, rtol=1e-5)
    for mine, own in zip(one.keys, other.keys, strict=True):
        # In the model's own precision, whatever the runs are made in.
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-5)


def test_another_precision_is_nearly_the_same_and_leaves_the_model_alone() -> None:
    llm = resident("llama")
    before = llm.weights_fingerprint()
    wanted = whole(llm).logits((0, 1, 2))
    found = ends(llm, ROUGH).logits((0, 1, 2))
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 0.15
    assert {p.dtype for p in llm.model.parameters()} == {torch.float32}
    assert llm.weights_fingerprint() == before


def after(llm: ResidentLLM) -> Tensor:
    return ends(llm, ROUGH).logits((0, 1, 2))


def test_copies_follow_every_change_of_the_weights() -> None:
    llm = resident("llama")
    unedited = after(llm)
    fork = llm.fork()
    fork.commit(random_updates(fork))
    edited = after(fork)
    assert float((edited - unedited).abs().max()) > 0.05
    # The model again, after a fork was run with the same copies.
    torch.testing.assert_close(after(llm), unedited, atol=0, rtol=0)
    state = llm.commit(random_updates(llm))
    torch.testing.assert_close(after(llm), edited, atol=0.02, rtol=0.02)
    with llm.unedited():
        torch.testing.assert_close(after(llm), unedited, atol=0, rtol=0)
    llm.restore(state)
    torch.testing.assert_close(after(llm), unedited, atol=0, rtol=0)
    # A weight that is no candidate, changed by somebody else.
    with torch.no_grad():
        block = llm.halves.blocks[-1]  # type: ignore[attr-defined]
        block.input_layernorm.weight.mul_(3.0)
    assert float((after(llm) - unedited).abs().max()) > 0.05


def test_copies_are_freed_and_made_anew() -> None:
    llm = resident("llama")
    own, rough = (llm.upper.find(llm, 1, dtype) for dtype in (torch.float32, ROUGH))
    assert own is not None is not rough
    before = after(llm)
    copy = weakref.ref(rough)
    del rough
    assert copy() is not None
    llm.upper.drop_copies()
    gc.collect()
    assert copy() is None
    assert llm.upper.find(llm, 1, torch.float32) is own
    torch.testing.assert_close(after(llm), before, atol=0, rtol=0)


def test_forks_may_run_in_turn_with_the_same_copies() -> None:
    llm = resident("llama")
    fork = llm.fork()
    fork.commit(random_updates(fork))
    one, other = ends(llm, ROUGH), ends(fork, ROUGH)
    mine, its = one.logits((0, 1, 2)), other.logits((0, 1, 2))
    assert float((mine - its).abs().max()) > 0.05
    torch.testing.assert_close(one.logits((0, 1, 2)), mine, atol=0, rtol=0)
    torch.testing.assert_close(mine, after(resident("llama")), atol=0, rtol=0)


def test_gradients_in_another_precision_point_the_same_way() -> None:
    llm = resident("llama")
    found = []
    for dtype in (torch.float32, ROUGH):
        nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS, dtype)
        vectors = [normal(i, 3, llm.shapes[layer][1]) for i, layer in enumerate(LAYERS)]
        vectors = [vector.requires_grad_() for vector in vectors]
        gradients = torch.autograd.grad(nudges.losses(vectors).sum(), vectors)
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99


def test_losses_of_some_rows_are_those_of_all() -> None:
    llm = resident("llama")
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    vectors = [normal(i, 3, llm.shapes[layer][1]) for i, layer in enumerate(LAYERS)]
    wanted, worst = answer_losses(nudges.logits(vectors), PROMPTS)
    some = [vector[[0, 2]] for vector in vectors]
    found = nudges.losses(some, (0, 2))
    torch.testing.assert_close(found, wanted[[0, 2]], atol=1e-5, rtol=1e-5)
    least = answer_losses(nudges.logits(some, (0, 2)), [PROMPTS[0], PROMPTS[2]])[1]
    torch.testing.assert_close(least, worst[[0, 2]], atol=1e-5, rtol=1e-5)
    assert [len(keys) for keys in nudges.keys] == [2, 2]


def test_a_layer_without_a_vector_is_left_as_it_is() -> None:
    llm = resident("llama")
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS)
    vector = normal(0, 3, llm.shapes[0][1])
    zero = torch.zeros(1, llm.shapes[2][1])
    found, wanted = nudges.losses([vector, None]), nudges.losses([vector, zero])
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def test_a_precision_with_other_losses_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    own = Ends.logits

    def wrong(self: Ends, chosen: Any) -> Tensor:
        return own(self, chosen) * (1.0 if self._half.dtype == torch.float32 else 3.0)

    monkeypatch.setattr(Ends, "logits", wrong)
    nudges = Nudges(llm, PROMPTS, POSITIONS, LAYERS, ROUGH)
    packed = nudges_module.packing_pays(Row.of(PROMPTS, POSITIONS))
    assert llm.upper.run_ends[torch.float32, packed].right
    assert not any(one.right for (dtype, _), one in llm.upper.run_ends.items() if dtype == ROUGH)
    assert nudges._run._half.dtype == torch.float32  # type: ignore[attr-defined]


def test_which_precision_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    assert quick_dtype(llm, "own") == torch.float32
    assert quick_dtype(llm, "bfloat16") == torch.bfloat16
    # Tiny models gain nothing.
    assert quick_dtype(llm, "auto") == torch.float32
    monkeypatch.setattr("hiedit_env.resident.upper_half._LARGE", 10)
    for known in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: {"amx_bf16": known})
        assert quick_dtype(llm, "auto") == (torch.bfloat16 if known else torch.float32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    size = sum(p.numel() for p in llm.model.parameters())
    for free, wanted in ((4 * size + 1, torch.bfloat16), (4 * size, torch.float32)):
        monkeypatch.setattr(
            "hiedit_env.resident.upper_half.available_memory", lambda _, free=free: free
        )
        assert quick_dtype(llm, "auto") == wanted
    with pytest.raises(SettingsError, match="own, bfloat16 or auto, got 'float8'"):
        quick_dtype(llm, "float8")


def test_casting_keeps_the_rest_and_the_largest_numbers() -> None:
    ids, mask = torch.arange(3), torch.full((2,), torch.finfo(torch.float32).min)
    found = cast_all({"a": (ids, [mask, None])}, ROUGH)
    assert found["a"][0] is ids
    assert found["a"][1][1] is None
    assert found["a"][1][0].dtype == ROUGH
    assert bool(torch.isfinite(found["a"][1][0]).all())


def test_a_few_prompts_are_compared_with_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    prompts = [prompt((4, 4, 7, *[5] * (i % 5), 8), (5,) * (1 + i % 3)) for i in range(12)]
    # At the beginning, at the end, longest, and with the longest end.
    prompts[5] = prompt((4, 4, 7, *[5] * 9, 8), (5,))
    prompts[7] = prompt((4, 4, 7, 5), (5,) * 9)
    seen: list[list[EncodedPrompt]] = []
    own = WholePrompts.measured

    def note(self: WholePrompts) -> Tensor:
        seen.append(list(self.prompts))
        return own(self)

    monkeypatch.setattr(WholePrompts, "measured", note)
    positions = [2] * 7 + [0] + [2] * 4
    nudges = Nudges(llm, prompts, positions, LAYERS)
    assert isinstance(nudges._run, Ends)
    assert seen == [[prompts[i] for i in (0, 5, 7, 11)]]
    vectors = [normal(i, 12, llm.shapes[layer][1]) for i, layer in enumerate(LAYERS)]
    wanted = whole_of(resident("llama"), prompts, positions, vectors)
    torch.testing.assert_close(nudges.losses(vectors), wanted, atol=1e-4, rtol=1e-4)


def whole_of(
    llm: ResidentLLM,
    prompts: Sequence[EncodedPrompt],
    positions: Sequence[int],
    vectors: Sequence[Tensor],
) -> Tensor:
    """Losses by whole passes, whatever way of running prompts this model allows."""
    llm.upper.run_ends.update(
        {(torch.float32, packed): Compared(wrong=0) for packed in (True, False)}
    )
    nudges = Nudges(llm, prompts, positions, LAYERS)
    assert isinstance(nudges._run, WholePrompts)
    return nudges.losses(vectors)
