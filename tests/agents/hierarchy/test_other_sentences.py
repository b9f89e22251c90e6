"""Other sentences about a subject: which ones, where they are cut, and what they leave out."""

from __future__ import annotations

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
    made = other_sentences(encoder, asked(encoder, "The capital of Norland is", "Norland"), FORMS)
    plain, chat = ([p for p in made if p.form == form] for form in FORMS)
    # What begins with the subject itself reads like the beginning of every text.
    assert len(plain) >= sum(not s.startswith("{}") for s in STATEMENTS)
    assert len(chat) == len(QUESTIONS) + len(ANSWERS)
    for one in made:
        assert encoder.decode(one.prompt_ids).endswith("Norland")
        assert one.positions("subject")[0] == len(one.prompt_ids) - 1
    texts = [encoder.decode((*p.prompt_ids, *p.answer_ids[:-1])) for p in plain]
    assert "The price of Norland is" in [text.strip() for text in texts]
    (fact,) = asked(encoder, "The capital of Norland is", "Norland", "plain")
    assert {p.answer_ids[-1] for p in plain} == {fact.answer_ids[0]}
    # In chat the template goes on behind the question, or the answer begins with the subject.
    assert all(len(p.answer_ids) > 2 for p in chat[: len(QUESTIONS)])
    for one, (question, said) in zip(chat[len(QUESTIONS) :], ANSWERS, strict=True):
        whole = encoder.encode_chat(question.format("Norland"), said.format("Norland"))
        assert (*one.prompt_ids, *one.answer_ids[:-1]) == whole.prompt_ids + whole.answer_ids
        assert encoder.decode(one.answer_ids[:-1]).strip() == said.removeprefix("{}").strip()


def test_the_forms_are_those_that_are_wanted_and_asked() -> None:
    encoder = encoder_of(byte_level())
    both = asked(encoder, "The capital of Norland is", "Norland")
    assert {p.form for p in other_sentences(encoder, both, ("chat",))} == {"chat"}
    assert {p.form for p in other_sentences(encoder, both[:1], FORMS)} == {"plain"}
    # Without the plain prompt it is not known which words are the subject's.
    assert other_sentences(encoder, both[1:], FORMS) == []


def test_what_the_fact_asks_itself_is_left_out() -> None:
    encoder = encoder_of(byte_level())
    usual = other_sentences(encoder, asked(encoder, "Of Norland it is", "Norland"), FORMS)
    own = other_sentences(encoder, asked(encoder, "The price of Norland", "Norland"), FORMS)
    texts = {encoder.decode((*p.prompt_ids, *p.answer_ids[:-1])).strip() for p in own}
    assert "The price of Norland is" not in texts
    assert len(own) == len(usual) - 1


@pytest.mark.parametrize("subject", ["Sodor", ""])
def test_nothing_without_a_subject(subject: str) -> None:
    encoder = encoder_of(byte_level())
    prompts = encoder.encode_forms("The capital of Norland is", "Lyon", "both")
    if subject:
        prompts = tuple(
            encoder.with_subject(p, "The capital of Norland is", subject) for p in prompts
        )
    assert other_sentences(encoder, prompts, FORMS) == []


def test_the_token_that_ends_answers_is_no_part_of_a_beginning() -> None:
    tokenizer = byte_level()
    plain = encoder_of(tokenizer)
    ending = PromptEncoder(tokenizer, max_length=None, end_id=3)
    made, with_end = (
        other_sentences(one, asked(one, "The capital of Norland is", "Norland"), FORMS)
        for one in (plain, ending)
    )
    assert [p.input_ids for p in with_end] == [p.input_ids for p in made]
