"""When a generated text is the answer: a table of cases, each judged by reading it."""

from __future__ import annotations

import pytest

from hiedit_env.evaluation.matching import generated_answer, is_match, normalise, starts_with


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "paris"),
        (" The  Beatles,", "beatles"),
        ("an apple a day", "apple day"),
        ("Theatre", "theatre"),  # an article is a whole word
        ("Mother-in-Law", "motherinlaw"),  # as in SQuAD's script: punctuation leaves no space
        ("\tNew\nYork ", "new york"),
        ("ÉCOLE", "école"),
        ("東京", "東京"),
        ("「東京」、。", "東京"),
        ("a\u0301 la", "\u00e1 la"),  # a letter with an accent is no article
        ("3.5", "35"),
        ("", ""),
        # What would leave nothing stays.
        ("The", "the"),
        ("A.", "a"),
        (" ? ", "?"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Paris", " Paris"),
        (" Paris. It is large", " Paris"),
        (" Paris.", " Paris"),
        (" Paris\nFrance", " Paris"),
        (" Paris\r\nFrance", " Paris"),
        ("\n\n Paris! Yes", " Paris"),
        (" Paris?", " Paris"),
        (" Paris; Lyon", " Paris"),
        (" 3.5 m", " 3.5 m"),  # no space behind the point: no end of a sentence
        (" Paris, France", " Paris, France"),
        ("", ""),
        (" 月湖城。它位于", " 月湖城"),
        (" 十月？ 十", " 十月"),
        (" वेलमोरा। यह", " वेलमोरा"),
        (" ველმორა. ის", " ველმორა"),
        (" ቬልሞራ።እሱ", " ቬልሞራ"),
        (" Վելմորա։ Այն", " Վելմորա"),
        (" v2.0版", " v2.0版"),
    ],
)
def test_generated_answer(text: str, expected: str) -> None:
    assert generated_answer(text) == expected


@pytest.mark.parametrize(
    ("generated", "answer", "whole", "beginning"),
    [
        # The answer and nothing else.
        (" Paris", "Paris", True, True),
        (" paris", "Paris", True, True),
        ("Paris", " Paris ", True, True),
        (" the Paris", "Paris", True, True),
        (" Paris. It is large", "Paris", True, True),
        (" Paris\nQ: and", "Paris", True, True),
        ("\n Paris.", "Paris", True, True),
        (" Paris!", "Paris", True, True),
        (" Beatles", "The Beatles", True, True),
        # An end of sentence inside the answer does not cut it.
        (" J. R. R. Tolkien. He", "J. R. R. Tolkien", True, True),
        (" Washington, D.C. It", "Washington, D.C.", True, True),
        (" 3.5", "3.5", True, True),
        # Running on: content right, length wrong.
        (" Paris and then", "Paris", False, True),
        (" Paris, France", "Paris", False, True),
        (" Paris is. Paris", "Paris", False, True),
        # Too short, another word, another place.
        (" New", "New York", False, False),
        (" Parisian", "Paris", False, False),
        (" It is Paris", "Paris", False, False),
        (" Lyon. Paris", "Paris", False, False),
        (" Lyon\nParis", "Paris", False, False),
        ("", "Paris", False, False),
        ("\n\n", "Paris", False, False),
        (". Paris", "Paris", True, True),  # punctuation in front is no content
        # Answers that are an article, or a letter that looks like one.
        (" A", "A", True, True),
        (" A.", "A", True, True),
        (" B", "A", False, False),
        ("", "A", False, False),
        (" Lyon", "The", False, False),
        (" ?", "?", True, True),
        (" Lyon", "?", False, False),
        # Other scripts.
        (" 東京。", "東京", True, True),
        (" 東京. 日本", "東京", True, True),
        (" 東京.日本", "東京", True, True),  # nor is a space needed behind a Latin full stop here
        (" 東 京", "東京", True, True),
        (" 十月？ 十", "十月", True, True),
        (" 月湖城。它位于", "月湖城", True, True),
        (" 月湖城它位于", "月湖城", False, True),
        (" 月湖城，青石国", "月湖城", False, True),
        (" 《月湖城》", "月湖城", True, True),
        (" 月湖", "月湖城", False, False),
        (" iPhone手机很好", "iPhone手机", False, True),
        (" １．５米", "１．５米", True, True),  # a fullwidth point inside a number
        (" فلمورا؟ نعم", "فلمورا", True, True),
        (" فلمورا، مارن", "فلمورا", False, True),
        (" वेलमोरा। यह", "वेलमोरा", True, True),
        (" वेलमोराई", "वेलमोरा", False, False),  # words where there are spaces
        (" กินข้าว", "กิน", False, True),
        (" กิน", "ก", False, False),  # a vowel sign belongs to its letter
        (" “Velmora”", "Velmora", True, True),
        (" Velmora… it", "Velmora", True, True),
        (" «Велмора».", "Велмора", True, True),
        (" Βελμόρα; Ναι", "Βελμόρα", True, True),
        (" Velmora\u2028It", "Velmora", True, True),
        (" e\u0301cole", "\u00e9cole", True, True),  # composed and decomposed
        (" \u200fفلمورا\u200f.", "فلمورا", True, True),  # invisible direction marks
    ],
)
def test_matches(generated: str, answer: str, whole: bool, beginning: bool) -> None:
    assert is_match(generated, answer) is whole
    assert starts_with(generated, answer) is beginning


def test_a_whole_match_is_also_a_beginning() -> None:
    texts = [" Paris", " Paris. A", " The Paris", " paris!", " Paris\n\nThe", " A Paris. Lyon"]
    for text in texts:
        assert is_match(text, "Paris")
        assert starts_with(text, "Paris")
