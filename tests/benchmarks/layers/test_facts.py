"""Which facts layers are measured on, and the prompts that judge them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.layers.facts import prompts_of, spread, swapped_prompts
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.errors import DatasetError, PromptError
from hiedit_env.model.loading import load_model
from hiedit_env.model.tokenization import PromptEncoder


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def fact(subject: str, relation: str = "home", **changes: Any) -> Request:
    return Request(
        **{
            "prompt": f"{subject} lives in",
            "answer": "Averlund",
            "subject": subject,
            "relation": relation,
            "source": f"facts row {subject}",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(load_model("tiny", progress=False).tokenizer, None)


def test_relations_take_turns() -> None:
    names = {"a": 5, "b": 1, "c": 2}
    requests = [fact(f"{r}{i}", r) for r, count in names.items() for i in range(count)]
    ordered = [request.relation for request in spread(requests, rng())]
    assert sorted(str(r) for r in ordered[:3]) == ["a", "b", "c"]
    assert sorted(str(r) for r in ordered[3:5]) == ["a", "c"]
    assert ordered[5:] == ["a", "a", "a"]


def test_another_subject_stands_in_every_place_of_the_subject() -> None:
    request = fact("Belka", prompt="Belka's house: Belka lives in")
    assert swapped_prompts(request, [request, fact("Corrin")], rng()) == [
        "Corrin's house: Corrin lives in"
    ]


def test_subjects_of_the_same_relation_come_first() -> None:
    same = [fact(name) for name in ("Corrin", "Dasmo", "Eldo")]
    others = [fact(f"Other{i}", "craft") for i in range(9)]
    found = swapped_prompts(fact("Belka"), [*others, *same], rng())
    assert sorted(found[:3]) == ["Corrin lives in", "Dasmo lives in", "Eldo lives in"]
    assert found[3].startswith("Other")
    assert len(found) == 4


def test_a_swapped_prompt_never_names_the_subject() -> None:
    request = fact("Belka")
    names = ["Belka", "belka", "Belka of Averlund", "old Belka", "Corrin"]
    assert swapped_prompts(request, [fact(name) for name in names], rng()) == ["Corrin lives in"]
    unnamed = fact("Belka", prompt="She lives in")
    assert swapped_prompts(unnamed, [fact("Corrin")], rng()) == []


def test_unrelated_prompts_are_the_facts_own_or_those_of_other_facts(
    encoder: PromptEncoder,
) -> None:
    own = fact("Belka", locality=(Probe("Vasnik works as a", "tanner"),), paraphrases=("P of",))
    bare = fact("Corrin")
    first, second = prompts_of([own, bare], [own, bare], encoder, rng())
    assert [p.prompt for p in first.unrelated] == ["Vasnik works as a"]
    assert [p.prompt for p in first.swapped] == ["Corrin lives in"]
    assert [(p.prompt, p.answer) for p in first.paraphrases] == [("P of", "Averlund")]
    assert [p.prompt for p in second.unrelated] == ["Belka lives in"]
    assert [p.prompt for p in second.others] == ["Belka lives in", "Belka lives in"]


def test_a_fact_without_anything_that_shows_damage_is_refused(encoder: PromptEncoder) -> None:
    alone = fact("Belka")
    with pytest.raises(DatasetError, match="facts row Belka: nothing shows the damage"):
        prompts_of([alone], [alone], encoder, rng())


def test_a_text_that_cannot_be_read_names_its_row(encoder: PromptEncoder) -> None:
    wrong = fact("Belka", paraphrases=("\ud800",))
    with pytest.raises(PromptError, match="facts row Belka: "):
        prompts_of([wrong], [wrong, fact("Corrin")], encoder, rng())
