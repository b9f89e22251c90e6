"""Which facts are in place: what replaces what, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hiedit_agents import Editor
from hiedit_agents.editing import ledger as ledger_module
from hiedit_agents.editing.checks import AskedFact
from hiedit_agents.editing.in_place import FactsInPlace, different
from hiedit_agents.editing.ledger_file import transaction
from hiedit_env import Request
from tests.support.editors import NONE, bits, live
from tests.support.models import prompt


def fact(*prompts: tuple[int, ...]) -> AskedFact:
    """A fact whose prompts have these tokens."""
    forms = {str(i): prompt(ids, (1,)) for i, ids in enumerate(prompts)}
    return AskedFact(Request("P", "Q", "P"), forms)


def test_a_fact_replaces_those_that_ask_one_of_its_prompts() -> None:
    both, plain, chat, other = fact((1,), (2,)), fact((1,)), fact((2,)), fact((3,))
    facts = FactsInPlace()
    facts.put(1, [both, other])
    assert (facts.replaced_by(plain), facts.replaced_by(fact((4,)))) == (1, None)
    assert facts.without([plain]) == [other]
    facts.put(2, [plain])
    assert list(facts) == [other, plain]
    # The first one is gone with all of its prompts.
    assert facts.replaced_by(chat) is None
    facts.put(3, [chat])
    assert list(facts) == [other, plain, chat]
    assert facts.replaced_by(both) == 3
    facts.put(4, [both])
    assert list(facts) == [other, both]


def test_facts_that_ask_one_prompt_are_not_written_together() -> None:
    both, plain, other = fact((1,), (2,)), fact((1,)), fact((3,))
    assert different([other, both, plain]) == [other, both]
    assert different([plain, other]) == [plain, other]


def test_another_form_or_system_message_makes_another_prompt() -> None:
    model, tokens = live()
    tokens.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}lives in"
    with Editor(model, tokens, name="tiny", checks=NONE) as editor:
        asked: list[dict[str, Any]] = [
            {"system": "Tova", "answer": "Averlund", "prompt_form": "chat"},
            {"system": "Dasmo", "answer": "Istrand", "prompt_form": "chat"},
            {"answer": "Quellby", "prompt_form": "plain"},
            {"system": "Dasmo", "answer": "Averlund", "prompt_form": "chat"},
        ]
        results = editor.edit([{"prompt": "Belka", **one} for one in asked])
        assert [r.status for r in results] == ["written"] * 4
        assert [r.replaces for r in results] == [None, None, None, 2]
        assert editor.measure().asked == 3
        # The same after they were taken from the ledger.
        editor.undo(4)
        assert [f.request.answer for f in editor._session.facts] == [
            "Averlund", "Istrand", "Quellby"
        ]  # fmt: skip


@contextmanager
def interrupted_behind(connection: Any) -> Iterator[None]:
    """A transaction whose commit is done when the interruption comes."""
    with transaction(connection):
        yield
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["edit", "undo"])
def test_an_interruption_behind_a_commit_leaves_model_and_ledger_alike(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [("Belka lives in", "Averlund"), ("Dasmo lives in", "Istrand")]
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(facts[0])
        first = bits(editor)
        with monkeypatch.context() as patch:
            patch.setattr(ledger_module, "transaction", interrupted_behind)
            with pytest.raises(KeyboardInterrupt):
                editor.edit(facts[1]) if what == "edit" else editor.undo(1)
        assert len(editor.ledger) == 2
        recorded = editor.ledger[2].record["fingerprint_after"]
        assert editor.llm.weights_fingerprint() == recorded
        assert bits(editor) != first
        in_place = [f.request.prompt for f in editor._session.facts]
        assert in_place == ([prompt for prompt, _ in facts] if what == "edit" else [])
        # And it goes on.
        assert editor.edit(("Belka works as a", "Istrand"))[0].id == 3
        editor.rewind(1)
        assert bits(editor) == first
        assert [event.kind for event in editor.ledger][:2] == [
            "edit",
            "revoke" if what == "undo" else "edit",
        ]
