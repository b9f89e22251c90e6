"""Agents on disk: ``agent.json`` and ``agent.safetensors``, one format for every kind of agent.

``agent.json`` says format, kind, how to build the agent, how it was trained, and the SHA-256 digest
of the tensors. Both files are data: reading them runs no code. There are three kinds: ``levels``, a
high and a low level that ``hiedit train`` wrote; ``policy``, a policy of an RL library or of
:mod:`hiedit_agents.rl.ppo`; and ``shared``, a router of planted worlds that
:mod:`hiedit_agents.bandits.train_shared` wrote. What each records is checked by :mod:`.schema`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from hiedit_agents.named.schema import check_record
from hiedit_agents.named.spec import AgentSpec
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import CheckpointError
from hiedit_env.files import parse_json, write_bytes
from hiedit_env.model.relatives import sample
from hiedit_env.resident.resident import ResidentLLM

FORMAT = 2
LEVELS, POLICY, SHARED = "levels", "policy", "shared"
JSON_FILE = "agent.json"
TENSOR_FILE = "agent.safetensors"
#: Key of a training's record: the hashes of its facts, one text, since a line each would bury the
#: rest.
FACTS = "fact_hashes"
#: Files of earlier versions, which wrote one format per kind of agent.
_OLD_FILES = ("policy.json", "ppo.json")
#: A text that tells tokenizers apart.
PANGRAM = "The quick brown fox jumps over 13 lazy dogs."
_REMEDY = "copy the folder again, or train the agent into another one"


# -- any kind -------------------------------------------------------------------------------------


def write_agent(
    folder: Path, kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes an agent of any kind; each file appears whole or not at all, ``agent.json`` last.

    Args:
        folder: Made if need be.
        kind: ``"levels"``, ``"policy"`` or ``"shared"``.
        record: Plain JSON, what :mod:`.schema` asks for this kind.
        tensors: Its trained numbers by name.

    Raises:
        CheckpointError: the folder cannot be written, or a tensor is not finite; nothing is
            written then.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = save(plain)
    digest = {"sha256": hashlib.sha256(data).hexdigest()}
    whole = {"format": FORMAT, "kind": kind, **record, "tensors": digest}
    check_record(folder / JSON_FILE, whole)
    for name, value in plain.items():
        if not _is_finite(value):
            raise CheckpointError(f"{folder} is not written: {name!r} is not finite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / TENSOR_FILE, data)
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        write_bytes(folder / JSON_FILE, text.encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def read_record(folder: Path, kind: str | None = LEVELS) -> dict[str, Any]:
    """``agent.json`` of an agent's folder, with all fields checked.

    Args:
        folder: What :func:`write_agent` wrote.
        kind: The kind that is wanted; None for any.

    Raises:
        CheckpointError: there is none, it is of another format or kind, or a field is missing or of
            the wrong type; names the file and the field.
    """
    file = folder / JSON_FILE
    refuse_folder(folder, "policy" if kind == POLICY else "trained agent")
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "policy" if kind == POLICY else "trained agent"
        raise CheckpointError(f"{folder} holds no {what}: {error}; {_REMEDY}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{file} has format {found!r}; this version of hiedit reads format {FORMAT} only: "
            "train the agent again into another folder"
        )
    check_record(file, record)
    if kind is not None and record["kind"] != kind:
        raise CheckpointError(
            f"{folder} holds an agent of the kind {record['kind']!r}, and {kind!r} is wanted here: "
            "hiedit train writes 'levels', the scripts of RL libraries write 'policy', and "
            "hiedit_agents.bandits.train_shared writes 'shared'"
        )
    return record


def refuse_folder(folder: Path, what: str = "trained agent") -> None:
    """Says what a folder holds in the place of a trained agent; nothing where there is no folder.

    Args:
        folder: The folder.
        what: What was looked for, in words.

    Raises:
        CheckpointError: a folder without ``agent.json``; names the remedy.
    """
    if not os.path.isdir(folder) or os.path.isfile(folder / JSON_FILE):
        return
    old = next((name for name in _OLD_FILES if os.path.isfile(folder / name)), None)
    if old is not None:
        raise CheckpointError(
            f"{folder} holds {old}, a format of an earlier version of hiedit, which this one does "
            "not read; train the policy again into another folder"
        )
    unfinished = sorted(folder.glob(f"checkpoint-*/{JSON_FILE}"))
    if unfinished:
        raise CheckpointError(
            f"{folder} holds a training that has not finished; go on with the same hiedit train "
            f"and --resume, or name {unfinished[-1].parent}, the agent so far"
        )
    raise CheckpointError(
        f"{folder} is a folder without {JSON_FILE}, so it holds no {what}; give the --out of "
        "hiedit train, or the name of an agent"
    )


def kind_of(folder: Path) -> str | None:
    """The kind of agent in a folder; None where there is none that can be told.

    A folder whose ``agent.json`` cannot be read counts as ``"levels"``: reading it says why.
    """
    file = folder / JSON_FILE
    if not os.path.isfile(file):  # which is False also for names that are too long
        return None
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return LEVELS
    kind = record.get("kind") if isinstance(record, dict) else None
    return kind if kind in (POLICY, SHARED) else LEVELS


def read_tensors(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained numbers of an agent by name, on the CPU.

    Raises:
        CheckpointError: they are missing or damaged, not those of the record, or not finite.
    """
    file = folder / TENSOR_FILE
    try:
        data = file.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != record["tensors"]["sha256"]:
            raise CheckpointError(
                f"{file} is missing or damaged: its SHA-256 digest is {found[:16]}…, and "
                f"{JSON_FILE} says {record['tensors']['sha256'][:16]}…; {_REMEDY}"
            )
        tensors: dict[str, Tensor] = load(data)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}; {_REMEDY}") from error
    for name, value in tensors.items():
        if not _is_finite(value):
            raise CheckpointError(
                f"{file} holds numbers that are not finite in {name!r}; {_REMEDY}"
            )
    return tensors


# -- levels ---------------------------------------------------------------------------------------


def save_agent(
    folder: Path, spec: AgentSpec, state: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes a trained agent of two levels.

    Args:
        folder: Made if need be.
        spec: How to build the agent.
        state: Nested dictionaries of tensors and numbers: the ``state_dict()`` of its levels.
        about: What else to record: ``model_name``, ``model`` from :func:`describe_model`,
            ``training`` (how it was trained) and ``log``.

    Raises:
        CheckpointError: the folder cannot be written, or a number of the state is not finite.
    """
    tensors, values = flatten(state)
    _require_finite(folder, {**tensors, **values})
    write_agent(folder, LEVELS, {**spec.to_json(), **about, "values": values}, tensors)


def read_state(folder: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Trained numbers of an agent of two levels by dotted path, tensors on ``device``.

    Raises:
        CheckpointError: the tensors are missing or damaged.
    """
    tensors = read_tensors(folder, record)
    return {path: t.to(device) for path, t in tensors.items()} | dict(record["values"])


def weights_of(record: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that say whether two agents have the same trained numbers."""
    return str(record["tensors"]["sha256"])[:16]


def flatten(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a nested state into tensors and plain values, both by dotted path.

    >>> tensors, values = flatten({"a": {"b": torch.ones(2), "c": 3}})
    >>> list(tensors), values
    (['a.b'], {'a.c': 3})
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, value in _leaves(state, prefix):
        if isinstance(value, Tensor):
            tensors[path] = value.detach().contiguous()
        else:
            values[path] = value
    return tensors, values


def describe_model(llm: ResidentLLM) -> dict[str, Any]:
    """What a trained agent has to find again in a model it is used on."""
    return {
        "model_type": llm.model.config.model_type,
        "layers": list(llm.names),
        "shapes": [list(shape) for shape in llm.shapes],
        # Token ids are kept, of prompts that are rehearsed.
        "tokenizer": [len(llm.tokenizer), *llm.encoder.encode_prompt(PANGRAM)],
        "sample": _samples(llm),
    }


def _samples(llm: ResidentLLM) -> list[list[float]]:
    with llm.unedited():
        weights = [llm.model.get_submodule(name).weight for name in llm.names]
        return [sample(weight) for weight in weights if isinstance(weight, Tensor)]


def fact_hashes(requests: Iterable[Request]) -> frozenset[str]:
    """What facts are recognised by where nothing of them is kept: 8 hexadecimal digits each.

    Subject and prompt count, without regard to case and white space; the answer does not.

    >>> one, two = (Request("Rome is in", answer, "Rome") for answer in ("Peru", "Chad"))
    >>> fact_hashes([one]) == fact_hashes([two])
    True
    """
    texts = (f"{request.subject}\n{request.prompt}" for request in requests)
    plain = ("\n".join(" ".join(t.split()) for t in text.casefold().split("\n")) for text in texts)
    return frozenset(hashlib.blake2b(t.encode(), digest_size=4).hexdigest() for t in plain)


def facts_entry(hashes: Iterable[str]) -> dict[str, str]:
    """:func:`fact_hashes` as an entry of a training's record, for :func:`trained_facts`."""
    return {FACTS: " ".join(sorted(hashes))}


def trained_facts(record: Mapping[str, Any]) -> frozenset[str]:
    """:func:`fact_hashes` of what an agent was trained on; empty where its record does not say."""
    return frozenset(str(record.get("training", {}).get(FACTS, "")).split())


def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Entries of a flat state below a path, with the path taken off.

    >>> part({"high.a": 1, "low.a": 2, "low.b.c": 3}, "low")
    {'a': 2, 'b.c': 3}
    """
    start = f"{prefix}."
    return {path[len(start) :]: v for path, v in state.items() if path.startswith(start)}


def check_fits(folder: Path, record: Mapping[str, Any], llm: ResidentLLM) -> None:
    """Compares the model an agent was trained on with another.

    Raises:
        CheckpointError: names what differs, both values, and the remedy.
    """
    trained, present = record["model"], describe_model(llm)
    for name, what in (
        ("model_type", "model type"),
        ("layers", "candidate layers"),
        ("shapes", "layer shapes (d_in, d_out)"),
        ("tokenizer", "a tokenizer that has so many tokens and reads a text as"),
    ):
        if name == "tokenizer" and _extends(present[name], trained[name]):
            continue
        if trained[name] != present[name]:
            raise CheckpointError(
                f"the agent in {folder} does not fit this model: it was trained for {what} "
                f"{_short(trained[name])}, here they are {_short(present[name])}. Use the model "
                "and --layers it was trained with, or train an agent for these"
            )


def _extends(present: Sequence[int], trained: Sequence[int]) -> bool:
    """Whether a tokenizer reads texts as another one does and has at least its tokens."""
    return present[0] >= trained[0] and list(present[1:]) == list(trained[1:])


def _require_finite(folder: Path, flat: Mapping[str, Any]) -> None:
    for path, value in flat.items():
        if not _is_finite(value):
            level, _, name = path.partition(".")
            raise CheckpointError(
                f"{folder} is not written: {name!r} of the {level} level is not finite; train with "
                "a smaller learning rate or step size"
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


def _leaves(state: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for name, value in state.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, state


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:150]}… ({len(value)} in all)"
