"""Bytes into JSON rows: files, streams, limits on their size, and errors with line and column."""

from __future__ import annotations

import json
import os
import sys
from codecs import getincrementaldecoder
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, BinaryIO

from hiedit_env.datasets.formats import recognise
from hiedit_env.datasets.named_pipes import open_stream
from hiedit_env.datasets.other_files import kind_by_start, remedy_by_ending
from hiedit_env.datasets.refused import is_by_columns, refusal
from hiedit_env.errors import DatasetError

#: The largest file, in bytes, and the longest line of a ``.jsonl`` file; more is refused before it
#: is read, since JSON needs several times as much memory.
MAX_FILE_BYTES = 2 * 10**9
MAX_LINE_BYTES = 200 * 10**6

_PIECE_BYTES = 2**20
_LINES = (".jsonl", ".ndjson")
_ENDINGS = (".json", *_LINES)
_MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put in front


def read_rows(label: str, built_in: Traversable | None, names: str) -> list[object]:
    """The rows of a data set.

    Args:
        label: What the user gave: a path, or ``-`` for standard input.
        built_in: The file of a built-in data set, if ``label`` is its name.
        names: The built-in names, for messages.

    Raises:
        DatasetError: there is no such file, it cannot be read, is too large or is not JSON.
    """
    if built_in is not None:
        return _document(_decode(built_in.read_bytes(), label), label)
    if label == "-":
        return _document(_decode(_read_stream(standard_input(), label), label), label)
    path = Path(label)
    if not label.strip() or not os.path.exists(path):
        raise DatasetError(
            f"no data set {label!r}: neither a built-in name ({names}) "
            "nor the path of an existing .json or .jsonl file"
        )
    if path.is_dir():
        raise DatasetError(
            f"{label} cannot be read: it is a folder; give a .json or .jsonl file in it"
        )
    by_content = _is_stream(path)
    if not by_content and path.suffix.lower() not in _ENDINGS:
        raise DatasetError(f"{label}: a data set is a .json or .jsonl file{remedy_by_ending(path)}")
    try:
        if by_content:
            with open_stream(path) as stream:
                data = _read_stream(stream, label)
        else:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise _too_large(label)
                if path.suffix.lower() in _LINES:
                    return _lines(file, label)
                data = _read_all(file, label)
    except OSError as error:
        raise DatasetError(f"{label} cannot be read: {error.strerror or error}") from error
    return _document(_decode(data, label), label)


def _is_stream(path: Path) -> bool:
    """Pipes, devices and file descriptors have no ending and are judged by their content."""
    named = str(path.absolute()).startswith(("/dev/", "/proc/"))
    return named or not path.is_file()


def _too_large(label: str) -> DatasetError:
    return DatasetError(
        f"{label} has more than {MAX_FILE_BYTES / 1e9:.3g} GB, the most that is read; split it"
    )


def _read_all(file: IO[bytes], label: str) -> bytes:
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _too_large(label)
    return data


def _read_stream(file: IO[bytes], label: str) -> bytes:
    """As :func:`_read_all`, but what can be no rows is not read to its end, which may never come.

    Returns:
        All bytes, or the first ones, if they already show that this is no list of rows.
    """
    decoder = getincrementaldecoder("utf-8")()
    data = bytearray()
    while piece := file.read(_PIECE_BYTES):
        start = len(data)
        data += piece
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(label)
        if not start and kind_by_start(piece[:16]) is not None:
            break  # _decode names it
        if 0 in piece:
            raise DatasetError(
                f"{label} holds bytes that are no text (byte {start + piece.index(0)} is 0); give "
                "a .json or .jsonl file"
            )
        try:
            decoder.decode(piece)
        except UnicodeDecodeError:
            break  # _decode names the byte
        if not start and piece.removeprefix(_MARK).lstrip()[:1] not in b"[{":
            # _loads names the character; half a character at the end of the piece is left out.
            return bytes(data[: len(data) - len(decoder.getstate()[0])])
    return bytes(data)


def _decode(data: bytes, label: str, offset: int = 0) -> str:
    kind = kind_by_start(data[:16]) if not offset else None
    if kind is not None:
        raise DatasetError(f"{label} is {kind}")
    try:
        return data.removeprefix(_MARK if not offset else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{label} is not UTF-8 text (byte {offset + error.start}); save it as UTF-8"
        ) from error


def _lines(file: IO[bytes], label: str) -> list[object]:
    """One row a line, never more than one line in memory beside the rows."""
    rows: list[object] = []
    offset = number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DatasetError(
                f"{label} line {number} has more than {MAX_LINE_BYTES / 1e6:.4g} MB, the most that "
                "is read of one row; shorten its texts"
            )
        text = _decode(line, label, offset)
        offset += len(line)
        if not rows and text.lstrip().startswith("["):
            # One list of all rows, in a file that is named as if it had one row a line.
            return _document(text + _decode(_read_all(file, label), label, offset), label)
        if text.strip():
            rows.append(_loads(text.rstrip("\r\n"), label, number))
    return rows


def _loads(text: str, label: str, first_line: int = 1) -> object:
    def without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DatasetError(
                f"{label} has an object with the field {twice!r} twice, "
                f"{json.dumps(found, ensure_ascii=False)[:60]}; leave one of them"
            )
        return found

    try:
        return json.loads(text, object_pairs_hook=without_repetition)
    except DatasetError:  # is a ValueError, too
        raise
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        begins = f"; it begins with {text.lstrip()[:30]!r}" if not text[: error.pos].strip() else ""
        raise DatasetError(
            f"{label} is not JSON at line {line}, column {error.colno}: {error.msg}{begins}"
        ) from error
    except RecursionError as error:
        raise DatasetError(
            f"{label} cannot be read as JSON: its lists or objects are nested too deep"
        ) from error
    except ValueError as error:
        raise DatasetError(
            f"{label} cannot be read as JSON: a number has more than "
            f"{sys.get_int_max_str_digits()} digits; write it as text"
        ) from error


def standard_input() -> BinaryIO:
    """The bytes of standard input.

    Raises:
        DatasetError: it is closed.
    """
    if sys.stdin is None:
        raise DatasetError("facts were to come from standard input, which is closed")
    return sys.stdin.buffer


def _document(text: str, label: str) -> list[object]:
    """The rows of a JSON document, or of one row a line under another ending than ``.jsonl``."""
    if not text.strip():
        return []
    try:
        document = _loads(text, label)
    except DatasetError:
        if not _starts_with_a_row(text):
            raise
        # Not splitlines(): it also breaks at characters such as U+2028, which JSON allows in texts.
        lines = enumerate(text.split("\n"), start=1)
        return [_loads(line, label, number) for number, line in lines if line.strip()]
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise DatasetError(f"{label} must hold a list of rows, got {json.dumps(document)[:60]}")
    known = recognise(document)
    if (known or "columns" in document) and is_by_columns(document):
        raise DatasetError(
            f"{label} is a table stored by columns; write it row by row, in pandas with "
            f'to_json("facts.json", orient="records")'
        )
    if known:  # a single row: its own lists are paraphrases, not rows
        return [document]
    refused = refusal(document)
    if refused is not None:
        raise DatasetError(f"{label} {refused}")
    lists = [value for value in document.values() if isinstance(value, list)]
    if len(lists) == 1:
        return lists[0]
    values = list(document.values())
    if values and all(isinstance(v, Mapping) and recognise(v) for v in values):
        return values  # rows under their names
    raise DatasetError(
        f"{label} must hold a list of rows, or an object with exactly one list; "
        f"it has {len(lists)} lists (fields: {', '.join(document) or 'none'})"
    )


def _starts_with_a_row(text: str) -> bool:
    """Whether the first line alone is a JSON object, so that the rest must be rows too."""
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False
