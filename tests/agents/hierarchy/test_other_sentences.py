"""Other sentences about a subject: which ones, where they are cut, and what they leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hiedit_agents.hierarchy.other_sentences import (
    ANSWERS,
    QUESTIONS,
    STATEMENTS,
    other_sentences,
)
from hiedit_env.model.tokenization import PromptEncoder
from tests.agents.hierarchy.test_rewordings import FORMS, asked
from tests.hiedit_env.model.test_asking import encoder_of
from tests.hiedit_env.model.test_tokenization import byte_level, sentencepiece


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_sentences_are_cut_behind_the_subject(kind: str) -> None:
    encoder = encoder_of(byte_level() if kind == "byte" else sentencepiece("first"))
    prompts = asked(encoder, "The capital of Norland is", "Norland")
    made = other_sentences(encoder, prompts, FORMS)
    plain, chat = ([p for p in made if p.form == form] for form in FORMS)
    assert (len(plain), len(chat)) == (len(STATEMENTS), len(QUESTIONS) + len(ANSWERS))
    for one in made:
        assert encoder.decode(one.prompt_ids).endswith("Norland")
        assert one.positions("subject")[0] == len(one.prompt_ids) - 1
        assert one.answer == "Lyon"
    wholes = [encoder.encode(text.format("Norland"), "Lyon") for text in STATEMENTS]
    wholes += [encoder.encode_chat(text.format("Norland"), "Lyon") for text in QUESTIONS]
    for one, whole in zip(made, wholes, strict=False):
        assert (*one.prompt_ids, *one.answer_ids[:-1]) == whole.prompt_ids
        assert one.answer_ids[-1] == whole.answer_ids[0]
    # What the model begins to say, and the answer as it would go on with it.
    for one, pair in zip(chat[len(QUESTIONS) :], ANSWERS, strict=True):
        told, said = (text.format("Norland") for text in pair)
        begun = encoder.encode_chat(told, said)
        whole = encoder.encode_chat(told, f"{said} Lyon")
        assert (*one.prompt_ids, *one.answer_ids[:-1]) == begun.prompt_ids + begun.answer_ids
        assert one.answer_ids[-1] == whole.answer_ids[len(begun.answer_ids)]


def test_the_forms_are_those_that_are_wanted_and_asked() -> None:
    encoder = encoder_of(byte_level())
    both = asked(encoder, "The capital of Norland is", "Norland")
    assert {p.form for p in other_sentences(encoder, both, ("chat",))} == {"chat"}
    assert {p.form for p in other_sentences(encoder, both[:1], FORMS)} == {"plain"}
    # Without the plain prompt it is not known which words are the subject's.
    assert other_sentences(encoder, both[1:], FORMS) == []


@pytest.mark.parametrize(
    ("own", "missing"),
    [("The price of Norland", 1), ("Who knows Norland?", 2), ("Norland has", 2), ("Norland", 12)],
)
def test_what_a_fact_asks_itself_is_left_out(own: str, missing: int) -> None:
    encoder = encoder_of(byte_level())
    usual = other_sentences(encoder, asked(encoder, "Of Norland it is", "Norland"), FORMS)
    other = asked(encoder, "Of Norland it is", "Norland")
    for prompts in (asked(encoder, own, "Norland"), [*other, *asked(encoder, own, "Norland")]):
        found = other_sentences(encoder, prompts, FORMS)
        texts = [encoder.decode((*p.prompt_ids, *p.answer_ids[:-1])).strip() for p in found]
        assert not any(text.startswith(own) for text in texts)
        if missing < 12:
            assert len(found) == len(usual) - missing


@pytest.mark.parametrize("subject", ["Sodor", ""])
def test_nothing_without_a_subject(subject: str) -> None:
    encoder = encoder_of(byte_level())
    prompts = encoder.encode_forms("The capital of Norland is", "Lyon", "both")
    if subject:
        prompts = tuple(
            encoder.with_subject(p, "The capital of Norland is", subject) for p in prompts
        )
    assert other_sentences(encoder, prompts, FORMS) == []


def test_braces_in_a_subject_are_no_places_for_words() -> None:
    encoder = encoder_of(byte_level())
    made = other_sentences(encoder, asked(encoder, "The capital of {x} is", "{x}"), FORMS)
    assert made
    assert all(encoder.decode(p.prompt_ids).endswith("{x}") for p in made)


def test_the_token_that_ends_answers_is_no_part_of_a_beginning() -> None:
    tokenizer = byte_level()
    plain = encoder_of(tokenizer)
    ending = PromptEncoder(tokenizer, max_length=None, end_id=3)
    made, with_end = (
        other_sentences(one, asked(one, "The capital of Norland is", "Norland"), FORMS)
        for one in (plain, ending)
    )
    assert with_end == made


def test_an_answer_that_is_only_the_end_has_no_beginnings_before_it() -> None:
    encoder = encoder_of(byte_level())
    text = "The capital of Norland is"
    (plain, chat) = asked(encoder, text, "Norland")
    ending = PromptEncoder(encoder.tokenizer, max_length=None, end_id=chat.answer_ids[-1])
    only = encoder.decode(chat.answer_ids[-1:])
    prompts = [replace(p, answer=only, answer_ids=(ending.end_id,)) for p in (plain, chat)]
    assert ending.encode_chat(text, only).answer_ids == (ending.end_id,)
    made = other_sentences(ending, prompts, FORMS)
    assert len(made) >= len(STATEMENTS) + len(QUESTIONS)
