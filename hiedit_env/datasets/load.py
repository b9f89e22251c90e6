"""Data sets: files and built-in names into requests. No torch.

What a row of each format may hold is in :mod:`hiedit_env.datasets.formats`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType

from hiedit_env.datasets.formats import FORMATS, Format, Row, recognise
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import split_by_subject, without
from hiedit_env.errors import DatasetError

__all__ = ["BUILT_IN", "FORMATS", "SPLITS", "load_requests"]

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
"""Names of the data sets that come with the package -> file in ``data/`` beside this module."""

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
        place = files("hiedit_env.datasets") / "data" / BUILT_IN[label]
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
