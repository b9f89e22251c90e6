"""Low-rank updates: the arithmetic by hand, and everything that must be refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hiedit_env.errors import HieditError, NonFiniteUpdateError, UpdateShapeError
from hiedit_env.resident.low_rank import LowRankUpdate, check_updates
from tests.support.models import normal

SHAPES = ((2, 3), (3, 1))
NAMES = ("first", "second")
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT16_MAX = 65504.0


def by_hand() -> LowRankUpdate:
    # leftᵀ right = [1 2]ᵀ [1 0 -1] + [0 3]ᵀ [2 1 0].
    return LowRankUpdate(
        torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]])
    )


def check(*updates: LowRankUpdate | None, largest: float = FLOAT32_MAX) -> None:
    check_updates(updates, SHAPES, NAMES, torch.device("cpu"), largest)


def test_dense_by_hand() -> None:
    assert by_hand().dense().tolist() == [[1, 0, -1], [8, 3, -2]]


def test_apply_by_hand_and_as_the_dense_change() -> None:
    # [1 -1] · dense = [1 0 -1] - [8 3 -2].
    assert by_hand().apply(torch.tensor([1.0, -1.0])).tolist() == [-7, -3, 1]
    inputs = normal(0, 4, 5, 2)
    torch.testing.assert_close(by_hand().apply(inputs), inputs @ by_hand().dense())


def test_apply_keeps_the_dtype_of_the_inputs() -> None:
    assert by_hand().apply(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert by_hand().apply(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_squared_norm_by_hand_and_its_gradient() -> None:
    assert by_hand().squared_norm().item() == 1 + 1 + 64 + 9 + 4
    left = normal(1, 3, 4, dtype=torch.float64).requires_grad_()
    right = normal(2, 3, 5, dtype=torch.float64).requires_grad_()
    LowRankUpdate(left, right).squared_norm().backward()
    # d‖LᵀR‖² / dL = 2 R (LᵀR)ᵀ and / dR = 2 L (LᵀR).
    dense = (left.mT @ right).detach()
    torch.testing.assert_close(left.grad, 2 * right.detach() @ dense.mT)
    torch.testing.assert_close(right.grad, 2 * left.detach() @ dense)


def test_scaled_changes_the_change_alone() -> None:
    update = by_hand()
    assert update.scaled(-0.5).dense().tolist() == [[-0.5, 0, 0.5], [-4, -1.5, 1]]
    assert update.dense().tolist() == [[1, 0, -1], [8, 3, -2]]


def test_detach_cuts_the_graph() -> None:
    left = torch.ones(1, 2, requires_grad=True)
    update = LowRankUpdate(left * 2, torch.ones(1, 3))
    assert update.dense().requires_grad
    assert not update.detach().dense().requires_grad
    assert torch.equal(update.detach().dense(), update.dense())


def test_what_fits_is_accepted() -> None:
    check(by_hand(), LowRankUpdate(torch.ones(4, 3), torch.ones(4, 1)))
    check(None, None)
    check(by_hand(), None)
    check(LowRankUpdate(torch.zeros(0, 2), torch.zeros(0, 3)), None)  # rank 0 changes nothing
    check(LowRankUpdate(torch.zeros(1, 2), torch.full((1, 3), 1e38)), None)  # 0 times a lot


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.ones(1, 3), torch.ones(1, 2)),  # the two sides exchanged
        (torch.ones(2, 2), torch.ones(1, 3)),  # ranks differ
        (torch.ones(1, 2), torch.ones(1, 4)),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(1, 1, 2), torch.ones(1, 1, 3)),
        (torch.ones(2, 1), torch.ones(3, 1)),  # transposed factors
    ],
)
def test_wrong_shapes(left: Tensor, right: Tensor) -> None:
    message = rf"first has left \({left.shape[0]},.*expected \(r, 2\) and \(r, 3\)"
    with pytest.raises(UpdateShapeError, match=message):
        check(LowRankUpdate(left, right), None)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_updates(count: int) -> None:
    with pytest.raises(UpdateShapeError, match=f"got {count} updates for 2 candidate layers"):
        check(*[None] * count)


ONES = (torch.ones(1, 2), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (1, "first must be a LowRankUpdate or None, got 1"),
        (ONES, "first must be a LowRankUpdate or None"),
        (LowRankUpdate(ONES[0].numpy(), ONES[1].numpy()), "first .*two tensors.*ndarray"),  # type: ignore[arg-type]
        (LowRankUpdate(ONES[0].int(), ONES[1].int()), "first .*int32.*same float type"),
        (LowRankUpdate(ONES[0].bool(), ONES[1]), "first .*bool.*same float type"),
        (LowRankUpdate(ONES[0].cfloat(), ONES[1].cfloat()), "first .*complex64.*float type"),
        (LowRankUpdate(ONES[0], ONES[1].double()), "first .*float32 and .*float64.*same"),
        (LowRankUpdate(ONES[0], ONES[1].to("meta")), "first .*cpu and meta.*layer is on cpu"),
        (LowRankUpdate(ONES[0].to("meta"), ONES[1].to("meta")), "first .*meta and meta.*on cpu"),
    ],
)
def test_what_is_no_update_is_named(update: Any, message: str) -> None:
    with pytest.raises(UpdateShapeError, match=message):
        check(update, None)


@pytest.mark.parametrize("updates", [7, None, iter([None, None]), torch.zeros(2)])
def test_what_is_no_list_of_updates_is_named(updates: Any) -> None:
    with pytest.raises(UpdateShapeError, match="must be a list of one LowRankUpdate or None"):
        check_updates(updates, SHAPES, NAMES, torch.device("cpu"), FLOAT32_MAX)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("other", [1.0, 0.0])
def test_non_finite_factors(value: float, side: str, other: float) -> None:
    left, right = torch.full((2, 3), other), torch.full((2, 1), other)
    (left if side == "left" else right)[1, 0] = value
    with pytest.raises(NonFiniteUpdateError, match=r"update of second.*nothing was written"):
        check(by_hand(), LowRankUpdate(left, right))


def test_overflow_by_the_product_alone() -> None:
    # Each factor is finite in float32, their product of 1e40 is not.
    with pytest.raises(NonFiniteUpdateError, match=r"first.*e\+40.*smaller step size"):
        check(LowRankUpdate(torch.full((1, 2), 1e20), torch.full((1, 3), -1e20)), None)


def test_numbers_whose_squares_float32_cannot_hold() -> None:
    # The squares would be infinite and 0; the norms are at most 1e30 · √2 and 1e-24 · √2.
    huge, tiny = torch.tensor([[1e30, 0.0]]), torch.tensor([[1e-24, 0.0]])
    small = torch.tensor([[2e-10, 0.0, 0.0]])
    check(LowRankUpdate(huge, small), None)
    with pytest.raises(NonFiniteUpdateError, match=r"entries up to 2\.82843e\+20"):
        check(LowRankUpdate(huge, small), None, largest=FLOAT16_MAX)
    # √2 · √3 · 1e6.
    with pytest.raises(NonFiniteUpdateError, match=r"entries up to 2\.44949e\+06"):
        check(LowRankUpdate(tiny, torch.tensor([[1e30, 0, 0]])), None, largest=FLOAT16_MAX)


def test_what_float32_cannot_hold_is_refused() -> None:
    # It is written in float32, where the left factor would be infinite.
    left, right = (torch.full((1, n), x, dtype=torch.float64) for n, x in ((2, 1e40), (3, 1e-40)))
    with pytest.raises(NonFiniteUpdateError, match="first"):
        check(LowRankUpdate(left, right), None)


def test_norms_need_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices (MPS) have none."""
    monkeypatch.setattr(torch, "float64", None)
    monkeypatch.setattr(Tensor, "double", lambda self: 1 / 0)
    check(by_hand(), None)


def test_overflow_by_the_sum_over_the_rank() -> None:
    # 40 products of 1000 make 40,000, more than half of what float16 can hold.
    update = LowRankUpdate(torch.full((40, 2), 1000.0), torch.ones(40, 3))
    check(update, None)
    with pytest.raises(NonFiniteUpdateError, match="first"):
        check(update, None, largest=FLOAT16_MAX)


def test_float16_range_is_that_of_the_weights() -> None:
    for size, fits in ((3e4, True), (7e4, False)):
        update = LowRankUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[size, 0.0, 0.0]]))
        check(update, None)
        if fits:
            check(update, None, largest=FLOAT16_MAX)
        else:
            with pytest.raises(NonFiniteUpdateError):
                check(update, None, largest=FLOAT16_MAX)


def test_errors_are_caught_as_value_errors_too() -> None:
    with pytest.raises(HieditError):
        check(None)
    with pytest.raises(ValueError, match="one per layer"):
        check(None)
