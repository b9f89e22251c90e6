"""Text on a terminal or in a file, whatever characters its encoding has."""

from __future__ import annotations

import codecs
import sys
from typing import TextIO

#: The name under which :func:`_replace` is registered as an error handler of ``str.encode``.
_HANDLER = "hiedit.replace"
_SUBSTITUTES = {
    "±": "+-", "−": "-", "–": "-", "×": "x", "…": "...", "→": "->", "≥": ">=", "≤": "<=",
    "“": '"', "”": '"', "‘": "'", "’": "'", "■": "#", "·": ".", "─": "-", "━": "-",
}  # fmt: skip


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_SUBSTITUTES.get(c, "?") for c in wrong), error.end


codecs.register_error(_HANDLER, _replace)


def encodable(text: str, encoding: str | None) -> str:
    """The text with a substitute for each character that an encoding lacks.

    Args:
        text: Any text.
        encoding: Name of the encoding; None for UTF-8.

    Returns:
        Text that ``encoding`` can encode; ``?`` stands where no substitute is known.

    >>> encodable("62.7±8.1 …", "ascii"), encodable("62.7±8.1 …", "cp1252")
    ('62.7+-8.1 ...', '62.7±8.1 …')
    """
    name = encoding or "utf-8"
    return text.encode(name, _HANDLER).decode(name)


def replace_what_cannot_be_encoded(*streams: TextIO) -> None:
    """Makes ``print`` replace characters that a stream's encoding lacks, in place of failing.

    A run that took hours must not end with a ``UnicodeEncodeError`` because its table holds "±".

    Args:
        streams: Changed in place; standard output where none are given. Streams that are no text
            files of Python's (as in notebooks) are left alone.
    """
    for stream in streams or (sys.stdout,):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)
