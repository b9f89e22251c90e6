"""The facts that layers are measured on: which are taken, and the prompts that judge each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.writing import mentions
from hiedit_env.errors import DatasetError, PromptError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder

#: Most unrelated, and most subject-swapped prompts per fact.
PROMPTS = 4


@dataclass(frozen=True, slots=True)
class FactPrompts:
    """A fact as tokens.

    Args:
        prompt: With the new answer.
        paraphrases: With the new answer.
        unrelated: Prompts whose answers shall stay.
        swapped: The fact's prompt with other subjects in its place, whose answers shall stay.
    """

    prompt: EncodedPrompt
    paraphrases: tuple[EncodedPrompt, ...]
    unrelated: tuple[EncodedPrompt, ...]
    swapped: tuple[EncodedPrompt, ...]

    @property
    def others(self) -> tuple[EncodedPrompt, ...]:
        """All prompts whose answers shall stay."""
        return (*self.unrelated, *self.swapped)

    def answered_by(self, unedited: UneditedModel) -> Self:
        """The same, with the unedited model's greedy answers to the prompts that shall stay."""
        return replace(
            self,
            unrelated=tuple(unedited.answers(self.unrelated)),
            swapped=tuple(unedited.answers(self.swapped)),
        )


def spread(requests: Sequence[Request], rng: np.random.Generator) -> list[Request]:
    """All facts at random, one of each relation after another, then the second ones, and so on."""
    groups: dict[str | None, list[Request]] = {}
    for i in rng.permutation(len(requests)):
        groups.setdefault(requests[i].relation, []).append(requests[i])
    turns = max(map(len, groups.values()), default=0)
    return [group[k] for k in range(turns) for group in groups.values() if k < len(group)]


def swapped_prompts(
    fact: Request, requests: Sequence[Request], rng: np.random.Generator
) -> list[str]:
    """The prompt of a fact with other facts' subjects in its place, at most :data:`PROMPTS`.

    Subjects of the same relation come first, and no text that still names the fact's own subject
    is among them.

    Args:
        fact: A fact; there are none where its prompt does not name its subject.
        requests: Facts whose subjects are taken.
        rng: Draws them.
    """
    spans = mentions(fact.prompt, fact.subject)
    if not spans:
        return []
    mixed = [requests[i] for i in rng.permutation(len(requests))]
    mixed.sort(key=lambda other: other.relation is None or other.relation != fact.relation)
    found: dict[str, None] = {}
    for other in mixed:
        text, end = "", 0
        for first, last in spans:
            text += fact.prompt[end:first] + other.subject
            end = last
        text += fact.prompt[end:]
        if not mentions(text, fact.subject):
            found.setdefault(text)
        if len(found) == PROMPTS:
            break
    return list(found)


def prompts_of(
    facts: Sequence[Request],
    requests: Sequence[Request],
    encoder: PromptEncoder,
    rng: np.random.Generator,
) -> list[FactPrompts]:
    """The facts as tokens, with the prompts that judge them.

    A fact without unrelated prompts of its own is judged by prompts of other facts with another
    subject.

    Args:
        facts: What is written.
        requests: The data set, for other subjects and prompts.
        encoder: Of the model.
        rng: Draws subjects and prompts.

    Raises:
        DatasetError: a fact has nothing to show damage by.
        PromptError: a text that cannot be tokenised; names the fact's source.
    """
    made = []
    for fact in facts:
        unrelated = [probe.prompt for probe in fact.locality][:PROMPTS]
        if not unrelated:
            mixed = [requests[i] for i in rng.permutation(len(requests))]
            own = fact.subject.casefold()
            others = (r.prompt for r in mixed if r.subject.casefold() != own)
            unrelated = list(dict.fromkeys(others))[:PROMPTS]
        swapped = swapped_prompts(fact, requests, rng)
        if not unrelated and not swapped:
            raise DatasetError(
                f"{fact.source}: nothing shows the damage of writing it; give unrelated prompts, "
                "or a second fact with another subject"
            )
        try:
            made.append(
                FactPrompts(
                    encoder.encode(fact.prompt, fact.answer),
                    tuple(encoder.encode(text, fact.answer) for text in fact.paraphrases),
                    # Their answers come from the unedited model.
                    tuple(encoder.encode(text, fact.answer) for text in unrelated),
                    tuple(encoder.encode(text, fact.answer) for text in swapped),
                )
            )
        except PromptError as error:
            raise PromptError(f"{fact.source}: {error}") from error
    return made
