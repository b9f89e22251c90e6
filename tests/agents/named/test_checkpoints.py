"""The one format of agents on disk: what is written is read, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from hiedit_agents.named.checkpoints import (
    FORMAT,
    JSON_FILE,
    POLICY,
    TENSOR_FILE,
    kind_of,
    read_record,
    read_tensors,
    write_agent,
)
from hiedit_agents.policies import Task, read_policy, save_policy
from hiedit_agents.policies.task import Sizes
from hiedit_agents.registry import SHIPPED, make_agent, spec_agent
from hiedit_env.errors import CheckpointError

TENSORS = {"weight": torch.tensor([[1.5, -2.0]]), "count": torch.tensor([3])}
MADE = "tests.agents.named.test_checkpoints"


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    """A folder of the kind that ``hiedit train`` writes."""
    return Path(shutil.copytree(SHIPPED / "hiedit-planted", tmp_path / "levels"))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A folder of the kind that the script of a library writes."""
    save_policy(
        tmp_path / "policy",
        library="any",
        algorithm="none",
        task=Task("layers", {"id": "hiedit/Toy-v1"}),
        sizes=Sizes(7, 3),
        policy={"a": 1},
        tensors=TENSORS,
        training={"steps": 2},
    )
    return tmp_path / "policy"


def change(folder: Path, *path: str, to: Any = None, remove: bool = False) -> None:
    """Changes or removes one field of ``agent.json``."""
    record = json.loads((folder / JSON_FILE).read_text())
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    (folder / JSON_FILE).write_text(json.dumps(record))


def put(folder: Path, data: bytes) -> None:
    """Writes other tensors, and their digest into the record."""
    (folder / TENSOR_FILE).write_bytes(data)
    change(folder, "tensors", "sha256", to=hashlib.sha256(data).hexdigest())


def test_what_is_written_is_read(policy: Path) -> None:
    record = read_record(policy, POLICY)
    assert (record["format"], record["kind"]) == (FORMAT, "policy")
    assert sorted(file.name for file in policy.iterdir()) == [JSON_FILE, TENSOR_FILE]
    found = read_tensors(policy, record)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    data = (policy / TENSOR_FILE).read_bytes()
    assert record["tensors"] == {"sha256": hashlib.sha256(data).hexdigest()}
    assert read_policy(policy, "any").digest == record["tensors"]["sha256"][:16]


def test_every_shipped_agent_has_the_digest_of_its_tensors() -> None:
    for folder in SHIPPED.iterdir():
        assert read_tensors(folder, read_record(folder))


def test_the_kinds_are_told_apart(levels: Path, policy: Path, tmp_path: Path) -> None:
    assert (kind_of(levels), kind_of(policy), kind_of(tmp_path)) == ("levels", "policy", None)
    with pytest.raises(CheckpointError, match="of the kind 'policy', and 'levels' is wanted"):
        read_record(policy)
    with pytest.raises(CheckpointError, match="of the kind 'levels', and 'policy' is wanted"):
        read_policy(levels, "any")
    with pytest.raises(CheckpointError, match=f"trained by any, not by sb3; name it any:{policy}"):
        read_policy(policy, "sb3")
    assert read_record(policy, None)["library"] == "any"


def test_one_flipped_bit_is_noticed(levels: Path) -> None:
    data = bytearray((levels / TENSOR_FILE).read_bytes())
    data[-1] ^= 1
    load(bytes(data))  # which safetensors itself takes
    (levels / TENSOR_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"missing or damaged: its SHA-256 digest is"):
        read_tensors(levels, read_record(levels))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(value: float, levels: Path, policy: Path) -> None:
    for folder, name in ((levels, "high.bias"), (policy, "weight")):
        tensors = load((folder / TENSOR_FILE).read_bytes())
        put(folder, save({**tensors, name: torch.full_like(tensors[name], value)}))
        with pytest.raises(CheckpointError, match=f"not finite in '{name}'"):
            read_tensors(folder, read_record(folder, None))
        record = read_record(folder, None)
        other = folder.parent / "other"
        with pytest.raises(CheckpointError, match=f"'{name}' is not finite"):
            write_agent(other, record["kind"], record, {name: torch.tensor([value])})
        assert not other.exists()


FIELDS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("name",), 3),
    (("high",), "policy"),
    (("high", "name"), None),
    (("high", "settings"), []),
    (("low", "settings"), None),
    (("max_steps_per_edit",), "5"),
    (("train",), []),
    (("source",), None),
    (("model",), []),
    (("model", "layers"), "all"),
    (("model", "shapes"), [[37], [56]]),
    (("model", "tokenizer"), ["a"]),
    (("model", "tokenizer"), []),
    (("training",), "long"),
    (("training", "run"), None),
    (("training", "settings"), 1),
    (("training", "fact_hashes"), 7),
    (("log",), "none"),
    (("values",), []),
    (("tensors",), "agent.safetensors"),
    (("tensors", "sha256"), "12"),
)


@pytest.mark.parametrize(("path", "value"), FIELDS)
def test_a_mistyped_field_is_named_in_one_line(
    path: tuple[str, ...], value: Any, levels: Path
) -> None:
    change(levels, *path, to=value)
    with pytest.raises(CheckpointError) as caught:
        spec_agent(str(levels))
    message = str(caught.value)
    assert "\n" not in message
    assert f"{levels / JSON_FILE}: field '{'.'.join(path)}" in message


@pytest.mark.parametrize("path", [p for p, _ in FIELDS if p != ("training", "fact_hashes")])
def test_a_missing_field_is_named_in_one_line(path: tuple[str, ...], levels: Path) -> None:
    change(levels, *path, remove=True)
    with pytest.raises(CheckpointError, match=f"field '{'.'.join(path)}': Field required;.*again"):
        spec_agent(str(levels))


@pytest.mark.parametrize("name", ["library", "algorithm", "task", "sizes", "policy", "training"])
def test_a_policy_without_a_field_is_refused(name: str, policy: Path) -> None:
    change(policy, name, remove=True)
    with pytest.raises(CheckpointError, match=f"field '{name}': Field required"):
        read_policy(policy, "any")


def test_an_unknown_kind_is_refused(levels: Path) -> None:
    change(levels, "kind", to="magic")
    with pytest.raises(CheckpointError, match=r"field 'kind'.*'magic'"):
        read_record(levels)


@pytest.mark.parametrize("found", [None, 1, 3, "2"])
def test_another_format_is_refused_with_the_remedy(found: Any, levels: Path) -> None:
    change(levels, "format", to=found)
    with pytest.raises(CheckpointError, match=rf"format {found!r}; .* format 2 only: train"):
        spec_agent(str(levels))


@pytest.mark.parametrize(("name", "agent"), [("policy.json", "sb3"), ("ppo.json", "ppo")])
def test_files_of_earlier_versions_are_refused_with_the_remedy(
    name: str, agent: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"holds {name}, a format of an earlier .*train the"):
        make_agent(f"{agent}:{tmp_path}")
    with pytest.raises(CheckpointError, match=f"holds {name}, a format of an earlier .*train the"):
        make_agent(str(tmp_path))


def test_no_json_is_refused(levels: Path) -> None:
    for text in ("", "[]", "{", '"x"', "[" * 100_000):
        (levels / JSON_FILE).write_text(text)
        with pytest.raises(CheckpointError):
            spec_agent(str(levels))


imported: list[int] = []


def called(*arguments: Any, **settings: Any) -> None:
    """Would run where a folder could run code."""
    imported.append(1)


@pytest.mark.parametrize(
    "name", [lambda path: f"{path}", lambda path: f"{path}+ridge", lambda path: f"{path},ridge=1"]
)
@pytest.mark.parametrize("level", ["high", "low"])
def test_a_folder_imports_nothing(
    level: str, name: Callable[[Path], str], levels: Path, tmp_path: Path
) -> None:
    change(levels, level, "name", to="no.such.module:Class")
    with pytest.raises(CheckpointError, match=r"no\.such\.module:Class.*add.*allow_code=true"):
        spec_agent(name(levels))
    change(levels, level, "name", to=f"{MADE}:called")
    with pytest.raises(CheckpointError, match="allow_code=true"):
        spec_agent(name(levels))
    assert not imported


def test_a_folder_that_is_trusted_imports(levels: Path) -> None:
    change(levels, "low", "name", to=f"{MADE}:called")
    spec = spec_agent(f"{levels},allow_code=true").spec
    assert spec.low == f"{MADE}:called"
    assert spec_agent(f"{levels},allow_code=true+ridge").spec.low == "ridge"


def test_an_unfinished_training_names_its_agent_so_far(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-{number:06}"
        folder.mkdir()
        (folder / "agent.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has not finished.*--resume.*checkpoint-000002"):
        spec_agent(str(tmp_path))


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a folder without agent\.json, so it holds no"):
        spec_agent(str(tmp_path))
