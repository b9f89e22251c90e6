"""Environments work wherever they are called from, inside ``torch.inference_mode()`` too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hiedit_env.envs.base import EditingEnv
from hiedit_env.resident.low_rank import LowRankUpdate
from tests.support.episodes import (
    IDS,
    KINDS,
    LIFELONG,
    act,
    actions,
    bits,
    make,
    roll,
    same_bits,
    shown,
)
from tests.support.models import random_updates


def episode(env: EditingEnv) -> list[tuple[Any, ...]]:
    return [shown(env.reset(seed=0)), *roll(env, actions(env, 20, 0))]


def gradients(env: EditingEnv) -> list[torch.Tensor]:
    """Of the loss at the present state, in all factors of some updates."""
    updates = [
        LowRankUpdate(u.left.requires_grad_(), u.right.requires_grad_())
        for u in random_updates(env.llm, scale=0.1)
        if u
    ]
    env.loss(updates).backward()  # type: ignore[no-untyped-call]
    found = [factor.grad for u in updates for factor in (u.left, u.right)]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("inside", ["environment", "everything"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IDS)
def test_an_environment_in_inference_mode_is_the_same(name: str, kind: str, inside: str) -> None:
    settings: dict[str, Any] = {"reward": kind, "update_rule": "decorrelated", "step_size": None}
    plain = make(name, **settings)
    with torch.inference_mode(inside == "everything"):
        env = make(name, **settings)
    with torch.inference_mode():
        results = episode(env)
    assert len(results) > 2
    assert results == episode(plain)
    assert same_bits(bits(env), bits(plain))


@pytest.mark.parametrize("reference", ["unedited", "previous"])
def test_gradients_flow_after_steps_in_inference_mode(reference: str) -> None:
    plain, env = (make(LIFELONG, locality_reference=reference) for _ in range(2))
    with torch.inference_mode():
        env.reset(seed=0)
        env.step(act(LIFELONG))
        capture = env.capture
    plain.reset(seed=0)
    plain.step(act(LIFELONG))
    # What was kept from in there serves gradients out here.
    for ours, theirs in zip(gradients(env), gradients(plain), strict=True):
        assert torch.equal(ours, theirs)
    change = env.llm.change(0)
    assert change is not None
    for kept in (change, *capture.keys, *capture.value_gradients):
        scale = torch.ones(kept.shape[1], requires_grad=True)
        (kept * scale).sum().backward()  # type: ignore[no-untyped-call]
        assert scale.grad is not None
