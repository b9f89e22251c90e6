"""``hiedit log``, ``show``, ``revoke``, ``rewind`` and ``diff`` on saved models."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents import Editor
from hiedit_agents.editing import saved_folder
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.saved_folder import MARKER, SavedFolder
from hiedit_benchmarks.commands.cli import main
from hiedit_env.model.loading import load_model
from tests.support.editors import FACTS, NONE, bits, dense, gap
from tests.support.models import all_bits

AUTO: Any = AutoModelForCausalLM


def saved(place: Path, count: int = 4, **settings: Any) -> list[dict[str, bytes]]:
    """A saved model with some edits; returns the weights after each of them."""
    states = []
    with Editor.from_pretrained(**{"name": "tiny", "checks": NONE, **settings}) as editor:
        states.append(bits(editor))
        for fact in FACTS[:count]:
            editor.edit(fact)
            states.append(bits(editor))
        editor.save(place)
    return states


def reloaded(place: Path) -> dict[str, bytes]:
    return all_bits(AUTO.from_pretrained(place))


def test_log_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "out")
    assert main(["revoke", str(tmp_path / "out"), "2"]) == 0
    capsys.readouterr()
    assert main(["log", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["1", "edit"],
        ["2", "edit"],
        ["3", "edit"],
        ["4", "edit"],
        ["5", "revoke"],
    ]
    assert lines[0].endswith("Belka lives in → Averlund")
    assert lines[1].endswith("(taken back)")
    assert lines[4].endswith("revokes 2")
    assert lines[5] == "3 edits are in place, of the model 'tiny'"
    assert main(["show", str(tmp_path / "out"), "3"]) == 0
    text = capsys.readouterr().out
    record = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert record["facts"][0]["request"]["prompt"] == FACTS[2].prompt
    assert "update 0 of model.layers.1.mlp.gate_proj: rank " in text


def test_rewind_gives_every_state_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = saved(tmp_path / "out")
    for number in (2, 0, 4, 1, 3):
        assert main(["rewind", str(tmp_path / "out"), str(number)]) == 0
        assert "bit for bit" in capsys.readouterr().out
        assert reloaded(tmp_path / "out") == states[number]
    # Byte for byte the file of the unedited model.
    assert main(["rewind", str(tmp_path / "out"), "0"]) == 0
    source = Path(load_model("tiny", progress=False).source)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_revoke_gives_what_the_other_recorded_updates_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "out")
    assert main(["revoke", str(tmp_path / "out"), "2"]) == 0
    said = capsys.readouterr().out
    assert "2 later edits stay as they are" in said
    assert "3 edits in place; model.safetensors" in said
    model = AUTO.from_pretrained(tmp_path / "out")
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        for fact in FACTS[:4]:
            editor.edit(fact)
        wanted = dense(editor, (1, 3, 4))
        editor.undo(2)
        # The same bits as in a live editor, and the dense sum by hand.
        assert all_bits(model) == bits(editor)
        assert gap(editor, wanted) < 1e-6
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    for i, fact in enumerate(FACTS[:4]):
        ids = tokens(fact.prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        given = tokens.decode(out[0, ids.shape[1] :]).startswith(f" {fact.answer}")
        assert given or i == 1


def test_revoke_counts_the_later_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "out")
    assert main(["revoke", str(tmp_path / "out"), "3"]) == 0
    assert "\n1 later edit stays as it is;" in capsys.readouterr().out
    assert main(["revoke", str(tmp_path / "out"), "4"]) == 0
    assert "later" not in capsys.readouterr().out


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_folders_of_another_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    loaded = load_model("tiny", progress=False)
    loaded.model.to(stored).save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    saved(tmp_path / "out", name=str(tmp_path / "base"))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    for number in (2, 0, 4):
        assert main(["rewind", str(tmp_path / "out"), str(number)]) == 0
        with Editor.from_pretrained(tmp_path / "base", checks=NONE) as editor:
            editor.edit(FACTS[:number])
            editor.save(tmp_path / f"fresh-{number}")
        one = load_file(tmp_path / "out" / "model.safetensors")
        two = load_file(tmp_path / f"fresh-{number}" / "model.safetensors")
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert reloaded(tmp_path / "out") == reloaded(tmp_path / "copy")


def test_several_files_and_a_moved_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model("tiny", progress=False)
    loaded.model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    states = saved(tmp_path / "out", name=str(tmp_path / "base"))
    os.replace(tmp_path / "base", tmp_path / "moved")
    before = reloaded(tmp_path / "out")
    assert main(["rewind", str(tmp_path / "out"), "1"]) == 2
    assert "is not on this machine; give its folder with --base" in capsys.readouterr().err
    assert reloaded(tmp_path / "out") == before
    moved = ["--base", str(tmp_path / "moved")]
    assert main(["rewind", str(tmp_path / "out"), "1", *moved]) == 0
    assert reloaded(tmp_path / "out") == states[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["revoke", "9"], "there is no edit 9; the edits are 1, 2, 3"),
        (["rewind", "9"], "there is no event 9"),
        (["show", "9"], "there is no event 9"),
        (["revoke", "x"], "a whole number is wanted, got 'x'"),
    ],
)
def test_an_unknown_id_is_one_line_and_nothing_changes(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "out", 3)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.suffix != ".lock"}
    assert main([words[0], str(tmp_path / "out"), words[1]]) == 2
    error = capsys.readouterr().err
    assert message in error
    after = {name: (tmp_path / "out" / name).read_bytes() for name in before}
    assert after == before


def test_other_weights_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "out", 2)
    model = AUTO.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "out")
    before = reloaded(tmp_path / "out")
    assert main(["rewind", str(tmp_path / "out"), "0"]) == 2
    assert "are not those of its ledger" in capsys.readouterr().err
    assert reloaded(tmp_path / "out") == before


def test_a_base_that_is_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "out", 2)
    base = ["--base", str(tmp_path / "out")]
    assert main(["rewind", str(tmp_path / "out"), "0", *base]) == 2
    assert "is not the one that the ledger" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["copyfile", "replace", "write_bytes"])
def test_an_interrupted_rewind_is_finished_by_the_next_command(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model("tiny", progress=False)
    loaded.model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    states = saved(tmp_path / "out", name=str(tmp_path / "base"))
    owner: Any = {"copyfile": saved_folder.shutil, "replace": saved_folder.os}.get(at, saved_folder)
    own, calls = getattr(owner, at), []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        # In the middle of the files, as a kill would.
        if at == "write_bytes" or len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(owner, at, killed)
    with SavedFolder(tmp_path / "out") as folder, pytest.raises(KeyboardInterrupt):
        folder.rewind(1)
    monkeypatch.undo()
    assert (tmp_path / "out" / MARKER).exists()
    assert main(["rewind", str(tmp_path / "out"), "5"]) == 0  # the rewind to 1 was event 5
    assert reloaded(tmp_path / "out") == states[1]
    assert not (tmp_path / "out" / MARKER).exists()
    assert not list((tmp_path / "out").glob(".*hiedit-new"))


def test_diff_tells_the_answers_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "one", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["diff", *places]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    assert main(["revoke", places[1], "3"]) == 0
    capsys.readouterr()
    assert main(["diff", *places]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(FACTS[2].prompt)
    assert lines[place + 1].startswith(f"  < {FACTS[2].answer}")
    assert not lines[place + 2].startswith(f"  > {FACTS[2].answer}")
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"prompt": FACTS[2].prompt, "answer": "x"}]))
    assert main(["diff", "tiny", places[0], "--facts", str(facts)]) == 0
    assert FACTS[2].prompt in capsys.readouterr().out
    assert main(["diff", "tiny", "tiny"]) == 2
    assert "name the facts with --facts FILE" in capsys.readouterr().err


def test_a_saved_model_is_edited_again_with_its_facts_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "out", 3)
    assert main(["revoke", str(tmp_path / "out"), "2"]) == 0
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"prompt": FACTS[4].prompt, "answer": FACTS[4].answer}]))
    words = ["--facts", str(facts), "--out", str(tmp_path / "again"), "--agent", "all-layers"]
    assert main(["edit", "--model", str(tmp_path / "out"), *words]) == 0
    assert "names 2 edited prompts of one earlier run" in capsys.readouterr().err
    record = json.loads((tmp_path / "again" / "edits.json").read_text())
    prompts = [(fact["prompt"], fact["run"]) for fact in record["facts"]]
    assert prompts == [(FACTS[0].prompt, 0), (FACTS[2].prompt, 0), (FACTS[4].prompt, 1)]
    # The ledger goes on: three edits, the revocation, and the new edit.
    with Ledger.open(tmp_path / "again") as ledger:
        assert ledger.active == (1, 3, 5)
