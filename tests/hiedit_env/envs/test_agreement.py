"""Agreement in ``info``: the same number as in an evaluation, and as by a plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hiedit_env.envs.vector import VectorLayerSelection
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.evaluation.unedited import UneditedModel
from tests.support.episodes import IDS, KINDS, SELECTION, PlainModel, act, bits, make

#: Strong enough to change what the model says to unrelated prompts.
HARM: dict[str, Any] = {"num_edits": 6, "step_size": 1e-2, "max_steps_per_edit": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IDS)
def test_agreement_of_the_last_fact_is_that_of_the_evaluation(name: str, kind: str) -> None:
    env = make(name, reward=kind, **HARM)
    env.reset(seed=0)
    ended = False
    while not ended:
        _, _, ended, _, info = env.step(act(name))
    found = evaluate(env.llm, env.stream, UneditedModel(env.llm), generation=())
    last = found.per_fact["specificity"]["agreement"][-1]
    assert 0 < last < 100
    assert 100 * info["metrics"]["agreement"] == pytest.approx(last, abs=1e-4)


def test_agreement_is_the_share_of_the_unedited_models_own_five_tokens() -> None:
    env, plain = make(SELECTION, **HARM), PlainModel()
    env.reset(seed=0)
    differs = False
    for fact in env.stream:
        info = env.step(act(SELECTION))[4]
        now, shares = PlainModel(bits(env)), []
        for probe in fact.locality:
            prompt, _ = plain.ids(probe.prompt, probe.answer)
            ids = list(prompt)
            with torch.no_grad():
                for _ in range(5):
                    ids.append(int(plain.model(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == plain.tokenizer.eos_token_id:
                        break
                told = now.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
            shares.append(np.mean(np.equal(told[len(prompt) - 1 : -1], ids[len(prompt) :])))
        assert info["metrics"]["agreement"] == pytest.approx(np.mean(shares))
        differs |= info["metrics"]["agreement"] != info["metrics"]["argmax_match"]
    assert differs


def test_forks_share_the_unedited_models_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    inner = UneditedModel._answer

    def counted(self: UneditedModel, prompts: Any, progress: Any) -> None:
        computed.append(len(prompts))
        inner(self, prompts, progress)

    monkeypatch.setattr(UneditedModel, "_answer", counted)
    envs = VectorLayerSelection(3, **HARM)
    envs.reset(seed=[0, 0, 0])
    envs.step(np.ones((3, 6), np.int8))
    # The same fact three times: its unrelated prompts once.
    assert computed == [len(envs.envs[0].past_facts[0].probes)]
    envs.reset(seed=[0, 0, 0])
    envs.step(np.ones((3, 6), np.int8))
    assert len(computed) == 1
