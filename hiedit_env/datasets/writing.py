"""Unicode properties of a text: punctuation, ends of sentences, scripts without spaces.

The only list of punctuation in the project. Everything that splits, closes or compares texts asks
here, so that a rule holds for all scripts or for none. No torch.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

#: The longest text, in characters, that is read from a file or tokenised: a tokenizer needs about
#: 200 bytes for each, so that a text of 20 MB would take gigabytes before it is found too long.
MAX_CHARACTERS = 200_000

# Unicode's Sentence_Terminal characters outside ASCII (PropList.txt of Unicode 16, without those
# that only end abbreviations), and the semicolons of scripts that have their own.
_WIDE_ENDS = (
    "\u0589\u061b\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e"
    "\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809"
    "\u1944\u1945\u1aa8\u1aa9\u1aaa\u1aab\u1b4e\u1b4f\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e\u1b7f"
    "\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d\u2047\u2048\u2049\u2e2e\u2e3c\u2e53\u2e54\u3002"
    "\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d\uaa5e\uaa5f"
    "\uaaf0\uaaf1\uabeb\ufe52\ufe54\ufe56\ufe57\uff01\uff1b\uff1f\uff61\U00011047\U00011048"
)
# These may also stand inside a number or a name, and need something behind them.
_NARROW_ENDS = ".!?;\u037e\u2026"
_FULLWIDTH_STOP = "\uff0e"

# Blocks of the scripts that put no space between words, as first and last code point.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # CJK and Kangxi radicals
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark, zero
    (0x3021, 0x3029),  # Hangzhou numerals
    (0x3031, 0x303C),  # kana repeat marks
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31BF),  # Bopomofo extended
    (0x31F0, 0x31FF),  # Katakana phonetic extensions
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0xA4CF),  # CJK ideographs, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar extended
    (0xAA60, 0xAADF),  # Myanmar extended, Tai Viet
    (0xF900, 0xFAFF),  # CJK compatibility ideographs
    (0xFF66, 0xFF9F),  # halfwidth Katakana
    (0x1B000, 0x1B16F),  # Kana supplement and extended
    (0x20000, 0x3FFFF),  # CJK extensions B and later
)

Span = tuple[int, int]
"""First position and the position after the last, both from 0."""

#: Characters of no width that stand where a text was copied from, and are no white space to Python:
#: zero width space, word joiner, byte order mark.
ZERO_WIDTH = "\u200b\u2060\ufeff"

_LINE = "[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"


@lru_cache(maxsize=4096)
def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces between words.

    >>> [is_unspaced(c) for c in "月かไ한a。"]
    [True, True, True, False, False, False]
    """
    point = ord(character)
    return (
        point >= _UNSPACED[0][0]
        and any(first <= point <= last for first, last in _UNSPACED)
        and not is_punctuation(character)
    )


@lru_cache(maxsize=4096)
def is_punctuation(character: str) -> bool:
    """Whether a character is punctuation: Unicode's categories P, and all marks of ASCII.

    >>> [is_punctuation(c) for c in ".。؟।“—$a月"]
    [True, True, True, True, True, True, True, False, False]
    """
    return unicodedata.category(character)[0] == "P" or character in string.punctuation


def is_blank(text: str) -> bool:
    r"""Whether nothing of a text is seen: white space, control and format characters alone.

    >>> is_blank(" \t\u200b\ufeff"), is_blank("\U0001f469\u200d")
    (True, False)
    """
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def trimmed(text: str, *, end: bool = True) -> str:
    r"""The text without white space and :data:`ZERO_WIDTH` around it.

    Args:
        text: The text.
        end: Whether its end is trimmed, too.

    >>> trimmed("\ufeff Lyon\u200b "), trimmed("\ufeff Lyon ", end=False)
    ('Lyon', 'Lyon ')
    """
    text = _LEADING.sub("", text)
    return _LEADING.sub("", text[::-1])[::-1] if end else text


def comparable(text: str) -> str:
    """The text as it is compared where case, white space and Unicode's forms do not count.

    >>> comparable(" ROME  lies in ") == comparable("Rome lies in")
    True
    """
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def without_punctuation(text: str) -> str:
    """The text without its punctuation and its invisible format characters; nothing in their place.

    >>> without_punctuation("“Mother-in-law”, 月。")
    'Motherinlaw 月'
    """
    return "".join(
        c
        for c in text
        if not is_punctuation(c) and (c.isascii() or unicodedata.category(c) != "Cf")
    )


_LEADING = re.compile(f"^[\\s{ZERO_WIDTH}]+")
_UNSPACED_CLASS = "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED)
_END = re.compile(
    f"{_LINE}|[{re.escape(_NARROW_ENDS)}](?=\\s|$|[{_UNSPACED_CLASS}])"
    f"|[{_WIDE_ENDS}]|{_FULLWIDTH_STOP}(?!\\d)"
)


def sentence_ends(text: str) -> Iterator[int]:
    """Where a sentence or a line ends: the positions of the marks, in order.

    A full stop, question mark, exclamation mark, semicolon or ellipsis of the Latin and Greek
    scripts ends a sentence where white space, the end of the text or a script without spaces
    follows; the marks of other scripts (。！？؟। and their like) end one wherever they stand.

    >>> list(sentence_ends("3.5 m. Yes")), list(sentence_ends("月湖城。它"))
    ([5], [3])
    """
    return (match.start() for match in _END.finditer(text))


def is_closed(text: str) -> bool:
    """Whether the text ends like a sentence, in any script.

    >>> is_closed("Who?"), is_closed("谁？ "), is_closed("Who")
    (True, True, False)
    """
    last = text.rstrip()[-1:]
    return last != "" and last in _NARROW_ENDS + _WIDE_ENDS + _FULLWIDTH_STOP and last != ";"


def question_mark_for(text: str) -> str:
    """The question mark that belongs behind an open question: wide in a script without spaces.

    >>> question_mark_for("who"), question_mark_for("谁")
    ('?', '？')
    """
    return "\uff1f" if is_unspaced(text.rstrip()[-1:] or " ") else "?"


def words(text: str) -> list[str]:
    """What is compared: words, and in scripts without spaces characters with their marks.

    >>> words("the iPhone 手机"), words("กิน")
    (['the', 'iPhone', '手', '机'], ['กิ', 'น'])
    """
    found: list[str] = []
    for word in text.split():
        fresh = True  # the next character begins a new entry
        for character in word:
            if found and not fresh and unicodedata.category(character)[0] == "M":
                found[-1] += character
                continue
            apart = is_unspaced(character)
            if fresh or apart or is_unspaced(found[-1][0]):
                found.append(character)
            else:
                found[-1] += character
            fresh = False
    return found


def space_between(prompt: str, answer: str) -> str:
    r"""What stands between a prompt and its answer: one space, or nothing.

    Nothing where the prompt ends in white space; where either meets the other with wide punctuation
    (？：《 and their like bring their own space); and where both meet in a script without spaces,
    to which digits that follow it count. Other punctuation at the seam is looked through.

    >>> space_between("It is", "Lyon"), space_between("A:\n", "Lyon"), space_between("是", "月")
    (' ', '', '')
    >>> space_between("谁？", "Lyon"), space_between("東", "é"), space_between("谁?", "“月”")
    ('', ' ', '')
    """
    if not prompt or prompt[-1].isspace():
        return ""
    if _is_wide_mark(prompt[-1]) or _is_wide_mark(answer[:1]):
        return ""
    before = next((c for c in reversed(prompt) if not is_punctuation(c)), " ")
    behind = next((c for c in answer if not is_punctuation(c)), " ")
    joined = is_unspaced(before) and (is_unspaced(behind) or behind.isdigit())
    return "" if joined else " "


def _is_wide_mark(character: str) -> bool:
    return (
        character != ""
        and is_punctuation(character)
        and unicodedata.east_asian_width(character) in "WF"
    )


def mentions(text: str, subject: str) -> tuple[Span, ...]:
    """Find every mention of a subject in a text, as spans of characters.

    Mentions in the same case, or, if there is none, in any case. A subject inside another word is
    no mention. Where a word ends is read from Unicode's categories: a letter, mark or number goes
    on into the next one, unless either belongs to a script without spaces between words. Korean
    particles stand right behind their word, so Hangul is no obstacle there.

    >>> mentions("Al met Albert; al left", "Al")
    ((0, 2),)
    >>> mentions("Albert left", "Al"), mentions("東京の首都", "東京"), mentions("서울은", "서울")
    ((), ((0, 2),), ((0, 2),))
    """
    wanted = subject.strip()
    if not wanted:
        return ()
    for flags in (re.NOFLAG, re.IGNORECASE):
        spans = [match.span() for match in re.finditer(re.escape(wanted), text, flags)]
        found = tuple(span for span in spans if _is_whole(text, *span))
        if found:
            return found
    return ()


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether what stands there is no part of a longer word."""
    if start > 0 and _goes_on(text[start - 1], text[start]):
        return False
    if end == len(text) or not _goes_on(text[end - 1], text[end]):
        return True
    return unicodedata.name(text[end], "").startswith("HANGUL")


def _goes_on(one: str, other: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    return all(
        unicodedata.category(character)[0] in "LMN" and not is_unspaced(character)
        for character in (one, other)
    )
