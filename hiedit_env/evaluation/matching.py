"""When a freely generated text counts as the answer: the one rule, used everywhere."""

from __future__ import annotations

import re
import string

#: Tokens generated beyond the answer's own, so that running on can be seen.
EXTRA_TOKENS = 5

_END = re.compile(r"[\n\r]|[.!?;](?=\s|$)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (SQuAD's normalisation).

    What would leave nothing stays, because an answer may be ``"A"``, and an empty one would match
    anything.

    >>> normalise(" The  Beatles,"), normalise("A.")
    ('beatles', 'a')
    """
    lowered = text.lower()
    plain = lowered.translate(_PUNCTUATION)
    chosen = _ARTICLES.sub(" ", plain).strip() or plain.strip() or lowered
    return " ".join(chosen.split())


def generated_answer(text: str) -> str:
    """What the model said before its first line break or end of sentence.

    >>> generated_answer(" Paris. It is large")
    ' Paris'
    >>> generated_answer(" J. R. R. Tolkien")
    ' J'
    """
    return _END.split(text.lstrip("\n\r"), maxsplit=1)[0]


def is_match(generated: str, answer: str) -> bool:
    """Whether a greedy continuation gives the answer, the whole answer and nothing else.

    Both sides are normalised; the continuation, of at most the answer's tokens plus
    ``EXTRA_TOKENS``, counts up to its first line break or end of sentence that lies beyond the
    answer. Content and length both have to be right, which teacher forcing cannot test.

    >>> is_match(" Paris. It is", "Paris"), is_match(" Paris and then", "Paris")
    (True, False)
    >>> is_match(" J. R. R. Tolkien. He", "J. R. R. Tolkien")
    True
    """
    wanted = normalise(answer)
    text = generated.lstrip("\n\r")
    ends = [match.start() for match in _END.finditer(text)] + [len(text)]
    return any(normalise(text[:end]) == wanted for end in ends)


def starts_with(generated: str, answer: str) -> bool:
    """The lenient reading: the continuation begins with the answer's words, whatever follows.

    >>> starts_with(" Paris and then", "Paris"), starts_with(" Parisian", "Paris")
    (True, False)
    """
    wanted = normalise(answer).split()
    return normalise(generated).split()[: len(wanted)] == wanted
