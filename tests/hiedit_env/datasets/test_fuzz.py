"""Data files that hold anything: read as facts, or refused in one line by an error of ours."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hiedit_env import load_requests
from hiedit_env.datasets.formats import FORMATS
from hiedit_env.errors import DatasetError
from tests.support.fuzz import HOSTILE, JSON, TEXTS, damaged, require_one_line

pytestmark = pytest.mark.filterwarnings("ignore::hiedit_env.errors.HieditWarning")

FIELDS = [*sorted({name for one in FORMATS.values() for name in one.signature}), "prompt_form"]
STRINGS = st.fixed_dictionaries({"str": TEXTS})
ROWS = st.dictionaries(st.sampled_from(FIELDS) | TEXTS, JSON | STRINGS)


def read(data: bytes, ending: str) -> list[Any]:
    """The facts of a file, or the error that was said."""
    handle, name = tempfile.mkstemp(suffix=ending)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return list(load_requests(name))
    except DatasetError as error:
        require_one_line(error)
        return []
    finally:
        Path(name).unlink()


@settings(max_examples=60)
@given(rows=st.lists(ROWS, max_size=3) | JSON, ending=st.sampled_from((".json", ".jsonl")))
def test_any_json_is_read_or_refused(rows: Any, ending: str) -> None:
    if ending == ".jsonl" and isinstance(rows, list):
        data = "\n".join(json.dumps(row) for row in rows)
    else:
        data = json.dumps(rows)
    read(data.encode(), ending)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    rows = [{"prompt": text, "answer": "A", "subject": "s"} for text in HOSTILE[:4]]
    whole = json.dumps(rows, ensure_ascii=False).encode()
    read(data.draw(damaged(whole)), ".json")


def inner(text: str) -> str:
    """A text without what has no ink around it: white space, and characters of no width."""
    inked = [i for i, c in enumerate(text) if not (c.isspace() or c in "\u200b\u2060\ufeff")]
    return text[inked[0] : inked[-1] + 1] if inked else ""


@settings(max_examples=60)
@given(prompt=TEXTS, answer=TEXTS, subject=TEXTS)
@example(prompt="ends here\ufeff", answer="\u200bzero\u200bwidth\u200djoined\ufeff", subject="s")
@example(prompt="word " * 2000, answer="x" * 10_000, subject="‮")
def test_texts_come_through_unchanged(prompt: str, answer: str, subject: str) -> None:
    row = {"prompt": prompt, "answer": answer, "subject": subject}
    for ensure_ascii in (True, False):
        text = json.dumps([row], ensure_ascii=ensure_ascii)
        try:
            data = text.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates
            continue
        for request in read(data, ".json"):
            if "{" not in prompt:
                assert inner(request.prompt) == inner(prompt)
            assert inner(request.answer) == inner(answer)
