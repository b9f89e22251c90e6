"""Trained agents on disk: ``agent.json`` and ``agent.safetensors``, nothing that runs code."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from hiedit_agents.named.spec import AgentSpec
from safetensors.torch import load, save
from torch import Tensor

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import CheckpointError
from hiedit_env.files import write_bytes
from hiedit_env.resident.resident import ResidentLLM

FORMAT = 1
_PANGRAM = "The quick brown fox jumps over 13 lazy dogs."
JSON_FILE = "agent.json"
TENSOR_FILE = "agent.safetensors"
#: Key of a training's record: the hashes of its facts, one text, since a line each would bury the
#: rest.
FACTS = "fact_hashes"
_REMEDY = "copy the folder again, or train the agent into another one"


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
        "tokenizer": [len(llm.tokenizer), *llm.encoder.encode_prompt(_PANGRAM)],
    }


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


def save_agent(
    folder: Path, spec: AgentSpec, state: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes a trained agent.

    Args:
        folder: Made if need be; each of the two files appears whole or not at all.
        spec: How to build the agent.
        state: Nested dictionaries of tensors and numbers: its parameters and statistics.
        about: What else to record: ``model`` from :func:`describe_model`, and how it was trained.

    Raises:
        CheckpointError: the folder cannot be written, or a number of the state is not finite.
    """
    tensors, values = flatten(state)
    _require_finite(folder, {**tensors, **values})
    record = {"format": FORMAT, **spec.to_json(), **about, "values": values}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / TENSOR_FILE, save(tensors))
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_bytes(folder / JSON_FILE, text.encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def read_record(folder: Path) -> dict[str, Any]:
    """``agent.json`` of a trained agent's folder.

    Raises:
        CheckpointError: there is none, or it is not one of ours.
    """
    file = folder / JSON_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a trained agent: {error}; {_REMEDY}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{file} has format {found!r}; this version of hiedit reads format {FORMAT}"
        )
    return record


def read_state(folder: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Parameters and statistics of a trained agent by dotted path, tensors on ``device``.

    Raises:
        CheckpointError: the tensors are missing or damaged.
    """
    file = folder / TENSOR_FILE
    try:
        tensors = load(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}; {_REMEDY}") from error
    return {path: t.to(device) for path, t in tensors.items()} | dict(record["values"])


def file_digest(file: Path) -> str:
    """16 hexadecimal digits that say whether two files are the same.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


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
        if trained[name] != present[name]:
            raise CheckpointError(
                f"the agent in {folder} does not fit this model: it was trained for {what} "
                f"{_short(trained[name])}, here they are {_short(present[name])}. Use the model "
                "and --layers it was trained with, or train an agent for these"
            )


def _require_finite(folder: Path, flat: Mapping[str, Any]) -> None:
    for path, value in flat.items():
        if isinstance(value, Tensor):
            finite = bool(torch.isfinite(value).all())
        else:
            finite = not isinstance(value, float) or math.isfinite(value)
        if not finite:
            level, _, name = path.partition(".")
            raise CheckpointError(
                f"{folder} is not written: {name!r} of the {level} level is not finite; train with "
                "a smaller learning rate or step size"
            )


def _leaves(state: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for name, value in state.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, state


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:150]}… ({len(value)} in all)"
