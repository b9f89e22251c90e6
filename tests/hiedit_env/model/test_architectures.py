"""Candidate layers: found in every listed architecture, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hiedit_env.errors import LayerError
from hiedit_env.model.architectures import (
    ARCHITECTURES,
    PRESETS,
    block_list,
    find_candidates,
    find_preset,
)
from tests.support.models import BLOCKS, COMMON, HEAD, HIDDEN, INNER, SETTINGS, build

# Worked out by hand from the published layouts: matrix, d_in, d_out, in forward order.
GATED = [
    ("mlp.gate_proj", HIDDEN, INNER),
    ("mlp.up_proj", HIDDEN, INNER),
    ("mlp.down_proj", INNER, HIDDEN),
]
EXPECTED = dict.fromkeys(SETTINGS, GATED) | {
    "gpt2": [("mlp.c_fc", HIDDEN, INNER), ("mlp.c_proj", INNER, HIDDEN)],
    "gptj": [("mlp.fc_in", HIDDEN, INNER), ("mlp.fc_out", INNER, HIDDEN)],
    "phi": [("mlp.fc1", HIDDEN, INNER), ("mlp.fc2", INNER, HIDDEN)],
    "phi3": [("mlp.gate_up_proj", HIDDEN, 2 * INNER), ("mlp.down_proj", INNER, HIDDEN)],
}
PREFIX = dict.fromkeys(SETTINGS, "model.layers") | {
    "gemma3": "model.language_model.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
}


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(SETTINGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_all_matrices_in_execution_order(model_type: str) -> None:
    model = build(model_type)
    prefix = PREFIX[model_type]
    # Asked for in a wrong order: the answer must not depend on it.
    patterns = [f"{prefix}.{{0-2}}.{matrix}" for matrix, _, _ in reversed(EXPECTED[model_type])]
    layers = find_candidates(model, patterns)
    assert [(layer.name, layer.block, layer.d_in, layer.d_out) for layer in layers] == [
        (f"{prefix}.{block}.{matrix}", block, d_in, d_out)
        for block in range(BLOCKS)
        for matrix, d_in, d_out in EXPECTED[model_type]
    ]
    assert ARCHITECTURES[model_type].matrices == tuple(m for m, _, _ in EXPECTED[model_type])

    ran: list[str] = []
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            ran.append(name)
            sizes[name] = (args[0].shape[-1], output.shape[-1])

        return hook

    for layer in layers:
        layer.module.register_forward_hook(note(layer.name))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    assert ran == [layer.name for layer in layers]
    assert sizes == {layer.name: (layer.d_in, layer.d_out) for layer in layers}


@pytest.mark.parametrize("model_type", SETTINGS)
def test_block_list(model_type: str) -> None:
    model = build(model_type)
    blocks, attribute = block_list(model)
    assert len(blocks) == BLOCKS
    assert model.base_model.get_submodule(attribute) is blocks


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        # 3 blocks: gate 3·11/32 = 1.03 to 3·15/32 = 1.41; up 3·18/32 = 1.69 to 3·24/32 = 2.25.
        ("qwen3", ["1.mlp.gate_proj", "2.mlp.up_proj"]),
        # 3·18/28 = 1.93 to 3·26/28 = 2.79, which rounds past the last block and is held there.
        ("gpt2", ["2.mlp.c_proj"]),
        ("phi3", ["2.mlp.down_proj"]),
    ],
)
def test_default_rule(model_type: str, expected: list[str]) -> None:
    found = [layer.name for layer in find_candidates(build(model_type))]
    assert found == [f"{PREFIX[model_type]}.{name}" for name in expected]


def test_default_rule_reproduces_the_choices_it_was_taken_from() -> None:
    gate, up = ARCHITECTURES["llama"].default
    assert (gate.blocks(32), up.blocks(32)) == (range(11, 16), range(18, 25))
    assert (gate.blocks(30), up.blocks(30)) == (range(10, 15), range(17, 24))
    assert ARCHITECTURES["gptj"].default[0].blocks(28) == range(18, 27)
    assert gate.blocks(1) == up.blocks(1) == range(0, 1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (COMMON, (HIDDEN, INNER, True)),
        (COMMON | {"intermediate_size": HIDDEN}, (HIDDEN, HIDDEN, True)),
    ],
)
def test_linear_orientation(config: dict[str, Any], expected: tuple[int, int, bool]) -> None:
    (layer,) = find_candidates(build("llama", **config), "model.layers.1.mlp.up_proj")
    assert (layer.d_in, layer.d_out, layer.is_transposed) == expected


@pytest.mark.parametrize("inner", [INNER, HIDDEN])
def test_conv1d_orientation_even_when_square(inner: int) -> None:
    (layer,) = find_candidates(build("gpt2", n_inner=inner), "transformer.h.1.mlp.c_fc")
    assert isinstance(layer.module, Conv1D)
    assert (layer.d_in, layer.d_out, layer.is_transposed) == (HIDDEN, inner, False)
    # Independent route: what the layer computes, with its weight read as d_in × d_out.
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight, bias = layer.module.weight, layer.module.bias
    torch.testing.assert_close(layer.module(x), x @ weight + bias)


def test_presets_hold_the_published_layers() -> None:
    assert PRESETS["llama-3-8b"].layers == (
        *(f"{i}.mlp.gate_proj" for i in (11, 12, 13, 14, 15)),
        *(f"{i}.mlp.up_proj" for i in (18, 19, 20, 21, 22, 23, 24)),
    )
    assert PRESETS["smollm2-135m"].layers == (
        *(f"{i}.mlp.gate_proj" for i in (10, 11, 12, 13, 14)),
        *(f"{i}.mlp.up_proj" for i in (17, 18, 19, 20, 21, 22, 23)),
    )
    assert PRESETS["tiny"].layers == tuple(
        f"{i}.mlp.{m}_proj" for i in (1, 2) for m in ("gate", "up", "down")
    )
    assert PRESETS["gpt-j-6b"].layers == tuple(f"{i}.mlp.fc_out" for i in range(18, 27))
    assert len(PRESETS["gemma-2-9b"].layers) == len(PRESETS["gemma-3-27b"].layers) == 18


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_exist_in_models_of_their_depth(preset: str) -> None:
    row = PRESETS[preset]
    for model_type in row.model_types:
        depth = {"n_layer" if model_type == "gptj" else "num_hidden_layers": row.num_blocks}
        if model_type == "gemma3":
            depth = {"text_config": COMMON | HEAD | depth}
        with torch.device("meta"):
            model = build(model_type, **depth)
        layers = find_candidates(model, preset)
        root = f"{PREFIX[model_type]}."
        assert tuple(layer.name.removeprefix(root) for layer in layers) == row.layers
        assert find_candidates(model, name=f"some/folder/{preset.upper()}/") == layers


def test_preset_is_found_by_hub_id_and_path() -> None:
    assert find_preset("meta-llama/Meta-Llama-3-8B-Instruct") is PRESETS["llama-3-8b"]
    assert find_preset("google/gemma-2-9b-it") is PRESETS["gemma-2-9b"]
    assert find_preset("/models/SmolLM2-135M-Instruct") is PRESETS["smollm2-135m"]
    assert find_preset("google/gemma-2-2b") is None


def test_preset_of_another_model_is_refused_when_asked_for_and_passed_over_by_name() -> None:
    model = build("llama")
    with pytest.raises(LayerError, match=r"'llama-3-8b'.*32 blocks.*llama model of 3 blocks"):
        find_candidates(model, "llama-3-8b")
    with pytest.raises(LayerError, match="gptj models"):
        find_candidates(model, "EleutherAI/gpt-j-6B")
    assert find_candidates(model, name="llama-3-8b") == find_candidates(model)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("model.layers.{0-2}.mlp.up_proj", ["0.up", "1.up", "2.up"]),
        ("model.layers.{0,2}.mlp.up_proj", ["0.up", "2.up"]),
        (["*.{1-2}.mlp.down_proj", "*.2.mlp.?ate_proj"], ["1.down", "2.gate", "2.down"]),
        ("model.layers.{0,2}.mlp.{up,gate}_proj", ["0.gate", "0.up", "2.gate", "2.up"]),
        (["*.1.mlp.up_proj", "model.layers.[1].mlp.up_proj"], ["1.up"]),
    ],
)
def test_patterns(patterns: str | list[str], expected: list[str]) -> None:
    layers = find_candidates(build("llama"), patterns)
    names = [f"model.layers.{e.replace('.', '.mlp.')}_proj" for e in expected]
    assert [layer.name for layer in layers] == names


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            "model.layers.1.mlp.upproj",
            r"upproj' matches no.*close names: .*layers\.1\.mlp\.up_proj",
        ),
        ("model.layers.{1-9}.mlp.up_proj", r"layers\.3\.mlp\.up_proj' \(part of .*matches no"),
        ("model.layers.{0-99999999999}.mlp.up_proj", r"layers\.3\.mlp"),
        ("model.layers.{2-1}.mlp.up_proj", "rising"),
        ("model.layers.{a-b}.mlp.up_proj", "braces"),
        ("model.layers.{a b}.mlp.up_proj", "braces"),
        ("model.layers.1.mlp.{up,in}_proj", r"in_proj' \(part of .*matches no"),
        ("model.layers.{1.mlp.up_proj", "braces"),
        ("model.layers.1}.mlp.up_proj", "without"),
        ("model.layers.1.mlp", "LlamaMLP, not nn.Linear"),
        ("model.embed_tokens", "Embedding, not nn.Linear"),
        ("lm_head", "outside the blocks"),
        ([], "empty"),
        ("", "matches no module"),
        ([3], "must be text, got int"),
    ],
)
def test_bad_patterns(patterns: Any, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        find_candidates(build("llama"), patterns)


def test_quantised_weights_are_refused() -> None:
    model = build("llama")
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = nn.Parameter(torch.zeros(INNER, HIDDEN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayerError, match=r"quantised weights \(torch.int8\)"):
        find_candidates(model, "model.layers.1.mlp.up_proj")
    model.get_submodule("model.layers.1.mlp").gate_proj = packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(LayerError, match="quantised"):
        find_candidates(model, "model.layers.1.mlp.gate_proj")


def test_unlisted_architecture_has_the_depths_of_its_kin() -> None:
    model = build("olmo2")
    # The same three blocks and matrices as in qwen3 above.
    names = [layer.name for layer in find_candidates(model)]
    assert names == ["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.up_proj"]
    assert block_list(model)[1] == "layers"
    (layer,) = find_candidates(model, "model.layers.2.mlp.down_proj")
    assert (layer.block, layer.d_in, layer.d_out) == (2, INNER, HIDDEN)


def test_unlisted_architecture_with_ambiguous_blocks_is_refused() -> None:
    model = build("olmo2")
    model.base_model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(BLOCKS))
    assert block_list(model)[1] == "layers"  # a list inside a block is not the list of blocks
    model.base_model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(BLOCKS))
    with pytest.raises(LayerError, match=r"3 blocks.*'layers', 'others'"):
        block_list(model)
