"""Edit units: facts that one step edits together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt


class Asked(Protocol):
    """A fact with its prompts as tokens."""

    @property
    def request(self) -> Request:
        """The fact."""

    @property
    def prompts(self) -> Sequence[EncodedPrompt]:
        """Its prompt in every form asked."""


def check_units(facts: Sequence[Asked], edits_per_step: int) -> None:
    """Refuses facts of one step that contradict each other.

    Args:
        facts: The stream.
        edits_per_step: How many are edited together.

    Raises:
        SettingsError: two of them give one prompt different answers.
    """
    for start in range(0, len(facts) if edits_per_step > 1 else 0, edits_per_step):
        known: dict[tuple[int, ...], Asked] = {}
        for fact in facts[start : start + edits_per_step]:
            for prompt in fact.prompts:
                other = known.setdefault(prompt.prompt_ids, fact)
                if other.request.answer.strip() != fact.request.answer.strip():
                    raise SettingsError(
                        f"{other.request.source} and {fact.request.source} are edited in one step "
                        f"and give {fact.request.prompt[:60]!r} two answers, "
                        f"{other.request.answer[:40]!r} and {fact.request.answer[:40]!r}; leave "
                        "one out or set edits_per_step=1 (--batch 1)"
                    )
