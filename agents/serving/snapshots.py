"""Models that are answered with while others are written: copies that share all unchanged tensors.

A snapshot is never written. An edit makes a new one, in which only the matrices it changed are
other tensors; answers that have begun go on with the snapshot they began with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hiedit_env.resident.resident import ResidentLLM


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model at one moment; nothing writes it any more.

    Args:
        model: Modules of its own; every tensor that no edit changed is shared with other snapshots.
        fingerprint: Of its candidate weights, 16 hexadecimal digits.
        active: Ids of the edits in place, in the order they were made.
        weights: Layer index → its weight.
        changes: Layer index → the accumulated change behind that weight; None for an unedited one.
    """

    model: PreTrainedModel
    fingerprint: str
    active: tuple[int, ...]
    weights: Mapping[int, Tensor]
    changes: Mapping[int, Tensor | None]


def unedited_snapshot(llm: ResidentLLM) -> Snapshot:
    """The unedited model; no tensor is copied."""
    count = range(len(llm.layers))
    with llm.unedited():
        fingerprint = llm.weights_fingerprint()
    weights = {i: llm.unedited_weight(i) for i in count}
    return _snapshot(llm, fingerprint, (), weights, dict.fromkeys(count))


def present_snapshot(llm: ResidentLLM, active: tuple[int, ...], earlier: Snapshot) -> Snapshot:
    """The model as it is edited now.

    Args:
        llm: The edited model.
        active: Ids of the edits in place.
        earlier: Whose weights are shared where nothing was changed since.
    """
    changes = llm.snapshot().changes
    weights: dict[int, Tensor] = {}
    for i, change in changes.items():
        if change is None:
            weights[i] = llm.unedited_weight(i)
        elif change is earlier.changes[i]:  # changes are never written in place
            weights[i] = earlier.weights[i]
        else:
            weights[i] = _weight(llm, i).detach().clone()
    return _snapshot(llm, llm.weights_fingerprint(), active, weights, changes)


@torch.inference_mode(False)
def _snapshot(
    llm: ResidentLLM,
    fingerprint: str,
    active: tuple[int, ...],
    weights: Mapping[int, Tensor],
    changes: Mapping[int, Tensor | None],
) -> Snapshot:
    # What is in the memo is taken over and not copied.
    memo: dict[int, Any] = {id(buffer): buffer for buffer in llm.model.buffers()}
    for parameter in llm.model.parameters():
        # A parameter object of its own, since the editor sets requires_grad of the others.
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for i, weight in weights.items():
        memo[id(_weight(llm, i))] = nn.Parameter(weight, requires_grad=False)
    model = copy.deepcopy(llm.model, memo).eval()
    # Penalties and sampling settings that came with the model are not used, as in every measure.
    model.generation_config = cast(Any, GenerationConfig)()
    return Snapshot(model, fingerprint, active, weights, changes)


def _weight(llm: ResidentLLM, index: int) -> Tensor:
    return cast(Tensor, llm.layers[index].module.weight)
