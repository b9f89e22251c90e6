"""Untrained layer choices: what they choose, how often, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.rules.layer_choice import (
    CHOICES,
    LayerChoice,
    all_layers,
    fixed_layers,
    gradient_norm,
    make_choice,
    no_layers,
    random_layers,
)
from tests.support.models import fake_capture, prompt

SHAPES = ((2, 3), (3, 2), (2, 3), (4, 4), (2, 3), (3, 2))
CAPTURE = fake_capture(SHAPES, prompt([1, 2, 3], [4, 5]))


def chosen(choice: LayerChoice, capture: Capture = CAPTURE, seed: int = 0) -> list[int]:
    mask = choice(capture, np.random.default_rng(seed))
    assert mask.dtype == np.bool_
    assert mask.ndim == 1
    return np.flatnonzero(mask).tolist()


def test_all_and_none() -> None:
    assert chosen(all_layers(6)) == [0, 1, 2, 3, 4, 5]
    assert chosen(no_layers(6)) == []
    assert no_layers(6)(CAPTURE, np.random.default_rng(0)).shape == (6,)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [0]), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 4, 5]), ([5], [5]), ((4, 0), [0, 4])],
)
def test_fixed(layers: Any, expected: list[int]) -> None:
    choice = fixed_layers(6, layers)
    assert chosen(choice) == expected
    assert chosen(choice, seed=1) == expected


def test_fixed_does_not_follow_a_list_that_changes_later() -> None:
    layers = [1, 2]
    choice = fixed_layers(6, layers)
    layers.append(3)
    mask = choice(CAPTURE, np.random.default_rng(0))
    mask[:] = True  # and a caller who writes into the mask changes no later one
    assert chosen(choice) == [1, 2]


def test_random_has_its_size_and_depends_on_the_generator_alone() -> None:
    choice = random_layers(6, 2)
    assert all(len(chosen(choice, seed=seed)) == 2 for seed in range(50))
    assert chosen(choice, seed=7) == chosen(random_layers(6, 2), seed=7)
    generator = np.random.default_rng(0)
    draws = [tuple(np.flatnonzero(choice(CAPTURE, generator))) for _ in range(3000)]
    # 15 pairs, 200 of each expected; 5 standard deviations are 68.
    counts = {pair: draws.count(pair) for pair in set(draws)}
    assert len(counts) == 15
    assert all(132 < count < 268 for count in counts.values())
    assert chosen(random_layers(6, 6)) == [0, 1, 2, 3, 4, 5]


def test_gradient_norm_by_hand() -> None:
    # One token, unit keys: the norm of a layer is the length of its value gradient.
    lengths = [3.0, 0.5, 4.0, 0.0, 10.0, 4.0]
    keys = tuple(torch.eye(d_in)[:1] for d_in, _ in SHAPES)
    gradients = tuple(
        torch.full((1, d_out), length / d_out**0.5)
        for (_, d_out), length in zip(SHAPES, lengths, strict=True)
    )
    one, no = torch.zeros(1, dtype=torch.int64), torch.tensor([False])
    capture = Capture((prompt([1], [2]),), keys, gradients, 1.0, one, no)
    assert chosen(gradient_norm(6, 1), capture) == [4]
    assert chosen(gradient_norm(6, 3), capture) == [2, 4, 5]
    assert chosen(gradient_norm(6, 5), capture) == [0, 1, 2, 4, 5]
    assert chosen(gradient_norm(6, 3), capture, seed=1) == [2, 4, 5]


def test_gradient_norm_equals_dense_norms() -> None:
    norms = [
        float(np.linalg.norm(u.double().numpy().T @ v.double().numpy()))
        for u, v in zip(CAPTURE.keys, CAPTURE.value_gradients, strict=True)
    ]
    for size in range(1, 7):
        assert chosen(gradient_norm(6, size)) == sorted(np.argsort(norms)[-size:].tolist())


def test_equal_norms_give_the_first_layers() -> None:
    zero = tuple(torch.zeros_like(v) for v in CAPTURE.value_gradients)
    flags = CAPTURE.predictions, CAPTURE.correct
    capture = Capture(CAPTURE.prompts, CAPTURE.keys, zero, 1.0, *flags)
    assert chosen(gradient_norm(6, 2), capture) == [0, 1]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("size", [1, 4, None])
def test_by_name(name: str, size: int | None) -> None:
    expected = {
        "no-edit": no_layers(6),
        "all-layers": all_layers(6),
        "random-layers": random_layers(6, size or 3),  # half where no size is given
        "fixed-layers": fixed_layers(6, size or 3),
        "gradient-norm": gradient_norm(6, size or 3),
    }
    assert set(expected) == set(CHOICES)
    assert chosen(make_choice(name, 6, size), seed=5) == chosen(expected[name], seed=5)


def test_half_of_few_layers_is_at_least_one() -> None:
    assert len(chosen(make_choice("fixed-layers", 1))) == 1
    assert len(chosen(make_choice("fixed-layers", 5))) == 2


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("best-layers", None, "'best-layers'; choose one of no-edit, all-layers"),
        ("random-layers", 0, "from 1 to 6.*got 0"),
        ("random-layers", 7, "from 1 to 6.*got 7"),
        ("fixed-layers", -1, "from 1 to 6"),
        ("gradient-norm", 7, "from 1 to 6.*got 7"),
    ],
)
def test_refused_by_name(name: str, size: int | None, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_choice(name, 6, size)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "from 1 to 6"),
        ([6], "different indices from 0 to 5"),
        ([-1], "different indices from 0 to 5"),
        ([1, 1], "different indices from 0 to 5"),
        ([0, 1, 2, 3, 4, 5, 0], "from 1 to 6"),
    ],
)
def test_refused_fixed_layers(layers: list[int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        fixed_layers(6, layers)
