"""The observation: its size and bounds, and every feature by hand or by a dense computation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.envs.observations import (
    GLOBAL_FEATURES,
    LAYER_FEATURES,
    PROJECTIONS,
    Observer,
    View,
)
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import (
    PROMPTS,
    build_random,
    fake_capture,
    prompt,
    random_updates,
    resident,
    weights,
)

KEY, GRADIENT, SHARE, CHANGE, CONFLICT, WRITTEN = range(6)
PROJECTED_KEY, PROJECTED_GRADIENT = slice(6, 14), slice(14, 22)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def llm(request: pytest.FixtureRequest) -> ResidentLLM:
    return resident(request.param, (1, 2))


@pytest.fixture(autouse=True)
def unedited(request: pytest.FixtureRequest) -> None:
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").restore_unedited()


def seen(
    observer: Observer,
    capture: Capture,
    written: NDArray[np.float32],
    steps: float,
    stream: float,
) -> NDArray[np.float32]:
    """One observation."""
    found: NDArray[np.float32] = observer.batch(
        [View(observer.llm, capture, written, steps, stream)]
    )[0].numpy()
    return found


def observe(
    llm: ResidentLLM,
    capture: Capture,
    written: Any = 0.0,
    steps: float = 0.0,
    stream: float = 0.0,
    seed: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """L × 22 features of the layers and the 5 of the fact."""
    shares = np.broadcast_to(np.asarray(written, np.float32), len(llm.layers)).copy()
    vector = seen(Observer(llm, seed), capture, shares, steps, stream)
    table = vector[:-GLOBAL_FEATURES].reshape(len(llm.layers), LAYER_FEATURES)
    return table, vector[-GLOBAL_FEATURES:]


def gradient(capture: Capture, layer: int) -> NDArray[np.float64]:
    """The dense gradient of one layer, d_in × d_out."""
    u, v = capture.keys[layer].double().numpy(), capture.value_gradients[layer].double().numpy()
    return u.T @ v


def with_rows(capture: Capture, layer: int, keys: Tensor, gradients: Tensor) -> Capture:
    """The same capture with other rows in one layer."""
    new_keys, new_gradients = list(capture.keys), list(capture.value_gradients)
    new_keys[layer], new_gradients[layer] = keys, gradients
    return dataclasses.replace(capture, keys=tuple(new_keys), value_gradients=tuple(new_gradients))


def test_size_type_and_bounds(llm: ResidentLLM) -> None:
    assert (LAYER_FEATURES, GLOBAL_FEATURES) == (22, 5)
    observer = Observer(llm)
    assert observer.size == 22 * len(llm.layers) + 5
    llm.commit(random_updates(llm))
    for capture in (llm.read(PROMPTS[2]).capture(), fake_capture(llm.shapes, PROMPTS[0])):
        vector = seen(observer, capture, np.full(len(llm.layers), 0.5, np.float32), 0.25, 1.0)
        assert (vector.shape, vector.dtype) == ((observer.size,), np.float32)
        assert np.isfinite(vector).all()
        assert np.abs(vector).max() <= 1
        # Most features say something.
        assert np.mean(vector == 0) < 0.1
        assert np.mean(np.abs(vector) == 1) < 0.1


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15, math.inf, math.nan])
def test_finite_and_bounded_whatever_the_capture(llm: ResidentLLM, size: float) -> None:
    llm.commit(random_updates(llm))
    capture = fake_capture(llm.shapes, PROMPTS[2])
    keys = tuple(torch.full_like(u, size) for u in capture.keys)
    gradients = tuple(torch.full_like(v, size) for v in capture.value_gradients)
    extreme = dataclasses.replace(capture, keys=keys, value_gradients=gradients, loss=size)
    table, last = observe(llm, extreme, 1.0, 1.0, 1.0)
    for part in (table, last):
        assert np.isfinite(part).all()
        assert np.abs(part).max() <= 1


def test_root_mean_squares_by_hand(llm: ResidentLLM) -> None:
    capture = fake_capture(llm.shapes, PROMPTS[2])
    d_in, d_out = llm.shapes[1]
    # All entries ±100: rms 10². All entries ±10⁻⁶.
    keys = torch.full((8, d_in), 100.0)
    keys[::2] *= -1
    table, _ = observe(llm, with_rows(capture, 1, keys, torch.full((8, d_out), -1e-6)))
    assert table[1, KEY] == pytest.approx(2 / 6, rel=1e-5)
    assert table[1, GRADIENT] == pytest.approx(-6 / 12, rel=1e-5)
    # The other layers by numpy.
    for i in (0, 2, 3):
        u, v = (rows[i].double().numpy() for rows in (capture.keys, capture.value_gradients))
        assert table[i, KEY] == pytest.approx(math.log10(np.sqrt((u**2).mean())) / 6, abs=1e-5)
        wanted = math.log10(np.sqrt((v**2).mean())) / 12
        assert table[i, GRADIENT] == pytest.approx(wanted, abs=1e-5)


def test_share_of_the_gradient_norms(llm: ResidentLLM) -> None:
    capture = llm.read(PROMPTS[2]).capture()
    norms = np.array([np.linalg.norm(gradient(capture, i)) for i in range(len(llm.layers))])
    table, _ = observe(llm, capture)
    np.testing.assert_allclose(table[:, SHARE], norms / norms.sum(), rtol=1e-4)
    assert table[:, SHARE].sum() == pytest.approx(1, rel=1e-5)


def test_change_and_conflict_equal_the_dense_computation(llm: ResidentLLM) -> None:
    before = [w.double().numpy() for w in weights(llm)]
    capture = llm.read(PROMPTS[2]).capture()
    table, _ = observe(llm, capture)
    assert not table[:, [CHANGE, CONFLICT]].any()  # nothing was edited yet
    for seed in (1, 2):
        updates = random_updates(llm, seed, scale=0.1)
        updates[1] = None
        llm.commit(updates)
    capture = llm.read(PROMPTS[2]).capture()
    table, _ = observe(llm, capture)
    for i, (new, old) in enumerate(zip(weights(llm), before, strict=True)):
        change, g = new.double().numpy() - old, gradient(capture, i)
        size = np.linalg.norm(change)
        assert table[i, CHANGE] == pytest.approx(size / np.linalg.norm(old), rel=1e-4)
        cosine = (change * g).sum() / max(size * np.linalg.norm(g), 1e-12)
        assert table[i, CONFLICT] == pytest.approx(cosine, abs=1e-4)
    assert table[1, CHANGE] == table[1, CONFLICT] == 0
    assert np.abs(table[[0, 2, 3], CONFLICT]).max() > 0.01


def test_sign_of_the_conflict_and_bound_of_the_change(llm: ResidentLLM) -> None:
    capture = fake_capture(llm.shapes, PROMPTS[2])
    u, v = capture.keys[0], capture.value_gradients[0]
    none: list[LowRankUpdate | None] = [None] * (len(llm.layers) - 1)
    # An earlier edit that went up this fact's gradient: descending on the fact undoes it.
    llm.commit([LowRankUpdate(u, v), *none])
    assert observe(llm, capture)[0][0, CONFLICT] == pytest.approx(1, abs=1e-4)
    # One that went down: descending goes on with it.
    llm.commit([LowRankUpdate(u, -3 * v), *none])
    assert observe(llm, capture)[0][0, CONFLICT] == pytest.approx(-1, abs=1e-4)
    llm.commit([LowRankUpdate(u * 1e4, v), *none])
    assert observe(llm, capture)[0][0, CHANGE] == 1


def test_change_is_relative_to_the_unedited_weight_by_hand() -> None:
    model = build_random("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(2.0)
    llm = resident("llama", (1,), model=model, matrices=["mlp.up_proj"])
    for expected in (0.25, 0.5, 0.75):  # + ½ to every entry of 2 each time
        llm.commit([LowRankUpdate(torch.full((1, 16), 0.5), torch.ones(1, 24))])
        table, _ = observe(llm, fake_capture(llm.shapes, PROMPTS[0]))
        assert table[0, CHANGE] == pytest.approx(expected, rel=1e-5)


def test_written_share_and_the_features_of_the_fact(llm: ResidentLLM) -> None:
    shares = np.linspace(0, 1, len(llm.layers)).astype(np.float32)
    capture = fake_capture(llm.shapes, PROMPTS[2])
    capture = dataclasses.replace(capture, loss=2.5, correct=torch.tensor([True, False, True]))
    table, last = observe(llm, capture, shares, 0.125, 0.75)
    np.testing.assert_array_equal(table[:, WRITTEN], shares)
    np.testing.assert_allclose(last, [0.25, 2 / 3, 0, 0.125, 0.75], rtol=1e-6)
    done = dataclasses.replace(capture, loss=31.0, correct=torch.tensor([True, True, True]))
    _, last = observe(llm, done, shares, 1.0, 0.0)
    np.testing.assert_allclose(last, [1, 1, 1, 1, 0], rtol=1e-6)


def test_projections_are_linear_maps_of_the_mean_direction(llm: ResidentLLM) -> None:
    capture = fake_capture(llm.shapes, PROMPTS[2])
    d_in, d_out = llm.shapes[0]

    def signs(size: int, side: int) -> NDArray[np.float64]:
        """The map itself, read off from directions along the axes."""
        found = []
        for axis in range(size):
            rows = [torch.zeros(8, d_in), torch.zeros(8, d_out)]
            rows[side][3, axis] = 5.0  # only the direction of the mean counts
            table, _ = observe(llm, with_rows(capture, 0, *rows))
            found.append(table[0, (PROJECTED_KEY, PROJECTED_GRADIENT)[side]])
        return np.array(found, np.float64) * 3

    table, _ = observe(llm, capture)
    for side, part, rows in (
        (0, PROJECTED_KEY, capture.keys[0]),
        (1, PROJECTED_GRADIENT, capture.value_gradients[0]),
    ):
        found = signs(rows.shape[1], side)
        np.testing.assert_allclose(np.abs(found), 1, rtol=1e-5)
        assert 0.2 < (found > 0).mean() < 0.8
        assert len({tuple(column) for column in np.sign(found).T}) == PROJECTIONS
        mean = rows.double().numpy().mean(0)
        wanted = mean / np.linalg.norm(mean) @ found / 3
        np.testing.assert_allclose(table[0, part], np.clip(wanted, -1, 1), atol=1e-5)


def test_depends_on_nothing_but_its_arguments_and_the_seed() -> None:
    first, second = resident("llama", (1, 2)), resident("llama", (1, 2))
    for model in (first, second):
        model.commit(random_updates(model))
    request = prompt([1, 5, 9, 4], [7, 3])
    shares = np.linspace(0, 1, 6).astype(np.float32)
    kept = shares.copy()
    observer = Observer(first, 3)
    capture = first.read(request).capture()
    torch.manual_seed(1)
    one = seen(observer, capture, shares, 0.5, 0.25)
    torch.manual_seed(2)
    assert np.array_equal(seen(observer, capture, shares, 0.5, 0.25), one)
    again = seen(Observer(second, 3), second.read(request).capture(), shares, 0.5, 0.25)
    assert np.array_equal(again, one)
    np.testing.assert_array_equal(shares, kept)
    other = seen(Observer(first, 4), capture, shares, 0.5, 0.25)
    # Another seed projects differently and changes nothing else.
    differs = (other != one)[:-GLOBAL_FEATURES].reshape(6, LAYER_FEATURES)
    assert not differs[:, :6].any()
    assert differs[:, 6:].mean() > 0.9
    assert np.array_equal(other[-GLOBAL_FEATURES:], one[-GLOBAL_FEATURES:])
