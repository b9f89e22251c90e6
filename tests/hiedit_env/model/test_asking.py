"""Chat form against ``apply_chat_template``; subject positions written down by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer
from transformers import PreTrainedTokenizerBase as Base

from hiedit_env.datasets.writing import mentions
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.tokenization import PromptEncoder
from tests.hiedit_env.model.test_tokenization import byte_level, sentencepiece

TEMPLATE = (
    "{% if messages[0].role != 'system' %}Lyon\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot:\n{% endif %}"
)
SPANS = tuple[tuple[int, int], ...]
FORMS: tuple[PromptForm, ...] = ("plain", "chat", "both")


def encoder_of(tokenizer: Base) -> PromptEncoder:
    tokenizer.chat_template = TEMPLATE
    return PromptEncoder(tokenizer, max_length=None)


def real_tokenizer() -> Base:
    folders = sorted((Path.home() / ".cache" / "hiedit").glob("*/chat_template.jinja"))
    if not folders:
        pytest.skip("no real model in the cache")
    loaded: Base = AutoTokenizer.from_pretrained(folders[0].parent)
    return loaded


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "real"])
@pytest.mark.parametrize("system", [None, "", "Be short."])
def test_chat_ids_are_those_of_the_template(kind: str, system: str | None) -> None:
    if kind == "real":
        encoder = PromptEncoder(real_tokenizer(), max_length=None)
    else:
        encoder = encoder_of(byte_level() if kind == "byte" else sentencepiece("first"))
    chat = [] if system is None else [{"role": "system", "content": system}]
    chat.append({"role": "user", "content": "Is it Lyon?"})
    wanted = encoder.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    encoded = encoder.encode_chat("Is it Lyon?", "Lyon", system)
    assert list(encoded.prompt_ids) == list(wanted)
    whole = encoder.tokenizer.decode(list(encoded.prompt_ids + encoded.answer_ids))
    assert whole.endswith("\nLyon")


def test_chat_without_a_template_is_refused_in_one_line() -> None:
    with pytest.raises(PromptError, match="prompt_form='plain'") as caught:
        PromptEncoder(byte_level(), max_length=None).encode_chat("It is", "Lyon")
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_system_message_is_one_line() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('no system message here\\nsorry') }}"
    with pytest.raises(PromptError, match="no system message here") as caught:
        PromptEncoder(tokenizer, max_length=None).encode_chat("It is", "Lyon", "Be short.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "subject", "spans"),
    [
        ("It is Lyon", "Lyon", ((3, 4),)),  # I t " is" " Lyon"
        ("It is Lyons", "Lyons", ((3, 5),)),  # ... " Lyon" s
        ("Lyon is Lyon", "Lyon", ((0, 3), (4, 5))),  # L y on " is" " Lyon"
        ("It is Lyon", "lyon", ((3, 4),)),
        ("東京は", "京", ((3, 6),)),  # three bytes each
    ],
)
def test_subject_in_byte_level_tokens(prompt: str, subject: str, spans: SPANS) -> None:
    encoder = PromptEncoder(byte_level(), max_length=None)
    found = encoder.with_subject(encoder.encode(prompt, "on"), prompt, subject)
    assert (found.subject_spans, found.subject_missing) == (spans, False)


@pytest.mark.parametrize("kind", ["always", "first", "normalizer"])
def test_subject_in_sentencepiece_tokens(kind: str) -> None:
    encoder = PromptEncoder(sentencepiece(kind), max_length=None)
    # <s> ▁It ▁is ▁Lyon
    found = encoder.with_subject(encoder.encode("It is Lyon", "on"), "It is Lyon", "Lyon")
    assert found.subject_spans == ((3, 4),)


def test_the_system_message_does_not_count() -> None:
    encoder = encoder_of(byte_level())
    found = encoder.with_subject(encoder.encode_chat("It is Lyon", "on"), "It is Lyon", "Lyon")
    # "Lyon\n" is L y on \n; "user:" has 5 tokens; then I t " is" and the subject.
    assert found.subject_spans == ((12, 13),)


def test_a_slow_tokenizer_is_followed_by_decoding() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    encoder = PromptEncoder(tokenizer, max_length=None)
    found = encoder.with_subject(encoder.encode("a 東 b", "on"), "a 東 b", "東")
    assert found.subject_spans == ((2, 5),)  # a, space, three bytes


def test_a_subject_that_is_not_there_falls_back_to_the_last_token() -> None:
    encoder = PromptEncoder(byte_level(), max_length=None)
    encoded = encoder.encode("It is", "Lyon")
    found = encoder.with_subject(encoded, "It is", "Paris")
    assert (found.subject_spans, found.subject_missing) == (((2, 3),), True)
    assert (encoded.subject_spans, encoded.subject_missing) == ((), False)


@pytest.mark.parametrize(
    ("text", "subject", "spans"),
    [
        ("Albert met al and Al", "Al", ((18, 20),)),
        ("Albert and al", "Al", ((11, 13),)),
        ("Albert", "Al", ()),
        ("Apollo 11", "Apollo 1", ()),
        ("Jose\u0301 left", "Jose", ()),  # the accent is a mark of its own
        ("Al's, Al-Ahly and C++11", "Al", ((0, 2), (6, 8))),
        ("C++11", "C++", ((0, 3),)),
        ("東京都の東京", "東京", ((0, 2), (4, 6))),
        ("東京Tower", "Tower", ((2, 7),)),
        ("กรุงเทพฯคือ", "กรุงเทพ", ((0, 7),)),
        ("서울은 크다", "서울", ((0, 2),)),
        ("북서울", "서울", ()),
        ("It is", " ", ()),
    ],
)
def test_a_mention_is_a_whole_word(text: str, subject: str, spans: SPANS) -> None:
    assert mentions(text, subject) == spans


def test_the_end_token_stands_once_behind_the_answer_in_both_forms() -> None:
    tokenizer = byte_level()  # "<|endoftext|>" is 0, " Lyon" is 262; L y on: 77, 122, 261
    tokenizer.chat_template = TEMPLATE
    without = PromptEncoder(tokenizer, max_length=None)
    encoder = PromptEncoder(tokenizer, max_length=None, end_id=0)
    assert encoder.encode("It is", "Lyon").answer_ids == (262, 0)
    assert encoder.encode("It is", "Lyon<|endoftext|>").answer_ids == (262, 0)
    assert encoder.encode_chat("It is", "Lyon").answer_ids == (77, 122, 261, 0)
    assert encoder.encode("It is", "Lyon").prompt_ids == without.encode("It is", "Lyon").prompt_ids
    assert without.encode("It is", "Lyon").answer_ids == (262,)


def test_the_end_token_counts_against_the_context() -> None:
    tokenizer = byte_level()  # three tokens of the prompt, one of the answer, the end token
    assert PromptEncoder(tokenizer, max_length=5, end_id=0).encode("It is", "Lyon").length == 4
    with pytest.raises(PromptError, match="shorten"):
        PromptEncoder(tokenizer, max_length=4, end_id=0).encode("It is", "Lyon")


@pytest.mark.parametrize("wrong", [-1, 264, True, "</s>"])
def test_an_end_token_that_is_no_id_is_refused(wrong: object) -> None:
    with pytest.raises(SettingsError, match="end_id must be None or a token id from 0 to 263"):
        PromptEncoder(byte_level(), max_length=None, end_id=wrong)  # type: ignore[arg-type]


def test_a_prompt_in_every_form_asked() -> None:
    encoder = encoder_of(byte_level())
    plain = encoder.encode("Is it Lyon?", "Lyon")
    chat = encoder.encode_chat("Is it Lyon?", "Lyon", "Be short.")
    assert plain.prompt_ids != chat.prompt_ids
    asked = [encoder.encode_forms("Is it Lyon?", "Lyon", f, "Be short.") for f in FORMS]
    assert asked == [(plain,), (chat,), (plain, chat)]


def test_a_prompt_that_a_template_wrote_is_asked_as_it_is() -> None:
    encoder = encoder_of(byte_level())
    written = f"{encoder.tokenizer.eos_token}user:Is it Lyon?\nbot:\n"
    asked = [encoder.encode_forms(written, "Lyon", form) for form in FORMS]
    assert asked == [(encoder.encode(written, "Lyon"),)] * 3


def test_a_form_that_the_tokenizer_lacks_is_refused() -> None:
    encoder = PromptEncoder(byte_level(), max_length=None)
    assert len(encoder.encode_forms("It is", "Lyon", "plain")) == 1
    for form in FORMS[1:]:
        with pytest.raises(PromptError, match="has none"):
            encoder.encode_forms("It is", "Lyon", form)
