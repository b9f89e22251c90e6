"""Models that read images beside text: opened, edited and saved with all their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.model.memory_budget import auto_class
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import PROMPTS, all_bits, random_updates, tokenizer
from tests.support.tiny_models import tiny_config, tiny_multimodal

KINDS = {
    "gemma3": "model.language_model.layers.",
    "idefics3": "model.text_model.layers.",
    "llava": "model.language_model.layers.",
    "mllama": "model.language_model.layers.",
    "qwen3_5": "model.language_model.layers.",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_is_edited_and_the_rest_kept(kind: str, tmp_path: Path) -> None:
    model = tiny_multimodal(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), progress=False)
    assert all_bits(loaded.model) == all_bits(model)
    llm = ResidentLLM(loaded.model, loaded.tokenizer, find_candidates(loaded.model))
    assert all(name.startswith(KINDS[kind]) for name in llm.names)

    def own() -> torch.Tensor:
        with torch.no_grad():
            rows = [
                llm.model(input_ids=torch.tensor([p.input_ids]), use_cache=False).logits[
                    0, len(p.prompt_ids) - 1 :
                ]
                for p in PROMPTS
            ]
        return torch.cat(rows)

    before = own()
    llm.commit(random_updates(llm, scale=0.1))
    assert not torch.allclose(own(), before, atol=1e-3)
    ours = llm.answer_logits(llm.batch(PROMPTS))
    torch.testing.assert_close(ours, own(), rtol=1e-4, atol=1e-5)

    llm.model.save_pretrained(tmp_path / "edited")
    again = all_bits(AutoModelForMultimodalLM.from_pretrained(tmp_path / "edited"))
    changed = {name for name, bits in all_bits(model).items() if again[name] != bits}
    assert changed == {f"{name}.weight" for name in llm.names}


def test_the_class_follows_what_was_saved() -> None:
    # The same type may be saved with its parts for images or as the text model alone.
    config = tiny_multimodal("gemma3").config
    config.architectures = ["Gemma3ForConditionalGeneration"]
    assert auto_class(config) is AutoModelForMultimodalLM
    assert auto_class(tiny_config("gemma3_text")).__name__ == "AutoModelForCausalLM"
    assert auto_class(tiny_config("llama")).__name__ == "AutoModelForCausalLM"
