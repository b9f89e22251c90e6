"""The edits as one small file: the edited matrices alone, bit for bit.

A safetensors file with one tensor per edited matrix, named as the model's parameter, in the model's
dtype. Its metadata hold ``format`` (``hiedit-delta-1``), ``base`` (the unedited model, see
:class:`.ledger_format.Base`, as JSON) and ``fingerprint``, of the candidate weights once it is
applied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hiedit_agents.editing.ledger_format import Base, base_of
from hiedit_agents.editing.other_weights import OtherWeights
from hiedit_env.errors import LedgerError, ResultsExistError
from hiedit_env.files import parse_json, write_bytes
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.resident.weights import EditableWeights

DELTA_FORMAT = "hiedit-delta-1"


def write_delta(path: Path, base: Base, edited: Mapping[str, Tensor], fingerprint: str) -> None:
    """Writes the edited matrices.

    Args:
        path: The file; it must not exist.
        base: The unedited model.
        edited: Layer name → weight.
        fingerprint: Of the candidate weights as edited.

    Raises:
        ResultsExistError: it is there.
        OutputError: it cannot be written.
    """
    if os.path.lexists(path):
        raise ResultsExistError(f"{path} exists; give another file")
    tensors = {f"{name}.weight": w.detach().cpu().contiguous() for name, w in edited.items()}
    metadata = {
        "format": DELTA_FORMAT, "base": json.dumps(asdict(base)), "fingerprint": fingerprint
    }  # fmt: skip
    write_bytes(path, save(tensors, metadata))


def apply_delta(model: nn.Module, path: str | PathLike[str]) -> list[str]:
    """Puts the edits of a file into an unedited model.

    Args:
        model: The unedited model that the file is for, in the same dtype.
        path: From ``Editor.save_delta``.

    Returns:
        Names of the edited layers.

    Raises:
        LedgerError: no such file, or it is for another model; nothing has changed.
    """
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != DELTA_FORMAT:
                raise LedgerError(f"{path} holds no edits of hiedit ({DELTA_FORMAT})")
            base = base_of(parse_json(metadata["base"]))
            edited = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(f"{path} cannot be read: {error}; copy the file again") from error
    weights = _weights(model, base)
    found = weights.weights_fingerprint()
    if found != base.fingerprint:
        raise LedgerError(
            f"{path} is for another model: its unedited weights have the fingerprint "
            f"{base.fingerprint}, this model's {found}; load {base.model!r} in {base.dtype}"
        )
    base.refuse_other_weights(OtherWeights(model, weights.layers).fingerprint(), str(path))
    names = [layer.name for layer in base.layers if f"{layer.name}.weight" in edited]
    with torch.no_grad():
        for name in names:
            cast(Tensor, model.get_submodule(name).weight).copy_(edited[f"{name}.weight"])
    return names


def _weights(model: nn.Module, base: Base) -> EditableWeights:
    layers: list[CandidateLayer] = []
    for layer in base.layers:
        try:
            module = model.get_submodule(layer.name)
            shape = tuple(cast(Tensor, module.weight).shape)
        except AttributeError as error:
            raise LedgerError(
                f"this model has no layer {layer.name!r}; load {base.model!r}"
            ) from error
        wanted = (layer.d_out, layer.d_in) if layer.is_transposed else (layer.d_in, layer.d_out)
        if shape != wanted:
            raise LedgerError(
                f"layer {layer.name!r} has the shape {shape}, the edits are for {wanted}; load "
                f"{base.model!r}"
            )
        sides = (layer.d_in, layer.d_out, layer.is_transposed)
        layers.append(CandidateLayer(layer.name, module, 0, *sides))
    return EditableWeights(layers)
