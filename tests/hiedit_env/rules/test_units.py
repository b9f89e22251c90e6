"""Closed forms on edit units of several prompts: one dense solution over the rows of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hiedit_env.resident.capture import Capture
from hiedit_env.rules.names import RULES, make_rule
from tests.support.models import fake_capture, prompt

Matrix = NDArray[np.float64]
CPU = torch.device("cpu")
SHAPES = ((6, 4), (6, 4), (4, 6))
ALL = np.ones(3, bool)
#: What is read: 5, 2 and 4 tokens; the subject's last token is the second, the first, and missing.
PROMPTS = (
    replace(prompt([1, 5, 9, 4], [7, 3]), subject_spans=((0, 2),)),
    replace(prompt([6, 8], [5]), subject_spans=((0, 1),)),
    prompt([3, 3, 11], [2, 9]),
)
#: Rows along the joined token axis, by hand.
ROWS = {
    "answer": [3, 4, 6, 9, 10],
    "all": [*range(11)],
    "last": [3, 6, 9],
    "subject": [1, 5, 9],
}


def unit(seed: int) -> Capture:
    """A capture of all three prompts."""
    found = [fake_capture(SHAPES, p, 10 * seed + i) for i, p in enumerate(PROMPTS)]
    return Capture(
        prompts=PROMPTS,
        keys=tuple(map(torch.cat, zip(*(c.keys for c in found), strict=True))),
        value_gradients=tuple(
            map(torch.cat, zip(*(c.value_gradients for c in found), strict=True))
        ),
        loss=2.0,
        predictions=torch.cat([c.predictions for c in found]),
        correct=torch.cat([c.correct for c in found]),
    )


def chosen(capture: Capture, layer: int, tokens: str) -> tuple[Matrix, Matrix]:
    """Keys and value gradients of the rows that count."""
    rows = ROWS[tokens]
    return (
        capture.keys[layer][rows].double().numpy(),
        capture.value_gradients[layer][rows].double().numpy(),
    )


def standardised(seen: list[Capture], layer: int, tokens: str) -> tuple[Matrix, Matrix]:
    """The last unit's keys and value gradients by the moments of all rows seen."""
    found = []
    for side in (0, 1):
        rows = np.concatenate([chosen(c, layer, tokens)[side] for c in seen])
        own = chosen(seen[-1], layer, tokens)[side]
        found.append((own - rows.mean(0)) / rows.std(0, ddof=1))
    return found[0], found[1]


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_a_unit_is_solved_jointly(name: str, tokens: Any, count: int) -> None:
    seen = [unit(i) for i in range(count)]
    rule = make_rule(name, SHAPES, CPU, {"tokens": tokens, "step_size": 0.2})
    for capture in seen:
        rule.observe(capture)
    for layer, update in enumerate(rule.propose(seen[-1], ALL)):
        u, v = chosen(seen[-1], layer, tokens)
        u_hat, v_hat = standardised(seen, layer, tokens)
        if name == "gradient":
            wanted = u.T @ v
        elif name == "ridge":
            sized = (u_hat**2).sum(1, keepdims=True) * v_hat
            wanted = np.linalg.solve(u.T @ u + np.eye(len(u.T)), u.T @ sized)
        else:
            left = u_hat
            if name == "decorrelated":
                past = [standardised(seen[: i + 1], layer, tokens)[0] for i in range(count)]
                moment = sum(rows.T @ rows for rows in past)
                ridge = 3.0 * moment.trace() / len(moment)
                left = np.linalg.solve(moment + ridge * np.eye(len(moment)), u_hat.T).T
                left *= np.linalg.norm(u_hat) / np.linalg.norm(left)
            wanted = left.T @ v_hat
        assert update is not None
        assert len(update.left) == len(ROWS[tokens])
        found = update.dense().double().numpy()
        np.testing.assert_allclose(
            found, -0.2 * wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max()
        )


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("name", RULES)
def test_of_a_unit_of_one_prompt_its_own_rows_count(name: str, tokens: Any) -> None:
    capture = fake_capture(SHAPES, PROMPTS[0])
    rows = [i for i in ROWS[tokens] if i < 5]
    own = replace(
        capture,
        prompts=(prompt([1] * len(rows), [2]),),
        keys=tuple(u[rows] for u in capture.keys),
        value_gradients=tuple(v[rows] for v in capture.value_gradients),
    )
    updates = []
    for given, which in ((capture, tokens), (own, "all")):
        rule = make_rule(name, SHAPES, CPU, {"tokens": which})
        rule.observe(given)
        updates.append(rule.propose(given, ALL))
    for one, other in zip(*updates, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-4, atol=1e-6)
