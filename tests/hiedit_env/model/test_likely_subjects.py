"""What a prompt without a subject is taken to be about."""

from __future__ import annotations

import pytest

from hiedit_env.model.likely_subjects import likely_subject, settled_subject
from tests.support.models import resident


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("The capital of Australia is", "Australia"),
        ("Who is Artemisia Gentileschi's father? Their father is named", "Artemisia Gentileschi"),
        ("Name of mother of Alphonse de Lamartine is", "Alphonse de Lamartine"),
        ("Name of mother of Henry VIII of England is", "Henry VIII of England"),
        ("The Birth of Venus is a famous work by", "The Birth of Venus"),
        ("Messi plays for", "Messi"),
        ("Marie Curie was born in", "Marie Curie"),
        ("In Norland, people speak", "Norland"),
        ("Which company developed iPod Nano? It was developed by", "Nano"),
        ("Who painted “Guernica”?", "Guernica"),
        ("La capitale de la France est", "France"),
        ("Die Hauptstadt von Frankreich ist", "Die Hauptstadt von Frankreich"),
        ("Столица Франции — город", "Столица Франции"),
        ("The 2012 Olympics took place in", "The 2012 Olympics"),
        ("What is two plus two?", None),
        ("The past tense of run is", None),
        ("Wer schreibt?", None),
        ("法国的首都是", None),
        ("", None),
        ("?!", None),
    ],
)
def test_names_by_hand(prompt: str, wanted: str | None) -> None:
    assert likely_subject(prompt) == wanted


def test_a_prompt_that_is_its_own_subject_is_edited_at_the_name_in_it() -> None:
    encoder = resident("llama").encoder
    prompt = "w5 W9 w4"  # the tokenizer reads words; the middle one is written like a name
    encoded = encoder.encode(prompt, "w7")
    guessed = encoder.with_subject(encoded, prompt, prompt)
    assert (list(guessed.positions("subject")), guessed.subject_missing) == ([1], False)
    # A subject that is given is not guessed.
    given = encoder.with_subject(encoded, prompt, "w4")
    assert list(given.positions("subject")) == [2]
    # Nothing like a name: the whole prompt, so its last token.
    plain = encoder.encode("w5 w9 w4", "w7")
    assert list(encoder.with_subject(plain, "w5 w9 w4", "w5 w9 w4").positions("subject")) == [2]


_MARKERS = ("<|im_start|>", "<|im_end|>")
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant named Smol, made in Paris<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("prompt", "subject", "wanted"),
    [
        # A question stands where the subject should.
        (_CHAT.format("Who runs the Velmora Institute?"), "Who runs the Velmora Institute?",
         "Velmora Institute"),
        ("Q: Which river flows through Quellby? A:", "Which river flows through Quellby?",
         "Quellby"),
        ("Wer leitet Velmora？", "Wer leitet Velmora？", "Velmora"),
        # Titles are subjects, and so is a question without a name in it.
        ("Who hosts Where's Wally?", "Where's Wally?", "Where's Wally?"),
        ("Who hosts Whose Line Is It?", "Whose Line Is It?", "Whose Line Is It?"),
        ("Say: what is two plus two?", "what is two plus two?", "what is two plus two?"),
        ("The owner of Yahoo! is", "Yahoo!", "Yahoo!"),
        # Nobody named one: the user's message counts, not the system's.
        (_CHAT.format("Who runs the Velmora Institute?"), None, "Velmora Institute"),
        ("<|im_start|>Which river flows through Quellby?<|im_end|>", None, "Quellby"),
        # No name in the user's message: none of the system's either.
        (_CHAT.format("what is two plus two?"), None, _CHAT.format("what is two plus two?")),
        ("The capital of Norland is", None, "Norland"),
    ],
)  # fmt: skip
def test_no_subject_is_a_question_or_of_the_system_message(
    prompt: str, subject: str | None, wanted: str
) -> None:
    assert settled_subject(prompt, prompt if subject is None else subject, _MARKERS) == wanted


def test_a_question_that_is_given_as_the_subject_is_edited_at_the_name_in_it() -> None:
    encoder = resident("llama").encoder
    encoded = encoder.encode("w6 w5 W9 w3? w4", "w7")
    asked = encoder.with_subject(encoded, encoded.prompt, "w6 w5 W9 w3?")
    assert list(asked.positions("subject")) == [2]  # the question ends at 3
