"""Row formats: every one against requests written by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from hiedit_env.datasets.load import FORMATS
from hiedit_env.datasets.requests import NEIGHBOUR, Probe, Request
from tests.support.rows import COUNTERFACT, EXPECTED, WIKIBIGEDIT, ZSRE, load_rows

# The rows below have every field of their files; what is not read of them is tested at the end.
pytestmark = pytest.mark.filterwarnings("ignore:.*fields that are not read:UserWarning")


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
    assert empty.locality[0] == Probe("The Louvre is in", "Paris", NEIGHBOUR)


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
