"""Every causal-LM class of transformers: loaded, run, captured, edited, restored and saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.all_models import go_through, written
from tests.support.tiny_models import MODEL_TYPES, NOT_BUILT

#: One of every kind, tried in every run: scaled logits, projections, flattened tokens, experts,
#: in-place operations, state spaces, parts for images, positions from outside the blocks.
QUICK = (
    *("bloom", "cohere", "falcon", "fuyu", "gpt_neox", "granite", "llama4_text", "mamba"),
    *("minimax", "mixtral", "opt", "qwen2_moe", "qwen3_5", "rwkv", "xlnet", "zaya"),
)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in MODEL_TYPES
        if kind not in NOT_BUILT
    ],
)
def test_a_model_type_is_edited_by_default_as_the_page_says(
    model_type: str, tmp_path: Path
) -> None:
    outcome = go_through(model_type, tmp_path)
    # Write the page anew with: python -m tests.support.all_models
    assert outcome.row() in written().splitlines()


def test_the_page_lists_all_models_that_can_be_built() -> None:
    rows = [line for line in written().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [k for k in MODEL_TYPES if k not in NOT_BUILT]
    assert sum("| refused |" not in row for row in rows) >= 165
