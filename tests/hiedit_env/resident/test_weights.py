"""Writing weights: exactly what was asked for, exactly where, and an exact way back."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from hiedit_env.errors import NonFiniteUpdateError, UpdateShapeError
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import (
    HIDDEN,
    PROMPTS,
    all_bits,
    build_random,
    random_updates,
    resident,
    weights,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def only(llm: ResidentLLM, index: int, update: LowRankUpdate) -> Updates:
    return [update if i == index else None for i in range(len(llm.layers))]


# -- commit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_commit_changes_the_chosen_layers_only(model_type: str) -> None:
    llm = resident(model_type, (1, 2))
    updates = random_updates(llm)
    updates[0] = updates[2] = None
    before, old = all_bits(llm.model), weights(llm)
    llm.commit(updates)
    changed = {name for name, value in all_bits(llm.model).items() if value != before[name]}
    chosen = [i for i, update in enumerate(updates) if update is not None]
    assert changed == {f"{llm.names[i]}.weight" for i in chosen}
    for i in chosen:
        update = updates[i]
        assert update is not None
        # Independent of matmul's order of summation: in float64, by numpy.
        change = update.left.double().numpy().T @ update.right.double().numpy()
        expected = old[i].double().numpy() + change
        np.testing.assert_allclose(weights(llm)[i].numpy(), expected, rtol=1e-5, atol=1e-6)
        stored = llm.change(i)
        assert stored is not None
        np.testing.assert_allclose(stored.numpy(), change, rtol=1e-5, atol=1e-6)
    assert llm.change(0) is None


@pytest.mark.parametrize("inner", [24, HIDDEN])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_orientation_one_entry_at_a_time_even_when_square(model_type: str, inner: int) -> None:
    size = {"n_inner": inner} if model_type == "gpt2" else {"intermediate_size": inner}
    llm = resident(model_type, (1,), model=build_random(model_type, **size))
    layer = llm.layers[0]
    assert (layer.d_in, layer.d_out) == (HIDDEN, inner)
    left, right = torch.zeros(1, HIDDEN), torch.zeros(1, inner)
    left[0, 3], right[0, 11] = 2.0, 0.25
    expected = layer.module.weight.detach().clone()
    # Input 3 to output 11: Linear stores outputs first, Conv1D inputs first.
    place = (11, 3) if model_type == "llama" else (3, 11)
    expected[place] += 0.5
    output = layer.module(torch.eye(HIDDEN))
    llm.commit(only(llm, 0, LowRankUpdate(left, right)))
    assert torch.equal(layer.module.weight, expected)
    moved = layer.module(torch.eye(HIDDEN)) - output
    assert moved.abs().gt(1e-3).nonzero().tolist() == [[3, 11]]
    assert math.isclose(float(moved[3, 11]), 0.5, rel_tol=1e-5)


def test_commit_takes_factors_with_gradients_and_of_other_float_types() -> None:
    llm = resident("llama", (1,))
    update = LowRankUpdate(
        torch.full((1, 16), 0.5, dtype=torch.float64, requires_grad=True),
        torch.full((1, 24), 0.5, dtype=torch.float64, requires_grad=True),
    )
    old = weights(llm)[0]
    llm.commit(only(llm, 0, update))
    assert torch.equal(weights(llm)[0], old + 0.25)
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())
    assert all(parameter.grad_fn is None for parameter in llm.model.parameters())


def test_rank_zero_and_zero_updates_change_nothing() -> None:
    for dtype in DTYPES:
        model = build_random("llama").to(dtype)
        for parameter in model.parameters():
            parameter.data /= 3  # float64 weights that float32 cannot hold
        llm = resident("llama", (1,), model=model, dtype=dtype)
        before = all_bits(llm.model)
        llm.commit([LowRankUpdate(torch.zeros(0, i), torch.zeros(0, o)) for i, o in llm.shapes])
        llm.commit([LowRankUpdate(torch.zeros(2, i), torch.ones(2, o)) for i, o in llm.shapes])
        llm.commit([None] * len(llm.layers))
        assert all_bits(llm.model) == before, dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_updates_too_small_for_half_precision_add_up(dtype: torch.dtype) -> None:
    model = build_random("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(4.0)
    llm = resident("llama", (1,), model=model, matrices=["mlp.up_proj"], dtype=dtype)
    # 2⁻¹² is less than half of a step at 4 (2⁻⁵ in bfloat16, 2⁻⁸ in float16).
    tiny = LowRankUpdate(torch.full((1, 16), 2.0**-6), torch.full((1, 24), 2.0**-6))
    before = all_bits(model)
    llm.commit([tiny])
    assert all_bits(model) == before
    for _ in range(1023):
        llm.commit([tiny])
    # 1024 · 2⁻¹² = ¼ exactly, also as a sum in float32.
    assert torch.equal(weights(llm)[0], torch.full((16, 24), 4.25, dtype=dtype))
    llm.restore_unedited()
    assert all_bits(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_commits_equal_their_float32_sum(dtype: torch.dtype) -> None:
    llm = resident("gpt2", (1, 2), dtype=dtype)
    base = [w.double() for w in weights(llm)]
    total = [torch.zeros(shape, dtype=torch.float64) for shape in llm.shapes]
    for seed in range(20):
        updates = random_updates(llm, seed, scale=0.05)
        llm.commit(updates)
        for t, update in zip(total, updates, strict=True):
            assert update is not None
            t += update.left.double().mT @ update.right.double()
    for w, b, t in zip(weights(llm), base, total, strict=True):
        step = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(w.double(), b + t, rtol=step, atol=step)


# -- refusals -----------------------------------------------------------------------------------


def bad_updates(llm: ResidentLLM) -> list[tuple[type[Exception], LowRankUpdate]]:
    d_in, d_out = llm.shapes[-1]
    left, right = torch.ones(1, d_in), torch.ones(1, d_out)
    spoiled = left.clone()
    spoiled[0, -1] = math.nan
    return [
        (NonFiniteUpdateError, LowRankUpdate(spoiled, right)),
        (NonFiniteUpdateError, LowRankUpdate(left, right * math.inf)),
        (NonFiniteUpdateError, LowRankUpdate(left * 1e20, right * 1e20)),
        (UpdateShapeError, LowRankUpdate(right, left)),
        (UpdateShapeError, LowRankUpdate(left, torch.ones(2, d_out))),
        (UpdateShapeError, LowRankUpdate(left[0], right[0])),
    ]


@pytest.mark.parametrize("edited", [False, True])
def test_refused_updates_write_nothing(edited: bool) -> None:
    llm = resident("llama", (1, 2))
    if edited:
        llm.commit(random_updates(llm, 1))
    before, print_before, snapshot = all_bits(llm.model), llm.weights_fingerprint(), llm.snapshot()
    for error, bad in bad_updates(llm):
        updates = random_updates(llm, 2)  # good ones in front of the bad one
        updates[-1] = bad
        with pytest.raises(error, match=r"layers\.2\.mlp\.down_proj"):
            llm.commit(updates)
        assert all_bits(llm.model) == before
    with pytest.raises(UpdateShapeError):
        llm.commit(random_updates(llm, 2)[:-1])
    assert all_bits(llm.model) == before
    assert llm.weights_fingerprint() == print_before
    assert all(llm.change(i) is None for i in range(len(llm.layers))) is not edited
    llm.restore(snapshot)
    assert all_bits(llm.model) == before


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 4, 6])
def test_a_commit_that_fails_on_the_way_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, fails_at: int, error: type[BaseException], edited: bool
) -> None:
    llm = resident("llama", (1, 2))
    if edited:
        llm.commit(random_updates(llm, 1))
    before, snapshot, write = all_bits(llm.model), llm.snapshot(), llm._write
    calls: list[int] = []

    def failing(index: int) -> None:
        calls.append(index)
        write(index)
        if len(calls) == fails_at:
            raise error

    monkeypatch.setattr(llm, "_write", failing)
    with pytest.raises(error):
        llm.commit(random_updates(llm, 2))
    assert all_bits(llm.model) == before
    assert all(llm.snapshot().changes[i] is change for i, change in snapshot.changes.items())


def test_beyond_the_range_of_float16_is_refused_for_float16_weights() -> None:
    half, single = resident("llama", (1,), dtype=torch.float16), resident("llama", (1,))
    before = all_bits(half.model)
    for value, fits in ((2e4, True), (7e4, False)):
        left, right = (torch.zeros(1, size) for size in half.shapes[0])
        left[0, 0], right[0, 0] = 1.0, value
        update = LowRankUpdate(left, right)
        single.commit(only(single, 0, update))
        if fits:
            half.commit(only(half, 0, update))
            half.restore_unedited()
        else:
            with pytest.raises(NonFiniteUpdateError):
                half.commit(only(half, 0, update))
        assert all_bits(half.model) == before


# -- the way back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_restore_is_bit_exact_after_many_commits(model_type: str, dtype: torch.dtype) -> None:
    llm = resident(model_type, (1, 2), dtype=dtype)
    states = [(llm.snapshot(), all_bits(llm.model))]
    for seed in range(12):
        updates = random_updates(llm, seed, scale=0.1)
        updates[seed % len(updates)] = None
        llm.commit(updates)
        states.append((llm.snapshot(), all_bits(llm.model)))
    assert len({tuple(bits.items()) for _, bits in states}) == 13
    # Back, forward and back again, with commits in between.
    for place in (5, 12, 0, 7, 7, 1):
        llm.restore(states[place][0])
        assert all_bits(llm.model) == states[place][1]
        llm.commit(random_updates(llm, 99))
    llm.restore_unedited()
    assert all_bits(llm.model) == states[0][1]
    assert all(llm.change(i) is None for i in range(len(llm.layers)))
    llm.restore(states[12][0])
    assert all_bits(llm.model) == states[12][1]


def test_commit_gives_back_the_state_before_it() -> None:
    llm = resident("llama", (1, 2))
    llm.commit(random_updates(llm, 1))
    before = all_bits(llm.model)
    updates = random_updates(llm, 2)
    updates[1] = None
    undo = llm.commit(updates)
    assert set(undo.changes) == {0, 2, 3, 4, 5}
    assert all_bits(llm.model) != before
    llm.restore(undo)
    assert all_bits(llm.model) == before


def test_a_partial_snapshot_restores_its_layers_only() -> None:
    llm = resident("llama", (1, 2))
    old = weights(llm)
    part = llm.snapshot([1, 4])
    llm.commit(random_updates(llm))
    new = weights(llm)
    llm.restore(part)
    for i, weight in enumerate(weights(llm)):
        assert torch.equal(weight, old[i] if i in (1, 4) else new[i])


def test_same_commits_after_restore_give_the_same_bits() -> None:
    llm = resident("llama", (1, 2))
    llm.commit(random_updates(llm, 1))
    snapshot = llm.snapshot()
    ends = []
    for _ in range(2):
        for seed in (2, 3):
            llm.commit(random_updates(llm, seed))
        ends.append(all_bits(llm.model))
        llm.restore(snapshot)
    assert ends[0] == ends[1]


# -- unedited -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unedited_shows_the_unedited_model_and_switches_back(dtype: torch.dtype) -> None:
    llm = resident("llama", (1, 2), dtype=dtype)
    batch = llm.batch(PROMPTS)
    logits, bits = llm.answer_logits(batch), all_bits(llm.model)
    with llm.unedited():
        assert torch.equal(llm.answer_logits(batch), logits)
    updates = random_updates(llm)
    updates[0] = None
    llm.commit(updates)
    edited_logits, edited = llm.answer_logits(batch), all_bits(llm.model)
    assert not torch.allclose(edited_logits, logits, atol=0.1)
    with llm.unedited():
        assert all_bits(llm.model) == bits
        assert torch.equal(llm.answer_logits(batch), logits)
        with llm.unedited():
            assert all_bits(llm.model) == bits
        assert all_bits(llm.model) == bits
    assert all_bits(llm.model) == edited
    assert torch.equal(llm.answer_logits(batch), edited_logits)
    with pytest.raises(RuntimeError, match="inside"), llm.unedited():
        raise RuntimeError("inside")
    assert all_bits(llm.model) == edited
    # What is written afterwards goes to the right place.
    llm.commit(random_updates(llm, 5))
    llm.restore_unedited()
    assert all_bits(llm.model) == bits
    with llm.unedited():
        assert all_bits(llm.model) == bits


# -- fingerprint --------------------------------------------------------------------------------


def flip(weight: Tensor, place: tuple[int, int], bit: int) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    lowest = -(2 ** (8 * weight.element_size() - 1))
    weight.detach().view(integer)[place] ^= lowest if bit == -1 else 2**bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_sees_every_single_bit(dtype: torch.dtype) -> None:
    llm = resident("gpt2", (1, 2), dtype=dtype)
    first = llm.weights_fingerprint()
    assert len(first) == 16
    int(first, 16)
    assert llm.weights_fingerprint() == first
    seen = {first}
    for layer in llm.layers:
        for bit in (0, 1, 7, 14, -1):
            for place in ((0, 0), (5, 9), (layer.d_in - 1, layer.d_out - 1)):
                flip(layer.module.weight, place, bit)
                seen.add(llm.weights_fingerprint())
                flip(layer.module.weight, place, bit)
                assert llm.weights_fingerprint() == first
    assert len(seen) == 1 + len(llm.layers) * 5 * 3


def test_fingerprint_is_of_the_weights_and_not_of_their_history() -> None:
    llm, twin = resident("llama", (1, 2)), resident("llama", (1, 2))
    start = llm.weights_fingerprint()
    assert twin.weights_fingerprint() == start
    other = resident("llama", (1, 2), model=build_random("llama", seed=1))
    assert other.weights_fingerprint() != start
    llm.commit(random_updates(llm, 1))
    after_one = llm.weights_fingerprint()
    snapshot = llm.snapshot()
    llm.commit(random_updates(llm, 2))
    assert len({start, after_one, llm.weights_fingerprint()}) == 3
    llm.restore(snapshot)
    assert llm.weights_fingerprint() == after_one
    twin.commit(random_updates(twin, 1))
    assert twin.weights_fingerprint() == after_one
    llm.restore_unedited()
    assert llm.weights_fingerprint() == start


def test_fingerprint_tells_layers_and_places_apart() -> None:
    model = build_random("llama", intermediate_size=HIDDEN)
    llm = resident("llama", (1,), model=model, matrices=["mlp.gate_proj", "mlp.up_proj"])
    first = llm.weights_fingerprint()
    gate, up = (layer.module.weight for layer in llm.layers)
    with torch.no_grad():
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)
        assert llm.weights_fingerprint() != first  # layers exchanged
        up.copy_(gate)
        gate.copy_(kept)
        up.copy_(up.mT.clone())
        assert llm.weights_fingerprint() != first  # transposed


def test_fingerprint_inside_unedited() -> None:
    llm = resident("llama", (1, 2))
    start = llm.weights_fingerprint()
    llm.commit(random_updates(llm))
    with llm.unedited():
        assert llm.weights_fingerprint() == start
    edited = llm.weights_fingerprint()
    assert edited != start
    twin = resident("llama", (1, 2))
    twin.commit(random_updates(twin))
    assert edited == twin.weights_fingerprint()


def test_base_norm_is_that_of_the_unedited_weight() -> None:
    llm = resident("llama", (1,))
    expected = [float(np.linalg.norm(w.double().numpy())) for w in weights(llm)]
    llm.commit(random_updates(llm))
    for i, norm in enumerate(expected):
        assert math.isclose(llm.base_norm(i), norm, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_weight_taken_apart_has_the_same_bits(dtype: torch.dtype) -> None:
    def own(llm: ResidentLLM) -> list[Tensor]:
        return [cast(Tensor, layer.module.weight).detach().clone() for layer in llm.layers]

    llm = resident("llama", (1, 2), dtype=dtype)
    base, fingerprint = own(llm), llm.weights_fingerprint()
    llm.commit(random_updates(llm))
    edited, change = own(llm), llm.snapshot()
    llm.rebase([w + 1 for w in base])
    assert all(torch.equal(w, b + 1) for w, b in zip(own(llm), base, strict=True))
    assert llm.change(0) is None
    llm.rebase(base)
    assert llm.weights_fingerprint() == fingerprint
    llm.restore(change)
    assert all(torch.equal(w, e) for w, e in zip(own(llm), edited, strict=True))
    with llm.unedited():
        assert llm.weights_fingerprint() == fingerprint
    with pytest.raises(UpdateShapeError, match="unedited weight of"):
        llm.rebase([w[:1] for w in base])
    assert all(torch.equal(w, e) for w, e in zip(own(llm), edited, strict=True))


def test_only_layers_that_are_written_have_a_second_copy() -> None:
    llm = resident("llama", (1, 2))
    before = weights(llm)
    assert not llm._kept
    held = [llm.unedited_weight(i) for i in range(len(llm.layers))]
    own = [tensor.clone() for tensor in held]
    updates = random_updates(llm)
    llm.commit(only(llm, 1, cast(LowRankUpdate, updates[1])))
    assert set(llm._kept) == {1}
    with llm.unedited():
        assert all(torch.equal(w, b) for w, b in zip(weights(llm), before, strict=True))
    assert all(torch.equal(h, o) for h, o in zip(held, own, strict=True))
    assert llm.base_norm(0) == pytest.approx(float(before[0].norm()))
    assert llm.base_norm(1) == pytest.approx(float(before[1].norm()))
    llm.restore_unedited()
    assert all(torch.equal(w, b) for w, b in zip(weights(llm), before, strict=True))
