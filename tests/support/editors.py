"""Editors on the tiny model, and their weights by another route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hiedit_agents import Checks, Editor
from hiedit_env import load_model, load_requests
from tests.support.models import all_bits

FACTS = load_requests("tiny-facts")
#: Checks that let every edit pass.
NONE = Checks(target=False, min_agreement=None, earlier=0)


def bits(editor: Editor) -> dict[str, bytes]:
    return all_bits(editor.model)


def edited_states(editor: Editor, count: int) -> list[dict[str, bytes]]:
    """Weights before and after each of some edits."""
    states = [bits(editor)]
    for fact in FACTS[:count]:
        [result] = editor.edit(fact)
        assert result.status == "written"
        states.append(bits(editor))
    return states


def dense(editor: Editor, edits: tuple[int, ...]) -> list[Tensor]:
    """Unedited weights plus the recorded updates of some edits, as float64 matrices, by hand."""
    with editor.llm.unedited():
        total = [
            (w.mT if layer.is_transposed else w).detach().double().clone()
            for layer in editor.llm.layers
            for w in [layer.module.weight]
        ]
    for number in edits:
        for updates in editor.ledger.steps(number):
            for i, update in enumerate(updates):
                if update is not None:
                    total[i] += update.left.double().mT @ update.right.double()
    return total


def gap(editor: Editor, wanted: list[Tensor]) -> float:
    """Largest difference from the present weights."""
    return max(
        float(((w.mT if layer.is_transposed else w).double() - matrix).abs().max())
        for layer, matrix in zip(editor.llm.layers, wanted, strict=True)
        for w in [layer.module.weight]
    )


def live(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    loaded = load_model("tiny", progress=False)
    return loaded.model.to(dtype), loaded.tokenizer
