"""The facts that a model's edits in place have written: for every prompt its latest answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hiedit_agents.editing.checks import AskedFact


class FactsInPlace:
    """Facts with the ids of their edits, in the order in which they were written.

    A prompt is one as the model reads it: in another form, or behind another system message, it is
    another one. A fact that asks a prompt of an earlier one replaces it.
    """

    def __init__(self) -> None:
        self._facts: dict[int, tuple[int, AskedFact]] = {}
        #: By the tokens of every prompt, which of the facts asks it.
        self._asked: dict[tuple[int, ...], int] = {}
        self._next = 0

    def __iter__(self) -> Iterator[AskedFact]:
        return (fact for _, fact in self._facts.values())

    def replaced_by(self, fact: AskedFact) -> int | None:
        """The latest edit that a fact replaces."""
        found = self._places([fact])
        return self._facts[max(found)][0] if found else None

    def without(self, facts: Sequence[AskedFact]) -> list[AskedFact]:
        """All but those that some facts replace."""
        left_out = self._places(facts)
        return [fact for place, (_, fact) in self._facts.items() if place not in left_out]

    def put(self, number: int, facts: Sequence[AskedFact]) -> None:
        """Takes in facts, which replace what they ask again.

        Args:
            number: Id of their edit.
            facts: With different prompts.
        """
        for place in self._places(facts):
            _, gone = self._facts.pop(place)
            for prompt in gone.prompts:
                self._asked.pop(prompt.prompt_ids, None)
        for fact in facts:
            self._facts[self._next] = number, fact
            self._asked.update((prompt.prompt_ids, self._next) for prompt in fact.prompts)
            self._next += 1

    def _places(self, facts: Sequence[AskedFact]) -> set[int]:
        asked = (prompt.prompt_ids for fact in facts for prompt in fact.prompts)
        return {self._asked[ids] for ids in asked if ids in self._asked}


def different(facts: Sequence[AskedFact]) -> Sequence[AskedFact]:
    """The first facts, up to one that asks a prompt which is there already."""
    asked: set[tuple[int, ...]] = set()
    for i, fact in enumerate(facts):
        own = {prompt.prompt_ids for prompt in fact.prompts}
        if own & asked:
            return facts[:i]
        asked |= own
    return facts
