"""Tokens into text as they come: pieces that can be sent, none of them ever taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Tokens that are decoded again with every new one.
_WINDOW = 12
_HALF = "\N{REPLACEMENT CHARACTER}"


class TextOut:
    """Turns tokens into pieces of text.

    The pieces together are the text of all tokens, up to the first stop text, which is left out. A
    character of several tokens is sent when it is whole, and what may become a stop text when it is
    clear that it does not.

    Args:
        decode: Tokens into text.
        stops: Texts that end the answer.

    >>> out = TextOut(lambda ids: "".join(chr(i) for i in ids), ["</s>"])
    >>> [out.push(ord(c)) for c in "a<b</s>c"], out.stopped, out.finish()
    (['a', '', '<b', '', '', '', '', ''], True, '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        # New tokens are decoded together with some before them, since a token's text may depend on
        # its neighbours: those from _window on, whose text _known was sent up to token _read.
        self._window = self._read = 0
        self._known = self._held = ""
        #: Whether a stop text was found; nothing more comes.
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token makes certain; often nothing."""
        self._ids.append(token)
        return self._sent(self._new(whole=True))

    def finish(self) -> str:
        """The rest, after the last token."""
        text = self._sent(self._new(whole=False))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _new(self, *, whole: bool) -> str:
        """Text of the tokens that were not read yet, if it is whole or need not be."""
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(self._known) or (whole and text.endswith(_HALF)):
            return ""
        new = text[len(self._known) :]
        if len(self._ids) - self._window > _WINDOW:
            self._window = self._read
            text = self._decode(self._ids[self._window :])
        self._known, self._read = text, len(self._ids)
        return new

    def _sent(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop text begins with.

    >>> _overlap("abab", "abc"), _overlap("xyz", "abc")
    (2, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
