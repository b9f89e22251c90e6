"""Agent folders that hold anything: used, or refused in one line by an error of ours."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiedit_agents.named.checkpoints import JSON_FILE, TENSOR_FILE
from hiedit_agents.registry import SHIPPED, spec_agent
from hiedit_env.errors import HieditError
from hiedit_env.resident.resident import ResidentLLM
from tests.support.episodes import SELECTION, make
from tests.support.fuzz import JSON, damaged, require_one_line

AGENT = SHIPPED / "hiedit-planted"
RECORD: dict[str, Any] = json.loads((AGENT / JSON_FILE).read_text())


@pytest.fixture(scope="module")
def llm() -> ResidentLLM:
    return make(SELECTION, model="planted", dataset="planted-facts-train").llm


def used(llm: ResidentLLM, files: dict[str, bytes]) -> bool:
    """Whether a copy of the agent with other files is made; nothing of another place is read."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(AGENT, Path(place) / "agent"))
        for name, data in files.items():
            (folder / name).write_bytes(data)
        try:
            spec_agent(str(folder)).build(llm, "planted")
        except HieditError as error:
            require_one_line(error)
            return False
    return True


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a record are."""
    found = [here] if here else []
    if isinstance(value, dict):
        found += [p for key, inner in value.items() for p in paths(inner, (*here, key))]
    return found


@settings(max_examples=60)
@given(path=st.sampled_from(paths(RECORD)), value=JSON, remove=st.booleans())
def test_a_record_with_any_field(
    llm: ResidentLLM, path: tuple[Any, ...], value: Any, remove: bool
) -> None:
    record = json.loads(json.dumps(RECORD))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    used(llm, {JSON_FILE: json.dumps(record).encode()})


@settings(max_examples=40)
@given(data=st.data(), name=st.sampled_from((JSON_FILE, TENSOR_FILE)))
def test_a_damaged_folder(llm: ResidentLLM, data: st.DataObject, name: str) -> None:
    made = used(llm, {name: data.draw(damaged((AGENT / name).read_bytes()))})
    # Numbers are protected by a digest; of a record a flipped bit may hit a name or a time.
    assert not (made and name == TENSOR_FILE)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "..\\x", "a/../../b", "\x00"])
def test_no_name_in_a_record_leads_out_of_the_folder(llm: ResidentLLM, name: str) -> None:
    for field in ("name", "high", "low"):
        record = json.loads(json.dumps(RECORD))
        if isinstance(record.get(field), dict):
            record[field]["name"] = name
        else:
            record[field] = name
        made = used(llm, {JSON_FILE: json.dumps(record).encode()})
        assert not (made and field != "name")
