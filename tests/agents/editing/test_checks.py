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
from hiedit_env.resident.upper_half import Compared
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


def fact(editor: Editor, subject: str, answer: str) -> AskedFact:
    return as_asked(editor.llm, Request(f"{subject} lives in", answer, subject), "plain")


def facts(editor: Editor) -> list[AskedFact]:
    """Three facts, of which the model answers the first and the last."""
    pairs = [("Belka", "Cindrath"), ("Dasmo", "Averlund"), ("Elvane", "Kessford")]
    return [fact(editor, *pair) for pair in pairs]


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
    assert first == [True, False]
    assert sorted(asked) == ["Belka lives in", "Dasmo lives in"]
    assert examiner.answered([some[1], some[0]]) == first[::-1]
    assert len(asked) == 2
    # The sample of earlier facts is of the same prompts, and of one more.
    assert examiner.held(some) == [some[0], some[2]]
    assert asked[2:] == ["Elvane lives in"]


def test_every_change_of_the_weights_is_asked_anew(editor: Editor, asked: list[str]) -> None:
    examiner, some = Examiner(editor.llm, Checks()), facts(editor)
    before = examiner.answered(some)
    assert before == [True, False, True]
    state = editor.llm.commit(change(editor, 5.0))
    after = examiner.answered(some)
    assert len(asked) == 6
    assert after == directly(editor, some) != before
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


def test_a_weight_that_no_edit_changes_ends_what_is_known(editor: Editor, asked: list[str]) -> None:
    examiner, some = Examiner(editor.llm, Checks(min_agreement=0.6)), facts(editor)
    assert examiner.answered(some) == [True, False, True]
    assert examiner.judge([]).agreement == 1.0
    with torch.no_grad():
        weight = editor.model.get_input_embeddings().weight
        weight.copy_(weight.roll(5, 0))
    del asked[:]
    assert examiner.answered(some) == directly(editor, some) == [False] * 3
    assert examiner.judge([]).agreement == pytest.approx(examiner.controls.agreement())
    # What the blocks below all edits give is run anew as well.
    shares = [right_tokens(editor.llm, [p])[0].float().mean() for p in examiner.controls.references]
    wanted = float(torch.stack(shares).mean())
    assert examiner.judge([]).agreement == pytest.approx(wanted) != 1.0


def test_groups_of_prompts_keep_their_places(editor: Editor) -> None:
    begin = "Belka lives in Cindrath. " * 5
    subjects = ("Belka", "Dasmo", "Elvane", "Amtor")
    said = editor.ask([f"{begin}{subject} lives in" for subject in subjects], max_new_tokens=1)
    alike = [
        editor.llm.encode(f"{begin}{subject} lives in", answer if right else " Averlund")
        for subject, answer, right in zip(subjects, said, (True, False, True, True), strict=True)
    ]
    short = [prompt for fact in facts(editor) for prompt in fact.prompts]
    mixed = [alike[0], short[0], short[1], alike[1], alike[2], short[2], alike[3]]
    for _ in range(2):
        found = right_tokens(editor.llm, mixed, asked_often=True)
        wanted = [right_tokens(editor.llm, [prompt])[0] for prompt in mixed]
        assert [f.tolist() for f in found] == [w.tolist() for w in wanted]
        assert {all(f.tolist()) for f in found} == {True, False}
    assert list(editor.llm.upper.run_alike.values()) == [
        Compared(right=max(p.length for p in alike))
    ]


def test_remembered_blocks_give_the_same_tokens(editor: Editor) -> None:
    prompts = [prompt for fact in facts(editor) for prompt in fact.prompts]
    for _ in range(2):
        plain = right_tokens(editor.llm, prompts)
        known = right_tokens(editor.llm, prompts, asked_often=True)
        assert [p.tolist() for p in plain] == [k.tolist() for k in known]
        editor.llm.commit(change(editor, 5.0))
