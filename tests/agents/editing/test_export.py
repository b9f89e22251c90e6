"""What is saved opens without the editor and answers the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents import Editor, apply_delta
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.low_rank_sum import truncated
from hiedit_agents.editing.model_card import LISTED, Measured, model_card
from hiedit_env import load_model
from hiedit_env.errors import LedgerError, ResultsExistError, SettingsError
from tests.support.editors import FACTS, NONE, bits, live
from tests.support.models import all_bits, build_random, tokenizer

AUTO: Any = AutoModelForCausalLM


def greedy(model: Any, tokens: Any, prompts: list[str]) -> list[str]:
    """Continuations by transformers alone."""
    texts = []
    for prompt in prompts:
        ids = tokens(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        texts.append(tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


PROMPTS = [fact.prompt for fact in FACTS[:12]]


# -- a model folder -------------------------------------------------------------------------------


def test_a_saved_folder_gives_the_same_answers_in_plain_transformers(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[:5])
        editor.undo(2)
        saved = editor.save(tmp_path / "out")
        own, wanted = editor.ask(PROMPTS, max_new_tokens=6), bits(editor)
        assert saved.measured.edits == saved.measured.asked == 4
        assert saved.measured.given == sum(
            own[i].startswith(f" {FACTS[i].answer}") for i in (0, 2, 3, 4)
        )
    model = AUTO.from_pretrained(tmp_path / "out")
    assert all_bits(model) == wanted
    assert greedy(model, AutoTokenizer.from_pretrained(tmp_path / "out"), PROMPTS) == own
    with Ledger.open(tmp_path / "out") as ledger:
        assert ledger.active == (1, 3, 4, 5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "tiny"\n')
    assert "| 3 | Dasmo lives in | Istrand |" in card
    assert "| 2 |" not in card
    assert f"gives {saved.measured.given} " in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_model_that_is_no_folder_is_saved_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = live(dtype)
    with torch.no_grad():  # so that the folder it came from is another model
        model.model.norm.weight += 0.25
    with Editor(model, tokens, name="tiny", checks=NONE) as editor:
        editor.edit(FACTS[:2])
        editor.save(tmp_path / "out")
        wanted = bits(editor)
    assert all_bits(AUTO.from_pretrained(tmp_path / "out")) == wanted


def test_a_card_of_the_unedited_model_is_kept(tmp_path: Path) -> None:
    model, tokens = live()
    model.save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("the model's own card")
    with Editor.from_pretrained(tmp_path / "base", checks=NONE) as editor:
        editor.edit(FACTS[0])
        editor.save(tmp_path / "out")
        assert (tmp_path / "out" / "README.base.md").read_text() == "the model's own card"
        text = (tmp_path / "out" / "README.md").read_text()
        assert text.startswith("---\nlibrary_name: transformers")
        assert str(tmp_path) not in text
        with pytest.raises(ResultsExistError, match="not an empty folder"):
            editor.save(tmp_path / "out")


def test_a_card_lists_a_bounded_number_of_edits_in_one_line_each() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(("Belka lives in", "Averlund"))
        ledger = editor.ledger
        record = dict(ledger[1].record)
        request = {"prompt": "a | b\n<c>", "answer": "*d*", "subject": "s"}
        record["facts"] = [{**record["facts"][0], "request": request}]
        for _ in range(LISTED + 2):
            ledger.append("edit", None, record)
        card = model_card(ledger, Measured(3, 3, 3, None), "model", "pass")
    assert card.count("\n| ") == LISTED + 1
    assert "| 2 | a \\| b &lt;c> | \\*d\\* |" in card
    assert "… and 3 more" in card


# -- an adapter -----------------------------------------------------------------------------------


def with_adapter(model: Any, folder: Path) -> Any:
    """A model with an adapter merged by hand: W + alpha/r · B A, as the LoRA paper has it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in config["target_modules"]:
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == config["r"]
        change = config["lora_alpha"] / config["r"] * (b @ a)
        weight: Tensor = model.get_submodule(name).weight
        with torch.no_grad():
            weight += change.T if config["fan_in_fan_out"] else change
    assert len(tensors) == 2 * len(config["target_modules"])
    return model


def largest_gap(one: Any, two: Any) -> float:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


def test_an_adapter_gives_the_edited_weights_and_answers(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[:4])
        editor.undo(3)
        report = editor.save_adapter(tmp_path / "adapter")
        own = editor.ask(PROMPTS, max_new_tokens=6)
        model = with_adapter(load_model("tiny", progress=False).model, tmp_path / "adapter")
        assert largest_gap(model, editor.model) < 1e-6
    assert report.is_exact
    assert report.weight_error == 0
    assert report.given_by_adapter == report.given
    assert greedy(model, AutoTokenizer.from_pretrained(model.name_or_path), PROMPTS) == own


def test_an_adapter_of_conv1d_layers(tmp_path: Path) -> None:
    model = build_random("gpt2")
    with Editor(model, tokenizer(), agent="all-layers", checks=NONE) as editor:
        results = editor.edit([("w3 w4", "w5 w6", "w3"), ("w7 w8", "w9", "w7")])
        assert any(result.status == "written" for result in results)
        editor.save_adapter(tmp_path / "adapter")
        merged = with_adapter(build_random("gpt2"), tmp_path / "adapter")
        assert largest_gap(merged, model) < 1e-5
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_a_summed_rank_above_that_of_the_matrix_is_still_exact(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[:40])
        rows = sum(
            len(update.left)
            for number in editor.ledger.active
            for updates in editor.ledger.steps(number)
            for update in updates[:1]
            if update is not None
        )
        report = editor.save_adapter(tmp_path / "adapter")
        assert rows > report.rank == report.exact_rank == min(editor.llm.shapes[0])
        model = with_adapter(load_model("tiny", progress=False).model, tmp_path / "adapter")
        assert largest_gap(model, editor.model) < 1e-5


def test_a_rank_that_cannot_hold_the_edits_is_refused_and_its_error_is_right(
    tmp_path: Path,
) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[:8])
        before = bits(editor)
        with pytest.raises(SettingsError, match=r"rank 1 cannot hold the edits: \d of the \d"):
            editor.save_adapter(tmp_path / "adapter", max_rank=1)
        assert not (tmp_path / "adapter").exists()
        report = editor.save_adapter(tmp_path / "adapter", max_rank=1, allow_loss=True)
        assert bits(editor) == before
        assert report.given_by_adapter < report.given
        model = with_adapter(load_model("tiny", progress=False).model, tmp_path / "adapter")
        cut = whole = 0.0
        with editor.llm.unedited():
            base = [layer.module.weight.detach().clone() for layer in editor.llm.layers]
        for layer, old in zip(editor.llm.layers, base, strict=True):
            change = (layer.module.weight - old).double()
            approximation = (model.get_submodule(layer.name).weight - old).double()
            # Eckart and Young: the best error of rank 1 are the other singular values.
            values = torch.linalg.svdvals(change)
            error = float((change - approximation).norm())
            assert error == pytest.approx(float(values[1:].square().sum().sqrt()), rel=1e-3)
            cut, whole = cut + error**2, whole + float(change.norm()) ** 2
        assert report.weight_error == pytest.approx((cut / whole) ** 0.5, rel=1e-3)
        texts = greedy(model, AutoTokenizer.from_pretrained(model.name_or_path), PROMPTS[:8])
        given = [t.startswith(f" {f.answer}") for t, f in zip(texts, FACTS, strict=False)]
        assert sum(given) == report.given_by_adapter
        for rank in (0, -1, 1.5):
            with pytest.raises(SettingsError, match="max_rank"):
                editor.save_adapter(tmp_path / "other", max_rank=rank)  # type: ignore[arg-type]


def test_without_an_edit_there_is_no_adapter(tmp_path: Path) -> None:
    with (
        Editor.from_pretrained("tiny") as editor,
        pytest.raises(LedgerError, match="no edit is in place"),
    ):
        editor.save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(("rows", "rank"), [(3, 2), (3, 3), (9, 4), (9, None), (3, None)])
def test_a_cut_sum_by_dense_singular_values(rows: int, rank: int | None) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(rows, 6), torch.randn(rows, 5)
    found = truncated(left, right, rank)
    dense = (left.mT @ right).double()
    values = torch.linalg.svdvals(dense)
    size = min(rows, 5) if rank is None else rank
    assert len(found.factors.left) == size
    assert found.needed == min(rows, 5)
    wanted = float(values[size:].square().sum().sqrt())
    assert float((found.factors.dense().double() - dense).norm()) == pytest.approx(wanted, abs=1e-4)
    assert found.error == pytest.approx(wanted, abs=1e-6)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # of versions of peft and transformers
@pytest.mark.parametrize("kind", ["tiny", "gpt2"])
def test_peft_itself_loads_the_adapter(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def base() -> tuple[Any, Any]:
        return live() if kind == "tiny" else (build_random("gpt2"), tokenizer())

    model, tokens = base()
    facts: Any = FACTS[:4] if kind == "tiny" else [("w3 w4", "w5 w6", "w3"), ("w7 w8", "w9", "w7")]
    prompts = PROMPTS if kind == "tiny" else ["w3 w4", "w7 w8", "w9 w9", "w3"]
    with Editor(model, tokens, agent="all-layers", checks=NONE) as editor:
        editor.edit(facts)
        editor.save_adapter(tmp_path / "adapter")
        own = greedy(model, tokens, prompts)
        with_peft = peft.PeftModel.from_pretrained(base()[0], str(tmp_path / "adapter"))
        assert greedy(with_peft, tokens, prompts) == own
        ids = tokens(prompts[0], return_tensors="pt").input_ids
        assert torch.allclose(
            with_peft(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4
        )
        merged = with_peft.merge_and_unload()
        assert largest_gap(merged, model) < 1e-5


# -- the edited matrices alone --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edited_matrices_alone_give_the_edited_model_bit_for_bit(
    dtype: str, tmp_path: Path
) -> None:
    path = tmp_path / "edits.safetensors"
    with Editor.from_pretrained("tiny", checks=NONE, dtype=dtype, agent="all-layers") as editor:
        editor.edit(FACTS[:3])
        editor.save_delta(path)
        wanted, names = bits(editor), editor.llm.names
    model = load_model("tiny", progress=False, dtype=dtype).model
    assert apply_delta(model, path) == list(names)
    assert all_bits(model) == wanted
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert path.stat().st_size < whole


def test_edited_matrices_for_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "edits.safetensors"
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[0])
        editor.save_delta(path)
    model, _ = live()
    apply_delta(model, path)
    before = all_bits(model)
    with pytest.raises(LedgerError, match="is for another model"):
        apply_delta(model, path)  # it is edited already
    assert all_bits(model) == before
    with pytest.raises(LedgerError, match="has no layer"):
        apply_delta(build_random("gpt2"), path)
    with pytest.raises(LedgerError, match="has the shape"):
        apply_delta(build_random("llama"), path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(LedgerError, match="holds no edits of hiedit"):
        apply_delta(model, tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    for file in (path, tmp_path / "none"):
        with pytest.raises(LedgerError, match="cannot be read"):
            apply_delta(model, file)
