"""Row formats: every malformed row gets a message with file, row and field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from hiedit_env.datasets.load import FORMATS
from tests.support.rows import COUNTERFACT, EXPECTED, ZSRE, refusal

# The rows below have every field of their files; what is not read of them is tested at the end.
pytestmark = pytest.mark.filterwarnings("ignore:.*fields that are not read:UserWarning")


# Errors. The file is named in each, which the helper checks.


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
        ("facts", "prompt_form", "spoken", "'prompt_form' must be one of plain, chat, both, got"),
        ("facts", "system", 3, "'system' must be text, got a number"),
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
