"""``hiedit edit`` on folders as people have them: what comes out, what is said, and the status."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.edit import NONE_GIVEN
from hiedit_env.evaluation.matching import starts_with
from hiedit_env.model.saving import find_folder
from tests.support.models import tokenizer
from tests.support.tiny_models import tiny_model, tiny_multimodal

FACT = {"subject": "Belka", "prompt": "Belka lives in", "answer": "Averlund"}
OTHER = {"subject": "Strelka", "prompt": "Strelka lives in", "answer": "Cindrath"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model as a folder of the user's own."""
    source = find_folder("tiny")
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit(tmp_path: Path, model: Path | str, *facts: Any, out: str = "out", **options: Any) -> int:
    file = tmp_path / f"{out}.json"
    file.write_text(json.dumps(facts or [FACT]))
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return main(
        ["edit", "--facts", str(file), "--model", str(model), "--out", str(tmp_path / out)]
        + [word.replace("_", "-") if word.startswith("--") else word for word in words]
    )


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "edits.json").read_text())
    return found


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().err
    return [line for line in text.splitlines() if line.startswith("hiedit: error: ")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_is_asked_as_it_is_saved(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model)
    whole.to(dtype).save_pretrained(model)
    assert edit(tmp_path, model) == 0
    out = tmp_path / "out"
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {value.dtype for value in new.values()} == {dtype}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{name}.weight" for name in record(out)["facts"][0]["layers"]}
    assert "identical bit for bit in " + str(dtype)[6:] in capsys.readouterr().out
    # As anybody opens it, with another library than the one that asked.
    again: Any = AutoModelForCausalLM.from_pretrained(out)
    words: Any = AutoTokenizer.from_pretrained(out)
    assert again.dtype == dtype
    ids = words(FACT["prompt"], return_tensors="pt")["input_ids"]
    made = again.generate(ids, max_new_tokens=4, do_sample=False)
    text = words.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert starts_with(text, FACT["answer"]) is record(out)["facts"][0]["given"] is True


def test_a_folder_of_several_dtypes_is_verified(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model / "model.safetensors"
    values = {
        name: value + 1e-4 if "norm" in name else value.to(torch.bfloat16)
        for name, value in load_file(file).items()
    }
    save_file(values, file, metadata={"format": "pt"})
    assert edit(tmp_path, model) == 0
    printed = capsys.readouterr()
    assert "identical bit for bit in bfloat16" in printed.out
    assert "not verified" not in printed.out + printed.err
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: v.dtype for name, v in new.items()} == {n: v.dtype for n, v in values.items()}


def test_the_last_line_counts_what_the_saved_model_gives(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, model, FACT, OTHER) == 0
    facts = record(tmp_path / "out")["facts"]
    given = sum(starts_with(fact["after"], fact["answer"]) for fact in facts)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{given} of 2 facts are given by the saved model, asked in the form")


def test_status_3_where_none_is_given(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, model, agent="no-edit") == NONE_GIVEN == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 of 1 facts are given")
    # Nothing was edited, so nothing is other bytes.
    for file in model.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_damage_is_said_and_not_called_success(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = edit(tmp_path, model, step_size=0.5, max_steps_per_edit=1)
    said = capsys.readouterr()
    assert "hiedit: warning: the edits damaged the model: on 12 control prompts" in said.err
    assert said.out.splitlines()[-1].endswith("; the model is damaged.")
    run = record(tmp_path / "out")["runs"][0]
    assert run["report"]["damaged"] is True
    assert run["report"]["agreement"]["control"]["share"] < 0.6
    assert status == (0 if run["report"]["given"]["facts"]["after"] else 3)


def test_the_report_asks_everything_there_is(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    fact = FACT | {
        "paraphrases": ["The home of Belka is", "Belka has a home in"],
        "locality": [{"prompt": "Strelka lives in", "answer": "x"}],
    }
    assert edit(tmp_path, model, fact, prompt_form="plain") == 0
    report = record(tmp_path / "out")["runs"][0]["report"]
    numbers = {kind: entry["number"] for kind, entry in report["given"].items()}
    assert numbers == {"facts": 1, "paraphrases": 2, "chat_facts": 1, "chat_paraphrases": 2}
    assert {kind: entry["number"] for kind, entry in report["agreement"].items()} == {
        "unrelated": 1,
        "neighbours": 1,
        "chat_unrelated": 1,
        "chat_neighbours": 1,
        "control": 12,
        "control_chat": 8,
    }
    assert report["given"]["facts"] == {"number": 1, "before": 0, "after": 1}
    text = capsys.readouterr().out
    assert "facts given: 0 of 1 before, 1 of 1 after" in text
    assert "8 control prompts in a chat" in text
    # All unrelated prompts are neighbours, so there is one line for both.
    assert "1 prompts of the file that ask the same about other subjects: " in text
    assert "unrelated prompts of the file" not in text


def test_editing_again_goes_on_with_the_history(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, model, FACT, out="one", max_steps_per_edit=4) == 0
    first = record(tmp_path / "one")
    assert edit(tmp_path, tmp_path / "one", OTHER, out="two", update_rule="ridge") in (0, 3)
    second = record(tmp_path / "two")
    assert "edits.json of the model names 1 edited prompts" in capsys.readouterr().err
    assert [(f["prompt"], f["run"]) for f in second["facts"]] == [
        (FACT["prompt"], 0),
        (OTHER["prompt"], 1),
    ]
    assert second["facts"][0] == first["facts"][0]
    assert [run["settings"]["update_rule"] for run in second["runs"]] == ["decorrelated", "ridge"]
    assert [run["settings"]["num_edits"] for run in second["runs"]] == [1, 1]
    assert second["runs"][0] == first["runs"][0]
    assert second["runs"][0]["settings"]["max_steps_per_edit"] == 4
    earlier = second["runs"][1]["report"]["given"]["earlier"]
    assert (earlier["number"], earlier["before"]) == (1, 1)
    # The unedited model of this run is the edited one of the last.
    assert (tmp_path / "one" / "edits.json").read_text() == json.dumps(
        first, ensure_ascii=False, indent=1
    ) + "\n"


def test_another_agent_than_the_last_one_is_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(agent: str, folder: Path, out: str, *facts: Any) -> bool:
        assert edit(tmp_path, folder, *facts, out=out, agent=agent) in (0, 3)
        return "to go on with the agent that wrote the last ones, give --agent random-layers" in (
            capsys.readouterr().err
        )

    assert not said("random-layers", model, "one", FACT)
    assert said("all-layers", tmp_path / "one", "two", OTHER)
    assert not said("random-layers", tmp_path / "one", "three", OTHER)
    # Also where only the ledger is left, or the record is not of our making.
    file = tmp_path / "one" / "edits.json"
    file.write_text(json.dumps({**record(tmp_path / "one"), "runs": [{"identity": 3}]}))
    assert not said("all-layers", tmp_path / "one", "four", OTHER)
    file.unlink()
    assert said("all-layers", tmp_path / "one", "five", OTHER)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 3}', '{"format": 2, "runs": []}'])
def test_a_damaged_history_is_named_before_anything_is_done(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (model / "edits.json").write_text(text)
    assert edit(tmp_path, model) == 2
    (line,) = errors(capsys)
    assert "edits.json cannot be read" in line
    assert "remove it to begin a new history" in line
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_is_removed_and_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".out.hiedit-abc"
    busy = tmp_path / ".out.hiedit-def"
    other = tmp_path / ".other.hiedit-abc"
    for folder in (left, busy, other):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "half").write_text("half")
    with FileLock(busy / ".lock"):
        assert edit(tmp_path, model) == 0
    assert f"removed {left}, which an interrupted run had left" in capsys.readouterr().err
    assert not left.exists()
    assert (busy / "model" / "half").exists(), "another run writes there at this moment"
    assert (other / "model" / "half").exists(), "it belongs to another --out"
    assert sorted(path.name for path in tmp_path.iterdir() if "hiedit-" in path.name) == [
        other.name,
        busy.name,
    ]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("adapter_config.json", "{}", "adapter_config.json is an adapter beside a model"),
        ("quantize_config.json", "{}", "weights are quantised"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_loading(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    text: str,
    message: str,
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    (model / file).write_text(text)
    assert edit(tmp_path, model) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_tokens_added_to_the_tokenizer_alone_are_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: Any = AutoTokenizer.from_pretrained(model)
    words.add_tokens([FACT["answer"]])
    words.save_pretrained(model)
    assert edit(tmp_path, model) == 2
    [line] = errors(capsys)
    assert "row 0: answer" in line
    assert "model.resize_token_embeddings(len(tokenizer))" in line
    assert not (tmp_path / "out").exists()


def test_a_result_inside_the_model_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(model))
    assert edit(tmp_path, model, out="model/edited") == 2
    assert "lies in the model's own folder" in errors(capsys)[0]
    assert sorted(os.listdir(model)) == sorted([*before, "edited.json"])


@pytest.mark.parametrize("kind", ["idefics3", "llava"])
def test_parts_for_images_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    tiny_multimodal(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "README.md", "LICENSE", "processing_own.py"):
        (folder / name).write_text(f'{{"mine": "{name}"}}')
    fact = {"subject": "w6", "prompt": "w5 w6 w7", "answer": "w9"}
    assert edit(tmp_path, folder, fact) in (0, 3)
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        *(file.name for file in folder.iterdir()),
        "edits.json",
        "ledger.sqlite",
    }
    old, new = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert any("vision" in name for name in new)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert not [name for name in changed if "vision" in name]
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_state_space_models_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    fact = {"subject": "w6", "prompt": "w5 w6 w7", "answer": "w9"}
    assert edit(tmp_path, tmp_path / "model", fact) in (0, 3)
    assert "identical bit for bit" in capsys.readouterr().out
    assert record(tmp_path / "out")["runs"][0]["saved"]["differences"] == []


def test_a_link_to_an_empty_folder_may_be_the_result(tmp_path: Path, model: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert edit(tmp_path, model) == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "edits.json").exists()


def test_a_name_that_is_too_long_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([FACT]))
    command = ["edit", "--facts", str(file), "--model", str(model)]
    assert main([*command, "--out", str(tmp_path / ("n" * 300))]) == 2
    (line,) = errors(capsys)
    assert "cannot be written, give another --out" in line
    # The longest name that is possible.
    assert main([*command, "--out", str(tmp_path / ("n" * 255))]) == 0
