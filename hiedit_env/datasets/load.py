"""Data sets: files and built-in names into requests. No torch.

What a row of each format may hold is in :mod:`hiedit_env.datasets.formats`, how bytes become rows
in :mod:`hiedit_env.datasets.files`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from types import MappingProxyType

from hiedit_env.datasets.difficulty import WorldName, is_world
from hiedit_env.datasets.files import read_rows
from hiedit_env.datasets.formats import FORMATS, recognise
from hiedit_env.datasets.planted import make_world
from hiedit_env.datasets.refused import refusal
from hiedit_env.datasets.report import DatasetReport, repetitions
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.rows import Row
from hiedit_env.datasets.streams import split_by_subject, without
from hiedit_env.errors import DatasetError, HieditWarning

__all__ = ["BUILT_IN", "FORMATS", "SPLITS", "load_requests", "read_dataset"]

#: What a file of facts holds, for an error.
_ROWS = "; a row is an object with prompt, answer and subject"

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "world-facts": "world_facts.json",
        "knowledge-forms-train": "knowledge_forms_train.json",
        "knowledge-forms-test": "knowledge_forms_test.json",
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


def load_requests(
    name_or_path: str | os.PathLike[str], *, format: str | None = None
) -> list[Request]:
    """Read a data set; :func:`read_dataset` also says what was understood of it.

    Warns with :class:`~hiedit_env.errors.HieditWarning`, once for each kind, of fields that are not
    read, of rows that are left out and of facts that contradict each other.

    Args:
        name_or_path: A name of :data:`BUILT_IN` or :data:`SPLITS`, ``planted:DIFFICULTY:SEED`` for
            the facts of a planted world (:mod:`.difficulty`), or the path of a ``.json`` file
            (a list of rows, an object holding one list, an object of rows, or a single row) or a
            ``.jsonl`` file (one row a line). A ``.json`` file with one row a line is read too:
            UltraEdit's README writes UltraEditBench that way. ``-`` is standard input; it, pipes
            and ``/dev/stdin`` are read by their content.
        format: A name of :data:`FORMATS`; by default recognised from the fields of the first row.

    Returns:
        The requests, in file order: one per row, but several from a row of MQuAKE and none from a
        row without an answer to write. Requests that repeat or contradict each other are all kept
        here and thinned out by :func:`~hiedit_env.datasets.streams.stream`.

    Raises:
        SettingsError: no planted world has this name.
        DatasetError: unknown name or format, a file that cannot be read, is too large or is not
            JSON (with line and column), no rows, or a malformed row (with file, row counted from 0,
            and field).
    """
    report = read_dataset(name_or_path, format=format)
    for line in report.serious():
        warnings.warn(line, HieditWarning, stacklevel=2)
    return report.requests


def read_dataset(
    name_or_path: str | os.PathLike[str], *, format: str | None = None
) -> DatasetReport:
    """Read a data set and say what was understood: arguments and errors of :func:`load_requests`.

    >>> report = read_dataset("tiny-facts")
    >>> report.format, report.counts["facts"], report.remarks()
    ('hiedit', 160, [])
    """
    label = os.fspath(name_or_path)
    if format is not None and format not in FORMATS:
        raise DatasetError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if is_world(label):
        return _parsed(make_world(WorldName.read(label)).records(), label, format or "hiedit")
    if label in SPLITS:
        whole, side = SPLITS[label]
        report = read_dataset(whole, format=format)
        halves = split_by_subject(report.requests, held_out=0.5, seed=0)
        half = halves[1] if side else without(*halves)
        return DatasetReport(label, report.format, half, len(half), repetitions=repetitions(half))
    built_in = (
        files("hiedit_env.datasets") / "data" / BUILT_IN[label] if label in BUILT_IN else None
    )
    values = read_rows(label, built_in, ", ".join(sorted((*BUILT_IN, *SPLITS))))
    if not values:
        hint = " (a stream is read once only)" if label.startswith(("-", "/dev/", "/proc/")) else ""
        raise DatasetError(f"{label} holds no rows{hint or _ROWS}")
    rows: list[Mapping[str, object]] = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise DatasetError(f"{label} row {i} must be an object, got {json.dumps(value)[:60]}")
        rows.append(value)
    return _parsed(rows, label, format or _recognised(rows[0], label))


def _parsed(rows: Sequence[Mapping[str, object]], label: str, format: str) -> DatasetReport:
    parse = FORMATS[format].parse
    requests: list[Request] = []
    unread: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for i, fields in enumerate(rows):
        row = Row(fields, f"{label} row {i}")
        found = parse(row)
        requests += found if isinstance(found, tuple) else () if found is None else (found,)
        left_out.update(row.left_out)
        if found is not None:
            unread.update(row.unread())
    if not requests:
        raise DatasetError(f"{label} holds no facts: {'; '.join(left_out)} in all {len(rows)} rows")
    return DatasetReport(
        label, format, requests, len(rows), dict(unread), dict(left_out), repetitions(requests)
    )


def _recognised(fields: Mapping[str, object], label: str) -> str:
    found = recognise(fields)
    if found is not None and "image" not in fields:
        return found
    refused = refusal(fields)
    if refused is not None:
        raise DatasetError(f"{label} {refused}")
    known = "; ".join(f"{name} ({', '.join(f.signature)})" for name, f in FORMATS.items())
    raise DatasetError(
        f"{label}: unknown format, row 0 has the fields {', '.join(fields) or '(none)'}; "
        f"known formats and the fields that mark them: {known}"
    )
