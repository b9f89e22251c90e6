"""``hiedit edit``: where it saves is checked first, and a finished model is never thrown away."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hiedit_agents.editing.ledger import Ledger
from hiedit_benchmarks.commands import edit, edit_folder
from hiedit_benchmarks.commands.edit import edit_model
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.errors import PromptError, ResultsExistError, SettingsError

FACT = {"subject": "Belka", "prompt": "Belka lives in", "answer": "Averlund"}


@pytest.fixture
def settings(tmp_path: Path) -> CompareSettings:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([FACT]))
    return CompareSettings(model="tiny", dataset=str(path))


def run(settings: CompareSettings, out: Path) -> edit.SavedEdits:
    return edit_model(settings, "all-layers", out, progress=False)


def forbidden(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("must not be called")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("place", ["file", "file/out", "file/new/out"])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    error = ResultsExistError if place == "file" else SettingsError
    with pytest.raises(error, match=r"another --out"):
        run(settings, tmp_path / place)
    assert files(tmp_path) == ["facts.json", "file"]


def test_a_folder_without_the_right_to_write(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whom every folder is writable too: the administrator of a container."""

    def refuse(**options: Any) -> NoReturn:
        assert options == {"dir": tmp_path}
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    with pytest.raises(SettingsError, match=r"new/out cannot be written.*Permission denied"):
        run(settings, tmp_path / "new" / "out")
    assert files(tmp_path) == ["facts.json"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory"),
        MemoryError("too much"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_model_that_cannot_be_loaded_twice_is_kept(
    settings: CompareSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    exists: bool,
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()

    def full(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(edit_folder, "load_model", full)
    edit.main(settings, "all-layers", out)
    said = capsys.readouterr()
    assert "not verified" in said.out
    assert "identical" not in said.out
    assert f"not verified ({type(error).__name__}: {error})" in said.err
    assert files(tmp_path) == ["facts.json", "out"]
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert (out / "edits.json").exists()


def test_a_verified_model_says_so(settings: CompareSettings, tmp_path: Path) -> None:
    assert run(settings, tmp_path / "out").unverified is None
    assert files(tmp_path) == ["facts.json", "out"]


def test_an_interruption_while_verifying_keeps_the_model(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(edit, "reload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "out")
    assert files(tmp_path) == ["facts.json", "out"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_a_model_that_cannot_be_moved_is_kept_where_it_is(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == "out":
            raise OSError("Directory not empty")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SettingsError, match=r"finished but cannot be moved.*not empty") as caught:
        run(settings, tmp_path / "out")
    left = Path(str(caught.value).rpartition(" ")[2])
    assert left.parent.parent == tmp_path
    assert not left.parent.name.startswith(".")
    assert AutoModelForCausalLM.from_pretrained(left).num_parameters() > 0


def test_what_is_half_written_is_removed(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(source: Path, target: Path, *_: Any) -> NoReturn:
        target.mkdir()
        (target / "model.safetensors").write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(edit_folder, "save_edited", half)
        with pytest.raises(SettingsError, match=r"cannot be saved.*disk full"):
            run(settings, tmp_path / "out")
    # Of the model nothing; the edits are kept, and the same command saves them.
    assert files(tmp_path) == ["facts.json", "out.unfinished"]
    assert files(tmp_path / "out.unfinished") == [".lock", "command.json", "ledger.sqlite"]
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", forbidden)
        run(settings, tmp_path / "out")
    assert files(tmp_path) == ["facts.json", "out"]


def test_a_difference_is_named_and_the_result_kept(
    settings: CompareSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inner = edit_folder.save_edited

    def tamper(source: Path, target: Path, matrices: Any) -> list[str]:
        left_out = inner(source, target, matrices)
        weights = load_file(target / "model.safetensors")
        weights["model.norm.weight"][0] += 0.5
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        return left_out

    monkeypatch.setattr(edit_folder, "save_edited", tamper)
    assert edit.main(settings, "all-layers", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "not verified: " in said.out
    assert "parameter 'model.norm.weight' differs by up to 0.5 in the saved model" in said.err
    assert "identical" not in said.out
    assert files(tmp_path) == ["facts.json", "out"]
    saved = json.loads((tmp_path / "out" / "edits.json").read_text())["runs"][0]["saved"]
    assert any("model.norm.weight" in line for line in saved["differences"])


def test_a_prompt_that_is_too_long_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([FACT, {**FACT, "prompt": "word " * 200}]))
    settings = CompareSettings(model="tiny", dataset=str(path))
    with pytest.raises(PromptError, match=r"facts\.json row 1"):
        run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
