"""What the unedited model says is the same whatever was edited, asked before, or forked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from hiedit_env.envs.base import EditingEnv
from hiedit_env.evaluation.unedited import UneditedModel, answer_log_probs
from hiedit_env.model.tokenization import EncodedPrompt
from tests.support.episodes import SELECTION, L, make


@pytest.fixture
def env() -> EditingEnv:
    env = make(SELECTION, num_edits=2)
    env.reset(seed=0)
    return env


def probes(env: EditingEnv) -> list[EncodedPrompt]:
    found = [p for request in env.requests for p in request.locality]
    return [env.llm.encode(p.prompt, p.answer) for p in dict.fromkeys(found)][:3]


def test_log_probs_are_those_of_transformers_before_the_edits(env: EditingEnv) -> None:
    prompts = probes(env)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.answer_ids]])
        with torch.no_grad():
            logits = env.llm.model(ids).logits[0, len(prompt.prompt_ids) - 1 : -1]
        wanted.append(logits.log_softmax(-1))
    env.step(np.ones(L, np.int8))
    unedited = UneditedModel(env.llm)
    found = unedited.log_probs(prompts)
    assert list(found) == prompts
    for prompt, rows in zip(prompts, wanted, strict=True):
        assert found[prompt].shape == (len(prompt.answer_ids), rows.shape[1])
        torch.testing.assert_close(found[prompt], rows, rtol=1e-4, atol=1e-4)
        now = answer_log_probs(env.llm, (prompt,))[prompt]
        assert not torch.allclose(now, rows, atol=1e-3)
    assert not any(rows.is_inference() or rows.requires_grad for rows in found.values())
    assert unedited.log_probs(()) == {}


def test_equal_calls_give_equal_bits_and_run_once(
    env: EditingEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = probes(env)
    first = UneditedModel(env.llm)
    first.log_probs(prompts[:1])
    found = first.log_probs(prompts)
    for prompt, rows in UneditedModel(env.llm).log_probs(prompts).items():
        assert torch.equal(found[prompt], rows)
    answers = first.answers(prompts)
    env.step(np.ones(L, np.int8))
    monkeypatch.setattr(env.llm, "answer_logits", None)
    assert all(torch.equal(found[p], rows) for p, rows in first.log_probs(prompts).items())
    assert first.answers(prompts) == answers
    assert len(first) == len(prompts)


def test_forks_share_what_is_known(env: EditingEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = probes(env)
    env.llm.restore_unedited()
    fork = env.llm.fork()
    first = UneditedModel(env.llm)
    twin = first.clone_for(fork)
    assert twin.llm is fork
    found, answers = twin.log_probs(prompts), twin.answers(prompts)
    monkeypatch.setattr(env.llm, "answer_logits", None)
    assert all(torch.equal(found[p], rows) for p, rows in first.log_probs(prompts).items())
    assert first.answers(prompts) == answers


def alone(env: EditingEnv, ids: Sequence[int], most: int) -> list[int]:
    """Greedy tokens by whole passes over one prompt, an end token kept."""
    llm, new = env.llm, list[int]()
    limit = llm.encoder.max_length
    while len(new) < most and not (new and new[-1] in llm.end_ids):
        if limit is not None and new and len(ids) + len(new) >= limit:
            break
        with torch.no_grad():
            logits = llm.model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
        new.append(int(logits.argmax()))
    return new


@pytest.mark.parametrize("guessed", ["by the cache", "without a cache", "wrongly"])
def test_answers_are_the_argmax_of_whole_passes(
    env: EditingEnv, monkeypatch: pytest.MonkeyPatch, guessed: str
) -> None:
    llm = env.llm
    llm.restore_unedited()
    prompts = [llm.encode(f"w7 w{i} w9 {'w11 ' * (i % 4)}", "w3") for i in range(3, 12)]
    # One that fills the context but for two tokens, and one that fills it.
    limit = llm.encoder.max_length
    assert limit is not None
    long = [replace(prompts[0], prompt_ids=(5,) * (limit - left)) for left in (2, 0)]
    wanted = [alone(env, p.prompt_ids, 6) for p in (*prompts, *long)]
    assert {len(tokens) for tokens in wanted} >= {1, 2, 6}
    if guessed == "without a cache":
        monkeypatch.setattr(type(llm), "generates_whole", property(lambda _llm: True))
        monkeypatch.setattr(llm, "continuations", None)
    if guessed == "wrongly":
        own = llm.continuations

        def wrong(given: Sequence[EncodedPrompt], budgets: Sequence[int]) -> list[list[int]]:
            found = own(given, budgets)
            return [[*ids[:2], *(4 for _ in ids[2:])] for ids in found]

        monkeypatch.setattr(llm, "continuations", wrong)
    found = UneditedModel(llm, max_tokens=6).answers([*prompts, *long])
    assert [list(p.answer_ids) for p in found] == wanted
