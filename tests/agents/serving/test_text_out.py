"""Tokens into pieces of text: the pieces are the text, and none is taken back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hiedit_agents.serving.text_out import TextOut


def utf8(ids: list[int]) -> str:
    """Tokens that are bytes, as in a byte-level vocabulary."""
    return bytes(ids).decode("utf-8", errors="replace")


def marked(ids: list[int]) -> str:
    """Tokens as SentencePiece has them: the space in front of the first one is dropped."""
    return "".join([" a", " b", "c", "", " "][i] for i in ids).removeprefix(" ")


@given(st.text("aé€\U0001f600\ufffd ", max_size=40), st.integers(0, 3))
def test_the_pieces_are_the_text_and_whole_characters(text: str, cut: int) -> None:
    ids = list(text.encode())[: len(text.encode()) - cut]
    out = TextOut(utf8)
    pieces = [out.push(i) for i in ids]
    # A character that is cut off at the end comes last.
    assert utf8(ids).startswith("".join(pieces))
    assert "".join(pieces) + out.finish() == utf8(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 4), max_size=40))
def test_a_text_that_depends_on_its_neighbours(ids: list[int]) -> None:
    out = TextOut(marked)
    assert "".join([*map(out.push, ids), out.finish()]) == marked(ids)


@given(st.text("ab<>", max_size=20), st.lists(st.text("ab<>", min_size=1, max_size=3), max_size=2))
def test_a_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    out = TextOut(utf8, stops)
    sent = ""
    for token in text.encode():
        if not out.stopped:
            sent += out.push(token)
    sent += out.finish()
    # The stop text that is complete first ends the answer, as when tokens are read one by one.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    starts = [start for end, start in ends if end == first]
    assert sent == (text if first is None else text[: min(starts)])
    assert out.stopped is bool(ends)


def test_what_may_become_a_stop_text_is_held_back() -> None:
    out = TextOut(utf8, ["\n\n"])
    assert [out.push(i) for i in b"a\nb\n\nc"] == ["a", "", "\nb", "", "", ""]
    assert out.stopped
    assert out.finish() == ""
