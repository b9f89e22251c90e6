"""An editor of a live model leaves it as it found it; a ledger on disk is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hiedit_agents import Editor
from hiedit_agents.editing.ledger import FILE
from hiedit_env.errors import (
    LedgerError,
    SettingsError,
)
from hiedit_env.model.loading import load_model
from tests.support.editors import FACTS, NONE, bits, dense, edited_states, gap, live
from tests.support.killed import run_until_killed
from tests.support.models import all_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_live_model_is_left_as_it_was_found(dtype: torch.dtype) -> None:
    model, tokenizer = live(dtype)
    model.train()
    model.model.layers[1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = all_bits(model)
    gradients = [p.requires_grad for p in model.parameters()]
    training = [m.training for m in model.modules()]
    places = [p.data_ptr() for p in model.parameters()]

    def same_modes() -> bool:
        return gradients == [p.requires_grad for p in model.parameters()] and training == [
            m.training for m in model.modules()
        ]

    with Editor(model, tokenizer, name="tiny", checks=NONE) as editor:
        assert same_modes()
        [result] = editor.edit(FACTS[0])
        assert result.status == "written"
        assert same_modes()
        assert all_bits(model) != before
        assert model.dtype == dtype
        editor.edit(FACTS[1])
        editor.undo(1)
    assert same_modes()
    assert all_bits(model) == before
    assert places == [p.data_ptr() for p in model.parameters()]
    with pytest.raises(SettingsError, match="closed"):
        editor.edit(FACTS[2])


def test_a_model_loaded_rounded_is_left_as_it_was_loaded(tmp_path: Path) -> None:
    model, tokenizer = live(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with Editor.from_pretrained(tmp_path / "base", checks=NONE) as editor:
        editor.edit(FACTS[:2])
        edited = bits(editor)
        editor.save(tmp_path / "edited")
    loaded = load_model(tmp_path / "edited", progress=False)
    before = all_bits(loaded.model)
    for ledger in (None, tmp_path / "ledger"):
        with Editor(loaded.model, loaded.tokenizer, checks=NONE, ledger=ledger) as editor:
            # The unrounded weights of the first editor.
            assert bits(editor) == edited != before
            assert editor.ledger.active == (1, 2)
            editor.edit(FACTS[2])
            editor.rewind(2)
            assert bits(editor) == edited
        assert all_bits(loaded.model) == before
    # Refused, it is as it was loaded, too.
    with Editor.from_pretrained(tmp_path / "base", ledger=tmp_path / "other") as editor:
        editor.edit(FACTS[3])
    with pytest.raises(LedgerError, match="lacks edits that the model has"):
        Editor(loaded.model, loaded.tokenizer, ledger=tmp_path / "other")
    assert all_bits(loaded.model) == before


def test_it_is_left_as_it_was_found_after_an_error_too() -> None:
    model, tokenizer = live()
    before = all_bits(model)
    with pytest.raises(ZeroDivisionError), Editor(model, tokenizer, checks=NONE) as editor:  # noqa: PT012
        editor.edit(FACTS[0])
        raise ZeroDivisionError
    assert all_bits(model) == before


def test_without_a_context_the_edits_stay_in_the_model() -> None:
    model, tokenizer = live()
    editor = Editor(model, tokenizer, checks=NONE)
    editor.edit(FACTS[0])
    after = all_bits(model)
    del editor
    assert all_bits(model) == after


def test_foreign_changes_are_noticed() -> None:
    model, tokenizer = live()
    editor = Editor(model, tokenizer, checks=NONE)
    editor.edit(FACTS[0])
    with torch.no_grad():
        editor.llm.layers[2].module.weight[0, 0] += 1
    with pytest.raises(LedgerError, match="changed outside of the editor"):
        editor.edit(FACTS[1])
    with pytest.raises(LedgerError, match="changed outside of the editor"):
        editor.undo(1)


def test_an_agent_that_needs_an_environment_is_refused_before_the_model_is_touched() -> None:
    model, tokenizer = live()
    model.train()
    with pytest.raises(SettingsError, match="acts in an environment only"):
        Editor(model, tokenizer, agent="oracle")
    assert model.training


@pytest.mark.parametrize(
    ("low", "said"),
    [("anchored", "'anchored' needs second moments"), ("neuron", "'neuron' has to see")],
)
def test_an_agent_that_lacks_its_calibration_is_refused_at_once(low: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Editor(*live(), agent=f"all-layers+{low}")


def test_a_ledger_on_disk_is_gone_on_with(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", ledger=tmp_path, checks=NONE) as editor:
        edited_states(editor, 3)
        editor.undo(2)
        after = bits(editor)
    with Editor.from_pretrained("tiny", ledger=tmp_path, checks=NONE) as editor:
        assert bits(editor) == after
        assert editor.ledger.active == (1, 3)
        [result] = editor.edit(FACTS[5])
        assert result.id == 5


def test_a_ledger_of_another_model_is_refused_and_the_model_unchanged(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", ledger=tmp_path, checks=NONE) as editor:
        editor.edit(FACTS[0])
    model, tokenizer = live()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    before = all_bits(model)
    with pytest.raises(LedgerError, match=r"belongs to another model.*fingerprint"):
        Editor(model, tokenizer, ledger=tmp_path)
    assert all_bits(model) == before
    with pytest.raises(LedgerError, match="candidate layers"):
        Editor.from_pretrained("tiny", ledger=tmp_path, layers="*.mlp.up_proj")
    with pytest.raises(LedgerError, match="is of a model in float32, this one is in bfloat16"):
        Editor.from_pretrained("tiny", ledger=tmp_path, dtype="bfloat16")
    # Neither of these kept the folder locked.
    with Editor.from_pretrained("tiny", ledger=tmp_path) as editor:
        assert editor.ledger.active == (1,)


EDIT = """
import sys
from hiedit_agents import Checks, Editor
from hiedit_env import load_requests
checks = Checks(target=False, min_agreement=None, earlier=0)
editor = Editor.from_pretrained("tiny", ledger=sys.argv[1], checks=checks)
facts = load_requests("tiny-facts")
while True:
    for fact in facts[len(editor.ledger) % len(facts):]:
        [result] = editor.edit(fact)
        if result.id is not None:
            print(result.id, editor.llm.weights_fingerprint(), flush=True)
"""


def test_a_killed_editor_loses_nothing_and_applies_nothing_twice(tmp_path: Path) -> None:
    for after in (0.0, 0.013, 0.071):
        lines = run_until_killed(EDIT, str(tmp_path), after=after, at_least=2)
        last, fingerprint = lines[-1].split()
        with Editor.from_pretrained("tiny", ledger=tmp_path, checks=NONE) as editor:
            assert int(last) <= len(editor.ledger) <= int(last) + 1
            assert editor.ledger[int(last)].record["fingerprint_after"] == fingerprint
            newest = editor.ledger[len(editor.ledger)]
            assert editor.llm.weights_fingerprint() == newest.record["fingerprint_after"]
            assert gap(editor, dense(editor, editor.ledger.active)) < 1e-4
    assert (tmp_path / FILE).is_file()
