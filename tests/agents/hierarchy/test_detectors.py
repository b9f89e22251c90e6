"""The score of least variance that tells one token's reading from all others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy.detectors import Readings, inputs
from tests.support.models import PROMPTS, resident


def rows(count: int = 400, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing + 2.0


def least_variance(covariance: Tensor, key: Tensor, mean: Tensor, at_mean: float) -> Tensor:
    """Of all w with w · key = 1 and w · mean given, the one of least wᵀ C w: Lagrange's system."""
    size = len(key)
    system = torch.zeros(size + 2, size + 2, dtype=torch.float64)
    system[:size, :size] = covariance
    system[:size, size], system[size, :size] = key, key
    system[:size, size + 1], system[size + 1, :size] = mean, mean
    right = torch.zeros(size + 2, dtype=torch.float64)
    right[size], right[size + 1] = 1, at_mean
    return torch.linalg.solve(system, right)[:size].float()


def test_score_and_constant_are_those_of_least_variance_by_a_dense_solve() -> None:
    x = rows()
    mean, covariance = x.mean(0), torch.cov(x.mT)
    known, key = Readings(mean, covariance, 1e-9), x[:2]
    found = known.detector(key, x[:0])
    row, constant = (least_variance(covariance, key.mean(0), mean, at) for at in (0.0, 1.0))
    torch.testing.assert_close(found.row, row, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.constant, constant, rtol=1e-3, atol=1e-4)
    assert float(found.scores(mean)) == pytest.approx(0, abs=1e-4)
    assert float(found.scores(key).mean()) == pytest.approx(1, abs=1e-4)
    assert found.spread == pytest.approx(float(found.scores(x).std()), rel=1e-3)


def test_other_readings_count_in_the_covariance() -> None:
    x = rows()
    mean, covariance = x.mean(0), torch.cov(x.mT)
    others = x[5:8]
    found = Readings(mean, covariance, 1e-9).detector(x[:1], others)
    apart = others - mean
    row = least_variance(covariance + apart.mT @ apart, x[0], mean, 0.0)
    torch.testing.assert_close(found.row, row, rtol=1e-3, atol=1e-4)
    assert float(found.scores(others).abs().max()) < 0.1


def test_inputs_are_the_models_own_and_nothing_behind_what_is_asked_for_runs() -> None:
    llm = resident(blocks=(0, 1), max_batch_tokens=8)
    outputs: list[tuple[int, Tensor]] = []
    for block, module in enumerate(llm.model.model.layers):
        module.register_forward_hook(
            lambda _m, _a, out, block=block: outputs.append((block, out[0]))
        )
    found = {}
    for part, given in inputs(llm, [2, 5], PROMPTS, block=1):
        for row, prompt in enumerate(part.prompts):
            found[prompt] = [one[row, : prompt.length] for one in given]
    assert {block for block, _ in outputs} == {0, 1}
    for prompt in PROMPTS:
        outputs.clear()
        own = llm.read(prompt).capture().keys
        behind = dict(outputs)[1].reshape(prompt.length, -1).detach()
        wanted = [own[2], own[5], behind]
        torch.testing.assert_close(found[prompt], wanted, atol=1e-5, rtol=1e-5)
    # Nothing that stops a pass is left.
    assert outputs[-1][0] == 2
    outputs.clear()
    for _ in inputs(llm, [2, 5], PROMPTS):
        pass
    assert {block for block, _ in outputs} == {0}
