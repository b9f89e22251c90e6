"""The ledger that ``hiedit edit FILE`` leaves, and what follows from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hiedit_agents.editing.ledger import Ledger
from hiedit_benchmarks.commands.cli import main
from hiedit_env.evaluation.matching import starts_with
from tests.benchmarks.commands.test_edit_folders import FACT, OTHER, edit, errors, model, record

__all__ = ["model"]  # a fixture

THIRD = {"subject": "Dasmo", "prompt": "Dasmo lives in", "answer": "Istrand"}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def events(folder: Path) -> list[tuple[str, list[str]]]:
    with Ledger.open(folder) as ledger:
        return [
            (e.kind, [f["request"]["prompt"] for f in e.record.get("facts", [])]) for e in ledger
        ]


def test_a_file_of_facts_leaves_a_ledger(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "README.md").write_text("mine")
    assert edit(tmp_path, model, FACT, OTHER, THIRD) == 0
    out = tmp_path / "out"
    edited, facts = weights(out), record(out)["facts"]
    assert events(out) == [("edit", [f["prompt"]]) for f in (FACT, OTHER, THIRD)]
    with Ledger.open(out) as ledger:
        for event, fact in zip(ledger, facts, strict=True):
            assert (event.record["steps"], event.record["layers"]) == (
                fact["steps"],
                fact["layers"],
            )
            assert starts_with(event.record["facts"][0]["after"]["plain"], fact["answer"])
        factors = [ledger.steps(1), ledger.steps(3)]
        names = [layer.name for layer in ledger.base.layers]
    capsys.readouterr()
    assert main(["log", str(out)]) == 0
    assert "3 edits are in place" in capsys.readouterr().out
    # Taken back, it is the unedited model plus the other recorded updates, by hand.
    assert main(["revoke", str(out), "2"]) == 0
    base, left = (load_file(f / "model.safetensors") for f in (model, out))
    for i, name in enumerate(names):
        total = base[f"{name}.weight"].double()
        for step in (*factors[0], *factors[1]):
            if step[i] is not None:
                total = total + (step[i].left.double().mT @ step[i].right.double()).mT
        assert float((left[f"{name}.weight"] - total).abs().max()) < 1e-5
    assert main(["rewind", str(out), "3"]) == 0
    assert weights(out) == edited
    assert main(["rewind", str(out), "0"]) == 0
    assert weights(out) == weights(model)
    assert (out / "README.md").read_text() == "mine"


def test_editing_a_saved_model_again_goes_on_with_its_ledger(tmp_path: Path, model: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert edit(tmp_path, model, FACT, OTHER, out="one") == 0
    assert edit(tmp_path, one, THIRD, out="two") in (0, 3)
    assert events(two) == [("edit", [f["prompt"]]) for f in (FACT, OTHER, THIRD)]
    assert [f["run"] for f in record(two)["facts"]] == [0, 0, 1]
    assert record(two)["runs"][1]["report"]["given"]["earlier"]["number"] == 2
    last = weights(two)
    assert last not in (weights(one), weights(model))
    # Every earlier state is there bit for bit.
    for number, folder in ((2, one), (0, model)):
        assert main(["rewind", str(two), str(number)]) == 0
        assert weights(two) == weights(folder)
    assert main(["rewind", str(two), "3"]) == 0
    assert weights(two) == last
    # What was taken back is asked no more, and stays in the record.
    assert main(["revoke", str(two), "1"]) == 0
    assert edit(tmp_path, two, THIRD | {"answer": "Averlund"}, out="three") in (0, 3)
    found = record(tmp_path / "three")
    assert [f["prompt"] for f in found["facts"]] == [
        f["prompt"] for f in (FACT, OTHER, THIRD, THIRD)
    ]
    assert found["runs"][2]["report"]["given"]["earlier"]["number"] == 1
    kinds = [kind for kind, _ in events(tmp_path / "three")]
    assert kinds == ["edit", "edit", "edit", "rewind", "rewind", "rewind", "revoke", "edit"]


def rounded_once(base: Path, out: Path, numbers: Sequence[int]) -> bool:
    """Whether a folder of half precision holds the sum of recorded updates, rounded once.

    The sum is computed in float64; ``addmm`` in float32 may differ from it by little.
    """
    old, new = (load_file(folder / "model.safetensors") for folder in (base, out))
    with Ledger.open(out) as ledger:
        steps = [step for number in numbers for step in ledger.steps(number)]
        names = [f"{layer.name}.weight" for layer in ledger.base.layers]
    for i, name in enumerate(names):
        total = old[name].double()
        for step in steps:
            if step[i] is not None:
                total = total + (step[i].left.double().mT @ step[i].right.double()).mT
        found = new[name]
        above = torch.nextafter(found, torch.full_like(found, torch.inf)).double()
        below = torch.nextafter(found, torch.full_like(found, -torch.inf)).double()
        half = torch.maximum(above - found.double(), found.double() - below) / 2
        if bool(((found.double() - total).abs() > half + 1e-6).any()):
            return False
    return True


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_folder_of_half_precision_goes_on_too(
    tmp_path: Path, model: Path, stored: torch.dtype
) -> None:
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model)
    whole.to(stored).save_pretrained(model)
    one, two = tmp_path / "one", tmp_path / "two"
    assert edit(tmp_path, model, FACT, OTHER, out="one") == 0
    # A warning would be an error: no new ledger begins.
    assert edit(tmp_path, one, THIRD, out="two") in (0, 3)
    assert events(two) == [("edit", [f["prompt"]]) for f in (FACT, OTHER, THIRD)]
    last = weights(two)
    assert last not in (weights(one), weights(model))
    # Not the sum of what was rounded in between.
    assert rounded_once(model, two, (1, 2, 3))
    for number, folder in ((2, one), (0, model), (3, None)):
        assert main(["rewind", str(two), str(number)]) == 0
        assert weights(two) == (last if folder is None else weights(folder))
    assert main(["revoke", str(two), "1"]) == 0
    assert rounded_once(model, two, (2, 3))
    assert not rounded_once(model, two, (1, 2, 3))
    assert edit(tmp_path, two, FACT, out="three") in (0, 3)
    assert rounded_once(model, tmp_path / "three", (2, 3, 8))
    with Ledger.open(tmp_path / "three") as ledger:
        prints = [(e.record["fingerprint_before"], e.record["fingerprint_after"]) for e in ledger]
    assert all(after == before for (_, after), (before, _) in pairwise(prints))


@pytest.mark.filterwarnings("default::hiedit_env.errors.HieditWarning")
def test_a_ledger_that_cannot_go_on_is_said_and_a_new_one_begins(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(**options: Any) -> str:
        place = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
        assert edit(tmp_path, tmp_path / "out", OTHER, out=place.name, **options) in (0, 3)
        (told,) = [x for x in capsys.readouterr().err.splitlines() if "warning: the ledger" in x]
        assert "does not go on, a new one begins with the model as it is" in told
        assert events(place) == [("edit", [OTHER["prompt"]])]
        assert len(record(place)["facts"]) == 2
        return told

    assert edit(tmp_path, model, FACT) == 0
    assert "other candidate layers" in again(layers="*.mlp.up_proj")
    moved = model.rename(tmp_path / "moved")
    assert "not on this machine" in again()
    moved.rename(model)
    shutil.rmtree(tmp_path / "out")
    # Files of float32 edited in bfloat16 do not hold the sum of the ledger's numbers.
    assert edit(tmp_path, model, FACT, dtype="bfloat16") in (0, 3)
    told = again(dtype="bfloat16")
    assert "not those of its ledger to the last bit (edited in bfloat16, saved as F32)" in told


def test_an_interrupted_undo_is_finished_first(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, model, FACT) == 0
    (tmp_path / "out" / ".hiedit-rewriting").touch()
    assert edit(tmp_path, tmp_path / "out", OTHER, out="again") == 2
    (line,) = errors(capsys)
    assert "taking edits back" in line
    assert "hiedit rewind" in line
    assert not (tmp_path / "again").exists()


OWN = """
import numpy as np
class Own:
    name = "own"
    def reset(self, env, seed):
        self.count = env.action_space.n
    def select_action(self, observation, info):
        return np.ones(self.count, np.int8)
    def update(self, *transition):
        pass
"""


def test_an_agent_of_an_environment_edits_without_a_ledger(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agent_of_an_environment.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert edit(tmp_path, model, FACT, OTHER, agent="agent_of_an_environment:Own") == 0
    assert edit(tmp_path, model, FACT, OTHER, out="levels", agent="all-layers") == 0
    own, levels = (record(tmp_path / name)["facts"] for name in ("out", "levels"))
    assert [f["steps"] for f in own] == [f["steps"] for f in levels]
    assert not (tmp_path / "out" / "ledger.sqlite").exists()
    capsys.readouterr()
    options = {"agent": "agent_of_an_environment:Own", "ledger": tmp_path / "ledger"}
    assert edit(tmp_path, model, FACT, out="none", **options) == 2
    assert "--ledger: agent" in errors(capsys)[0]


def test_a_file_with_a_ledger_is_gone_on_with(tmp_path: Path, model: Path) -> None:
    assert edit(tmp_path, model, FACT, OTHER, out="whole") == 0
    ledger = tmp_path / "ledger"
    assert edit(tmp_path, model, FACT, out="first", ledger=ledger) == 0
    # As after an interruption: the same file again.
    assert edit(tmp_path, model, FACT, OTHER, out="second", ledger=ledger) == 0
    assert events(tmp_path / "second") == [("edit", [f["prompt"]]) for f in (FACT, OTHER)]
    keys = ("steps", "layers", "after", "answered_right_after", "given")
    whole, second = (
        [[f[key] for key in keys] for f in record(tmp_path / name)["facts"]]
        for name in ("whole", "second")
    )
    assert whole[0] == second[0]
    assert second[1][4] is whole[1][4] is True


def test_the_ledger_of_the_model_itself_is_not_written_into(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, model, FACT) == 0
    out = tmp_path / "out"
    assert edit(tmp_path, out, OTHER, out="again", ledger=out) == 2
    assert "holds the ledger of the saved model itself" in errors(capsys)[0]
    # One that lacks its edits.
    assert edit(tmp_path, model, THIRD, out="third", ledger=tmp_path / "ledger") == 0
    assert edit(tmp_path, out, OTHER, out="again", ledger=tmp_path / "ledger") == 2
    assert "lacks edits that the model has" in errors(capsys)[-1]
    # A new one begins with them.
    assert edit(tmp_path, out, OTHER, out="again", ledger=tmp_path / "new") == 0
    assert events(tmp_path / "new") == [("edit", [f["prompt"]]) for f in (FACT, OTHER)]
    json.dumps(record(tmp_path / "again"))


def test_the_ledger_may_be_in_the_folder_above_the_model(tmp_path: Path, model: Path) -> None:
    kept = tmp_path / "work"
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([FACT, OTHER]))
    words = ["edit", "--model", str(model), "--facts", str(facts), "--ledger", str(kept)]
    assert main([*words, "--out", str(kept / "model")]) == 0
    assert sorted(path.name for path in kept.iterdir() if path.name[0] != ".") == [
        "ledger.sqlite",
        "model",
    ]
    expected = [("edit", [f["prompt"]]) for f in (FACT, OTHER)]
    assert events(kept) == events(kept / "model") == expected
    # The next model of the same ledger stands beside the first, which keeps its bytes.
    first = weights(kept / "model")
    facts.write_text(json.dumps([THIRD]))
    assert main([*words, "--out", str(kept / "next" / "model")]) in (0, 3)
    assert len(events(kept)) == len(events(kept / "next" / "model")) == 3
    assert (weights(kept / "model"), len(events(kept / "model"))) == (first, 2)
    assert main(["rewind", str(kept / "next" / "model"), "2"]) == 0
    assert weights(kept / "next" / "model") == first
