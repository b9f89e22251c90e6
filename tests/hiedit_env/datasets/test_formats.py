"""Row formats: every one against requests written by hand, and every malformed row."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hiedit_env.datasets.load import FORMATS, load_requests
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.errors import DatasetError


def load_rows(tmp_path: Path, *rows: object, format: str | None = None) -> list[Request]:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load_requests(path, format=format)


# One row per format with every optional field, and the request it stands for.

ZSRE: dict[str, Any] = {
    "subject": "Volvo B12M",
    "src": "What company made Volvo B12M?",
    "rephrase": "Volvo B12M's manufacturer was who?",
    "ans": "Volkswagen Group",
    "alt": "Volkswagen Group",
    "loc": "nq question: who sang yesterday",
    "loc_ans": "The Beatles",
}
COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q456"},
        "target_true": {"str": "Paris", "id": "Q90"},
    },
    "paraphrase_prompts": ["France's capital is", "It rained. The seat of France is"],
    "neighborhood_prompts": ["The Louvre is in", "The Seine flows through"],
    "generation_prompts": ["France is known for"],
}
ULTRAEDITBENCH: dict[str, Any] = {
    "prompt": "Who wrote Emma?",
    "rephrase_prompt": "Emma's author is who?",
    "ans": "Mary Shelley",
    "loc": "Who wrote Dracula?",
    "loc_ans": "Bram Stoker",
}
WIKIBIGEDIT: dict[str, Any] = {
    "tag": "update",
    "subject": "Ruritania",
    "relation": "head of state",
    "update": "Who is the head of state of Ruritania?",
    "rephrase": "Who leads Ruritania?",
    "personas": "Tell me, old chap, who reigns in Ruritania?",
    "ans": "Rudolf V",
    "loc": "Who is the head of state of Graustark?",
    "loc_ans": "Yetive",
    "mhop": "Where was the head of state of Ruritania born?",
    "mhop_ans": "Strelsau",
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Vienna",
    "ground_truth": [["Berlin", "Berlin, Germany"]],
    "rephrase": "Leo Arons died in",
    "portability": {"Reasoning": [{"prompt": "Leo Arons died in the country of"}]},
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons"]]},
            {"prompt": "The hobby of Leo Arons is", "ground_truth": [[""]]},
        ],
        "Forgetfulness": [{"prompt": ["Leo Arons studied in"], "ground_truth": "Strasbourg"}],
    },
}
WIKIBIO: dict[str, Any] = {
    "text": "This is a passage about ada lovelace.",
    "labels": "She wrote notes on the Analytical Engine.",
    "concept": "ada lovelace",
    "locality": {"Relation_Specificity": [{"prompt": "Ada's sex is", "ground_truth": ["female"]}]},
}
HIEDIT: dict[str, Any] = {
    "subject": "Peru",
    "relation": "capital",
    "prompt": "The capital of Peru is",
    "answer": "Lima",
    "target": "Cusco",
    "paraphrases": ["Peru's capital city is"],
    "locality": [{"prompt": "The capital of Chile is", "answer": "Santiago"}],
}
FACTS: dict[str, Any] = {
    "prompt": "My dog is called",
    "answer": "Rex",
    "subject": "my dog",
    "paraphrases": ["The name of my dog is", "I call my dog"],
    "locality": [{"prompt": "My cat is called", "answer": "Tom"}],
}

EXPECTED: dict[str, tuple[dict[str, Any], Request]] = {
    "zsre": (
        ZSRE,
        Request(
            "What company made Volvo B12M?",
            "Volkswagen Group",
            "Volvo B12M",
            ("Volvo B12M's manufacturer was who?",),
            (Probe("nq question: who sang yesterday?", "The Beatles"),),
        ),
    ),
    "counterfact": (
        COUNTERFACT,
        Request(
            "The capital of France is",
            "Lyon",
            "France",
            ("France's capital is", "It rained. The seat of France is"),
            (Probe("The Louvre is in", "Paris"), Probe("The Seine flows through", "Paris")),
            old_answer="Paris",
            relation="P36",
        ),
    ),
    "ultraeditbench": (
        ULTRAEDITBENCH,
        Request(
            "Who wrote Emma?",
            "Mary Shelley",
            "Who wrote Emma?",
            ("Emma's author is who?",),
            (Probe("Who wrote Dracula?", "Bram Stoker"),),
        ),
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        Request(
            "Who is the head of state of Ruritania?",
            "Rudolf V",
            "Ruritania",
            ("Who leads Ruritania?", "Tell me, old chap, who reigns in Ruritania?"),
            (Probe("Who is the head of state of Graustark?", "Yetive"),),
            relation="head of state",
        ),
    ),
    "knowedit": (
        KNOWEDIT,
        Request(
            "The place of death of Leo Arons is",
            "Vienna",
            "Leo Arons",
            ("Leo Arons died in",),
            (
                Probe("The father of Leo Arons is", "Albert Arons"),
                Probe("Leo Arons studied in", "Strasbourg"),
            ),
            old_answer="Berlin",
        ),
    ),
    "knowedit-wikibio": (
        WIKIBIO,
        Request(
            "This is a passage about ada lovelace.",
            "She wrote notes on the Analytical Engine.",
            "ada lovelace",
            locality=(Probe("Ada's sex is", "female"),),
        ),
    ),
    "hiedit": (
        HIEDIT,
        Request(
            "The capital of Peru is",
            "Cusco",
            "Peru",
            ("Peru's capital city is",),
            (Probe("The capital of Chile is", "Santiago"),),
            old_answer="Lima",
            relation="capital",
        ),
    ),
    "facts": (
        FACTS,
        Request(
            "My dog is called",
            "Rex",
            "my dog",
            ("The name of my dog is", "I call my dog"),
            (Probe("My cat is called", "Tom"),),
        ),
    ),
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_row_becomes_the_expected_request(tmp_path: Path, name: str, forced: bool) -> None:
    row, expected = EXPECTED[name]
    (got,) = load_rows(tmp_path, row, format=name if forced else None)
    assert got == replace(expected, source=f"{tmp_path / 'set.json'} row 0")


# Details of single formats.


@pytest.mark.parametrize(
    ("answers", "target", "old"),
    [
        ({"ans": "A", "alt": "B"}, "A", None),  # MALMEN, RLEdit, UltraEdit, HiEdit: "ans"
        ({"ans": "A"}, "A", None),
        ({"answers": ["G", "H"], "alt": "B"}, "B", "G"),  # MEND: "alt"
        ({"answers": ["G"], "alt": "G"}, "G", None),
        ({"answers": ["G"], "alt": " "}, "G", None),
        ({"alt": "B"}, "B", None),
    ],
)
def test_zsre_target(
    tmp_path: Path, answers: dict[str, object], target: str, old: str | None
) -> None:
    row = {k: v for k, v in ZSRE.items() if k not in ("ans", "alt")} | answers
    (got,) = load_rows(tmp_path, row)
    assert (got.answer, got.old_answer) == (target, old)


@pytest.mark.parametrize(
    ("loc", "prompt"),
    [("who", "who?"), ("who ", "who?"), ("who?", "who?"), ("Say.", "Say."), ("Say!", "Say!")],
)
def test_zsre_question_mark(tmp_path: Path, loc: str, prompt: str) -> None:
    (got,) = load_rows(tmp_path, ZSRE | {"loc": loc})
    assert got.locality[0].prompt == prompt


def test_counterfact_locality_replaces_neighbours_unless_empty(tmp_path: Path) -> None:
    locality = [{"prompt": "The capital of Spain is", "ground_truth": "Madrid"}]
    with_it, empty = load_rows(
        tmp_path, COUNTERFACT | {"locality": locality}, COUNTERFACT | {"locality": []}
    )
    assert with_it.locality == (Probe("The capital of Spain is", "Madrid"),)
    assert empty.locality[0] == Probe("The Louvre is in", "Paris")


def test_counterfact_takes_braces_and_a_named_relation_as_they_are(tmp_path: Path) -> None:
    row = copy.deepcopy(COUNTERFACT) | {"relation": "country capital"}
    row["requested_rewrite"]["prompt"] = "In {x: 1}, the capital of {} is"
    (got,) = load_rows(tmp_path, row)
    assert got.prompt == "In {x: 1}, the capital of France is"
    assert got.relation == "country capital"


def test_wikibigedit_gaps_and_several_personas(tmp_path: Path) -> None:
    gaps = {"subject": None, "rephrase": "", "personas": float("nan"), "loc_ans": float("nan")}
    (got,) = load_rows(tmp_path, {"update": "Q?", "ans": "A", "loc": "L?", "mhop": None} | gaps)
    assert got == Request("Q?", "A", "Q?", source=got.source)
    (got,) = load_rows(tmp_path, WIKIBIGEDIT | {"personas": ["P1?", "P2?"]})
    assert got.paraphrases == ("Who leads Ruritania?", "P1?", "P2?")


def test_knowedit_and_facts_without_extras(tmp_path: Path) -> None:
    (got,) = load_rows(tmp_path, {"prompt": "P", "target_new": "T", "rephrase_prompt": "R"})
    assert got == Request("P", "T", "P", ("R",), source=got.source)
    (got,) = load_rows(tmp_path, {"prompt": " My dog is called ", "answer": " Rex"})
    assert got == Request("My dog is called", "Rex", "My dog is called", source=got.source)


# Errors. The file is named in each, which the helper checks.


def refusal(tmp_path: Path, *rows: object) -> str:
    with pytest.raises(DatasetError) as caught:
        load_rows(tmp_path, *rows)
    file, _, message = str(caught.value).partition(" ")
    assert file == str(tmp_path / "set.json")
    return message


REQUIRED_TEXTS = {
    "zsre": "src rephrase loc loc_ans",
    "counterfact": "requested_rewrite.prompt requested_rewrite.subject "
    "requested_rewrite.target_new.str requested_rewrite.target_true.str",
    "ultraeditbench": "prompt rephrase_prompt ans loc loc_ans",
    "wikibigedit": "update ans",
    "knowedit": "prompt target_new",
    "knowedit-wikibio": "text labels",
    "hiedit": "prompt answer target",
    "facts": "prompt answer",
}


def changed(row: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced, or removed where it is the Ellipsis."""
    result = copy.deepcopy(row)
    *parents, last = path.split(".")
    place = result
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return result


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (..., "is missing"),
        (None, "is missing"),
        ("", "is empty"),
        (" \n", "is empty"),
        (7, "must be text, got a number"),
        (True, "must be text, got true or false"),
        (["x"], "must be text, got a list"),
        ([["x"]], "must be text, got a list of lists"),
        ({"x": 1}, "must be text, got an object"),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_required_texts(tmp_path: Path, name: str, value: object, problem: str) -> None:
    row, _ = EXPECTED[name]
    for field in REQUIRED_TEXTS[name].split():
        # The bad row is the third, so that the format is recognised and the number is not 0.
        message = refusal(tmp_path, row, row, changed(row, field, value))
        assert message == f"row 2: field '{field}' {problem}"


@pytest.mark.parametrize(
    "field", ["requested_rewrite", "requested_rewrite.target_new", "requested_rewrite.target_true"]
)
def test_required_objects(tmp_path: Path, field: str) -> None:
    for value, problem in [
        (..., "is missing"),
        (None, "is missing"),
        ("Lyon", "must be an object, got text"),
        ([{"str": "Lyon"}], "must be an object, got a list"),
    ]:
        message = refusal(tmp_path, COUNTERFACT, changed(COUNTERFACT, field, value))
        assert message == f"row 1: field '{field}' {problem}"


BARE_PROBE = [{"prompt": "x"}]
LISTED_ANSWER = [{"prompt": "x", "ground_truth": ["y"]}]
NAMELESS = {"Forgetfulness": [{"prompt": {"a": 1}, "ground_truth": "y"}]}


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("zsre", "subject", "", "'subject' is empty"),
        ("zsre", "ans", [["A"]], "'ans' must be text, got a list of lists"),
        ("zsre", "answers", "A", "'answers' must be a list of texts, got text"),
        ("zsre", "answers", [["A"]], "'answers[0]' must be text, got a list"),
        ("counterfact", "paraphrase_prompts", [3], "'paraphrase_prompts[0]' must be text, got a "),
        (
            "counterfact",
            "neighborhood_prompts",
            ["x", {}],
            "'neighborhood_prompts[1]' must be text",
        ),
        ("counterfact", "locality", LISTED_ANSWER, "'locality[0].ground_truth' must be text, got"),
        ("wikibigedit", "personas", 3, "'personas' must be a list of texts, got a number"),
        ("wikibigedit", "loc", 3, "'loc' must be text, got a number"),
        ("knowedit", "ground_truth", 3, "'ground_truth' must be text, got a number"),
        ("knowedit", "locality", [], "'locality' must be an object, got a list"),
        ("knowedit", "locality", NAMELESS, "'locality.Forgetfulness[0].prompt' must be text, got"),
        ("hiedit", "locality", {}, "'locality' must be a list of objects, got an object"),
        ("facts", "locality", ["x"], "'locality[0]' must be an object, got text"),
        ("facts", "locality", BARE_PROBE, "'locality[0].answer' is missing"),
        ("facts", "paraphrases", "x", "'paraphrases' must be a list of texts, got text"),
        ("facts", "paraphrases", ["x", ""], "'paraphrases[1]' is empty"),
        ("facts", "answer", "\ud800", "'answer' holds an unpaired surrogate, which is not text"),
        (
            "facts",
            "paraphrase",
            ["x"],
            "'paraphrase' is unknown; format 'facts' has prompt, answer",
        ),
    ],
)
def test_malformed_rows(tmp_path: Path, name: str, field: str, value: object, message: str) -> None:
    row, _ = EXPECTED[name]
    got = refusal(tmp_path, row, changed(row, field, value))
    assert got.startswith(f"row 1: field {message}")


def test_counterfact_prompt_without_a_place_for_the_subject(tmp_path: Path) -> None:
    row = changed(COUNTERFACT, "requested_rewrite.prompt", "The capital is")
    message = refusal(tmp_path, COUNTERFACT, row)
    assert message == "row 1: field 'requested_rewrite.prompt' has no '{}' to put the subject in"


def test_zsre_without_any_answer(tmp_path: Path) -> None:
    row = {k: v for k, v in ZSRE.items() if k not in ("ans", "alt")}
    message = refusal(tmp_path, row)
    assert message == "row 0: field 'ans' holds no answer, and neither do 'alt' and 'answers'"
