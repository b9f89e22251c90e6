"""The built-in data set ``world-facts``: rules its raw JSON must keep (no torch needed)."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[3] / "hiedit_env" / "datasets" / "data" / "world_facts.json"
FIELDS = ["subject", "relation", "prompt", "answer", "target", "paraphrases", "locality"]
TEXT_FIELDS = FIELDS[:5]

# Facts looked up by hand, one per kind of relation: (relation, subject) -> answer.
KNOWN = {
    ("capital_of_country", "Australia"): "Canberra",
    ("currency_of_country", "United Kingdom"): "pound",
    ("official_language", "Brazil"): "Portuguese",
    ("author_of_book", "Pride and Prejudice"): "Jane Austen",
    ("composer_of_work", "The Four Seasons"): "Antonio Vivaldi",
    ("painter_of_work", "Guernica"): "Pablo Picasso",
    ("chemical_symbol", "tungsten"): "W",
    ("birthplace", "Albert Einstein"): "Ulm",
    ("river_country", "Vistula"): "Poland",
    ("us_state_capital", "Nevada"): "Carson City",
    ("young_animal", "swan"): "cygnet",
}


def has_phrase(phrase: str, text: str) -> bool:
    """Whether ``phrase`` occurs in ``text`` as whole words, ignoring case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def name(fact: dict[str, Any]) -> tuple[str, str]:
    return fact["relation"], fact["subject"]


def wordings(fact: dict[str, Any]) -> list[str]:
    return [fact["prompt"], *fact["paraphrases"]]


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))
    return loaded


def test_file_is_canonical(facts: list[dict[str, Any]]) -> None:
    expected = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    assert PATH.read_bytes() == expected.encode("utf-8")
    assert [name(f) for f in facts] == sorted(name(f) for f in facts)


def test_size_and_balance(facts: list[dict[str, Any]]) -> None:
    per_relation = Counter(f["relation"] for f in facts)
    assert len(facts) >= 330
    assert len(per_relation) >= 18
    assert min(per_relation.values()) >= 10
    questions = sum(f["prompt"].endswith("?") for f in facts) / len(facts)
    assert 0.3 <= questions <= 0.37


def test_fields_and_types(facts: list[dict[str, Any]]) -> None:
    for f in facts:
        assert list(f) == FIELDS, name(f)
        assert all(isinstance(f[key], str) for key in TEXT_FIELDS), name(f)
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", f["relation"]), name(f)
        assert len(f["paraphrases"]) == 2, name(f)
        assert all(isinstance(p, str) for p in f["paraphrases"]), name(f)
        assert len(f["locality"]) == 2, name(f)
        assert all(list(probe) == ["prompt", "answer"] for probe in f["locality"]), name(f)


def check_texts(fact: dict[str, Any]) -> None:
    """Asserts that every text of a fact is clean, prompts are prompts and answers are short."""
    probes = fact["locality"]
    prompts = [*wordings(fact), *(p["prompt"] for p in probes)]
    answers = [fact["answer"], fact["target"], *(p["answer"] for p in probes)]
    for text in [fact["subject"], *prompts, *answers]:
        assert text, name(fact)
        assert text == " ".join(text.split()), (name(fact), text)
    for prompt in prompts:
        assert prompt[0].isupper(), (name(fact), prompt)
        assert not prompt.endswith((".", ":", ",")), (name(fact), prompt)
    for answer in answers:
        assert not answer.endswith("."), (name(fact), answer)
        assert 1 <= len(answer.split()) <= 4, (name(fact), answer)  # J. R. R. Tolkien


def test_texts_are_clean(facts: list[dict[str, Any]]) -> None:
    for f in facts:
        check_texts(f)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("answer", ""),
        ("answer", "Rome."),
        ("answer", "the city of seven hills"),
        ("target", "a b c d e"),
        ("target", " Rome"),
        ("subject", "two  spaces"),
        ("prompt", "rome is in"),
        ("prompt", "Rome is in:"),
    ],
)
def test_a_text_that_is_not_clean_is_found(
    facts: list[dict[str, Any]], field: str, text: str
) -> None:
    with pytest.raises(AssertionError):
        check_texts({**facts[0], field: text})


def test_facts_and_wordings_are_unique(facts: list[dict[str, Any]]) -> None:
    assert len({name(f) for f in facts}) == len(facts)
    assert len({f["prompt"] for f in facts}) == len(facts)
    all_wordings = [w for f in facts for w in wordings(f)]
    assert len(set(all_wordings)) == len(all_wordings)


def test_subject_is_in_every_wording(facts: list[dict[str, Any]]) -> None:
    for f in facts:
        assert all(has_phrase(f["subject"], w) for w in wordings(f)), name(f)


def test_known_answers(facts: list[dict[str, Any]]) -> None:
    answers = {name(f): f["answer"] for f in facts}
    assert {key: answers.get(key) for key in KNOWN} == KNOWN


def test_target_is_another_true_answer_of_the_relation(facts: list[dict[str, Any]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    for f in facts:
        assert f["target"].casefold() != f["answer"].casefold(), name(f)
        answers[f["relation"]][f["answer"]] += 1
        targets[f["relation"]][f["target"]] += 1
    # A rotation uses every answer as a target exactly as often as it is an answer.
    assert targets == answers


def test_no_wording_gives_an_answer_away(facts: list[dict[str, Any]]) -> None:
    for f in facts:
        for wording in wordings(f):
            for word in (f["answer"], f["target"]):
                assert not has_phrase(word, wording), (name(f), wording, word)
        for probe in f["locality"]:
            assert not has_phrase(probe["answer"], probe["prompt"]), (name(f), probe)


def test_locality_is_about_other_subjects(facts: list[dict[str, Any]]) -> None:
    for f in facts:
        prompts = [p["prompt"] for p in f["locality"]]
        assert prompts[0] != prompts[1], name(f)
        assert not set(prompts) & set(wordings(f)), name(f)
        for probe in f["locality"]:
            assert not has_phrase(f["subject"], probe["prompt"]), (name(f), probe)
            # Otherwise an edit that leaks into the probe would go unnoticed.
            assert probe["answer"] != f["target"], (name(f), probe)


def test_locality_facts_are_never_edited(facts: list[dict[str, Any]]) -> None:
    """Every wording of a relation, filled with each of its subjects, is no locality prompt."""
    templates: dict[str, set[str]] = defaultdict(set)
    subjects: dict[str, set[str]] = defaultdict(set)
    for f in facts:
        subjects[f["relation"]].add(f["subject"])
        for wording in wordings(f):
            pattern = rf"(?<!\w){re.escape(f['subject'])}(?!\w)"
            templates[f["relation"]].add(re.sub(pattern, "{}", wording, flags=re.IGNORECASE))
    edited = {
        template.replace("{}", subject).casefold()
        for relation in templates
        for template in templates[relation]
        for subject in subjects[relation]
    }
    assert {w.casefold() for f in facts for w in wordings(f)} <= edited
    probes = {p["prompt"].casefold() for f in facts for p in f["locality"]}
    assert not probes & edited


def test_locality_relations_and_consistency(facts: list[dict[str, Any]]) -> None:
    """First probe: a wording of the same relation; second: of another one; one answer a prompt."""
    shapes: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for f in facts:
        for wording in wordings(f):
            start = re.search(re.escape(f["subject"]), wording, re.IGNORECASE)
            assert start is not None
            head = re.sub(r"the $", "", wording[: start.start()], flags=re.IGNORECASE)
            shapes[f["relation"]].add((head, wording[start.end() :]))

    def relations_of(prompt: str) -> set[str]:
        fits = {
            relation: max(
                (
                    len(head) + len(tail)
                    for head, tail in pairs
                    if prompt.startswith(head) and prompt.endswith(tail)
                ),
                default=0,
            )
            for relation, pairs in shapes.items()
        }
        best = max(fits.values())
        return {relation for relation, fit in fits.items() if fit == best > 0}

    answers: dict[str, str] = {}
    for f in facts:
        same, other = f["locality"]
        assert f["relation"] in relations_of(same["prompt"]), (name(f), same)
        assert f["relation"] not in relations_of(other["prompt"]), (name(f), other)
        for probe in f["locality"]:
            assert answers.setdefault(probe["prompt"], probe["answer"]) == probe["answer"]
