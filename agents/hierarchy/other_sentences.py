"""Other sentences about a fact's subject, made without knowing what kind of subject it is.

They are no questions that have the fact's answer, and what the model says in them is to stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hiedit_agents.hierarchy.rewordings import named, placed
from hiedit_env.errors import PromptError
from hiedit_env.model.encoded import AskedForm
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder

#: In plain form. All words are English.
STATEMENTS = (
    "{} is",
    "{} was",
    "{} has",
    "{}, which",
    "The story of {} begins",
    "{} is known for",
    "People like {} because",
    "The best thing about {} is",
    "{} was born in",
    "{} died in",
    "{} works for",
    "{} belongs to",
    "The price of {} is",
    "The size of {} is",
    "{} was founded in",
    "The friend of {} is",
    "The wife of {} is",
    "The year of {} is",
    "A picture of {} shows",
    "{} is made of",
)

#: Questions in chat.
QUESTIONS = (
    "What is {}?",
    "Who knows {}?",
    "What is {} known for?",
    "How old is {}?",
    "Where is {}?",
    "What do you think of {}?",
)

#: What the model may say about the subject itself, and what it was asked.
ANSWERS = (
    ("Tell me about {}.", "{} is"),
    ("Who knows {}?", "{} was"),
    ("What do you think of {}?", "{} has"),
    ("What is {} known for?", "{} is known for"),
    ("Hello!", "{} is a"),
    ("Tell me a story.", "{}"),
)


def other_sentences(
    encoder: PromptEncoder, prompts: Sequence[EncodedPrompt], forms: Sequence[AskedForm]
) -> list[EncodedPrompt]:
    """Other sentences about the subject of a fact.

    Args:
        encoder: The model's.
        prompts: The fact in every form asked; nothing is made where none of them is plain, has no
            subject, or is itself the text of a template.
        forms: The wanted forms.

    Returns:
        Sentences up to their subjects. What follows stands as the answer, so that its tokens are
        predicted, and behind it the first token of the fact's answer. None of them begins with a
        prompt of the fact.
    """
    found = named(encoder, prompts)
    if found is None:
        return []
    plain, subject = found
    asked = {p.form for p in prompts}.intersection(forms)
    made: list[EncodedPrompt] = []
    texts: list[tuple[str, AskedForm]] = [(text, "plain") for text in STATEMENTS]
    texts += [(text, "chat") for text in QUESTIONS]
    for sentence, form in texts:
        text = sentence.format(subject)
        if form in asked and not text.startswith(plain.prompt.strip()):
            one = placed(encoder, text, plain.answer, form, subject)
            if one is not None:
                stop = one.subject_spans[-1][1]
                made.append(_cut(one, one.prompt_ids, stop, one.answer_ids[0]))
    if "chat" in asked:
        made += _answers(encoder, subject, plain.answer)
    return made


def _answers(encoder: PromptEncoder, subject: str, answer: str) -> list[EncodedPrompt]:
    """The beginnings of :data:`ANSWERS` up to the subject."""
    made: list[EncodedPrompt] = []
    for question, beginning in ANSWERS:
        texts = subject, beginning.format(subject), answer
        try:
            pairs = [encoder.encode_chat(question.format(subject), text) for text in texts]
        except PromptError:  # too long for the model
            continue
        name, said, after = (_without_end(encoder, pair.answer_ids) for pair in pairs)
        # Where a tokenizer writes the name differently before other words, its end is not known.
        if name and said[: len(name)] == name:
            before = pairs[0].prompt_ids
            made.append(_cut(pairs[0], (*before, *said), len(before) + len(name), after[0]))
    return made


def _without_end(encoder: PromptEncoder, ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids[:-1] if ids[-1] == encoder.end_id else ids


def _cut(one: EncodedPrompt, ids: tuple[int, ...], stop: int, after: int) -> EncodedPrompt:
    """Tokens up to one place as the prompt, whose last token is its subject's, the rest behind."""
    return replace(
        one,
        prompt_ids=ids[:stop],
        answer_ids=(*ids[stop:], after),
        subject_spans=((stop - 1, stop),),
        subject_missing=False,
    )
