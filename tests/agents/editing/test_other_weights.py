"""Weights that no edit writes: somebody else's changes of them are noticed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from hiedit_agents import Editor, apply_delta
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import base_of
from hiedit_agents.editing.other_weights import OtherWeights
from hiedit_env.errors import HieditWarning, LedgerError
from hiedit_env.resident.weights import digest_of_bits
from tests.support.editors import NONE, live

FACT = ("Belka lives in", "Averlund")
NAMES = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight")


def changed(name: str) -> tuple[torch.nn.Module, object]:
    """The tiny model with one number of one weight changed by one bit."""
    model, tokenizer = live()
    bits = model.get_parameter(name).data.view(torch.int32)
    bits.view(-1)[7] ^= 1
    return model, tokenizer


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4), (0,), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_digest_is_of_every_bit_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    before = digest_of_bits(tensor)
    assert digest_of_bits(tensor.clone()) == before
    for i in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[i] = 2
        assert digest_of_bits(other) != before


@pytest.mark.parametrize("name", NAMES)
def test_a_ledger_of_other_weights_is_refused(name: str, tmp_path: Path) -> None:
    with Editor(*live(), name="tiny", checks=NONE, ledger=tmp_path / "L") as editor:
        editor.edit(FACT)
        editor.save_delta(tmp_path / "edits")
        candidates = editor.llm.names
    assert name.removesuffix(".weight") not in candidates
    model, tokenizer = changed(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(LedgerError, match="weights that no edit writes have the fingerprint"):
        Editor(model, tokenizer, name="tiny", checks=NONE, ledger=tmp_path / "L")  # type: ignore[arg-type]
    with pytest.raises(LedgerError, match="weights that no edit writes have the fingerprint"):
        apply_delta(model, tmp_path / "edits")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_changes_between_two_calls_are_refused(name: str) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACT)
        with torch.no_grad():
            editor.model.get_parameter(name).add_(0.5)
        with pytest.raises(LedgerError, match="changed outside of the editor"):
            editor.ask("Belka lives in")


def test_a_saved_model_with_other_weights_does_not_go_on(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACT)
        editor.save(tmp_path / "M")
    with Editor.from_pretrained(tmp_path / "M", checks=NONE) as editor:
        assert len(editor.ledger) == 1
        with torch.no_grad():
            editor.model.get_parameter(NAMES[1]).add_(0.5)
        editor.model.save_pretrained(tmp_path / "M")
    with (
        pytest.warns(HieditWarning, match="does not go on.*weights that no edit writes"),
        Editor.from_pretrained(tmp_path / "M", checks=NONE) as editor,
    ):
        assert len(editor.ledger) == 0


def test_a_ledger_from_before_is_still_taken(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        record = json.loads(json.dumps(asdict(editor.ledger.base)))
        assert record["others"] == OtherWeights(editor.model, editor.llm.layers).fingerprint()
    del record["others"]
    Ledger.create(tmp_path, base_of(record)).close()
    with Editor.from_pretrained("tiny", checks=NONE, ledger=tmp_path) as editor:
        assert editor.edit(FACT)[0].id == 1


def test_weights_with_the_same_bits_are_no_change() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACT)
        model: torch.nn.Module = editor.model
        model.double().float()
        assert editor.ask("Belka lives in")[0].startswith(" Averlund")
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        assert editor.ask("Belka lives in")[0].startswith(" Averlund")


def test_another_parameter_in_the_place_of_one_is_a_change() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        norm = editor.model.get_submodule("model.norm")
        norm.weight = torch.nn.Parameter(norm.weight + 1)
        with pytest.raises(LedgerError, match="changed outside of the editor"):
            editor.ask("Belka lives in")


def test_a_digest_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    whole = digest_of_bits(matrix)
    monkeypatch.setattr("hiedit_env.resident.weights._AT_ONCE", 24)
    assert digest_of_bits(matrix) == whole
    # Sums of rows and columns of the bits, by hand.
    bits = matrix.view(torch.int32).long()
    sums = torch.cat([bits.sum(0), bits.sum(1)]).numpy().tobytes()
    assert whole == hashlib.blake2b(sums).digest()


def test_fields_of_a_base_that_are_not_known_are_left_out() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        base = editor.ledger.base
    assert base_of({**json.loads(json.dumps(asdict(base))), "later": 1}) == base
