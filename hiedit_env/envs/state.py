"""A saved state of an environment, the records of its finished edits, and copies of models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.envs.episode import EpisodeState
from hiedit_env.resident.resident import ResidentLLM


@dataclass(frozen=True, slots=True)
class EditRecord:
    """One finished edit.

    Args:
        edit_index: Place in the stream.
        prompt: The request's prompt.
        answer: The answer written.
        layers: L bool, layers written.
        steps: Primitive steps taken.
        reward: Sum of the rewards on the unit that the fact was edited in.
        metrics: Token accuracies at the end of the edit; a metric that could not be measured is
            absent.
    """

    edit_index: int
    prompt: str
    answer: str
    layers: NDArray[np.bool_]
    steps: int
    reward: float
    metrics: dict[str, float | bool]


@dataclass(slots=True)
class History:
    """The records of the present episode.

    Args:
        layer_names: L names in forward order.
        num_edits: Length of the stream.
    """

    layer_names: tuple[str, ...]
    num_edits: int
    records: list[EditRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EnvState:
    """A saved state of an environment; see :meth:`.base.EditingEnv.save_state`.

    Args:
        episode: Weights, statistics and position.
        random: State of ``np_random``.
        records: The finished edits, for rendering.
        edit_reward: Sum of the rewards on the present unit so far.
        option: The present unit's layers, L bool, where a high level chose them.
    """

    episode: EpisodeState
    random: Mapping[str, Any]
    records: tuple[EditRecord, ...]
    edit_reward: float
    option: NDArray[np.bool_] | None = None


def copy_model(llm: ResidentLLM) -> ResidentLLM:
    """An unedited copy of a model that shares no tensor with it."""
    with llm.unedited():
        model = copy.deepcopy(llm.model)
    layers = [replace(layer, module=model.get_submodule(layer.name)) for layer in llm.layers]
    return ResidentLLM(
        model,
        llm.tokenizer,
        layers,
        max_batch_tokens=llm.max_batch_tokens,
        end_id=llm.encoder.end_id,
    )
