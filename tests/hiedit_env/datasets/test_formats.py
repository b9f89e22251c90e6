"""Row formats: every one against requests written by hand, and every malformed row."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hiedit_env.datasets.load import FORMATS, load_requests, read_dataset
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.errors import DatasetError, HieditWarning

# The rows below have every field of their files; what is not read of them is tested at the end.
pytestmark = pytest.mark.filterwarnings("ignore:.*fields that are not read:UserWarning")


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

# Formats with fields beside those that every one has: invented rows of the released shapes.

MEND: dict[str, Any] = {
    "id": "a1",
    "input": "Where does Belka live?",
    "prediction": "Cindrath",
    "alternatives": ["Istrand", "Ostrell"],
    "filtered_rephrases": ["In which town does Belka live?", "What is the home of Belka?"],
    "rephrases": ["Belka lives where?"],
    "output": [{"answer": "Kessford", "provenance": [{"title": "Belka"}]}],
    "logit": -1.5,
}
MQUAKE: dict[str, Any] = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} lives in",
            "relation_id": "P0",
            "target_new": {"str": "Istrand", "id": "Q1"},
            "target_true": {"str": "Cindrath", "id": "Q2"},
            "subject": "Belka",
            "question": "Where does Belka live?",
        }
    ],
    "questions": ["On which river does the home of Belka lie?", "What flows by Belka's home?"],
    "answer": "Tol",
    "answer_alias": [],
    "new_answer": "Marn",
    "new_answer_alias": ["the Marn"],
    "single_hops": [{"question": "Where does Belka live?", "answer": "Cindrath"}],
    "new_single_hops": [
        {
            "question": "On which river does Istrand lie?",
            "cloze": "Istrand lies on the river",
            "answer": "Marn",
            "answer_alias": ["the Marn"],
        }
    ],
    "orig": {"triples": [["Q1", "P0", "Q2"]]},
}
ROME: dict[str, Any] = {
    "prompt": "{} lives in",
    "subject": "Belka",
    "target_new": {"str": "Istrand"},
    "target_true": {"str": "Cindrath"},
}
CKNOWEDIT: dict[str, Any] = {
    "prompt": "月湖城位于哪个国家？",
    "target_old": "白河国",
    "target_new": "青石国。",
    "rephrase": ["月湖城在哪个国家？", "月湖城是哪国的城市？"],
    "portability": [{"prompt": "月湖城所在国家的首都是哪里？", "answer": "东川"}],
    "locality": [{"prompt": "红叶节在几月？", "answer": "十月"}],
}
FEVER: dict[str, Any] = {
    "prompt": "Belka lives in Istrand.",
    "equiv_prompt": ["Istrand is the home of Belka."],
    "pred": "false",
    "alt": "true",
    "unrel_prompt": "Corrin lives in Grelmouth.",
    "unrel_ans": "true",
}
FASTEDIT: dict[str, Any] = {
    "prompt": "{}住在",
    "subject": "贝尔卡",
    "target": "月湖城",
    "queries": ["{}的家在"],
}
QAEDIT: dict[str, Any] = {
    "id": 1,
    "source": "NQ",
    "prompt": "where does belka live?",
    "target": "Istrand",
    "subject": "belka",
    "rephrase": "In which town does Belka live?",
    "locality": [{"loc": "where does corrin live", "loc_ans": "Grelmouth"}],
}
HALLUEDITBENCH: dict[str, Any] = {
    "topic": "places_city",
    "subject": "Velmora",
    "relation": "river",
    "object": "Marn",
    "question": "On which river does Velmora lie?",
    "output_some_model": "Tol",
    "paraphrased_question": "Which river flows through Velmora?",
    "multiple_choices": "['Marn', 'Tol']",
    "yes_question": "Does Velmora lie on the Marn?",
    "no_question": "Does Velmora lie on the Tol?",
    "locality_question": "Who runs Velmora?",
    "reversed_relation_question": "What lies on the Marn?",
    "question_2hop": "Into which sea does the river of Velmora flow?",
    "answer_2hop": "the Grey Sea",
    "question_3hop": float("nan"),
    "answer_3hop": float("nan"),
}
UNKE: dict[str, Any] = {
    "id": 0,
    "question": "What do you know about Velmora?",
    "answer": "Velmora is a town on the Marn.",
    "para_question": "Could you tell me of Velmora?",
    "sub_question": ["What is Velmora?", "On which river does it lie?"],
    "sub_answer": ["a town", "the Marn"],
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
            portability=(
                Probe("Where was the head of state of Ruritania born?", "Strelsau", "multi-hop"),
            ),
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
    "mend": (
        MEND,
        Request(
            "Where does Belka live?",
            "Istrand",
            "Where does Belka live?",
            ("In which town does Belka live?", "What is the home of Belka?"),
            old_answer="Cindrath",
        ),
    ),
    "mquake": (
        MQUAKE,
        Request(
            "Belka lives in",
            "Istrand",
            "Belka",
            ("Where does Belka live?",),
            old_answer="Cindrath",
            relation="P0",
            portability=(
                Probe(
                    "On which river does the home of Belka lie?",
                    "Marn",
                    "multi-hop",
                    ("the Marn",),
                ),
                Probe("What flows by Belka's home?", "Marn", "multi-hop", ("the Marn",)),
                Probe("On which river does Istrand lie?", "Marn", "single-hop", ("the Marn",)),
                Probe("Istrand lies on the river", "Marn", "single-hop", ("the Marn",)),
            ),
        ),
    ),
    "rome": (ROME, Request("Belka lives in", "Istrand", "Belka", old_answer="Cindrath")),
    "cknowedit": (
        CKNOWEDIT,
        Request(
            "月湖城位于哪个国家？",
            "青石国。",
            "月湖城位于哪个国家？",
            ("月湖城在哪个国家？", "月湖城是哪国的城市？"),
            (Probe("红叶节在几月？", "十月"),),
            old_answer="白河国",
            portability=(Probe("月湖城所在国家的首都是哪里？", "东川", "portability"),),
        ),
    ),
    "fever": (
        FEVER,
        Request(
            "Belka lives in Istrand.",
            "true",
            "Belka lives in Istrand.",
            ("Istrand is the home of Belka.",),
            (Probe("Corrin lives in Grelmouth.", "true"),),
            old_answer="false",
        ),
    ),
    "fastedit": (FASTEDIT, Request("贝尔卡住在", "月湖城", "贝尔卡", ("贝尔卡的家在",))),
    "qaedit": (
        QAEDIT,
        Request(
            "where does belka live?",
            "Istrand",
            "belka",
            ("In which town does Belka live?",),
            (Probe("where does corrin live", "Grelmouth"),),
        ),
    ),
    "hallueditbench": (
        HALLUEDITBENCH,
        Request(
            "On which river does Velmora lie?",
            "Marn",
            "Velmora",
            ("Which river flows through Velmora?",),
            relation="river",
            portability=(
                Probe("Into which sea does the river of Velmora flow?", "the Grey Sea", "2-hop"),
                Probe("Does Velmora lie on the Marn?", "Yes", "yes or no"),
                Probe("Does Velmora lie on the Tol?", "No", "yes or no"),
                Probe("What lies on the Marn?", "Velmora", "reversed"),
            ),
        ),
    ),
    "unke": (
        UNKE,
        Request(
            "What do you know about Velmora?",
            "Velmora is a town on the Marn.",
            "What do you know about Velmora?",
            ("Could you tell me of Velmora?",),
            portability=(
                Probe("What is Velmora?", "a town", "sub-question"),
                Probe("On which river does it lie?", "the Marn", "sub-question"),
            ),
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
    # The white space a prompt ends in is part of its text.
    (got,) = load_rows(tmp_path, {"prompt": " My dog is called\n", "answer": " Rex "})
    assert got == Request("My dog is called\n", "Rex", "My dog is called\n", source=got.source)


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
    "mend": "input",
    "mquake": "",
    "rome": "prompt subject target_new.str target_true.str",
    "cknowedit": "prompt target_new",
    "fastedit": "prompt target",
    "qaedit": "prompt target",
    "hallueditbench": "question object",
    "unke": "question answer",
    "fever": "prompt",
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


# Templates.


@pytest.mark.parametrize("place", ["{}", "{subject}"])
@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "X lives in", "answer": "I", "subject": "Belka"}, ["prompt"]),
        ({"prompt": "X lives in", "target_new": "I", "subject": "Belka"}, ["prompt"]),
        ({"prompt": "X lives in", "target": "I", "subject": "Belka"}, ["prompt"]),
        (ULTRAEDITBENCH | {"subject": "Belka", "prompt": "X lives in"}, ["prompt"]),
        (WIKIBIGEDIT | {"subject": "Belka", "update": "X lives in"}, ["update"]),
        (ZSRE | {"subject": "Belka", "src": "X lives in"}, ["src"]),
        (HIEDIT | {"subject": "Belka", "prompt": "X lives in"}, ["prompt"]),
        (ROME | {"prompt": "X lives in"}, ["prompt"]),
        (UNKE | {"question": "X lives in", "subject": "Belka"}, ["question"]),
        (WIKIBIO | {"text": "X lives in", "concept": "Belka"}, ["text"]),
        (HALLUEDITBENCH | {"question": "X lives in", "subject": "Belka"}, ["question"]),
    ],
)
def test_templates_are_filled_with_the_subject(
    tmp_path: Path, row: dict[str, Any], fields: list[str], place: str
) -> None:
    for field in fields:
        row = row | {field: row[field].replace("X", place)}
    first, second = load_rows(tmp_path, row, row | {_subject_field(row): "Corrin"})
    assert (first.prompt, second.prompt) == ("Belka lives in", "Corrin lives in")


def _subject_field(row: dict[str, Any]) -> str:
    return "concept" if "concept" in row else "subject"


def test_templates_in_paraphrases_and_probes(tmp_path: Path) -> None:
    row = FACTS | {
        "paraphrases": ["{subject} is called"],
        "portability": [{"prompt": "Who owns {}?", "answer": "I", "kind": "reversed"}],
        "locality": [{"prompt": "The age of {} is", "answer": "3"}],
    }
    (got,) = load_rows(tmp_path, row)
    assert got.paraphrases == ("my dog is called",)
    assert got.portability == (Probe("Who owns my dog?", "I", "reversed"),)
    assert got.locality == (Probe("The age of my dog is", "3"),)


def test_a_template_without_a_subject_is_an_error_and_braces_can_be_written(tmp_path: Path) -> None:
    message = refusal(tmp_path, FACTS, {"prompt": "{} lives in", "answer": "I"})
    assert message.startswith("row 1: field 'prompt' has '{}', the place of a subject, but the row")
    message = refusal(tmp_path, {"prompt": "P", "answer": "I", "paraphrases": ["{subject} is in"]})
    assert message.startswith("row 0: field 'paraphrases[0]' has '{subject}', the place of")
    (got,) = load_rows(tmp_path, {"prompt": "An empty dict is {{}}, {x}", "answer": "{}"})
    assert (got.prompt, got.answer) == ("An empty dict is {}, {x}", "{}")


# Fields of the released files that go by other names.


@pytest.mark.parametrize(
    "fields",
    [
        {"locality_prompt": "Corrin lives in", "locality_ground_truth": "Grelmouth"},
        {"locality_prompt": ["Corrin lives in"], "locality_ground_truth": ["Grelmouth"]},
        {"locality_prompt": "Corrin lives in", "locality_answer": "Grelmouth"},
        {"loc_prompt": "Corrin lives in", "loc_ans": "Grelmouth"},
        {"loc": "Corrin lives in", "loc_ans": "Grelmouth"},
        {"locality": [{"prompt": "Corrin lives in", "answer": "Grelmouth"}]},
        {"locality": [{"loc": "Corrin lives in", "loc_ans": "Grelmouth"}]},
        {"locality": {"prompt": "Corrin lives in", "ground_truth": "Grelmouth"}},
        {"locality": {"near": {"prompt": ["Corrin lives in"], "ground_truth": ["Grelmouth"]}}},
        {"neighborhood_prompts": [{"prompt": "Corrin lives in", "target": "Grelmouth"}]},
        {"neighborhood_prompts": ["Corrin lives in"], "ground_truth": "Grelmouth"},
    ],
)
def test_unrelated_prompts_by_every_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    (got,) = load_rows(tmp_path, {"prompt": "P", "target_new": "T"} | fields)
    assert got.locality == (Probe("Corrin lives in", "Grelmouth"),)


def test_parallel_lists_of_unrelated_prompts(tmp_path: Path) -> None:
    row = {"prompt": "P", "target_new": "T", "locality_prompt": ["A", "B"]}
    (got,) = load_rows(tmp_path, row | {"locality_ground_truth": ["1", "2"]})
    assert got.locality == (Probe("A", "1"), Probe("B", "2"))
    message = refusal(tmp_path, row | {"locality_ground_truth": ["1"]})
    assert message == (
        "row 0: field 'locality_ground_truth' has 1 answers for the 2 prompts of 'locality_prompt'"
    )


@pytest.mark.parametrize(
    "name", ["rephrase_prompt", "rephrase", "ood_rephrase", "paraphrase_prompts", "paraphrases"]
)
def test_paraphrases_by_every_name(tmp_path: Path, name: str) -> None:
    (one,) = load_rows(tmp_path, {"prompt": "P", "target_new": "T", name: "Q"})
    (several,) = load_rows(tmp_path, {"prompt": "P", "target_new": "T", name: ["Q", "R"]})
    assert (one.paraphrases, several.paraphrases) == (("Q",), ("Q", "R"))


def test_portability_of_knowedit(tmp_path: Path) -> None:
    groups = {
        "Reasoning": [{"prompt": "A", "ground_truth": [["1", "one"]]}],
        "Subject_Aliasing": [{"prompt": "B", "ground_truth": "2"}],
        "Logical_Generalization": [{"prompt": "C", "ground_truth": [["no"], ["false"]]}],
    }
    (got,) = load_rows(tmp_path, KNOWEDIT | {"portability": groups})
    assert got.portability == (
        Probe("A", "1", "reasoning", ("one",)),
        Probe("B", "2", "alias"),
        Probe("C", "no", "logical generalization", ("false",)),
    )


def test_portability_of_easyedits_zsre(tmp_path: Path) -> None:
    asked = {"Recalled Relation": "(a, b, c)", "New Question": "N?", "New Answer": "M"}
    (got,) = load_rows(tmp_path, ZSRE | {"portability": asked, "cond": "x >> y || z"})
    assert got.portability == (Probe("N?", "M", "multi-hop"),)


def test_a_row_of_mquake_is_several_facts(tmp_path: Path) -> None:
    second = {
        "prompt": "{} lies on the river",
        "target_new": {"str": "Marn"},
        "target_true": {"str": "Tol"},
        "subject": "Istrand",
        "question": "On which river does Istrand lie?",
    }
    row = MQUAKE | {"requested_rewrite": [*MQUAKE["requested_rewrite"], second]}
    first, last, other = load_rows(tmp_path, row, MQUAKE | {"questions": []})
    assert [r.prompt for r in (first, last)] == ["Belka lives in", "Istrand lies on the river"]
    assert first.portability == ()  # what follows from both belongs to the later one
    assert len(last.portability) == 4
    assert last.source.endswith("row 0 requested_rewrite[1]")
    assert other.source.endswith("row 1")


def test_rows_of_mend_without_alternatives_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (MEND | {"alternatives": []}, MEND)))
    report = read_dataset(path)
    assert (len(report.requests), report.rows) == (1, 2)
    assert report.left_out == {"no 'alternatives'": 1}
    with pytest.warns(HieditWarning, match="1 of 2 rows are left out: no 'alternatives'"):
        load_requests(path)


def test_counterfact_of_akew_and_wikiupdate(tmp_path: Path) -> None:
    rewrite = COUNTERFACT["requested_rewrite"] | {
        "prompt_full": "The capital of France is",
        "fact_new_uns": "Lyon has been …",
        "unsfact_triplets_GPT": [{"prompt": "{} is", "subject": "Lyon", "target": "old"}],
    }
    (got,) = load_rows(tmp_path, COUNTERFACT | {"requested_rewrite": rewrite})
    assert (got.prompt, got.answer, got.old_answer) == ("The capital of France is", "Lyon", "Paris")
    update = {
        "prompt": "{} is led by",
        "subject": "Velmora",
        "question": "Who leads Velmora?",
        "answer_new": "Belka",
        "answer_true": "Corrin",
    }
    (got,) = load_rows(tmp_path, {"requested_rewrite": update, "loc": "L?", "loc_ans": "M"})
    assert (got.prompt, got.answer, got.old_answer) == ("Velmora is led by", "Belka", "Corrin")
    assert (got.paraphrases, got.locality) == (("Who leads Velmora?",), (Probe("L?", "M"),))


def test_fever_labels_may_be_truth_values(tmp_path: Path) -> None:
    (got,) = load_rows(tmp_path, FEVER | {"pred": False, "alt": True})
    assert (got.old_answer, got.answer) == ("false", "true")


@pytest.mark.parametrize(
    ("row", "called"),
    [
        ({"instruction": "Say", "input": "", "output": "Hi"}, "instruction data (Alpaca)"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "a file of chats"),
        ({"conversations": []}, "a file of chats (ShareGPT)"),
        ({"prompt": "P", "completion": "C"}, "a file of prompts and completions"),
        (ZSRE | {"image": "a.jpg"}, "a multimodal set"),
        ({"example_type": "popular", "edit": {}}, "RippleEdits"),
        ({"adversarial prompt": "x"}, "SafeEdit"),
        ({"en": ZSRE, "zh": ZSRE}, "a set in several languages"),
        ({"prompt": "P", "target_true": "A", "target_false": "B"}, "counterfact-tracing"),
    ],
)
def test_formats_that_hold_no_facts_are_refused_by_name(
    tmp_path: Path, row: dict[str, Any], called: str
) -> None:
    assert refusal(tmp_path, row).startswith(f"is {called}")


def test_sanitation_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"success": [{"question": "Q"}], "locality": []}))
    with pytest.raises(DatasetError, match=r"set\.json is KnowEdit's Sanitation: write"):
        load_requests(path)


# Fields that are not read.


@pytest.mark.filterwarnings("error")
def test_fields_that_are_not_read_are_named_once_per_file(tmp_path: Path) -> None:
    rows = [COUNTERFACT | {"case_id": i, "remark": {"by": "me"}} for i in range(3)]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(rows))
    with pytest.warns(HieditWarning) as caught:
        load_requests(path)
    (unread,) = [str(w.message) for w in caught if "not read" in str(w.message)]
    assert unread == (
        f"{path}: fields that are not read: generation_prompts (3 rows), remark.by (3 rows)"
    )


@pytest.mark.parametrize("name", ["zsre", "knowedit-wikibio", "hiedit", "facts", "qaedit", "fever"])
@pytest.mark.filterwarnings("error")
def test_files_that_are_read_whole_give_no_warning(tmp_path: Path, name: str) -> None:
    load_rows(tmp_path, EXPECTED[name][0])
