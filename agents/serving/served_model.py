"""A model that is asked by many and edited by one at a time.

Two trees of modules answer: the unedited model and the present one, see :mod:`.snapshots`. The
editor writes into a third, which nobody asks. When an edit is recorded, a new snapshot takes the
place of the present one in a single assignment: whoever asks sees the model before or after the
edit, never a mixture, and neither waits for the other.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from hiedit_agents.editing.controls import has_template
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.facts import Facts
from hiedit_agents.editing.ledger_format import Event
from hiedit_agents.editing.results import EditResult
from hiedit_agents.serving.answering import Answered, Question, Speaker
from hiedit_agents.serving.snapshots import Snapshot, present_snapshot, unedited_snapshot
from hiedit_env.errors import LedgerError
from hiedit_env.model.generation import end_ids
from hiedit_env.model.tokenization import PromptEncoder

#: What stands behind the model's name to ask the unedited one.
UNEDITED = ":unedited"


class ServedModel:
    """An edited model and the unedited one, asked and edited at the same time.

    Args:
        editor: Nobody else uses it or its model from now on.
        name: By which it is asked for.
        ends: Tokens that end an answer; by default those of the model and its tokenizer.
    """

    def __init__(self, editor: Editor, name: str, *, ends: frozenset[int] | None = None) -> None:
        self.name = name
        self._editor = editor
        llm = editor.llm
        # A fast tokenizer breaks when two threads use it: the editor has the original one.
        self._encoder = PromptEncoder(
            copy.deepcopy(editor.tokenizer),
            llm.encoder.max_length,
            llm.encoder.end_id,
            llm.encoder.vocabulary,
        )
        self._tokenizing = threading.Lock()
        ends = end_ids(editor.model, llm.encoder) if ends is None else ends
        pad = editor.tokenizer.pad_token_id or 0
        self._speaker = Speaker(self._decode, ends, cast(int, pad), not llm.generates_whole)
        self._writing = threading.Lock()
        #: The unedited model.
        self.unedited = unedited_snapshot(llm)
        #: The model as it is edited now; another object after every change.
        self.present = present_snapshot(llm, editor.ledger.active, self.unedited)
        # Grows at its end only, so it can be read while an edit is written.
        self._events = list(editor.ledger)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return has_template(self._encoder.tokenizer)

    @property
    def agent(self) -> str:
        """Who edits."""
        return self._editor.agent

    def snapshot(self, name: str) -> Snapshot | None:
        """The snapshot of a name that is asked for; None where there is no such model."""
        found = {self.name: self.present, self.name + UNEDITED: self.unedited}
        return found.get(name)

    # -- asking ------------------------------------------------------------------------------------

    def tokens(self, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Tokens of a text to continue, or of a conversation.

        Raises:
            PromptError: it is empty, too long, or the tokenizer has no chat template.
        """
        with self._tokenizing:
            if isinstance(prompt, str):
                return self._encoder.encode_prompt(prompt, remember=False)
            return self._encoder.encode_messages(prompt)

    def room(self, ids: Sequence[int]) -> int | None:
        """Number of new tokens that fit behind a prompt; None where there is no limit."""
        limit = self._encoder.max_length
        # The last new token is never read, so it needs no position.
        return None if limit is None else limit + 1 - len(ids)

    def answer(
        self, snapshot: Snapshot, question: Question, send: Callable[[str], None]
    ) -> Answered:
        """Generates an answer of one snapshot; see :meth:`.answering.Speaker.answer`."""
        return self._speaker.answer(snapshot.model, question, send)

    def _decode(self, ids: Sequence[int]) -> str:
        with self._tokenizing:
            return self._encoder.decode(ids)

    # -- editing -----------------------------------------------------------------------------------

    def edit(self, facts: Facts, together: int = 1) -> tuple[list[EditResult], str]:
        """Writes facts, see :meth:`~hiedit_agents.Editor.edit`; they are answered from then on.

        Returns:
            One result per fact, and the fingerprint of the weights that hold them.

        Raises:
            DatasetError, PromptError: a fact that cannot be read; nothing has changed.
            OutputError: the ledger cannot be written; the edits that were recorded stay.
        """
        with self._writing:
            try:
                results = self._editor.edit(facts, together=together)
            finally:
                self._publish()
            return results, self.present.fingerprint

    def undo(self, id: int) -> Event:
        """Takes one edit back.

        Returns:
            The event that says so in the ledger.

        Raises:
            LedgerError: there is no such edit, or it is not in place; nothing has changed.
        """
        with self._writing:
            try:
                self._editor.undo(id)
            finally:
                self._publish()
            return self._events[-1]

    def _publish(self) -> None:
        ledger = self._editor.ledger
        self._events += [ledger[number] for number in range(len(self._events) + 1, len(ledger) + 1)]
        if ledger.active != self.present.active:
            self.present = present_snapshot(self._editor.llm, ledger.active, self.present)

    # -- what there is -----------------------------------------------------------------------------

    def edits(self, active: Sequence[int], limit: int, before: int | None = None) -> list[Event]:
        """Some edits, the latest first.

        Args:
            active: Ids of those in place.
            limit: Their largest number.
            before: Only those with a smaller id.
        """
        chosen = [i for i in reversed(active) if before is None or i < before][:limit]
        return [self._events[i - 1] for i in chosen]

    def event(self, id: int) -> Event:
        """One edit, in place or not.

        Raises:
            LedgerError: there is no such edit.
        """
        known = self._events
        if not 1 <= id <= len(known) or known[id - 1].kind != "edit":
            raise LedgerError(f"there is no edit {id}; GET /edits lists those in place")
        return known[id - 1]


def described(event: Event, active: Sequence[int]) -> dict[str, Any]:
    """An edit as JSON: its id, whether it is in place, and what its ledger says."""
    return {"id": event.id, "object": "edit", "in_place": event.id in active, **event.record}
