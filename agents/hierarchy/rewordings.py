"""A fact in other words, made without knowing what its sentence says.

What is sought for one sentence alone may lean on the words of that sentence. Where they stand in
front of the subject, the subject's token has read them; in a sentence that begins with the subject
it has not, and what is asked comes later. And a statement leads to its answer by its last words,
which a question does not have.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from hiedit_env.datasets.writing import mentions
from hiedit_env.errors import PromptError
from hiedit_env.model.asking import has_markers
from hiedit_env.model.encoded import AskedForm
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder

#: What stands in the subject's place behind its first mention. All words put in are English.
PRONOUN = "it"

#: Tokens of the longest prompt that is asked as a question; a longer one is no sentence but a text,
#: and the search would run it up to three times more.
LONGEST = 128

#: What the subject is read behind as well. A prompt that begins with its subject does not show how
#: it reads inside of a sentence, and one that does not shows it behind its own words only. SmolLM2,
#: block 7, neurons of 320 facts: the share of own paraphrases in which they are stronger than 0.7
#: is 95.6 instead of 90.2 % (in chat 97.2 and 94.0), that of prompts about other subjects in which
#: one is stronger than 0.2 is 3.0 instead of 3.2 % (3.6 both times).
LEADS = ("What is", "The name of", "Who is")


def subject_first(prompt: str, subject: str) -> str | None:
    """The sentence with its subject in front and a pronoun in its place.

    None where the subject is not in the sentence as written, or is all of it.

    >>> subject_first("The capital of Norland is", "Norland")
    'Norland: The capital of it is'
    >>> subject_first("Norland is a", "Norland")
    'Norland: It is a'
    >>> subject_first("Norland", "Norland") is None
    True
    """
    spans = mentions(prompt, subject)
    if not spans:
        return None
    before, after = prompt[: spans[-1][0]], prompt[spans[-1][1] :]
    if not (before.strip() or after.strip()):
        return None
    rest = f"{before}{PRONOUN}{after}".strip()
    return f"{subject}: {rest[0].upper()}{rest[1:]}"


def questions(prompt: str, subject: str) -> tuple[str, ...]:
    """A prompt as a question, alone and with the beginning of an answer behind it.

    Of a prompt that holds a question, what stands behind it is left out, unless the subject does.
    Without those that are the prompt itself.

    >>> questions("The capital of Norland is", "Norland")
    ('The capital of Norland is what?', 'The capital of Norland is what? It is')
    >>> questions("Where is Norland?", "Norland")
    ('Where is Norland? It is',)
    >>> questions("Where is Norland? It lies in", "Norland")
    ('Where is Norland?', 'Where is Norland? It is')
    """
    text = prompt.rstrip()
    marks = [i for i, letter in enumerate(text) if "QUESTION MARK" in unicodedata.name(letter, "")]
    question = text[: marks[-1] + 1] if marks else ""
    if not mentions(question, subject):
        question = f"{text} what?"
    both = question, f"{question} {PRONOUN.capitalize()} is"
    return tuple(one for one in both if one != text)


def rewordings(
    encoder: PromptEncoder, prompts: Sequence[EncodedPrompt], forms: Sequence[AskedForm]
) -> list[EncodedPrompt]:
    """A fact's prompt in other words, in some of the forms in which the fact is asked.

    With its subject first in every form, as questions in plain form, and as one in chat.

    Args:
        encoder: The model's.
        prompts: The fact in every form asked; nothing is made where none of them is plain, has no
            subject, or is itself the text of a template.
        forms: The wanted forms.

    Returns:
        Prompts with the subject's place known and not at the beginning.
    """
    found = named(encoder, prompts)
    if found is None:
        return []
    plain, subject = found
    texts: list[tuple[str | None, AskedForm]]
    texts = [(subject_first(plain.prompt, subject), form) for form in forms]
    if len(plain.prompt_ids) <= LONGEST:
        asking = questions(plain.prompt, subject)
        texts += [(question, "plain") for question in asking if "plain" in forms]
        texts += [(question, "chat") for question in asking[:1] if "chat" in forms]
    asked = {p.form for p in prompts}
    made = (
        placed(encoder, text, plain.answer, form, subject)
        for text, form in texts
        if text is not None and form in asked
    )
    return [one for one in made if one is not None]


def behind_leads(encoder: PromptEncoder, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """A fact's subject behind each of :data:`LEADS`, in plain form, to be read and not answered.

    Args:
        encoder: The model's.
        prompts: The fact in every form asked; nothing is made where :func:`rewordings` makes
            nothing.

    Returns:
        Prompts that end with the subject; none for a subject whose last token is another one there.
    """
    found = named(encoder, prompts)
    if found is None:
        return []
    plain, subject = found
    last = plain.prompt_ids[plain.subject_spans[-1][1] - 1]
    made = (placed(encoder, f"{x} {subject}", plain.answer, "plain", subject) for x in LEADS)
    return [one for one in made if one is not None and one.prompt_ids[-1] == last]


def named(
    encoder: PromptEncoder, prompts: Sequence[EncodedPrompt]
) -> tuple[EncodedPrompt, str] | None:
    """A fact's plain prompt and the subject in it; None where there is no such thing."""
    plain = next((p for p in prompts if p.form == "plain"), None)
    if plain is None or plain.subject_missing or not plain.subject_spans:
        return None
    if has_markers(encoder.tokenizer, plain.prompt):
        return None
    start, stop = plain.subject_spans[-1]
    return plain, encoder.decode(plain.prompt_ids[start:stop]).strip()


def placed(
    encoder: PromptEncoder, text: str, answer: str, form: AskedForm, subject: str
) -> EncodedPrompt | None:
    """A text with its subject's place; None where it is too long or begins with the last token."""
    try:
        (encoded,) = encoder.encode_forms(text, answer, form)
    except PromptError:  # too long for the model
        return None
    found = encoder.with_subject(encoded, text, subject)
    inside = not found.subject_missing and found.positions("subject")[0] > 0
    return found if inside else None
