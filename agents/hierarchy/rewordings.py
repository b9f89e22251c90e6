"""A fact in another sentence, made without knowing what the sentence says.

What is sought for one sentence alone may lean on the words of that sentence: where they stand in
front of the subject, the subject's token has read them. In a sentence that begins with the subject
it has not, and what is asked comes later.
"""

from __future__ import annotations

from collections.abc import Sequence

from hiedit_env.datasets.writing import mentions
from hiedit_env.errors import PromptError
from hiedit_env.model.asking import has_markers
from hiedit_env.model.encoded import AskedForm
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder

#: What stands in the subject's place behind its first mention.
PRONOUN = "it"


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


def rewordings(
    encoder: PromptEncoder, prompts: Sequence[EncodedPrompt], forms: Sequence[AskedForm]
) -> list[EncodedPrompt]:
    """A fact's prompt with its subject first, in some of the forms in which the fact is asked.

    Args:
        encoder: The model's.
        prompts: The fact in every form asked; nothing is made where none of them is plain, has no
            subject, or is itself the text of a template.
        forms: The wanted forms.

    Returns:
        Prompts with the subject's place known and not at the beginning.
    """
    plain = next((p for p in prompts if p.form == "plain"), None)
    if plain is None or plain.subject_missing or not plain.subject_spans:
        return []
    if has_markers(encoder.tokenizer, plain.prompt):
        return []
    start, stop = plain.subject_spans[-1]
    subject = encoder.decode(plain.prompt_ids[start:stop]).strip()
    text = subject_first(plain.prompt, subject)
    if text is None:
        return []
    found = []
    for form in forms:
        if not any(p.form == form for p in prompts):
            continue
        try:
            (encoded,) = encoder.encode_forms(text, plain.answer, form)
        except PromptError:  # too long for the model
            continue
        placed = encoder.with_subject(encoded, text, subject)
        if not placed.subject_missing and placed.positions("subject")[0] > 0:
            found.append(placed)
    return found
