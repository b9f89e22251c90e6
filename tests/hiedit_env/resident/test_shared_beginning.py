"""A beginning that prompts have in common, run once, against whole prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident import shared_beginning as module
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.shared_beginning import alike, logits_alike
from hiedit_env.resident.upper_half import Compared
from tests.support.models import prompt, random_updates, resident

BEGIN = tuple(2 + i % 8 for i in range(module.SHORTEST))


def begun(*ends: tuple[int, ...]) -> list[EncodedPrompt]:
    return [prompt((*BEGIN, *end), (3, 4)) for end in ends]


PROMPTS = begun((5, 6, 7), (9,), (4, 4))
LONGEST = len(BEGIN) + 3 + 1


def whole(llm: ResidentLLM) -> Tensor:
    return llm.answer_logits(llm.batch(PROMPTS))


def runs(monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> list[int]:
    """Numbers of prompts run behind one beginning; what these give is scaled."""
    found: list[int] = []
    own = module._BegunAlike.logits

    def noted(self: Any, chosen: Any) -> Tensor:
        found.append(len(chosen))
        return own(self, chosen) * scale

    monkeypatch.setattr(module._BegunAlike, "logits", noted)
    return found


def test_prompts_are_grouped_by_what_they_begin_with() -> None:
    other = tuple(reversed(BEGIN))
    two = [prompt((*other, i), (3,)) for i in (1, 2)]
    short = prompt(BEGIN[:-1], (3,))
    mixed = [PROMPTS[0], short, two[0], PROMPTS[1], two[1], PROMPTS[2]]
    # Two prompts are too few, and one token less is too short.
    assert alike(mixed) == [(len(BEGIN), [0, 3, 5]), (0, [1, 2, 4])]
    # The last token of a prompt is run for each, since the answer is told from there.
    same = begun((5, 6), (5, 6), (5, 6, 7))
    assert alike(same) == [(len(BEGIN) + 1, [0, 1, 2])]
    assert alike(begun((), (), ())) == [(0, [0, 1, 2])]
    assert alike([]) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3"])
def test_logits_are_those_of_whole_prompts(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, asked = resident(model_type), runs(monkeypatch)
    for _ in range(2):
        found = logits_alike(llm, llm.batch(PROMPTS), len(BEGIN))
        torch.testing.assert_close(found, whole(llm), atol=1e-5, rtol=1e-5)
        llm.commit(random_updates(llm))
    assert asked == [3, 3]
    assert llm.upper.run_alike == {len(BEGIN): Compared(right=LONGEST)}


def test_a_fork_sees_its_own_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")
    unedited = whole(llm)
    fork = llm.fork()
    fork.commit(random_updates(fork))
    logits_alike(fork, fork.batch(PROMPTS), len(BEGIN))
    assert llm.upper.run_alike == {len(BEGIN): Compared(right=LONGEST)}
    # From now on nothing is compared, and no whole prompt is run.
    wanted = whole(fork)
    monkeypatch.setattr(ResidentLLM, "answer_logits", None)
    found = logits_alike(fork, fork.batch(PROMPTS), len(BEGIN))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert float((found - unedited).abs().max()) > 0.05
    found = logits_alike(llm, llm.batch(PROMPTS), len(BEGIN))
    torch.testing.assert_close(found, unedited, atol=1e-5, rtol=1e-5)


def test_few_prompts_and_half_precision_are_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = runs(monkeypatch)
    llm = resident("llama")
    assert torch.equal(logits_alike(llm, llm.batch(PROMPTS[:2]), len(BEGIN)), whole(llm)[:4])
    rough = resident("llama", dtype=torch.bfloat16)
    found = logits_alike(rough, rough.batch(PROMPTS), len(BEGIN))
    assert torch.equal(found, whole(rough))
    assert found.dtype == torch.bfloat16
    assert asked == []


def test_weights_that_give_no_numbers_say_nothing_about_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, asked = resident("llama"), runs(monkeypatch)
    logits_alike(llm, llm.batch(PROMPTS), len(BEGIN))
    longer = begun((5, 6, 7, 8), (9,), (4, 4))
    with torch.no_grad():
        own = llm.halves.blocks[-1].mlp.down_proj.weight.clone()  # type: ignore[attr-defined]
        llm.halves.blocks[-1].mlp.down_proj.weight.fill_(torch.nan)  # type: ignore[attr-defined]
        assert not bool(logits_alike(llm, llm.batch(longer), len(BEGIN)).isfinite().any())
        llm.halves.blocks[-1].mlp.down_proj.weight.copy_(own)  # type: ignore[attr-defined]
    assert llm.upper.run_alike == {len(BEGIN): Compared(right=LONGEST)}
    logits_alike(llm, llm.batch(longer), len(BEGIN))
    assert llm.upper.run_alike == {len(BEGIN): Compared(right=LONGEST + 1)}
    assert asked == [3, 3, 3]


def test_what_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, asked = resident("llama"), runs(monkeypatch, 1.1)
    for _ in range(2):
        assert torch.equal(logits_alike(llm, llm.batch(PROMPTS), len(BEGIN)), whole(llm))
    # It was tried once; shorter prompts may still be right.
    assert asked == [3]
    assert llm.upper.run_alike[len(BEGIN)].wrong == LONGEST
    shorter = begun((5,), (9,), (4, 4))
    logits_alike(llm, llm.batch(shorter), len(BEGIN))
    assert asked == [3, 3]


def test_what_cannot_be_run_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = resident("llama")

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("of another shape")

    monkeypatch.setattr(module._BegunAlike, "logits", fail)
    assert torch.equal(logits_alike(llm, llm.batch(PROMPTS), len(BEGIN)), whole(llm))
    monkeypatch.undo()
    asked = runs(monkeypatch)
    assert torch.equal(logits_alike(llm, llm.batch(PROMPTS), len(BEGIN)), whole(llm))
    assert asked == []


def test_running_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    llm = resident("llama")
    monkeypatch.setattr(module._BegunAlike, "logits", fail)
    with pytest.raises(torch.OutOfMemoryError):
        logits_alike(llm, llm.batch(PROMPTS), len(BEGIN))


def test_no_beginning_runs_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, asked = resident("llama"), runs(monkeypatch)
    assert torch.equal(logits_alike(llm, llm.batch(PROMPTS), 0), whole(llm))
    assert asked == []
