"""Keys and value gradients of a loss over several prompts, and the updates they make."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hiedit_env.resident.capture import GradientRows
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import SELECTION, L, make
from tests.support.models import mean_losses

ALL = np.ones(L, bool)


def test_rows_of_a_batch_are_those_of_its_prompts_one_by_one() -> None:
    env = make(SELECTION)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    requests = [env.llm.encode(r.prompt, r.answer) for r in env.requests[:3]]
    assert len({len(p.input_ids) for p in requests}) > 1
    rows = env.llm.gradients(requests, mean_losses)
    captures = [env.llm.read(prompt).capture() for prompt in requests]
    for layer in range(L):
        keys = torch.cat([capture.keys[layer] for capture in captures])
        gradients = torch.cat([capture.value_gradients[layer] for capture in captures])
        torch.testing.assert_close(rows.keys[layer], keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.value_gradients[layer], gradients, rtol=1e-3, atol=1e-6)


def test_rows_at_updated_weights_are_those_after_the_updates_were_written() -> None:
    env = make(SELECTION)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    requests = [env.llm.encode(r.prompt, r.answer) for r in env.requests[:3]]
    rule = OuterProductRule(env.llm.shapes, env.llm.device, step_size=1e-2)
    updates = list(rule.propose(env.llm.read(requests[0]).capture(), ALL))
    updates[1] = None
    before, plain = env.llm.weights_fingerprint(), env.llm.gradients(requests, mean_losses)
    ahead = env.llm.gradients(requests, mean_losses, updates)
    assert env.llm.weights_fingerprint() == before
    env.llm.commit(updates)
    after = env.llm.gradients(requests, mean_losses)
    for layer in range(L):
        for name in ("keys", "value_gradients"):
            found = getattr(ahead, name)[layer]
            torch.testing.assert_close(found, getattr(after, name)[layer], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(ahead.value_gradients[-1], plain.value_gradients[-1], rtol=0.1)


def test_corrections_by_hand() -> None:
    """One layer: ũ standardised, v over its deviation alone, minus the step size."""
    rule = OuterProductRule([(1, 1)], torch.device("cpu"), step_size=0.5, tokens="all")
    rule.form.moments[0].update(torch.tensor([[[0.0, 1.0], [2.0, 5.0]]]))  # means 1, 3; sd √2, √8
    rows = GradientRows((torch.tensor([[3.0]]),), (torch.tensor([[4.0]]),))
    (update,) = rule.correct(rows, np.array([True]))
    assert update is not None
    wanted = -0.5 * ((3 - 1) / 2**0.5) * (4 / 8**0.5)
    assert update.dense().item() == pytest.approx(wanted, rel=1e-5)
    # What costs nothing changes nothing, though 0 is not the mean of the gradients.
    (nothing,) = rule.correct(GradientRows(rows.keys, (torch.zeros(1, 1),)), np.array([True]))
    assert nothing is not None
    assert nothing.dense().item() == 0
    assert rule.correct(rows, np.array([False])) == (None,)
