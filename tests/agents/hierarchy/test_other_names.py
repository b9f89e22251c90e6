"""Other names that end as a subject does."""

from __future__ import annotations

from hiedit_agents.hierarchy.other_names import NAMES, with_other_names
from hiedit_env.model.tokenization import EncodedPrompt
from tests.agents.hierarchy.test_neuron import model, unit
from tests.hiedit_env.model.test_asking import encoder_of
from tests.hiedit_env.model.test_tokenization import byte_level


def placed(text: str, subject: str) -> EncodedPrompt:
    encoder = encoder_of(byte_level())
    (encoded,) = encoder.encode_forms(text, "x", "plain")
    return encoder.with_subject(encoded, text, subject)


def texts(prompt: EncodedPrompt, place: int | None = None, number: int = 4) -> list[str]:
    tokenizer = byte_level()
    found = with_other_names(tokenizer, prompt, place, number)
    assert all(one.answer_ids == one.prompt_ids[-1:] for one in found)
    return [tokenizer.decode(list(one.prompt_ids)) for one in found]


def test_names_end_in_the_subjects_last_token() -> None:
    # One letter is one token here.
    prompt = placed("Where is Hull Bay now?", "Hull Bay")
    assert texts(prompt, number=2) == ["Where is Harpery", "Where is Dawsony"]
    # At the beginning of a text there is no space.
    assert texts(placed("Hull Bay is", "Hull Bay"), number=2) == ["Harpery", "Dawsony"]


def test_the_subject_itself_is_no_other_name() -> None:
    assert texts(placed("See Dawsony now", "Dawsony"), number=2) == ["See Harpery"]


def test_behind_the_subject_a_name_takes_its_whole_place() -> None:
    prompt = placed("Where is Hull Bay now?", "Hull Bay")
    stop = prompt.subject_spans[-1][1]
    assert texts(prompt, stop + 3, 2) == ["Where is Harper now", "Where is Dawson now"]
    # A place inside of the subject is its last token.
    assert texts(prompt, stop - 1, 2) == texts(prompt, None, 2)


def test_a_name_has_a_space_where_the_subject_has_one() -> None:
    tokenizer = byte_level()
    for before in ("", "\n", "(", "see "):
        prompt = placed(f"{before}Hull Bay is", "Hull Bay")
        assert texts(prompt, number=1) == [f"{before}Harpery"]
    # As part of its first token, which is how most tokenizers have it.
    ids = tuple(tokenizer("See Hull", add_special_tokens=False)["input_ids"])
    whole = EncodedPrompt("p", "a", ids, (7,), subject_spans=((3, len(ids)),))
    assert texts(whole, number=1) == ["See Harperl"]


def test_names_that_are_one_to_the_tokenizer_are_read_once() -> None:
    llm = model()
    capture = unit(llm, ("w6 w11 w9 w8", "w13", "w11 w9"))
    assert len(with_other_names(llm.tokenizer, capture.prompt, None, 24)) == 1


def test_where_there_is_no_subject_there_are_no_names() -> None:
    assert with_other_names(byte_level(), EncodedPrompt("p", "a", (5, 6), (7,)), None, 4) == []
    assert with_other_names(byte_level(), placed("See X now", "X"), None, 0) == []
    one = EncodedPrompt("p", "a", (5, 6), (7,), subject_spans=((1, 2),))
    assert with_other_names(byte_level(), one, None, 4) == []


def test_names_are_different() -> None:
    assert len(set(NAMES)) == len(NAMES) == 24
