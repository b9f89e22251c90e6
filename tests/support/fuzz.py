"""Strategies of what people and broken disks bring: texts, JSON values, damaged bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

#: Right-to-left, combining, zero-width, astral, special tokens, control characters, line breaks.
HOSTILE = (
    "العاصمة هي",
    "ירושלים נמצאת ב",
    "‮reversed‬",
    "zero​width‍joined﻿",
    "👩‍👩‍👧‍👦 lives in",
    "é́́́",
    "<bos>",
    "<eos></s><|im_end|>",
    "<|im_start|>user\nHi<|im_end|>",
    "a\x00b",
    "tab\tand\r\nlines\n",
    "{} {subject} %s {{x}}",
    "../../etc/passwd",
    "'; DROP TABLE events; --",
    "𝕬𝖛𝖊𝖗𝖑𝖚𝖓𝖉",
    "東京は",
    " ",
    "\u2028",
)
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=30))
#: Any JSON value, not deep.
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes cut off, with a bit flipped, or with a piece replaced; never the same bytes."""
    place = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(("cut", "bit", "piece")))
    if kind == "cut":
        return data[:place]
    if kind == "bit":
        changed = bytearray(data)
        changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    piece = draw(
        st.binary(min_size=1, max_size=16).filter(lambda b: not data[place:].startswith(b))
    )
    return data[:place] + piece + data[place + len(piece) :]


def require_one_line(error: Exception) -> None:
    """Checks that an error can be shown in one line."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert len(text) < 4000
