"""GGUF files, read again by transformers, and by llama.cpp where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents import Editor, write_gguf
from hiedit_agents.editing.gguf_file import TYPES, GgufType, rounded
from hiedit_env.errors import OutputError, ResultsExistError, SettingsError
from tests.support.editors import FACTS, NONE, live
from tests.support.models import all_bits, build_random, tokenizer
from tests.support.served import TEMPLATE

AUTO: Any = AutoModelForCausalLM
PROMPTS = [fact.prompt for fact in FACTS[:10]]
# transformers reads a file with a progress bar and through a deprecated part of itself.
pytestmark = pytest.mark.filterwarnings("ignore")


def reloaded(path: Path) -> Any:
    return AUTO.from_pretrained(path.parent, gguf_file=path.name)


def test_a_full_file_has_all_bits_and_gives_the_same_answers(tmp_path: Path) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[:5])
        size = write_gguf(editor.model, editor.tokenizer, tmp_path / "m.gguf", "f32", "mine")
        assert size == (tmp_path / "m.gguf").stat().st_size
        model = reloaded(tmp_path / "m.gguf")
        assert all_bits(model) == all_bits(editor.model)
        tokens = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        for text in (*PROMPTS, "Ärger, 12345 – 東京 <eos>\n\n  x"):
            assert tokens(text).input_ids == editor.tokenizer(text).input_ids
        wanted = editor.ask(PROMPTS, max_new_tokens=6)
    for prompt, text in zip(PROMPTS, wanted, strict=True):
        ids = tokens(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("type", TYPES[1:])
def test_a_smaller_file_holds_the_rounded_weights(type: GgufType, tmp_path: Path) -> None:
    model, tokens = live()
    write_gguf(model, tokens, tmp_path / "m.gguf", type)
    found = dict(reloaded(tmp_path / "m.gguf").named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(found[name], rounded(name, weight, type)), name
        assert torch.equal(found[name], weight) == (weight.dim() == 1), name


def test_rounding_by_hand() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    blocks = weight.numpy().reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    # 8 bits: the largest number of a block is 127 steps.
    step = largest / 127
    steps = np.trunc(blocks / step + np.copysign(0.5, blocks))
    wanted = steps * step.astype(np.float16).astype(np.float32)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(
        rounded("a.weight", weight, "q8_0"), torch.tensor(wanted).reshape(3, 64), **close
    )
    # 4 bits: 16 steps, the number that is largest in size being −8 of them.
    signed = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    step = signed / -8
    steps = np.clip(np.trunc(blocks / step + 8.5), 0, 15) - 8
    wanted = steps * step.astype(np.float16).astype(np.float32)
    torch.testing.assert_close(
        rounded("a.weight", weight, "q4_0"), torch.tensor(wanted).reshape(3, 64), **close
    )
    # The vocabulary has 8 bits, and rows that are no whole blocks 16.
    assert torch.equal(
        rounded("embed_tokens.weight", weight, "q4_0"), rounded("a.weight", weight, "q8_0")
    )
    assert torch.equal(rounded("a.weight", weight[:, :40], "q4_0"), weight[:, :40].half().float())
    assert torch.equal(rounded("norm.weight", weight[0], "q4_0"), weight[0])


def test_the_chat_template_and_special_tokens_are_there(tmp_path: Path) -> None:
    import gguf

    model, tokens = live()
    tokens.chat_template = TEMPLATE
    write_gguf(model, tokens, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokens.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    kinds = fields["tokenizer.ggml.token_type"].contents()
    specials = {i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL}
    assert specials == set(tokens.all_special_ids)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    model, tokens = live()
    out = tmp_path / "m.gguf"
    with pytest.raises(SettingsError, match=r"is a gpt2; .* convert_hf_to_gguf\.py"):
        write_gguf(build_random("gpt2"), tokens, out)
    with pytest.raises(SettingsError, match="this tokenizer is another"):
        write_gguf(model, tokenizer(), out)
    with pytest.raises(SettingsError, match="type must be one of f32, f16, q8_0, q4_0, q4_1"):
        write_gguf(model, tokens, out, "q2")  # type: ignore[arg-type]
    biased, scaled = live()[0], live()[0]
    biased.config.mlp_bias = True
    with pytest.raises(SettingsError, match="has biases"):
        write_gguf(biased, tokens, out)
    scaled.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(SettingsError, match=r"scales its positions \(linear\)"):
        write_gguf(scaled, tokens, out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(ResultsExistError, match="exists; give another"):
        write_gguf(model, tokens, out)
    with pytest.raises(OutputError, match="cannot be written"):
        write_gguf(model, tokens, out / "below")
    assert out.read_text() == "mine"


def test_llama_cpp_gives_the_same_answers(tmp_path: Path) -> None:
    cyllama = pytest.importorskip("cyllama")  # a wheel of llama.cpp
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(FACTS[:5])
        write_gguf(editor.model, editor.tokenizer, tmp_path / "m.gguf", "f32")
        wanted = editor.ask(PROMPTS, max_new_tokens=6)
    settings = cyllama.GenerationConfig(
        max_tokens=6, temperature=0.0, top_k=1, n_gpu_layers=0, n_ctx=64
    )
    llama = cyllama.LLM(str(tmp_path / "m.gguf"), config=settings, verbose=False)
    found = [str(llama(prompt, config=settings)) for prompt in PROMPTS]
    assert [text.strip() for text in found] == [text.strip() for text in wanted]
