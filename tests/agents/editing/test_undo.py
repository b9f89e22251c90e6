"""Taking edits back: bit for bit, and by dense sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from hiedit_agents import Editor
from hiedit_env.errors import (
    LedgerError,
)
from tests.support.editors import FACTS, NONE, bits, dense, edited_states, gap


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.from_pretrained("tiny", checks=NONE) as made:
        yield made


def test_rewind_gives_every_earlier_state_bit_for_bit(editor: Editor) -> None:
    states = edited_states(editor, 6)
    for number in (3, 0, 6, 1, 5, 2, 4):
        editor.rewind(number)
        assert bits(editor) == states[number], number
    # The rewinds are events themselves: 7 is "after the rewind to 3".
    editor.rewind(7)
    assert bits(editor) == states[3]
    assert editor.ledger.active == (1, 2, 3)


def test_undo_gives_what_the_other_recorded_updates_give(editor: Editor) -> None:
    states = edited_states(editor, 6)
    editor.undo(3)
    wanted = dense(editor, (1, 2, 4, 5, 6))
    assert gap(editor, wanted) < 1e-6
    assert gap(editor, dense(editor, (1, 2, 3, 4, 5, 6))) > 1e-3
    assert editor.ledger.active == (1, 2, 4, 5, 6)
    one = bits(editor)
    # In whatever order the same edits are taken back, the bits are the same.
    editor.undo(5)
    editor.rewind(6)
    assert bits(editor) == states[6]
    editor.undo(5)
    editor.undo(3)
    two = bits(editor)
    editor.rewind(7)
    assert bits(editor) == one
    editor.undo(5)
    assert bits(editor) == two


def test_undo_of_the_last_edit_is_the_state_before_and_of_all_the_unedited_model(
    editor: Editor,
) -> None:
    states = edited_states(editor, 4)
    for number in (4, 3, 2, 1):
        editor.undo(number)
        assert bits(editor) == states[number - 1]
    assert editor.ledger.active == ()


def test_edits_go_on_after_an_undo(editor: Editor) -> None:
    edited_states(editor, 3)
    editor.undo(2)
    [result] = editor.edit(FACTS[4])
    assert result.id == 5
    assert editor.ledger.active == (1, 3, 5)
    assert gap(editor, dense(editor, (1, 3, 5))) < 1e-6
    after = bits(editor)
    editor.rewind(0)
    editor.rewind(5)
    assert bits(editor) == after


def test_fingerprints_are_recorded(editor: Editor) -> None:
    edited_states(editor, 2)
    editor.undo(1)
    events = list(editor.ledger)
    for one, two in itertools.pairwise(events):
        assert one.record["fingerprint_after"] == two.record["fingerprint_before"]
    assert events[-1].record["fingerprint_after"] == editor.llm.weights_fingerprint()
    assert editor.ledger.base.fingerprint == events[0].record["fingerprint_before"]


def test_an_unknown_id_is_named_and_nothing_changes(editor: Editor) -> None:
    edited_states(editor, 2)
    editor.undo(1)
    before = bits(editor)
    with pytest.raises(LedgerError, match="there is no edit 9; the edits are 1, 2"):
        editor.undo(9)
    with pytest.raises(LedgerError, match="edit 1 is not in place any more"):
        editor.undo(1)
    with pytest.raises(LedgerError, match="there is no event 9"):
        editor.rewind(9)
    assert bits(editor) == before
    assert len(editor.ledger) == 3


def test_what_was_undone_is_not_rehearsed_any_more() -> None:
    agent = "all-layers+rehearsal,facts=8,probes=0"
    with Editor.from_pretrained("tiny", agent=agent, checks=NONE) as editor:
        editor.edit(FACTS[:3])
        editor.undo(2)
        low: Any = editor._session.levels.low
        assert [p.prompt for p in low._past] == [FACTS[0].prompt, FACTS[2].prompt]
