"""When a freely generated text counts as the answer: the one rule, used everywhere.

Punctuation, ends of sentences and scripts without spaces are those of
:mod:`hiedit_env.datasets.writing`, so that an answer is judged alike in every script.
"""

from __future__ import annotations

import re
import unicodedata

from hiedit_env.datasets.writing import sentence_ends, without_punctuation, words

#: Tokens generated beyond the answer's own, so that running on can be seen.
EXTRA_TOKENS = 5

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LINES = "\n\r"


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (SQuAD's normalisation).

    Characters are composed (Unicode's NFC). What would leave nothing stays, because an answer may
    be ``"A"``, and an empty one would match anything.

    >>> normalise(" The  Beatles,"), normalise("A."), normalise("“月湖城”。")
    ('beatles', 'a', '月湖城')
    """
    lowered = unicodedata.normalize("NFC", text).lower()
    plain = without_punctuation(lowered)
    chosen = _ARTICLES.sub(" ", plain).strip() or plain.strip() or lowered
    return " ".join(chosen.split())


def generated_answer(text: str) -> str:
    """What the model said before its first line break or end of sentence.

    >>> generated_answer(" Paris. It is large"), generated_answer("月湖城。它位于")
    (' Paris', '月湖城')
    >>> generated_answer(" J. R. R. Tolkien")
    ' J'
    """
    text = text.lstrip(_LINES)
    return text[: next(sentence_ends(text), len(text))]


def is_match(generated: str, answer: str) -> bool:
    """Whether a greedy continuation gives the answer, the whole answer and nothing else.

    Both sides are normalised and compared by words, by characters where a script has no spaces;
    the continuation, of at most the answer's tokens plus ``EXTRA_TOKENS``, counts up to its first
    line break or end of sentence that lies beyond the answer. Content and length both have to be
    right, which teacher forcing cannot test.

    >>> is_match(" Paris. It is", "Paris"), is_match(" Paris and then", "Paris")
    (True, False)
    >>> is_match(" J. R. R. Tolkien. He", "J. R. R. Tolkien"), is_match(" 十月？ 十", "十月")
    (True, True)
    """
    wanted = words(normalise(answer))
    text = generated.lstrip(_LINES)
    ends = [*sentence_ends(text), len(text)]
    return any(words(normalise(text[:end])) == wanted for end in ends)


def starts_with(generated: str, answer: str) -> bool:
    """The lenient reading: the continuation begins with the answer's words, whatever follows.

    In scripts without spaces it begins with the answer's characters.

    >>> starts_with(" Paris and then", "Paris"), starts_with(" Parisian", "Paris")
    (True, False)
    >>> starts_with("月湖城它位于", "月湖城")
    True
    """
    wanted = words(normalise(answer))
    return words(normalise(generated))[: len(wanted)] == wanted
