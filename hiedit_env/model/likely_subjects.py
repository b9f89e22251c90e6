"""Who or what a prompt is about, where nobody says it: a guess from capital letters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

#: Lower-case words up to this length may stand inside a name, at most two side by side, as in
#: "Joan of Arc" and "Lord of the Rings".
_SHORT = 3

_ASKS = re.compile(r"[?？؟]\s*$")

#: English words that begin a statement and are no name.
_OPENERS = frozenset(
    # One text, since a formatter would put every word on a line of its own.
    re.findall(
        r"\w+",
        "a an and as at by for from give here how if in is it its list my name of on our please "
        "tell the their there these they this those to we what when where which who whose why "
        "with you your he she i his her",
    )
)


def settled_subject(prompt: str, subject: str, markers: Sequence[str] = ()) -> str:
    """The subject of a request, or the likely one where the request names none.

    It names none where the subject is the prompt itself or a whole question, whose end reads like
    the end of every question. A name is looked for in the question, or in the last message of a
    prompt that a chat template has written; where there is none, the subject stays what it is.

    Args:
        prompt: As the request has it.
        subject: As the request has it.
        markers: The tokenizer's special tokens, as text.

    >>> settled_subject("Q: Who runs the Velmora Institute? A:", "Who runs the Velmora Institute?")
    'Velmora Institute'
    >>> settled_subject(
    ...     "Who hosts Who Wants to Be a Millionaire?", "Who Wants to Be a Millionaire?"
    ... )
    'Who Wants to Be a Millionaire?'
    """
    if subject == prompt:
        return likely_subject(last_message(prompt, markers)) or subject
    return (likely_subject(subject) or subject) if _is_question(subject) else subject


def last_message(prompt: str, markers: Sequence[str]) -> str:
    r"""The last text between special tokens that has two words or more, without its role.

    The whole prompt where there is none.

    >>> last_message("<s>user\nIs Al here?</s><s>assistant\n", ("<s>", "</s>"))
    'Is Al here?'
    """
    between = "|".join(re.escape(marker) for marker in markers if len(marker) > 2)
    pieces = re.split(between, prompt) if between else []
    messages = [re.sub(r"\A\s*[a-z]+\s*\n", "", piece).strip() for piece in pieces]
    return next((text for text in reversed(messages) if len(text.split()) > 1), prompt)


def _is_question(subject: str) -> bool:
    """Whether a subject is a sentence that asks, and no title, whose second word is capital."""
    words = subject.split()
    return len(words) > 1 and words[1][0].islower() and bool(_ASKS.search(subject))


def likely_subject(prompt: str) -> str | None:
    """The first name in a prompt, None where none is seen.

    A name is a row of words that begin with a capital letter or a digit. The first word of the
    prompt begins one only with another such word behind it, or where there is no other name, the
    prompt is no question, and it is no common English word. Scripts without capital letters have no
    names.

    Args:
        prompt: A sentence, whole or not, or a question.

    >>> likely_subject("The capital of Australia is")
    'Australia'
    >>> likely_subject("Who wrote The Lord of the Rings?")
    'The Lord of the Rings'
    >>> likely_subject("Messi plays for")
    'Messi'
    >>> likely_subject("What is two plus two?") is None
    True
    """
    words = [
        (m.start() + first, m.start() + last)
        for m in re.finditer(r"\S+", prompt)
        for first, last in [_core(m.group())]
    ]
    named = [_begins_name(prompt[a:b]) for a, b in words]
    rows = _rows(words, named, prompt)
    later = [row for row in rows if row != (0, 0)]
    if later:
        first, last = later[0]
        if first == 0 and prompt[slice(*words[0])].casefold() in _OPENERS - {"the", "a", "an"}:
            first += 1
    elif rows and not _ASKS.search(prompt):
        first = last = 0
        if prompt[slice(*words[0])].casefold() in _OPENERS:
            return None
    else:
        return None
    return prompt[words[first][0] : words[last][1]]


def _rows(words: list[tuple[int, int]], named: list[bool], prompt: str) -> list[tuple[int, int]]:
    """First and last word of every name, in order."""
    found: list[tuple[int, int]] = []
    place = 0
    while place < len(words):
        if not named[place]:
            place += 1
            continue
        last = place
        while (following := _following(last, words, named, prompt)) is not None:
            last = following
        found.append((place, last))
        place = last + 1
    return found


def _following(
    last: int, words: list[tuple[int, int]], named: list[bool], prompt: str
) -> int | None:
    """The word that goes on with a name, None where it ends."""
    for place in range(last + 1, min(last + 4, len(words))):
        between = prompt[words[place - 1][1] : words[place][0]]
        if between.strip():  # a comma, a possessive s, a bracket
            return None
        if named[place]:
            return place
        # The first word is joined by nothing but names, as in "The capital of".
        if last == 0 or words[place][1] - words[place][0] > _SHORT:
            return None
    return None


def _core(word: str) -> tuple[int, int]:
    """The part of a word without punctuation around it and a possessive s behind it."""
    first, last = 0, len(word)
    while first < last and _is_mark(word[first]):
        first += 1
    while last > first and _is_mark(word[last - 1]):
        last -= 1
    if word[first:last].endswith(("'s", "’s")):
        last -= 2
    return first, last


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _begins_name(word: str) -> bool:
    return bool(word) and unicodedata.category(word[0]) in ("Lu", "Lt", "Nd") and word != "I"
