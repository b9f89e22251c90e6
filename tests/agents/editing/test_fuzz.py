"""Hostile facts and damaged ledgers: edited or refused, and never half."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hiedit_agents import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE
from hiedit_env.errors import DatasetError, HieditError, LedgerError, PromptError
from tests.support.editors import FACTS, NONE, bits
from tests.support.fuzz import HOSTILE, JSON, TEXTS, damaged, require_one_line

pytestmark = pytest.mark.filterwarnings("ignore::hiedit_env.errors.HieditWarning")


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor.from_pretrained("tiny", checks=NONE, max_steps_per_edit=1) as made:
        yield made


@settings(max_examples=40)
@given(prompt=TEXTS, answer=TEXTS, subject=TEXTS)
@example(prompt="Belka " * 1700, answer="Averlund", subject="Belka")  # 10,200 characters
@example(prompt="Belka lives in", answer="Averlund " * 1200, subject="Belka")
@example(prompt="<eos><bos>Belka lives in", answer="<eos>", subject="<bos>")
def test_any_text_is_edited_or_refused_and_can_be_taken_back(
    editor: Editor, prompt: str, answer: str, subject: str
) -> None:
    before, count = bits(editor), len(editor.ledger)
    try:
        [result] = editor.edit((prompt, answer, subject))
    except (DatasetError, PromptError) as error:
        require_one_line(error)
        assert bits(editor) == before
        assert len(editor.ledger) == count
        return
    if result.id is not None:
        assert editor.ledger[result.id].record["facts"][0]["request"]["answer"] == result.answer
        editor.undo(result.id)
    assert bits(editor) == before


@settings(max_examples=40)
@given(fact=JSON | st.dictionaries(st.sampled_from(("prompt", "answer", "subject")), JSON))
def test_whatever_is_given_for_a_fact_is_named(editor: Editor, fact: Any) -> None:
    before, count = bits(editor), len(editor.ledger)
    try:
        results = editor.edit(fact)
    except (DatasetError, PromptError) as error:
        require_one_line(error)
        assert (bits(editor), len(editor.ledger)) == (before, count)
        return
    editor.rewind(0)
    assert all(result.status in ("written", "known", "rolled back") for result in results)


def test_duplicates_and_contradictions_in_one_call(editor: Editor) -> None:
    editor.rewind(0)
    facts = [*FACTS[:2], FACTS[0], (FACTS[0].prompt, FACTS[1].answer), *FACTS[:1]]
    for together in (1, 5):
        results = editor.edit(facts, together=together)
        assert len(results) == 5
        assert editor.ledger.facts()[FACTS[0].prompt][1]["answer"] == FACTS[0].answer
        editor.rewind(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of three edits and an undo, as one file."""
    folder = tmp_path_factory.mktemp("whole")
    with Editor.from_pretrained("tiny", checks=NONE, max_steps_per_edit=1) as made:
        made.edit(FACTS[:3])
        made.undo(2)
        made.ledger.copy_to(folder)
    return folder / FILE


def opened(data: bytes) -> list[Any] | None:
    """All that a file says, read to the end; None where it was refused."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / FILE).write_bytes(data)
        try:
            with Ledger.open(Path(place)) as ledger:
                said: list[Any] = [(e.kind, e.target, e.record) for e in ledger]
                shapes = [
                    [None if u is None else (u.left.tolist(), u.right.tolist()) for u in step]
                    for number, (kind, _, _) in enumerate(said, 1)
                    if kind == "edit"
                    for step in ledger.steps(number)
                ]
                return [ledger.base, ledger.active, said, shapes]
        except LedgerError as error:
            require_one_line(error)
            return None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_ledger_is_refused_or_says_the_same(whole: Path, data: st.DataObject) -> None:
    assert opened(data.draw(damaged(whole.read_bytes()))) in (None, opened(whole.read_bytes()))


@settings(max_examples=40)
@given(column=st.sampled_from(("record", "kind", "target", "factors", "digest")), value=JSON)
def test_rows_of_any_content_are_refused(whole: Path, column: str, value: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / FILE
        path.write_bytes(whole.read_bytes())
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA foreign_keys=OFF")
        text = json.dumps(value)
        connection.execute(f"UPDATE events SET {column} = ? WHERE id = 2", (text,))
        connection.commit()
        connection.close()
        assert opened(path.read_bytes()) is None


@settings(max_examples=40)
@given(value=JSON | st.dictionaries(st.sampled_from(("model", "dtype", "layers")), JSON))
def test_a_base_of_any_content_is_refused(whole: Path, value: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / FILE
        path.write_bytes(whole.read_bytes())
        connection = sqlite3.connect(path)
        connection.execute("UPDATE base SET record = ?", (json.dumps(value),))
        connection.commit()
        connection.close()
        with pytest.raises(HieditError), Ledger.open(Path(place)):
            raise AssertionError("it was opened")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_what_they_are_in_a_ledger(
    text: str, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_bytes(whole.read_bytes())
    with Ledger.open(tmp_path, write=True) as ledger:
        ledger.append("edit", None, {"facts": [{"request": {"prompt": text, "answer": "a"}}]})
    with Ledger.open(tmp_path) as ledger:
        assert ledger.facts()[text][1]["prompt"] == text
