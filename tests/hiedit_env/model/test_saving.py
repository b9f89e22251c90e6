"""Saving: other bytes in the edited matrices alone, whatever else a folder holds."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hiedit_env.errors import HieditWarning, ModelError
from hiedit_env.model.folders import stored_tensors
from hiedit_env.model.saving import (
    EditedMatrix,
    check_source,
    differences,
    find_folder,
    locate,
    save_edited,
)
from tests.support.models import build_random, tokenizer

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_random("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> list[EditedMatrix]:
    """Adds 1/8 to a matrix that was loaded in some dtype."""
    base = stored(folder, NAME).to(dtype)
    places = locate({NAME: base}, folder)[NAME]
    matrices = [EditedMatrix(NAME, base, base + 0.125, places)]
    save_edited(folder, out, matrices)
    return matrices


def stored(folder: Path, name: str) -> Tensor:
    found = [
        tensor.read()
        for file in folder.glob("*.safetensors")
        for tensor in stored_tensors(file)
        if tensor.name == name
    ]
    return found[0]


def test_all_other_bytes_stay(folder: Path, tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "modeling_own.py", "preprocessor_config.json"):
        (folder / name).write_text(f"mine: {name}")
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.png").write_bytes(b"\x89PNG")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    matrices = edit(folder, tmp_path / "out")
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(
        path.relative_to(tmp_path / "out")
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    )
    for name in names:
        old, new = (folder / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        assert (old == new) is (name.name != "model.safetensors")
        assert len(old) == len(new)
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert list(old) == list(new)
    assert {name for name in old if not torch.equal(old[name], new[name])} == {NAME}
    assert torch.equal(new[NAME], old[NAME] + 0.125)
    assert "lm_head.weight" not in new, "tied weights stay one tensor"
    assert differences(folder, tmp_path / "out", matrices) == []


def test_modes_are_those_of_new_files(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o600)
    (tmp_path / "new").write_text("")
    edit(folder, tmp_path / "out")
    wanted = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {wanted}


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_file_is_kept(
    folder: Path, tmp_path: Path, kept: torch.dtype, loaded: torch.dtype
) -> None:
    values = {k: v.to(kept) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt", "of": "mine"})
    matrices = edit(folder, tmp_path / "out", loaded)
    file = tmp_path / "out" / "model.safetensors"
    new = load_file(file)
    assert {value.dtype for value in new.values()} == {kept}
    base = values[NAME].to(loaded)
    change = (base + 0.125).double() - base.double()
    exact = torch.equal(base.to(kept), values[NAME])
    wanted = (base + 0.125).to(kept) if exact else (values[NAME].double() + change).to(kept)
    assert torch.equal(new[NAME], wanted)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "of": "mine"}
    assert differences(folder, tmp_path / "out", matrices) == []


def test_shards_stay(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    build_random("llama").save_pretrained(folder, max_shard_size="6KB")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 2
    edit(folder, tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(file.name for file in out.glob("*.safetensors")) == shards
    changed = [s for s in shards if (folder / s).read_bytes() != (out / s).read_bytes()]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert changed == [index["weight_map"][NAME]]


def test_names_in_a_file_may_begin_differently(folder: Path, tmp_path: Path) -> None:
    """As those of the text part of a model that also reads images, whose parts are kept."""
    old = load_file(folder / "model.safetensors")
    renamed = {key.replace("model.", "language_model.model.", 1): v for key, v in old.items()}
    renamed["vision.layers.1.mlp.up_proj.weight"] = torch.ones(5, 5)
    save_file(renamed, folder / "model.safetensors")
    places = locate({NAME: old[NAME]}, folder)[NAME]
    assert [place.name for place in places] == [f"language_model.{NAME}"]
    save_edited(folder, tmp_path / "out", [EditedMatrix(NAME, old[NAME], old[NAME] + 1, places)])
    new = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in new if not torch.equal(new[name], renamed[name])}
    assert changed == {f"language_model.{NAME}"}


def test_tied_weights_are_found_under_either_name(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, folder / "model.safetensors")
    places = locate({"lm_head.weight": values["lm_head.weight"]}, folder)["lm_head.weight"]
    assert {place.name for place in places} == {"lm_head.weight"}
    del values["lm_head.weight"]
    tied = values["model.embed_tokens.weight"].clone()
    save_file(values, folder / "model.safetensors")
    places = locate({"lm_head.weight": tied}, folder)["lm_head.weight"]
    assert {place.name for place in places} == {"model.embed_tokens.weight"}


def test_weights_in_another_layout_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=rf"'{NAME}' are stored in .* in another layout"):
        locate({NAME: stored(folder, NAME) + 1}, folder)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_of_a_dtype_that_cannot_be_edited_are_refused_by_it(
    folder: Path, dtype: torch.dtype, name: str
) -> None:
    values = load_file(folder / "model.safetensors")
    values[NAME] = values[NAME].to(dtype)
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"'{NAME}' are stored in .* as {name}, .*F32.*--layers"):
        locate({NAME: values[NAME].float()}, folder)


def test_unedited_weights_in_other_formats_are_left_out(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model-q4.gguf", "consolidated.safetensors"):
        (folder / name).write_bytes(b"old weights")
    left_out = save_edited(folder, tmp_path / "out", [])
    assert left_out == ["consolidated.safetensors", "model-q4.gguf", "pytorch_model.bin"]
    assert not [name for name in left_out if (tmp_path / "out" / name).exists()]


def test_unedited_weights_of_other_programs_are_left_out(folder: Path, tmp_path: Path) -> None:
    names = ["onnx/model.onnx", "onnx/model.onnx_data", "openvino_model.bin", "rust_model.ot"]
    (folder / "onnx").mkdir()
    for name in names:
        (folder / name).write_bytes(b"old weights")
    (folder / "onnx" / "LICENSE").write_text("mine")
    assert sorted(save_edited(folder, tmp_path / "out", [])) == names
    assert not [name for name in names if (tmp_path / "out" / name).exists()]
    assert (tmp_path / "out" / "onnx" / "LICENSE").read_text() == "mine"


def test_what_is_no_file_is_named_and_not_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "notes.txt").write_text("kept")
    os.mkfifo(folder / "sub" / "pipe")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "linked").symlink_to(folder / "sub", target_is_directory=True)
    (folder / "alias.txt").symlink_to(folder / "sub" / "deep" / "notes.txt")
    # No part of the model, so nothing is said of it.
    (folder / ".git").mkdir()
    (folder / ".git" / "gone").symlink_to(folder / "nowhere")
    check_source(folder, tmp_path / "out")
    with pytest.warns(HieditWarning) as said:
        assert save_edited(folder, tmp_path / "out", []) == []
    [line] = [str(warning.message) for warning in said]
    assert line.startswith(f"not copied from {folder}, since they are neither files nor folders")
    assert line.endswith(": gone, linked, sub/pipe")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    before = {str(p.relative_to(folder)) for p in folder.rglob("*") if ".git" not in p.parts}
    assert names == before - {"gone", "linked", "linked/deep", "linked/deep/notes.txt", "sub/pipe"}


def test_a_folder_of_files_is_copied_without_a_word(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_edited(folder, tmp_path / "out", [])


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"notes\.txt in .* is a link that leads out of"):
        check_source(folder, tmp_path / "out")
    (folder / "notes.txt").unlink()
    (folder / "again.json").symlink_to("config.json")
    check_source(folder, tmp_path / "out")
    save_edited(folder, tmp_path / "out", [])
    assert not (tmp_path / "out" / "again.json").is_symlink()
    assert (tmp_path / "out" / "again.json").read_text() == (folder / "config.json").read_text()


def test_linked_weights_are_copied_and_the_original_stays(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    before = (tmp_path / "weights.safetensors").read_bytes()
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    check_source(folder, tmp_path / "out")
    edit(folder, tmp_path / "out")
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def test_folders_that_are_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("mine")
    (folder / "extra").symlink_to(tmp_path / "private", target_is_directory=True)
    with pytest.warns(HieditWarning, match="extra"):
        save_edited(folder, tmp_path / "out", [])
    assert not (tmp_path / "out" / "extra").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_not_read(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe")
    check_source(folder, tmp_path / "out")
    with pytest.warns(HieditWarning, match="pipe"):
        save_edited(folder, tmp_path / "out", [])
    assert not (tmp_path / "out" / "pipe").exists()


@pytest.mark.parametrize("place", ["", "new", "new/deeper"])
def test_the_result_may_not_lie_in_the_model(folder: Path, place: str) -> None:
    with pytest.raises(ModelError, match=r"lies in the model's own folder.*another --out"):
        check_source(folder, folder / place)


def test_the_hubs_cache_is_a_folder_of_links(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--me--mine"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(hub / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs", str(i)))
    check_source(snapshot, tmp_path / "out")
    edit(snapshot, tmp_path / "out")
    assert not [file for file in (tmp_path / "out").iterdir() if file.is_symlink()]


def test_every_difference_is_named(folder: Path, tmp_path: Path) -> None:
    matrices = edit(folder, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    place = next(t for t in stored_tensors(file) if t.name == NAME)
    other = next(t for t in stored_tensors(file) if t.name == "model.norm.weight")
    data = bytearray(file.read_bytes())
    data[place.start : place.start + 4] = torch.tensor([1e3]).numpy().tobytes()
    data[other.start] ^= 1
    file.write_bytes(data)
    lines = differences(folder, tmp_path / "out", matrices)
    assert len(lines) == 2
    assert any(line.startswith(f"{NAME} in model.safetensors differs by up to") for line in lines)
    assert "model.norm.weight in model.safetensors was not edited and differs" in lines


def test_where_models_lie(folder: Path) -> None:
    assert find_folder(str(folder)) == folder
    assert (find_folder("tiny") or Path()).name == "tiny"
    assert find_folder("nobody/nothing-of-that-name") is None
    assert find_folder("not//a hub id") is None
