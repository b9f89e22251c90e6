"""Row formats: templates, fields by other names, fields that are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hiedit_env.datasets.load import load_requests, read_dataset
from hiedit_env.datasets.requests import NEIGHBOUR, Probe
from hiedit_env.errors import DatasetError, HieditWarning
from tests.support.rows import (
    COUNTERFACT,
    EXPECTED,
    FACTS,
    FEVER,
    HALLUEDITBENCH,
    HIEDIT,
    KNOWEDIT,
    MEND,
    MQUAKE,
    ROME,
    ULTRAEDITBENCH,
    UNKE,
    WIKIBIGEDIT,
    WIKIBIO,
    ZSRE,
    load_rows,
    refusal,
)

# The rows below have every field of their files; what is not read of them is tested at the end.
pytestmark = pytest.mark.filterwarnings("ignore:.*fields that are not read:UserWarning")


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
    kind = NEIGHBOUR if "neighborhood_prompts" in fields else ""
    assert got.locality == (Probe("Corrin lives in", "Grelmouth", kind),)


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


def test_a_row_says_how_it_is_asked(tmp_path: Path) -> None:
    row = {"prompt": "P", "answer": "A", "prompt_form": "both", "system": "Be short."}
    asked, silent = load_rows(tmp_path, row, {"prompt": "Q", "answer": "A"})
    assert (asked.prompt_form, asked.system) == ("both", "Be short.")
    assert (silent.prompt_form, silent.system) == (None, None)
