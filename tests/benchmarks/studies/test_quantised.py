"""The study of edits that survive rounding runs, rounds, and leaves the model as it was."""

from __future__ import annotations

import json

import pytest
import torch

from hiedit_agents.editing.gguf_file import rounded
from hiedit_benchmarks.studies.quantised import main, rounded_model
from tests.support.editors import live
from tests.support.models import all_bits


def test_it_asks_for_the_facts_in_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--edits", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["facts"]) == ("tiny", 3)
    rows = {row["type"]: row for row in found["types"]}
    assert list(rows) == ["f32", "f16", "q8_0", "q4_0", "q4_1"]
    assert rows["f32"]["given"] == rows["f16"]["given"] == 3
    # Nothing is rounded: what is left of the unedited model is all of it.
    assert rows["f32"]["agreement_unedited"] == 1.0
    assert rows["f32"]["agreement"] < 1.0
    assert rows["q4_0"]["agreement_unedited"] < 1.0


def test_weights_are_rounded_inside_and_come_back() -> None:
    model, _ = live()
    before = all_bits(model)
    wanted = {name: rounded(name, w, "q4_0") for name, w in model.named_parameters()}
    with rounded_model(model, "q4_0"):
        assert all(torch.equal(w, wanted[name]) for name, w in model.named_parameters())
        assert all_bits(model) != before
    assert all_bits(model) == before
