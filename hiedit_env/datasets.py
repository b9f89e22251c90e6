"""Data sets: files and built-in names into requests; splits, streams, fingerprints. No torch.

What a row of each format may hold is in :mod:`hiedit_env.dataset_formats`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hiedit_env.dataset_formats import FORMATS, Format, Row, recognise
from hiedit_env.errors import DatasetError, SettingsError
from hiedit_env.requests import Request

__all__ = [
    "BUILT_IN",
    "FORMATS",
    "SPLITS",
    "fingerprint",
    "load_requests",
    "split_by_subject",
    "stream",
    "without",
]

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "world-facts": "world_facts.json",
        "tiny-facts": "tiny_facts.json",
        "planted-facts": "planted_facts.json",
    }
)
#: Halves of a built-in data set by subject, to train on and to evaluate on: name → (whole, side).
#: Nothing that the second half asks is in the first.
SPLITS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "world-facts-train": ("world-facts", 0),
        "world-facts-test": ("world-facts", 1),
        "planted-facts-train": ("planted-facts", 0),
        "planted-facts-test": ("planted-facts", 1),
    }
)
"""Names of the data sets that come with the package -> file in ``hiedit_env/data``."""

_ENDINGS = (".json", ".jsonl")


def load_requests(
    name_or_path: str | os.PathLike[str], *, format: str | None = None
) -> list[Request]:
    """Read a data set.

    Args:
        name_or_path: A name of :data:`BUILT_IN` or :data:`SPLITS`, or the path of a ``.json`` file
            (a list of rows, an object holding one list, or a single row) or a ``.jsonl`` file (one
            row a line). A ``.json`` file with one row a line is read too: UltraEdit's README writes
            UltraEditBench that way.
        format: A name of :data:`FORMATS`; by default recognised from the fields of the first row.

    Returns:
        One request per row, in file order. Rows that repeat or contradict each other are all kept
        here and thinned out by :func:`stream`.

    Raises:
        DatasetError: unknown name or format, a file that cannot be read or is not JSON (with line
            and column), no rows, or a malformed row (with file, row counted from 0, and field).
    """
    split = SPLITS.get(os.fspath(name_or_path))
    if split is not None:
        whole, side = split
        halves = split_by_subject(load_requests(whole, format=format), held_out=0.5, seed=0)
        return halves[1] if side else without(*halves)
    chosen = None
    if format is not None:
        chosen = FORMATS.get(format)
        if chosen is None:
            raise DatasetError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    label, text, by_line = _read(name_or_path)
    values = _parse_lines(text, label) if by_line else _parse_document(text, label)
    if not values:
        raise DatasetError(f"{label} holds no rows")
    rows: list[Mapping[str, object]] = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise DatasetError(f"{label} row {i} must be an object, got {json.dumps(value)[:60]}")
        rows.append(value)
    chosen = chosen or _recognised(rows[0], label)
    return [chosen.parse(Row(row, f"{label} row {i}")) for i, row in enumerate(rows)]


def _read(name_or_path: str | os.PathLike[str]) -> tuple[str, str, bool]:
    """Label for messages, content, and whether it is one row a line."""
    label = os.fspath(name_or_path)
    place: Traversable
    if label in BUILT_IN:
        place = files("hiedit_env") / "data" / BUILT_IN[label]
    else:
        path = Path(label)
        if not path.exists():
            raise DatasetError(
                f"no data set {label!r}: neither a built-in name "
                f"({', '.join(sorted((*BUILT_IN, *SPLITS)))}) "
                "nor the path of an existing .json or .jsonl file"
            )
        if path.suffix.lower() not in _ENDINGS:
            raise DatasetError(f"{label}: a data set is a .json or .jsonl file")
        place = path
    try:
        # utf-8-sig drops the byte order mark that some editors put in front.
        text = place.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{label} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{label} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    return label, text, place.name.lower().endswith(".jsonl")


def _loads(text: str, label: str, first_line: int = 1) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DatasetError(
            f"{label} is not JSON at line {line}, column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, lists nested too deep
        raise DatasetError(f"{label} cannot be read as JSON: {error}") from error


def _parse_lines(text: str, label: str) -> list[object]:
    # Not splitlines(): it also breaks at characters such as U+2028, which JSON allows inside texts.
    lines = enumerate(text.split("\n"), start=1)
    return [_loads(line, label, number) for number, line in lines if line.strip()]


def _parse_document(text: str, label: str) -> list[object]:
    if not text.strip():
        return []
    try:
        document = _loads(text, label)
    except DatasetError:
        if not _starts_with_a_row(text):
            raise
        return _parse_lines(text, label)
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise DatasetError(f"{label} must hold a list of rows, got {json.dumps(document)[:60]}")
    if recognise(document):  # a single row: its own lists are paraphrases, not rows
        return [document]
    lists = [value for value in document.values() if isinstance(value, list)]
    if len(lists) != 1:
        raise DatasetError(
            f"{label} must hold a list of rows, or an object with exactly one list; "
            f"it has {len(lists)} lists (fields: {', '.join(document) or 'none'})"
        )
    return lists[0]


def _starts_with_a_row(text: str) -> bool:
    """Whether the first line alone is a JSON object, so that the rest must be rows too."""
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _recognised(fields: Mapping[str, object], label: str) -> Format:
    found = recognise(fields)
    if found is None:
        known = "; ".join(f"{name} ({', '.join(f.signature)})" for name, f in FORMATS.items())
        raise DatasetError(
            f"{label}: unknown format, row 0 has the fields {', '.join(fields) or '(none)'}; "
            f"known formats and the fields that mark them: {known}"
        )
    return found


def without(requests: Sequence[Request], kept: Sequence[Request]) -> list[Request]:
    """Requests to train on, where others are kept for an evaluation.

    Requests about a kept subject go, and so does every text that the kept ones ask (prompt,
    paraphrase or unrelated prompt, compared without regard to case and white space), wherever it
    stands: requests whose prompt it is, paraphrases and unrelated prompts.

    Args:
        requests: To choose from; their order stays.
        kept: For the evaluation.

    >>> fact = Request("Rome is in", "Peru", "Rome", paraphrases=("Rome lies in",))
    >>> asked = [Request("Oslo is in", "Chad", "Oslo", paraphrases=("ROME lies  in",))]
    >>> without([fact], asked)[0].paraphrases
    ()
    """

    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    subjects = {plain(request.subject) for request in kept}
    asked = {
        plain(text)
        for request in kept
        for text in (
            request.prompt,
            *request.paraphrases,
            *(probe.prompt for probe in request.locality),
        )
    }
    return [
        replace(
            request,
            paraphrases=tuple(t for t in request.paraphrases if plain(t) not in asked),
            locality=tuple(p for p in request.locality if plain(p.prompt) not in asked),
        )
        for request in requests
        if plain(request.subject) not in subjects and plain(request.prompt) not in asked
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

    The model sees a prompt and no subject, so there is one fact per prompt: a later request with
    the same prompt, be it a repetition or a contradiction, is dropped before the draw.

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
    """
    if num_edits is not None and (
        isinstance(num_edits, bool) or not isinstance(num_edits, int | np.integer) or num_edits < 1
    ):
        raise SettingsError(f"num_edits must be a positive whole number or None, got {num_edits!r}")
    distinct: dict[str, Request] = {}
    for request in requests:
        distinct.setdefault(request.prompt, request)
    facts = list(distinct.values())
    if not facts:
        raise DatasetError("there are no facts to draw a stream from")
    if num_edits is not None and num_edits > len(facts):
        dropped = len(requests) - len(facts)
        raise DatasetError(
            f"asked for {num_edits} edits, but there are only {len(facts)} facts"
            + (f" ({dropped} more repeat a prompt)" if dropped else "")
        )
    return [facts[i] for i in generator.permutation(len(facts))[:num_edits]]


def fingerprint(requests: Sequence[Request]) -> str:
    """Hash of what the requests say, in their order, for results files: 16 hexadecimal digits.

    The same on every machine; ``source``, which holds a path, does not count.

    >>> fact = Request("Rome is in", "Peru", "Rome", source="a.json row 0")
    >>> fingerprint([fact]) == fingerprint([Request("Rome is in", "Peru", "Rome")])
    True
    """
    digest = hashlib.sha256()
    for request in requests:
        content = [
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
        digest.update(json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()[:16]
