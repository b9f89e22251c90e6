"""What a file is that holds no JSON, told by its ending or its first bytes, and the remedy."""

from __future__ import annotations

from pathlib import Path

_TABLE = 'write it as one: pandas.{reader}).to_json("facts.json", orient="records")'
_UNPACK = "unpack it first"
_BY_ENDING: dict[str, str] = {
    ".csv": _TABLE.format(reader="read_csv(FILE"),
    ".tsv": _TABLE.format(reader='read_csv(FILE, sep="\\t"'),
    ".parquet": _TABLE.format(reader="read_parquet(FILE"),
    ".xlsx": _TABLE.format(reader="read_excel(FILE"),
    ".xls": _TABLE.format(reader="read_excel(FILE"),
    ".feather": _TABLE.format(reader="read_feather(FILE"),
    ".arrow": 'write it as one: datasets.Dataset.from_file(FILE).to_json("facts.jsonl")',
    ".yaml": "write its rows as JSON",
    ".yml": "write its rows as JSON",
} | dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), _UNPACK)

_COMPRESSED = "compressed; " + _UNPACK
_PAGE = "a page of HTML; download the file itself"
_UTF16 = "UTF-16 or UTF-32 text; save it as UTF-8"
#: In this order, since the first bytes of UTF-32 begin with those of UTF-16.
_BY_START: tuple[tuple[bytes, str], ...] = (
    (b"PAR1", "a Parquet table; " + _BY_ENDING[".parquet"]),
    (b"ARROW1", "an Arrow table; " + _BY_ENDING[".feather"]),
    (b"PK\x03\x04", "a zip archive or an Excel table; unpack it or write its rows as JSON"),
    (b"\x1f\x8b", _COMPRESSED),
    (b"BZh", _COMPRESSED),
    (b"\xfd7zXZ", _COMPRESSED),
    (b"\x28\xb5\x2f\xfd", _COMPRESSED),
    (b"version https://", "a pointer of Git LFS; fetch the file with 'git lfs pull'"),
    (b"<!DOCTYPE html", _PAGE),
    (b"<!doctype html", _PAGE),
    (b"<html", _PAGE),
    (b"SQLite format 3", "a database of SQLite; write its rows as JSON"),
    (b"\xff\xfe", _UTF16),
    (b"\xfe\xff", _UTF16),
)


def remedy_by_ending(path: Path) -> str:
    """What to do with a file whose name ends in something else than a data set's.

    >>> remedy_by_ending(Path("facts.json.gz"))
    '; unpack it first'
    """
    remedy = _BY_ENDING.get(path.suffix.lower(), "if this one holds JSON, rename it")
    start = b""
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        with path.open("rb") as file:
            start = file.read(4096)
    called = " (this table is of HalluEditBench)" if b"paraphrased_question" in start else ""
    return f"{called}; {remedy}"


def kind_by_start(start: bytes) -> str | None:
    """What a file is, with the remedy, if its first bytes are those of no JSON text in UTF-8.

    >>> kind_by_start('["a"]'.encode("utf-16-le"))
    'UTF-16 or UTF-32 text; save it as UTF-8'
    """
    for mark, kind in _BY_START:
        if start.startswith(mark):
            return kind
    # Without a mark: every other byte of ASCII is zero.
    return _UTF16 if 0 in start[:4] and any(start[:4]) else None
