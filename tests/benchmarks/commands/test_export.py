"""``hiedit export``: each form gives the same answers elsewhere; the ledger stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hiedit_agents import Editor, apply_delta
from hiedit_benchmarks.commands.cli import main
from tests.support.editors import FACTS, NONE, bits, live
from tests.support.models import all_bits, build_random, tokenizer

AUTO: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A ledger of four edits, one of them taken back, and the weights that it stands for."""
    place = tmp_path_factory.mktemp("kept") / "ledger"
    with Editor.from_pretrained("tiny", checks=NONE, ledger=place) as editor:
        editor.edit(FACTS[:4])
        editor.undo(2)
        return place, bits(editor)


def export(place: Path, kind: str, out: Path, *more: str) -> int:
    return main(["export", str(place), "--as", kind, "--out", str(out), *more])


def test_a_folder_and_what_is_exported_from_it(
    kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, wanted = kept
    before = (place / "ledger.sqlite").read_bytes()
    assert export(place, "folder", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: 3 edits are in place; ")
    assert all_bits(AUTO.from_pretrained(tmp_path / "out")) == wanted
    # A saved model has a ledger, too.
    assert export(tmp_path / "out", "folder", tmp_path / "again") == 0
    assert all_bits(AUTO.from_pretrained(tmp_path / "again")) == wanted
    assert (place / "ledger.sqlite").read_bytes() == before


def test_a_delta(kept: tuple[Path, Any], tmp_path: Path) -> None:
    place, wanted = kept
    assert export(place, "delta", tmp_path / "edits.safetensors") == 0
    model, _ = live()
    apply_delta(model, tmp_path / "edits.safetensors")
    assert all_bits(model) == wanted


def test_an_adapter(
    kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(kept[0], "adapter", tmp_path / "adapter") == 0
    assert "(exact); of 3 facts the edited model gives 3, the adapter 3" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert export(kept[0], "adapter", tmp_path / "one", "--max-rank", "1") == 2
    assert not (tmp_path / "one").exists()
    assert export(kept[0], "adapter", tmp_path / "one", "--max-rank", "1", "--allow-loss") == 0
    assert "rank 1 of" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of transformers, which reads a GGUF file
def test_a_gguf_file(
    kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, wanted = kept
    assert export(place, "gguf", tmp_path / "m.gguf", "--type", "f32") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm.gguf'}: 0.301 MB, f32, with 3 edits\n"
    assert all_bits(AUTO.from_pretrained(tmp_path, gguf_file="m.gguf")) == wanted
    assert export(place, "gguf", tmp_path / "half.gguf") == 0
    assert "f16" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["export", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_what_is_refused(
    kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = str(kept[0]), str(tmp_path / "out")
    line = refused(capsys, place, "--as", "folder", "--out", out, "--type", "f16")
    assert line == "hiedit: error: --type is for --as gguf; leave it out"
    line = refused(capsys, place, "--as", "gguf", "--out", out, "--max-rank", "3")
    assert line == "hiedit: error: --max-rank is for --as adapter; leave it out"
    assert "--as must be one of" in refused(capsys, place, "--as", "zip", "--out", out)
    assert "holds no ledger" in refused(capsys, str(tmp_path), "--as", "delta", "--out", out)
    model, tokens = live()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight += 1
    model.save_pretrained(tmp_path / "other")
    tokens.save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    capsys.readouterr()
    line = refused(capsys, place, "--as", "delta", "--out", out, "--base", other)
    assert "the ledger belongs to another model" in line
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert "exists" in refused(capsys, place, "--as", "delta", "--out", str(taken))
    assert "exists" in refused(capsys, place, "--as", "gguf", "--out", str(taken))
    assert taken.read_text() == "mine"
    shutil.rmtree(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_base_without_the_layers_of_the_ledger_is_named(
    kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, other, out = str(kept[0]), str(tmp_path / "other"), str(tmp_path / "out")
    build_random("gpt2").save_pretrained(other)
    tokenizer().save_pretrained(other)
    capsys.readouterr()
    line = refused(capsys, place, "--as", "folder", "--out", out, "--base", other)
    assert f"{other} is not the model that the ledger in {place} was begun with ('tiny')" in line
    assert not (tmp_path / "out").exists()


def test_an_edited_model_is_no_base(
    kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = kept
    assert export(place, "folder", tmp_path / "edited") == 0
    assert export(place, "folder", tmp_path / "again", "--base", str(tmp_path / "edited")) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'edited'} is an edited model" in said
    assert "give the unedited model with --base" in said
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("command", ["revoke", "rewind"])
def test_a_ledger_alone_has_no_model_that_could_be_changed(
    command: str, kept: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "ledger"
    shutil.copytree(kept[0], place)
    before = (place / "ledger.sqlite").read_bytes()
    assert main([command, str(place), "1"]) == 2
    said = capsys.readouterr().err
    assert "holds a ledger and no model to change; take the edit back in Python" in said
    assert "hiedit serve --ledger" in said
    assert (place / "ledger.sqlite").read_bytes() == before
