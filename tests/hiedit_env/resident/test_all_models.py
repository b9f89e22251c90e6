"""Every causal-LM class of transformers: loaded, run, captured, edited, restored and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.all_models import go_through, row_not_built, written
from tests.support.tiny_models import BLOCKS, MODEL_TYPES, NOT_BUILT, shrink

#: One of every kind, tried in every run: scaled logits, projections, flattened tokens, experts,
#: in-place operations, state spaces, parts for images, positions from outside the blocks.
QUICK = (
    *("bloom", "cohere", "falcon", "fuyu", "gpt_neox", "granite", "llama4_text", "mamba"),
    *("minimax", "mixtral", "opt", "qwen2_moe", "qwen3_5", "qwen4_exp", "rwkv", "xlnet"),
    *("zamba2", "zaya"),
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


def test_the_page_lists_all_model_types_and_says_which_cannot_be_made() -> None:
    rows = [line for line in written().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(MODEL_TYPES)
    assert len(NOT_BUILT) == 3
    assert all(row_not_built(model_type) in rows for model_type in NOT_BUILT)
    edited = sum("| refused |" not in row and "| not tried |" not in row for row in rows)
    assert edited >= 175


@pytest.mark.parametrize("model_type", ["gemma4_assistant", "gemma4_unified_assistant"])
def test_no_model_can_be_made_where_the_page_says_so(model_type: str) -> None:
    # If transformers can make one some day, this fails, and the type goes into the table.
    text = CONFIG_MAPPING[model_type.replace("assistant", "text")]
    fields = shrink(text().to_dict()) | {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": BLOCKS,
    }
    config = CONFIG_MAPPING[model_type](text_config=fields, backbone_hidden_size=32)
    with pytest.raises(ValueError, match="layer types producing a cache"):
        AutoModelForCausalLM.from_config(config)
