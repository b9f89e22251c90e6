"""The candidate weights of a model folder, read without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hiedit_agents.editing.ledger_format import Base, BaseLayer
from hiedit_env.errors import HieditError, LedgerError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.folders import DTYPES, StoredTensor, stored_tensors, weight_files
from hiedit_env.model.saving import find_folder
from hiedit_env.resident.weights import EditableWeights


class _Matrix(nn.Module):
    """A weight by itself, where a layer is wanted."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def base_folder(base: Base, folder: Path) -> Path:
    """Where the unedited model of a ledger lies on this machine.

    Args:
        base: Of the ledger.
        folder: The edited model, which is not its own unedited one.

    Raises:
        LedgerError: it is not on this machine.
    """
    for name in (base.source, base.model):
        try:
            found = find_folder(name) if name else None
        except HieditError:
            continue
        if found is not None and found.resolve() != folder.resolve():
            return found
    raise LedgerError(
        f"the unedited model {base.model or base.source!r} is not on this machine; give its folder "
        "with --base"
    )


def places(folder: Path, layers: Sequence[BaseLayer]) -> list[StoredTensor]:
    """Where each candidate weight is stored, by its name or the only one that ends like it.

    Raises:
        LedgerError: a matrix is not there, or in a form that cannot be edited.
    """
    stored = {t.name: t for file in weight_files(folder) for t in stored_tensors(file)}
    found_places = []
    for layer in layers:
        name = f"{layer.name}.weight"
        shape = (layer.d_out, layer.d_in) if layer.is_transposed else (layer.d_in, layer.d_out)
        found = [stored[name]] if name in stored else []
        found = found or [
            t for key, t in stored.items() if key.endswith(f".{name}") or name.endswith(f".{key}")
        ]
        if len(found) != 1 or found[0].shape != shape or found[0].dtype not in DTYPES:
            raise LedgerError(
                f"{folder} holds no matrix {name!r} of shape {shape} that can be edited; give the "
                "folder of the unedited model with --base"
            )
        found_places.append(found[0])
    return found_places


def editable(
    layers: Sequence[BaseLayer],
    stored: Sequence[StoredTensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> EditableWeights:
    """Weights read from files, to be edited by themselves.

    Args:
        layers: Their layers.
        stored: Where each is, see :func:`places`.
        dtype: The dtype the model was edited in.
        device: Where they are wanted.
    """
    return EditableWeights(
        [
            CandidateLayer(
                layer.name,
                _Matrix(place.read().to(device, dtype)),
                0,
                layer.d_in,
                layer.d_out,
                layer.is_transposed,
            )
            for layer, place in zip(layers, stored, strict=True)
        ]
    )
