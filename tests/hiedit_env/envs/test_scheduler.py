"""Environments that are driven together: fewer passes, the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hiedit_env.envs.vector import VectorLayerSelection
from hiedit_env.resident.resident import ResidentLLM
from tests.support.episodes import SELECTION, act, make

N = 4
SETTINGS: dict[str, Any] = {"num_edits": 3, "max_steps_per_edit": 2, "retention_window": 2}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every forward pass so far, by the method that ran it."""
    log: list[str] = []
    for name in ("answer_logits", "_record"):
        inner = getattr(ResidentLLM, name)

        def noted(self: ResidentLLM, *given: Any, _inner: Any = inner, **named: Any) -> Any:
            log.append(_inner.__name__)
            return _inner(self, *given, **named)

        monkeypatch.setattr(ResidentLLM, name, noted)
    return log


@pytest.mark.parametrize("reference", ["unedited", "previous"])
@pytest.mark.parametrize("kind", ["loss", "generation"])
def test_environments_begun_together_take_fewer_passes(
    passes: list[str], reference: str, kind: str
) -> None:
    settings = {**SETTINGS, "locality_reference": reference, "reward": kind}
    together = VectorLayerSelection(N, **settings, max_batch_tokens=4096)
    passes.clear()
    observations, infos = together.reset(seed=0)
    # One pass for the references of all, and one reading of all facts.
    assert passes == ["answer_logits", "_record"]
    passes.clear()
    for i in range(N):
        alone = make(SELECTION, **{"update_rule": "decorrelated", "step_size": None, **settings})
        passes.clear()
        observation, info = alone.reset(seed=i)
        assert passes == ["answer_logits", "_record"]
        np.testing.assert_allclose(observations[i], observation, atol=1e-3)
        known = alone.episode.evaluator.references.log_probs
        shared = together.envs[i].episode.evaluator.references.log_probs
        assert known.keys() == shared.keys()
        for prompt, rows in known.items():
            np.testing.assert_allclose(shared[prompt], rows, atol=1e-4)
        assert info["edit_index"] == infos["edit_index"][i]


def test_references_of_later_facts_are_shared_too(passes: list[str]) -> None:
    settings = {**SETTINGS, "max_steps_per_edit": 1, "max_batch_tokens": 4096}
    together = VectorLayerSelection(N, **settings)
    together.reset(seed=0)
    counts = []
    for _ in range(3):
        passes.clear()
        together.step(np.ones((N, 6), np.int8))
        counts.append(passes.count("answer_logits"))
    alone = 0
    for i in range(N):
        env = make(SELECTION, **SETTINGS, step_size=None, update_rule="decorrelated")
        env.reset(seed=i)
        passes.clear()
        env.step(act(SELECTION))
        alone += passes.count("answer_logits")
    assert counts[0] <= alone / 2


def test_a_reading_never_runs_the_model(passes: list[str]) -> None:
    env = make(SELECTION, **SETTINGS)
    with pytest.raises(RuntimeError, match="start"):
        _ = env.episode.reading
    env.reset(seed=0)
    ended = False
    while not ended:
        _, _, ended, _, _ = env.step(act(SELECTION))
        passes.clear()
        assert env.episode.reading.prompt == env.fact.prompt
        env.observe()
        assert passes == []
    # After the last fact: that fact at the final weights.
    again = env.llm.read(env.fact.prompt)
    assert env.episode.reading.loss == again.loss
