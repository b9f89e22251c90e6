"""Files of candidate layers: read back, taken as a pattern, refused for another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hiedit_env.errors import LayerError
from hiedit_env.model.architectures import (
    all_candidates,
    find_candidates,
    model_structure,
    outputs_of_mlps,
)
from hiedit_env.model.layer_files import write_layers
from tests.support.models import build

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj"]


def content(model: Any, **changes: Any) -> dict[str, Any]:
    whose = {"name": "mine", "type": "llama", "structure": model_structure(model)}
    return {"model": whose, "layers": NAMES, **changes}


def test_a_file_stands_for_its_layers(tmp_path: Path) -> None:
    model = build("llama")
    path = tmp_path / "found.json"
    write_layers(path, content(model, remark="ä"))
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["format"], written["version"]) == ("hiedit-layers", 1)
    assert written["remark"] == "ä"
    # By itself, and beside other patterns.
    assert [layer.name for layer in find_candidates(model, str(path))] == NAMES
    both = find_candidates(model, [str(path), "model.layers.1.mlp.gate_proj"])
    assert [layer.name for layer in both] == [NAMES[0], "model.layers.1.mlp.gate_proj", NAMES[1]]


def test_other_weights_of_the_same_structure_are_the_same_model(tmp_path: Path) -> None:
    model = build("llama")
    write_layers(tmp_path / "found.json", content(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    find_candidates(model, str(tmp_path / "found.json"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        # The last block of three does not exist.
        ({"num_hidden_layers": 2}, r"'model\.layers\.2\.self_attn\.o_proj' \(1 of 2 layers\)"),
        # All names exist, but one matrix has another shape.
        ({"intermediate_size": 48}, "other names or shapes"),
    ],
)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, other: dict[str, int], message: str
) -> None:
    path = tmp_path / "found.json"
    write_layers(path, content(build("llama")))
    with pytest.raises(LayerError, match=message) as caught:
        find_candidates(build("llama", **other), str(path))
    assert "made for model 'mine'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file of layers"),
        ("{", "it is not JSON"),
        ("[1]", "is no file of layers"),
        ('{"format": "other"}', "is no file of layers"),
        ('{"format": "hiedit-layers", "version": 2}', "has version 2 .* reads 1"),
        ('{"format": "hiedit-layers", "version": 1}', "names no layers"),
        ('{"format": "hiedit-layers", "version": 1, "model": {}, "layers": []}', "names no layers"),
        ('{"format": "hiedit-layers", "version": 1, "model": {}, "layers": [[1]]}', "names no"),
    ],
)
def test_rubbish_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LayerError, match=message) as caught:
        find_candidates(build("llama"), [str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "matrices"),
    [
        # Attention output, then the MLP's matrices, written down from the models' definitions.
        ("llama", ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("gemma2", ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("gptj", ["attn.out_proj", "mlp.fc_in", "mlp.fc_out"]),
        ("phi", ["self_attn.dense", "mlp.fc1", "mlp.fc2"]),
        ("phi3", ["self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    ],
)
def test_the_matrices_to_measure_of_every_block(model_type: str, matrices: list[str]) -> None:
    found = all_candidates(build(model_type))
    for block in range(3):
        own = [layer.name for layer in found if layer.block == block]
        assert [name.partition(f".{block}.")[2] for name in own] == matrices
    assert len(found) == 3 * len(matrices)


@pytest.mark.parametrize(
    ("model_type", "matrix"),
    [
        ("llama", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("gptj", "mlp.fc_out"),
        ("phi", "mlp.fc2"),
        ("phi3", "mlp.down_proj"),
    ],
)
def test_the_outputs_of_mlps_among_some_layers(model_type: str, matrix: str) -> None:
    model = build(model_type)
    layers = all_candidates(model)
    names = [layers[i].name for i in outputs_of_mlps(model, layers)]
    assert [name.rpartition(f".{b}.")[2] for b, name in enumerate(names)] == [matrix] * 3
    assert outputs_of_mlps(model, [layer for layer in layers if layer.name not in names]) == ()


def test_a_model_without_matrices_to_measure_is_refused() -> None:
    model = build("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(LayerError, match="no block of LlamaForCausalLM holds a matrix"):
        all_candidates(model)
