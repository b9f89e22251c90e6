"""Facts as people have them, as requests.

A fact is a :class:`~hiedit_env.datasets.requests.Request`, a mapping in any row format of a data
file (``prompt`` and ``answer`` are enough), or a pair ``(prompt, answer)``, to which the subject
may be added. Without a subject, a fact is edited at the first name in its prompt, or at its end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hiedit_env.datasets.formats import FORMATS, recognise
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.rows import Row
from hiedit_env.errors import DatasetError, HieditWarning
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.rules.base import UpdateRule

#: One fact.
Fact = Request | Mapping[str, Any] | tuple[str, ...]
#: Facts, or a single one.
Facts = Fact | Iterable[Fact]


def as_requests(facts: Facts) -> list[Request]:
    """Facts as requests, in their order.

    Args:
        facts: Several, or one.

    Raises:
        DatasetError: something that is no fact; names its place, from 0.

    >>> [found] = as_requests(("The capital of France is", "Lyon"))
    >>> found.answer, found.subject
    ('Lyon', 'The capital of France is')
    >>> [r.subject for r in as_requests([("A is in", "B", "A"), {"prompt": "P", "answer": "Q"}])]
    ['A', 'P']
    """
    if isinstance(facts, Request | Mapping) or _is_pair(facts):
        return _requests(facts, 0)
    if isinstance(facts, str) or not isinstance(facts, Iterable):
        raise DatasetError(
            f"facts must be mappings, Requests or pairs (prompt, answer), got {facts!r:.80}; "
            "read a file with hiedit_env.load_requests"
        )
    return [request for place, fact in enumerate(facts) for request in _requests(fact, place)]


def warn_of_subjects(
    low: UpdateRule, facts: Sequence[tuple[Request, Sequence[EncodedPrompt]]]
) -> None:
    """Warns of facts that are edited at their subject though their prompt does not name it.

    Args:
        low: Says where it edits.
        facts: Requests with their prompts as tokens.
    """
    found = [r for r, prompts in facts if any(p.subject_missing for p in prompts)]
    if found and low.tokens == "subject":
        warnings.warn(
            f"{len(found)} of {len(facts)} facts name a subject that is not in their prompt, such "
            f"as {found[0].source} ({found[0].subject!r:.60}); they are edited at the prompt's "
            "last token, which does not carry over to other words: write the subject as it stands "
            "in the prompt",
            HieditWarning,
            stacklevel=3,
        )


def _requests(fact: Any, place: int) -> list[Request]:
    source = f"fact {place}"
    if isinstance(fact, Request):
        return [fact]
    if _is_pair(fact):
        fact = dict(zip(("prompt", "answer", "subject"), fact, strict=False))
    if not isinstance(fact, Mapping):
        raise DatasetError(
            f"{source} must be a mapping, a Request or a pair (prompt, answer), got {fact!r:.80}"
        )
    name = recognise(fact)
    if name is None:
        raise DatasetError(
            f"{source} has the fields {', '.join(map(str, fact)) or 'none'}, which are no row "
            "format; give 'prompt' and 'answer'"
        )
    row = Row(fact, source)
    found = FORMATS[name].parse(row)
    if found is None:
        raise DatasetError(f"{source} gives nothing to edit: {'; '.join(row.left_out)}")
    return list(found) if isinstance(found, tuple) else [found]


def _is_pair(fact: Any) -> bool:
    """Whether it is a tuple of two or three texts; lists of texts too are taken for one fact."""
    return (
        isinstance(fact, tuple | list)
        and len(fact) in (2, 3)
        and all(isinstance(text, str) for text in fact)
    )


def request_record(request: Request) -> dict[str, Any]:
    """A request as JSON, for the ledger; the row format ``facts`` reads it again.

    >>> request_record(Request("P", "A", "S"))
    {'prompt': 'P', 'answer': 'A', 'subject': 'S'}
    """
    record: dict[str, Any] = {
        "prompt": request.prompt,
        "answer": request.answer,
        "subject": request.subject,
        "paraphrases": list(request.paraphrases),
        "locality": [{"prompt": p.prompt, "answer": p.answer} for p in request.locality],
        "relation": request.relation,
        "prompt_form": request.prompt_form,
        "system": request.system,
    }
    return {name: value for name, value in record.items() if value}
