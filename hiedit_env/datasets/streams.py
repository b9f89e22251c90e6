"""Splits, streams and fingerprints of data sets. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.writing import comparable
from hiedit_env.errors import DatasetError, SettingsError, shown

T = TypeVar("T")


def without(requests: Sequence[Request], kept: Sequence[Request]) -> list[Request]:
    """Requests to train on, where others are kept for an evaluation.

    Requests about a kept subject go, and so does every text that the kept ones ask (prompt,
    paraphrase, unrelated prompt or prompt of portability, compared without regard to case and white
    space), wherever it stands: requests whose prompt it is, paraphrases, unrelated prompts and
    those of portability.

    Args:
        requests: To choose from; their order stays.
        kept: For the evaluation.

    >>> fact = Request("Rome is in", "Peru", "Rome", paraphrases=("Rome lies in",))
    >>> asked = [Request("Oslo is in", "Chad", "Oslo", paraphrases=("ROME lies  in",))]
    >>> without([fact], asked)[0].paraphrases
    ()
    """
    subjects = {comparable(request.subject) for request in kept}
    asked = {
        comparable(text)
        for request in kept
        for text in (
            request.prompt,
            *request.paraphrases,
            *(probe.prompt for probe in request.locality),
            *(probe.prompt for probe in request.portability),
        )
    }
    return [
        replace(
            request,
            paraphrases=tuple(t for t in request.paraphrases if comparable(t) not in asked),
            locality=tuple(p for p in request.locality if comparable(p.prompt) not in asked),
            portability=tuple(p for p in request.portability if comparable(p.prompt) not in asked),
        )
        for request in requests
        if comparable(request.subject) not in subjects and comparable(request.prompt) not in asked
    ]


def split_by_subject(
    requests: Sequence[Request], *, held_out: float, seed: int
) -> tuple[list[Request], list[Request]]:
    """Split so that no subject, compared without regard to case, is on both sides.

    Which subjects are held out depends on the set of subjects and on ``seed``, not on the order of
    the requests.

    Args:
        requests: What to split; its order is kept on both sides.
        held_out: Share of the *subjects* to hold out, at least 0 and below 1. It is rounded to
            whole subjects; above 0, either side gets at least one.
        seed: Non-negative.

    Returns:
        The requests kept, and those held out.

    Raises:
        SettingsError: ``held_out`` or ``seed`` out of range.
        DatasetError: fewer than two subjects where some are to be held out.

    >>> facts = [
    ...     Request("Rome is in", "Peru", "Rome"),
    ...     Request("ROME lies in", "Peru", "ROME"),
    ...     Request("Oslo is in", "Chad", "Oslo"),
    ... ]
    >>> kept, held = split_by_subject(facts, held_out=0.5, seed=0)
    >>> sorted(len(side) for side in (kept, held))
    [1, 2]
    """
    if isinstance(held_out, bool) or not 0 <= held_out < 1:
        raise SettingsError(f"held_out must be at least 0 and below 1, got {held_out!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise SettingsError(f"seed must be a non-negative whole number, got {seed!r}")
    if held_out == 0:
        return list(requests), []
    subjects = sorted({request.subject.casefold() for request in requests})
    if len(subjects) < 2:
        raise DatasetError(
            f"cannot hold out a share of {len(subjects)} subject(s); a split needs at least 2"
        )
    count = min(max(round(held_out * len(subjects)), 1), len(subjects) - 1)
    order = np.random.default_rng(seed).permutation(len(subjects))
    away = {subjects[i] for i in order[:count]}
    kept = [request for request in requests if request.subject.casefold() not in away]
    held = [request for request in requests if request.subject.casefold() in away]
    return kept, held


def stream(
    requests: Sequence[Request], num_edits: int | None, generator: np.random.Generator
) -> list[Request]:
    """Draw a stream of facts: a sample without replacement, in random order.

    The model sees a prompt and no subject, so there is one fact per prompt. A later request with
    the same prompt is dropped before the draw: a contradiction altogether; a repetition leaves the
    paraphrases, unrelated prompts, portability prompts and subject aliases that the first one
    lacks.

    Args:
        requests: Where to draw from.
        num_edits: How many; None for all.
        generator: Advanced by one permutation of the distinct facts, whatever ``num_edits`` is.

    Raises:
        SettingsError: ``num_edits`` is not a positive whole number.
        DatasetError: there are fewer distinct facts than asked for, or none at all.

    >>> facts = [Request("Rome is in", "Peru", "Rome"), Request("Rome is in", "Chad", "Rome")]
    >>> [request.answer for request in stream(facts, None, np.random.default_rng(0))]
    ['Peru']
    >>> again = Request("Rome is in", "Peru", "Rome", subject_aliases=("Roma",))
    >>> stream([facts[0], again], None, np.random.default_rng(0))[0].subject_aliases
    ('Roma',)
    """
    if num_edits is not None and (
        isinstance(num_edits, bool) or not isinstance(num_edits, int | np.integer) or num_edits < 1
    ):
        raise SettingsError(f"num_edits must be a positive whole number or None, got {num_edits!r}")
    distinct: dict[str, Request] = {}
    for request in requests:
        first = distinct.setdefault(request.prompt, request)
        if first is not request and first.answer == request.answer:
            distinct[request.prompt] = _merged(first, request)
    facts = list(distinct.values())
    if not facts:
        raise DatasetError("there are no facts to draw a stream from")
    if num_edits is not None and num_edits > len(facts):
        dropped = len(requests) - len(facts)
        raise DatasetError(
            f"asked for {shown(num_edits)} edits, but there are only {len(facts)} facts"
            + (f" ({dropped} more repeat a prompt)" if dropped else "")
        )
    return [facts[i] for i in generator.permutation(len(facts))[:num_edits]]


def _merged(first: Request, later: Request) -> Request:
    """The first of two equal facts with the prompts and aliases that only the later one has."""
    return replace(
        first,
        paraphrases=_both(first.paraphrases, later.paraphrases),
        locality=_both(first.locality, later.locality),
        portability=_both(first.portability, later.portability),
        subject_aliases=_both(first.subject_aliases, later.subject_aliases),
    )


def _both(first: tuple[T, ...], later: tuple[T, ...]) -> tuple[T, ...]:
    """The first ones as they are, then those of the later ones that are new, each once."""
    return first + tuple(item for item in dict.fromkeys(later) if item not in first)


def fingerprint(requests: Sequence[Request]) -> str:
    """Hash of what the requests say, in their order, for results files: 16 hexadecimal digits.

    The same on every machine; ``source``, which holds a path, does not count. Portability, aliases,
    the form of the prompt and the system message count only where there are any, so that older
    results keep their fingerprints.

    >>> fact = Request("Rome is in", "Peru", "Rome", source="a.json row 0")
    >>> fingerprint([fact]) == fingerprint([Request("Rome is in", "Peru", "Rome")])
    True
    """
    digest = hashlib.sha256()
    for request in requests:
        content: list[object] = [
            request.prompt,
            request.answer,
            request.subject,
            request.paraphrases,
            [[probe.prompt, probe.answer] for probe in request.locality],
            request.old_answer,
            request.relation,
        ]
        if request.true_layers:
            content.append(request.true_layers)
        if request.portability or request.subject_aliases:
            more = [[p.kind, p.prompt, p.answer, p.aliases] for p in request.portability]
            content.append({"portability": more, "subject_aliases": request.subject_aliases})
        if request.prompt_form is not None or request.system is not None:
            content.append({"prompt_form": request.prompt_form, "system": request.system})
        digest.update(json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()[:16]
