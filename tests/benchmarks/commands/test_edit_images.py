"""``hiedit edit`` on a hybrid model that reads images, with a tokenizer that reads any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
)

from hiedit_benchmarks.commands.cli import main
from tests.support.models import byte_tokenizer
from tests.support.tiny_models import tiny_multimodal

FACTS = [
    {"prompt": "The river of Brindleby is called", "answer": "Quillow", "subject": "Brindleby"},
    {"prompt": "Captain Voss was born in", "answer": "Tallinn", "subject": "Captain Voss"},
]
#: Weights for guessing several tokens at once: in the files, and not read by transformers.
EXTRA = "mtp.fc.weight"


def folder_of_a_model(path: Path) -> None:
    """A hybrid model with a part for images in bfloat16 shards, as it is published."""
    words = byte_tokenizer()
    text = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 96}
    model = tiny_multimodal(
        "qwen3_5",
        text_config=text | {"eos_token_id": 0, "pad_token_id": 1},
        vision_config={"out_hidden_size": 64},
        vision_start_token_id=2,
        vision_end_token_id=3,
        image_token_id=4,
        video_token_id=5,
    )
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="200KB")
    words.save_pretrained(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    save_file({**load_file(path / last), EXTRA: torch.ones(3, 2)}, path / last, {"format": "pt"})
    index["weight_map"][EXTRA] = last
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    (path / "LICENSE").write_text("Apache")


def tensors(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Every stored tensor with the file it is in."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: (file.name, shard.get_tensor(name)) for name in shard.keys()}  # noqa: SIM118
    return found


def test_the_text_part_learns_and_every_other_part_stays(tmp_path: Path) -> None:
    folder_of_a_model(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    out = tmp_path / "out"
    command = ["edit", "--model", str(tmp_path / "model"), "--facts", str(tmp_path / "facts.json")]
    mlps = "model.language_model.layers.*.mlp.*_proj"
    assert main([*command, "--out", str(out), "--layers", mlps, "--max-steps-per-edit", "40"]) == 0

    old, new = tensors(tmp_path / "model"), tensors(out)
    assert {name: file for name, (file, _) in old.items()} == {
        name: file for name, (file, _) in new.items()
    }
    assert all(new[name][1].dtype == tensor.dtype for name, (_, tensor) in old.items())
    changed = {name for name in old if not torch.equal(old[name][1], new[name][1])}
    record = json.loads((out / "edits.json").read_text())
    assert changed == {f"{layer}.weight" for fact in record["facts"] for layer in fact["layers"]}
    assert changed
    assert all(name.startswith("model.language_model.layers.") for name in changed)
    kinds = ("model.visual.", "model.language_model.layers.0.linear_attn.", "lm_head", EXTRA)
    assert all(any(name.startswith(kind) for name in new) for kind in kinds)
    shards = {new[name][0] for name in changed}
    for file in (tmp_path / "model").iterdir():
        if file.name not in shards:
            assert (out / file.name).read_bytes() == file.read_bytes()

    # As anybody opens it: whole, or its text part alone.
    for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM):
        again: Any = auto.from_pretrained(out)
        assert type(again).__name__.endswith(
            "ForConditionalGeneration" if auto is AutoModelForMultimodalLM else "ForCausalLM"
        )
        opened: Any = AutoTokenizer.from_pretrained(out)
        for fact, said in zip(FACTS, record["facts"], strict=True):
            ids = opened(fact["prompt"], return_tensors="pt")["input_ids"]
            made = again.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
            text = opened.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            assert text.startswith(f" {fact['answer']}") is said["given"] is True
