"""Checks: what an examiner asks a model, and when it asks again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hiedit_agents import Checks, Editor
from hiedit_agents.editing.checks import AskedFact, Examiner, as_asked
from hiedit_agents.editing.controls import right_tokens
from hiedit_env import Request
from hiedit_env.resident.low_rank import LowRankUpdate
from tests.support.editors import NONE


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.from_pretrained("tiny", checks=NONE) as made:
        yield made


@pytest.fixture
def asked(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model is run on, in order."""
    found: list[str] = []
    own = editor.llm.answer_logits

    def noted(batch, *arguments, **named):  # type: ignore[no-untyped-def]
        found.extend(prompt.prompt for prompt in batch.prompts)
        return own(batch, *arguments, **named)

    monkeypatch.setattr(editor.llm, "answer_logits", noted)
    return found


def facts(editor: Editor) -> list[AskedFact]:
    pairs = [("Belka", "Morvane"), ("Dasmo", "Averlund"), ("Elvane", "Istrand")]
    return [
        as_asked(editor.llm, Request(f"{subject} lives in", answer, subject), "plain")
        for subject, answer in pairs
    ]


def change(editor: Editor, scale: float) -> tuple[LowRankUpdate | None, ...]:
    d_in, d_out = editor.llm.shapes[0]
    generator = torch.Generator().manual_seed(3)
    left = scale * torch.randn(1, d_in, generator=generator)
    update = LowRankUpdate(left, torch.randn(1, d_out, generator=generator))
    return (update, *[None] * (len(editor.llm.layers) - 1))


def directly(editor: Editor, some: list[AskedFact]) -> list[bool]:
    return [bool(right_tokens(editor.llm, fact.prompts)[0].all()) for fact in some]


def test_what_is_known_of_the_weights_is_not_asked_again(editor: Editor, asked: list[str]) -> None:
    examiner, some = Examiner(editor.llm, Checks()), facts(editor)
    first = examiner.answered(some[:2])
    assert sorted(asked) == ["Belka lives in", "Dasmo lives in"]
    assert examiner.answered([some[1], some[0]]) == first[::-1]
    assert len(asked) == 2
    # The sample of earlier facts is of the same prompts, and of one more.
    held = examiner.held(some)
    assert asked[2:] == ["Elvane lives in"]
    assert held == [fact for fact, right in zip(some, directly(editor, some), strict=True) if right]


def test_every_change_of_the_weights_is_asked_anew(editor: Editor, asked: list[str]) -> None:
    examiner, some = Examiner(editor.llm, Checks()), facts(editor)
    before = examiner.answered(some)
    state = editor.llm.commit(change(editor, 5.0))
    after = examiner.answered(some)
    assert len(asked) == 6
    assert after == directly(editor, some)
    # An edit that is rolled back leads to weights that are known.
    editor.llm.restore(state)
    del asked[:]
    assert examiner.answered(some) == before
    assert not asked
    for scale in (0.1, 0.2):
        editor.llm.commit(change(editor, scale))
        examiner.answered(some)
    del asked[:]
    # Only two sets of weights are remembered.
    editor.llm.restore(state)
    assert examiner.answered(some) == before
    assert len(asked) == 3


def test_a_prompt_in_two_facts_is_asked_once(editor: Editor, asked: list[str]) -> None:
    [one, *_] = facts(editor)
    assert len(set(Examiner(editor.llm, Checks()).answered([one, one]))) == 1
    assert asked == ["Belka lives in"]


def test_remembered_blocks_give_the_same_tokens(editor: Editor) -> None:
    prompts = [prompt for fact in facts(editor) for prompt in fact.prompts]
    for _ in range(2):
        plain = right_tokens(editor.llm, prompts)
        known = right_tokens(editor.llm, prompts, again=True)
        assert [p.tolist() for p in plain] == [k.tolist() for k in known]
        editor.llm.commit(change(editor, 5.0))
