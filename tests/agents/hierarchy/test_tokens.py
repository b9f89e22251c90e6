"""Which tokens a hypernetwork reads: those that a closed-form rule would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_env.rules.names import make_rule
from tests.hiedit_env.rules.test_units import ALL, CPU, ROWS, SHAPES, unit


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize(("form", "rule"), [("outer", "outer-product"), ("decorrelated",) * 2])
def test_an_untrained_one_is_its_rule_on_units_too(form: Any, rule: str, tokens: Any) -> None:
    network = Hypernetwork(SHAPES, CPU, form=form, tokens=tokens, step_size=0.2, rank=2)
    wanted = make_rule(rule, SHAPES, CPU, {"tokens": tokens, "step_size": 0.2})
    for low in (network, wanted):
        for seed in range(2):
            low.observe(unit(seed))
    pairs = zip(network.propose(unit(1), ALL), wanted.propose(unit(1), ALL), strict=True)
    for one, other in pairs:
        assert one is not None
        assert other is not None
        assert len(one.left) == len(ROWS[tokens])
        torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", ROWS)
def test_it_learns_from_the_rows_that_count_alone(tokens: Any) -> None:
    network = Hypernetwork(SHAPES, CPU, tokens=tokens, rank=2)
    capture = unit(0)
    network.observe(capture)
    updates = network.compute(capture, np.array([True, False, False]))
    assert updates[0] is not None
    torch.autograd.backward(updates[0].squared_norm())
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert any(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)
