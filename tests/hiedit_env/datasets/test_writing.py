"""Punctuation, sentence ends and scripts without spaces, judged by reading."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from hiedit_env.datasets import writing

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("prompt", "answer", "space"),
    [
        ("It is", "Lyon", " "),
        ("It is", "東京", " "),
        ("東", "é", " "),
        ("Is it?", "Lyon", " "),
        ("서울은", "한국", " "),  # Korean has spaces
        ("print(", "x", " "),
        # White space is the seam already.
        ("It is ", "Lyon", ""),
        ("user: hi\nassistant:\n", "Lyon", ""),
        ("It is\u3000", "東京", ""),
        # Scripts without spaces.
        ("首都是", "东川", ""),
        ("谁？", "东川", ""),
        ("谁?", "东川", ""),
        ("谁？", "Lyon", ""),
        ("他生于", "1990年", ""),
        ("小说是", "《月湖》", ""),
        ("他说:", "“月湖”", ""),
        ("เมืองหลวงคือ", "ปารีส", ""),
    ],
)
def test_space_between(prompt: str, answer: str, space: str) -> None:
    assert writing.space_between(prompt, answer) == space


def test_every_sentence_end_is_punctuation_and_ends_a_sentence_alone() -> None:
    for mark in writing._WIDE_ENDS:
        assert unicodedata.category(mark) in ("Po", "So", "Cn"), hex(ord(mark))
        assert list(writing.sentence_ends(f"x{mark}y")) == [1]
        assert writing.is_closed(f"x{mark}")
    assert len(set(writing._WIDE_ENDS)) == len(writing._WIDE_ENDS)


def test_blocks_of_unspaced_scripts_are_in_order_and_apart() -> None:
    ends = [point for block in writing._UNSPACED for point in block]
    assert ends == sorted(ends)
    # One character of each script named in the table, by its Unicode name.
    names = ["THAI CHARACTER KO KAI", "LAO LETTER KO", "TIBETAN LETTER KA", "MYANMAR LETTER KA"]
    names += ["KHMER LETTER KA", "HIRAGANA LETTER KA", "KATAKANA LETTER KA", "YI SYLLABLE IT"]
    names += ["CJK UNIFIED IDEOGRAPH-6708", "HALFWIDTH KATAKANA LETTER KA", "JAVANESE LETTER KA"]
    assert all(writing.is_unspaced(unicodedata.lookup(name)) for name in names)
    others = [
        "HANGUL SYLLABLE GA",
        "ARABIC LETTER BEH",
        "DEVANAGARI LETTER KA",
        "ETHIOPIC SYLLABLE HA",
    ]
    assert not any(writing.is_unspaced(unicodedata.lookup(name)) for name in others)


def test_no_other_list_of_punctuation_is_in_the_project() -> None:
    pattern = re.compile(
        r"string\.punctuation|strip\([\"'][.,;:!? ]+[\"']|\[\.[!?;]"
        r"|[\"'][.!?][\"'], [\"'][.!?][\"']"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("hiedit_env", "agents", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if path.name != "writing.py" and pattern.search(line)
    ]
    assert not found
