"""Second moments that are kept small: their error, against the dense moment."""

from __future__ import annotations

import pytest
import torch

from hiedit_agents.hierarchy.key_moments import RANK, inverses, key_moments
from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from tests.support.models import prompt, resident


def dense(captures: list[Capture], layer: int) -> torch.Tensor:
    rows = torch.cat([capture.keys[layer] for capture in captures]).double()
    return rows.mT @ rows


def test_inverses_of_small_layers_are_those_of_the_dense_moments() -> None:
    llm = resident("llama")
    captures = [llm.read(prompt((5, 6, i, 8, 9), (3, 4))).capture() for i in range(4, 20)]
    moments = key_moments(captures, llm.shapes, llm.device)
    found = inverses(moments, len(llm.shapes), 0.1, llm.device)
    for layer, inverse in enumerate(found):
        whole = dense(captures, layer)
        ridge = 0.1 * whole.diagonal().mean() * torch.eye(len(whole))
        # Fewer dimensions than RANK, so only half precision is lost.
        torch.testing.assert_close(
            inverse.double() @ (whole + ridge), torch.eye(len(whole)).double(), atol=5e-2, rtol=0
        )


def test_a_large_moment_keeps_its_diagonal_and_its_leading_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = torch.arange(1, 301).float() ** -1
    rows = torch.randn(2000, 300, generator=generator) * scales
    # One layer of 300 inputs; gradients do not matter here.
    capture = FakeCapture(rows)
    moments = key_moments([capture], [(300, 4)], torch.device("cpu"))  # type: ignore[list-item]
    leading, rest = moments["leading.0"].float(), moments["diagonal.0"].float()
    assert leading.shape == (RANK, 300)
    kept = (leading.mT @ leading + rest.diag()) * moments["total.0"]
    whole = rows.mT @ rows
    torch.testing.assert_close(kept.diagonal(), whole.diagonal(), rtol=5e-3, atol=1e-2)
    # Without the first 128 directions only this much would be left of the whole (Eckart, Young).
    left = torch.linalg.eigvalsh(whole)[: 300 - RANK].norm()
    assert (kept - whole).norm() < 1.1 * left + 2e-3 * whole.norm()


class FakeCapture:
    """What the moments read of a capture."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.keys, self.value_gradients = (rows,), (torch.ones(len(rows), 4),)


def test_nothing_to_take_moments_of_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least one prompt"):
        key_moments([], [(4, 4)], torch.device("cpu"))


def test_a_layer_that_was_given_zeros_has_a_finite_inverse() -> None:
    capture = FakeCapture(torch.zeros(3, 8))
    moments = key_moments([capture], [(8, 4)], torch.device("cpu"))  # type: ignore[list-item]
    assert all(torch.isfinite(value).all() for value in moments.values())
