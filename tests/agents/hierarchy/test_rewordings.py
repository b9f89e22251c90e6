"""A fact in another sentence: texts by hand, and where the subject stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hiedit_agents.hierarchy.rewordings import (
    LEADS,
    LONGEST,
    behind_leads,
    questions,
    rewordings,
    subject_first,
)
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.encoded import AskedForm, EncodedPrompt
from hiedit_env.model.tokenization import PromptEncoder
from tests.hiedit_env.model.test_asking import encoder_of
from tests.hiedit_env.model.test_tokenization import byte_level, sentencepiece

FORMS: Sequence[AskedForm] = ("plain", "chat")


def asked(
    encoder: PromptEncoder, prompt: str, subject: str, form: PromptForm = "both"
) -> list[EncodedPrompt]:
    found = encoder.encode_forms(prompt, "Lyon", form)
    return [encoder.with_subject(one, prompt, subject) for one in found]


@pytest.mark.parametrize(
    ("prompt", "subject", "wanted"),
    [
        ("the capital of Al is", "Al", "Al: The capital of it is"),
        ("Who rules Al?", "Al", "Al: Who rules it?"),
        ("Al met Albert; al left", "Al", "Al: It met Albert; al left"),
        ("Al, or Al II, lives in", "Al", "Al: Al, or it II, lives in"),
        ("東京の首都", "東京", "東京: Itの首都"),
    ],
)
def test_texts_by_hand(prompt: str, subject: str, wanted: str) -> None:
    assert subject_first(prompt, subject) == wanted


@pytest.mark.parametrize("prompt", ["Albert left", "Al", " Al "])
def test_no_text_without_a_subject_or_with_nothing_else(prompt: str) -> None:
    assert subject_first(prompt, "Al") is None


@pytest.mark.parametrize(
    ("prompt", "question", "alone"),
    [
        ("The capital of Al is ", "The capital of Al is what?", True),
        ("Who rules Al?", "Who rules Al?", False),
        ("Who rules Al? Al is ruled by", "Who rules Al?", True),
        ("Who rules Al? It is", "Who rules Al?", True),
        ("Who knows? Al rules", "Who knows? Al rules what?", True),
        ("谁统治Al？", "谁统治Al？", False),
        ("من يحكم Al؟ هو", "من يحكم Al؟", True),
    ],
)
def test_questions_by_hand(prompt: str, question: str, alone: bool) -> None:
    wanted = [question] if alone else []
    if not prompt.endswith("? It is"):
        wanted.append(f"{question} It is")
    assert questions(prompt, "Al") == tuple(wanted)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_the_subject_is_read_in_front(kind: str) -> None:
    encoder = encoder_of(byte_level() if kind == "byte" else sentencepiece("first"))
    prompts = asked(encoder, "the name of Lyon is", "Lyon")
    plain, chat, alone, question, asking = rewordings(encoder, prompts, FORMS)
    assert plain.prompt == "Lyon: The name of it is"
    assert (plain.form, chat.form, question.form) == (*FORMS, "plain")
    assert alone.prompt == "the name of Lyon is what?"
    assert question.prompt == "the name of Lyon is what? It is"
    assert asking.form == "chat"
    assert asking.prompt_ids == encoder.encode_chat(alone.prompt, "Lyon").prompt_ids
    # Up to the subject the questions are the prompt itself.
    for one in (alone, question):
        end = one.subject_spans[-1][1]
        assert one.prompt_ids[:end] == prompts[0].prompt_ids[: prompts[0].subject_spans[-1][1]]
    for one in (plain, chat):
        start, stop = one.subject_spans[-1]
        assert encoder.decode(one.prompt_ids[start:stop]).strip() == "Lyon"
        assert ": The name of it is" in encoder.decode(one.prompt_ids[stop:])
        assert one.answer_ids == prompts[0].answer_ids or one.form == "chat"
    assert chat.prompt_ids == encoder.encode_chat(plain.prompt, "Lyon").prompt_ids


def test_only_forms_in_which_the_fact_is_asked() -> None:
    encoder = encoder_of(byte_level())
    prompts = asked(encoder, "the name of Lyon is", "Lyon", "plain")
    assert [p.form for p in rewordings(encoder, prompts, FORMS)] == ["plain"] * 3
    assert rewordings(encoder, prompts, ("chat",)) == []
    both = asked(encoder, "the name of Lyon is", "Lyon")
    assert [p.form for p in rewordings(encoder, both, ("chat",))] == ["chat", "chat"]


def test_a_long_text_is_not_asked_as_a_question() -> None:
    encoder = encoder_of(byte_level())
    for words, number in ((2, 5), (LONGEST, 2)):
        prompts = asked(encoder, f"the name of Lyon is {'the ' * words}", "Lyon")
        assert (len(prompts[0].prompt_ids) > LONGEST) == (number == 2)
        assert len(rewordings(encoder, prompts, FORMS)) == number


def test_nothing_is_made_without_a_subject_or_a_plain_prompt() -> None:
    encoder = encoder_of(byte_level())
    prompts = asked(encoder, "the name of Lyon is", "Lyon")
    missing = asked(encoder, "the name of Lyon is", "Paris")
    assert missing[0].subject_missing
    for none in ([], prompts[1:], missing, [replace(p, subject_spans=()) for p in prompts]):
        assert rewordings(encoder, none, FORMS) == []


def test_a_subject_of_one_token_at_the_very_beginning_is_left_out() -> None:
    """All texts read their first token alike, so nothing is written there."""
    encoder = encoder_of(byte_level())
    prompts = asked(encoder, "the name of A is", "A")
    found = rewordings(encoder, prompts, FORMS)
    assert [p.form for p in found] == ["chat", "plain", "plain", "chat"]
    assert found[2].prompt == "the name of A is what? It is"


def test_a_text_that_is_too_long_is_left_out() -> None:
    tokenizer = byte_level()
    roomy = encoder_of(tokenizer)
    prompts = asked(roomy, "the name of Lyon is", "Lyon")
    longest = max(len(p.prompt_ids) + len(p.answer_ids) for p in prompts)
    tight = PromptEncoder(tokenizer, max_length=longest)
    assert [p.form for p in rewordings(tight, prompts, FORMS)] == ["plain"] * 3


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("byte", "the name of Lyon is"),
        ("sentencepiece", "the name of Lyon is"),
        ("sentencepiece", "Lyon has the name of"),
    ],
)
def test_the_subject_is_read_behind_other_words(kind: str, prompt: str) -> None:
    encoder = encoder_of(byte_level() if kind == "byte" else sentencepiece("first"))
    prompts = asked(encoder, prompt, "Lyon")
    found = behind_leads(encoder, prompts)
    assert [one.prompt for one in found] == [f"{lead} Lyon" for lead in LEADS]
    for one in found:
        ((start, stop),) = one.subject_spans
        assert (start > 0, stop) == (True, len(one.prompt_ids))
        assert encoder.decode(one.prompt_ids[start:]).strip() == "Lyon"
        assert one.prompt_ids == encoder.encode(one.prompt, "Lyon").prompt_ids
        assert one.form == "plain"
    assert found == behind_leads(encoder, prompts[::-1])


def test_nothing_is_read_behind_other_words_where_nothing_is_reworded() -> None:
    encoder = encoder_of(byte_level())
    prompts = asked(encoder, "the name of Lyon is", "Lyon")
    missing = asked(encoder, "the name of Lyon is", "Paris")
    for none in ([], prompts[1:], missing, [replace(p, subject_spans=()) for p in prompts]):
        assert behind_leads(encoder, none) == []
    # What is too long is left out, and so is a subject that ends in another token there.
    lengths = [len(p.prompt_ids) + len(p.answer_ids) for p in behind_leads(encoder, prompts)]
    tight = PromptEncoder(encoder.tokenizer, max_length=min(lengths))
    wanted = [lead for lead, n in zip(LEADS, lengths, strict=True) if n == min(lengths)]
    assert 0 < len(wanted) < len(LEADS)
    assert [one.prompt for one in behind_leads(tight, prompts)] == [f"{w} Lyon" for w in wanted]
    plain = prompts[0]
    start, stop = plain.subject_spans[-1]
    # At the beginning of a text these tokenizers write the name in other tokens.
    assert plain.prompt_ids[start:stop] != encoder.encode("Lyon", "a").prompt_ids
    assert behind_leads(encoder, asked(encoder, "Lyon has the name of", "Lyon")) == []
