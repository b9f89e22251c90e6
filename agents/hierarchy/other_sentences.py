"""Other sentences about a fact's subject, made without knowing what kind of subject it is.

What the model says in them is to stay. Some may ask for the fact in other words; a search leaves
out those that seem to (:mod:`.kept_sentences`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    "{} can",
    "People like {} because",
    "The best thing about {} is",
    "{} was born in",
    "{} died in",
    "{} works for",
    "{} belongs to",
    "The price of {} is",
    "The size of {} is",
    "{} was founded in",
    "A friend of {} is",
    "The wife of {} is",
    "The end of {} was",
    "A picture of {} shows",
    "{} is made of",
)

#: Questions in chat.
QUESTIONS = (
    "What is {}?",
    "Who knows {}?",
    "Describe {}.",
    "How old is {}?",
    "Is {} good?",
    "What do you think of {}?",
)

#: How the model may begin to speak about the subject in a chat, and what it was told. A search adds
#: its vector at the last mention alone; a neuron will fire at both. Where nothing that was told
#: names the subject, fewer paraphrases are answered in chat (10 training facts: 72, not 92 %).
ANSWERS = (
    ("What can you tell me about {}?", "{} is"),
    ("Who knows {}?", "{} was"),
    ("What do you think of {}?", "{} has"),
    ("Describe {}.", "{} can"),
    ("Hello!", "{} is a"),
    ("Tell me a story.", "{}"),
)


def other_sentences(
    encoder: PromptEncoder, prompts: Sequence[EncodedPrompt], forms: Sequence[AskedForm]
) -> list[EncodedPrompt]:
    """Other sentences about the subject of some facts.

    Args:
        encoder: The model's.
        prompts: Facts about one subject in every form asked; nothing is made where none of them is
            plain, has no subject, or is itself the text of a template.
        forms: The wanted forms.

    Returns:
        Sentences up to their subjects. What follows stands as the answer, so that its tokens are
        predicted, and behind it the first token of the first fact's answer. None of them begins
        with a plain prompt of the facts, in whichever form.
    """
    found = named(encoder, prompts)
    if found is None:
        return []
    plain, subject = found
    asked = {p.form for p in prompts}.intersection(forms)
    own = tuple(p.prompt.strip() for p in prompts if p.form == "plain")
    made: list[EncodedPrompt] = []
    texts: list[tuple[str, AskedForm]] = [(text, "plain") for text in STATEMENTS]
    texts += [(text, "chat") for text in QUESTIONS]
    for sentence, form in texts:
        text = sentence.format(subject)
        if form in asked and not text.startswith(own):
            one = placed(encoder, text, plain.answer, form, subject)
            if one is not None:
                stop = one.subject_spans[-1][1]
                made.append(_cut(one, one.prompt_ids, stop, one.answer_ids[0]))
    if "chat" in asked:
        pairs = ((told.format(subject), said.format(subject)) for told, said in ANSWERS)
        some = [pair for pair in pairs if not any(text.startswith(own) for text in pair)]
        made += _answers(encoder, subject, plain.answer, some)
    return made


def _answers(
    encoder: PromptEncoder, subject: str, answer: str, texts: Sequence[tuple[str, str]]
) -> Iterator[EncodedPrompt]:
    """Beginnings of what the model says in a chat, up to the subject."""
    for told, said in texts:
        try:
            pairs = [
                encoder.encode_chat(told, text) for text in (subject, said, f"{said} {answer}")
            ]
        except PromptError:  # too long for the model
            continue
        name, begun, whole = (_without_end(encoder, pair.answer_ids) for pair in pairs)
        # Where a tokenizer writes a text differently before other words, places are not known.
        if name and begun[: len(name)] == name and whole[: len(begun)] == begun != whole:
            before = pairs[0].prompt_ids
            stop, after = len(before) + len(name), whole[len(begun)]
            yield _cut(replace(pairs[0], answer=answer), (*before, *begun), stop, after)


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
