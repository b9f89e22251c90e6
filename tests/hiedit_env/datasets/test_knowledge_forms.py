"""The built-in data sets ``knowledge-forms-train`` and ``-test``: rules their facts must keep."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import without

FOLDER = Path(__file__).parents[3] / "hiedit_env" / "datasets" / "data"
HALVES = ("train", "test")
FORMS = (
    "entity",
    "formula",
    "rule",
    "long_answer",
    "another_language",
    "date_number",
    "arithmetic",
)


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def asked(request: Request) -> list[str]:
    return [request.prompt, *request.paraphrases]


@pytest.fixture(scope="module", params=HALVES)
def facts(request: pytest.FixtureRequest) -> list[Request]:
    return load_requests(f"knowledge-forms-{request.param}")


@pytest.mark.parametrize("half", HALVES)
def test_files_are_canonical(half: str) -> None:
    path = FOLDER / f"knowledge_forms_{half}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert path.read_bytes() == (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    order = [(FORMS.index(row["relation"]), row["subject"].casefold()) for row in rows]
    assert order == sorted(order)


def test_every_form_has_six_facts(facts: list[Request]) -> None:
    assert Counter(fact.relation for fact in facts) == dict.fromkeys(FORMS, 6)


def test_every_wording_names_the_subject_and_gives_nothing_away(facts: list[Request]) -> None:
    for fact in facts:
        assert fact.subject is not None
        assert len(fact.paraphrases) == 2
        for text in asked(fact):
            assert folded(fact.subject) in folded(text), text
            assert text == text.strip()
            assert folded(fact.answer) not in folded(text), (text, fact.answer)
            assert fact.old_answer is not None
            assert folded(fact.old_answer) not in folded(text), (text, fact.old_answer)
        assert folded(fact.answer) != folded(fact.old_answer)


def test_locality_is_of_the_form_and_of_another_one(facts: list[Request]) -> None:
    subjects = [folded(fact.subject or "") for fact in facts]
    forms: dict[str, set[str]] = {}
    for fact in facts:
        same, other = fact.locality
        assert same.prompt != other.prompt
        forms.setdefault(fact.relation or "", set()).add(same.prompt)
        for probe in fact.locality:
            assert not any(subject in folded(probe.prompt) for subject in subjects), probe
    for fact in facts:
        assert fact.locality[1].prompt not in forms[fact.relation or ""]
    assert {len(prompts) for prompts in forms.values()} == {3}


def test_answers_have_their_form(facts: list[Request]) -> None:
    for fact in facts:
        if fact.relation == "long_answer":
            assert 10 <= len(fact.answer.split()) <= 20, fact.answer
        if fact.relation == "arithmetic":
            assert fact.answer.isdigit()
            assert true_result(fact.subject or "") == int(fact.old_answer or "")
            assert fact.answer != fact.old_answer


def true_result(sum_in_words: str) -> int:
    """
    >>> true_result("72 divided by 9")
    8
    """
    first, *words, second = sum_in_words.split()
    a, b = int(first), int(second)
    found = {"times": a * b, "plus": a + b, "minus": a - b, "divided by": a // b}
    assert words != ["divided", "by"] or a % b == 0
    return found[" ".join(words)]


def test_halves_share_nothing_that_is_asked() -> None:
    train, test = (load_requests(f"knowledge-forms-{half}") for half in HALVES)
    # No locality prompt is about a subject that either of them edits.
    edited = {folded(fact.subject or "") for fact in (*train, *test)}
    probes = [folded(probe.prompt) for fact in (*train, *test) for probe in fact.locality]
    assert not [(s, probe) for s in edited for probe in probes if s in probe]
    assert without(train, test) == train
    assert not {folded(f.subject or "") for f in train} & {folded(f.subject or "") for f in test}
