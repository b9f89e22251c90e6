"""Which model folders are refused, and by what name; where tensors are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hiedit_env.errors import ModelError
from hiedit_env.model.folders import check_folder, stored_tensors, weight_files
from hiedit_env.model.loading import load_model
from tests.support.models import build_random, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_random("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_whole_model_is_not_refused(folder: Path) -> None:
    check_folder(folder)
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_at_once(folder: Path, beside: bool) -> None:
    (folder / "adapter_config.json").write_text("{}")
    if not beside:
        (folder / "config.json").unlink()
    what = "beside a model" if beside else "without its model"
    with pytest.raises(ModelError, match=rf"adapter_config\.json is an adapter {what}.*merge"):
        load_model(str(folder), progress=False)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_weights_are_refused_with_the_method(
    folder: Path, settings: dict[str, Any], method: str, nested: bool
) -> None:
    part = {"quantization_config": settings}
    change_config(folder, **({"text_config": part} if nested else part))
    with pytest.raises(ModelError, match=rf"quantised \({method}, .*cannot be edited.*made from"):
        check_folder(folder)


def test_quantised_weights_are_refused_when_loading(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="are quantised"):
        load_model(str(folder), progress=False)


def test_weights_that_mlx_quantised_are_refused(folder: Path) -> None:
    change_config(folder, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(ModelError, match=r"quantised \(MLX, says quantization in config\.json\)"):
        check_folder(folder)


@pytest.mark.parametrize(
    "name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"]
)
def test_old_files_of_quantisation(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"{name} says that the weights are quantised"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", r"from_pretrained\('.*'\)\.save_pretrained"),
        ("weights-q4.gguf", r"gguf_file='weights-q4\.gguf'\)\.save_pretrained"),
    ],
)
def test_weights_of_other_formats_are_refused_with_the_remedy(
    folder: Path, name: str, remedy: str
) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"{name} and not as \*\.safetensors.*{remedy}"):
        load_model(str(folder), progress=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", r"model\.fp16\.safetensors, .*; rename it to model\.saf"),
        ("model-00001-of-00002.safetensors", r"model-00001-of.* but no model\..*index.*copy it"),
    ],
)
def test_weights_under_names_that_are_not_looked_for(folder: Path, name: str, message: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), progress=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_pointers_of_git_lfs_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        load_model(str(folder), progress=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../other.safetensors"], r"'\.\./other\.safetensors', a file outside the folder"),
        (["/tmp/other.safetensors"], "a file outside the folder"),
        (["gone.safetensors"], r"'gone\.safetensors', which is missing"),
        ([3], "index.json cannot be read"),
    ],
)
def test_an_index_that_is_wrong(folder: Path, names: list[Any], message: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        check_folder(folder)


def test_tensors_are_found_where_they_are(tmp_path: Path) -> None:
    values = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.tensor([1.5, -2.0]),
        "none": torch.empty(0, 4, dtype=torch.float16),
    }
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in stored_tensors(tmp_path / "x.safetensors")}
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": "F32",
        "b": "BF16",
        "none": "F16",
    }
    for name, value in values.items():
        assert torch.equal(found[name].read(), value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"123",
        b"\xff" * 16,
        (2).to_bytes(8, "little") + b"[]",
        (72).to_bytes(8, "little")
        + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8000000000]}}  ',
    ],
)
def test_damaged_files_are_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"x\.safetensors cannot be read as safetensors"):
        stored_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, bad: float) -> None:
    model = build_random("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = bad
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight'.*not finite"):
        load_model(str(folder), progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "it has no field 'model'"),
        ("", "Expecting value"),
        ("[]", "it has no field 'model'"),
        ('{"model": 3}', "its field 'model' is no object"),
    ],
)
def test_a_damaged_tokenizer_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=rf"tokenizer\.json is damaged: {message}.*copy the file"):
        load_model(str(folder), progress=False)


def test_what_transformers_says_is_put_into_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load_model(str(folder), progress=False)
    assert "\n" not in str(caught.value)


def test_an_adapter_in_the_hubs_cache_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "adapter_config.json").write_text("{}")

    def cached(_: str, file: str) -> str | None:
        return str(folder / file) if (folder / file).exists() else None

    monkeypatch.setattr("hiedit_env.model.loading.try_to_load_from_cache", cached)
    with pytest.raises(ModelError, match=r"adapter_config\.json is an adapter beside a model"):
        load_model("me/mine", progress=False)
