"""``hiedit edit`` of models of many kinds: the saved folder, loaded again, is the edited model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hiedit_benchmarks.commands import edit
from hiedit_benchmarks.comparison.settings import CompareSettings
from tests.support.models import tokenizer
from tests.support.tiny_models import tiny_model

FACTS = [
    {"subject": "w6", "prompt": "w5 w6 w7", "answer": "w9", "paraphrases": ["w6 w7"]},
    {"subject": "w12", "prompt": "w11 w12 w13 w14 w15 w16", "answer": "w20 w21"},
]
IDS = torch.tensor([[5, 6, 7, 11, 12, 13]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "kind",
    [
        "mamba",
        "qwen2_moe",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("granite", "cohere", "opt", "falcon", "gpt_neox", "bloom", "rwkv", "jamba")
        ),
    ],
)
def test_the_saved_folder_is_the_edited_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    settings = CompareSettings(model=str(tmp_path / "model"), dataset=str(tmp_path / "facts.json"))
    kept: list[PreTrainedModel] = []
    reload = edit.reload

    def keep(out: Path, source: Path, llm: Any, *rest: Any) -> Any:
        kept.append(llm.model)
        return reload(out, source, llm, *rest)

    monkeypatch.setattr(edit, "reload", keep)
    saved = edit.edit_model(settings, "all-layers", tmp_path / "out", progress=False)
    assert saved.unverified is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    edited, reloaded = logits(kept[0]), logits(again)
    torch.testing.assert_close(reloaded, edited, rtol=1e-5, atol=1e-5)
    # Loss of the first answer, which was edited into it.
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, after = (
            m(input_ids=prompt, use_cache=False).logits[0, -1].log_softmax(-1)[9]
            for m in (model, again)
        )
    assert after > before
