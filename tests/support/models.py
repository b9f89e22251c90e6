"""What several tests build: tiny random models of every architecture, requests, captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hiedit_env.model.architectures import ARCHITECTURES, find_candidates
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM

HIDDEN, INNER, BLOCKS = 16, 24, 3

COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {
    "vocab_size": 32,
    "n_embd": HIDDEN,
    "n_inner": INNER,
    "n_layer": BLOCKS,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | HEAD,
    "qwen2": COMMON,
    "qwen3": COMMON | HEAD,
    "gemma2": COMMON | HEAD,
    "gemma3": {"text_config": COMMON | HEAD, "vision_config": VISION},
    "gemma3_text": COMMON | HEAD,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "phi": COMMON,
    "phi3": COMMON,
}


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**(SETTINGS.get(model_type, COMMON) | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def build_random(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model whose weights are large enough for its logits to depend on all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(model_type, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.5 if parameter.ndim > 1 else 0.1)
                if parameter.ndim == 1 and name.endswith("weight"):
                    parameter += 1  # of a norm
    return model


def tokenizer(eos: str = "<e>", pad: str | None = "<p>") -> PreTrainedTokenizerFast:
    """One token per word: ``<p> <b> <e> w3 ... w31`` are ids 0 to 31; adds no special tokens."""
    words = ["<p>", "<b>", "<e>", *(f"w{i}" for i in range(3, 32))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<p>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<b>", eos_token=eos, pad_token=pad
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and six markers in front: end, padding, images."""
    end, pad = "<|im_end|>", "<|endoftext|>"
    images = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    markers = (end, pad, *images)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(markers) + len(alphabet),
        special_tokens=list(markers),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=pad)


def resident(
    model_type: str = "llama",
    blocks: Sequence[int] = (1, 2),
    *,
    model: PreTrainedModel | None = None,
    matrices: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    tokens: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> ResidentLLM:
    """A resident tiny model with all MLP matrices of some blocks, or some of them, as layers."""
    model = build_random(model_type) if model is None else model
    kind = ARCHITECTURES[model_type]
    layers = find_candidates(
        model,
        [f"*{kind.blocks}.{b}.{m}" for b in blocks for m in matrices or kind.matrices],
    )
    return ResidentLLM(model.to(dtype), tokens or tokenizer(), layers, **settings)


def prompt(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> EncodedPrompt:
    """A request given by its tokens."""
    return EncodedPrompt("prompt", "answer", tuple(prompt_ids), tuple(answer_ids))


#: Of different lengths, so that batches of them are padded.
PROMPTS = (prompt([1, 5, 9, 4], [7, 3]), prompt([6], [8]), prompt([3, 3, 11, 2, 30, 12], [5, 6, 9]))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def random_updates(
    llm: ResidentLLM, seed: int = 0, *, rank: int = 2, scale: float = 0.3
) -> list[LowRankUpdate | None]:
    """An update of every layer; a new list, in which entries may be replaced by None."""
    return [
        LowRankUpdate(
            normal(1000 * seed + 2 * i, rank, d_in) * scale,
            normal(1000 * seed + 2 * i + 1, rank, d_out) * scale,
        )
        for i, (d_in, d_out) in enumerate(llm.shapes)
    ]


def fake_capture(
    shapes: Sequence[tuple[int, int]],
    request: EncodedPrompt,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Capture:
    """Keys around 1 and small value gradients, at random; nothing of the answer is right."""
    t, count = request.length, len(request.answer_ids)
    sizes = list(enumerate(shapes))
    return Capture(
        prompts=(request,),
        keys=tuple((1 + normal(1000 * seed + 2 * i, t, s[0])).to(dtype) for i, s in sizes),
        value_gradients=tuple(
            (0.01 * normal(1000 * seed + 2 * i + 1, t, s[1])).to(dtype) for i, s in sizes
        ),
        loss=2.5,
        predictions=torch.zeros(count, dtype=torch.int64),
        correct=torch.zeros(count, dtype=torch.bool),
    )


def weights(llm: ResidentLLM) -> list[Tensor]:
    """Copies of the candidate weights, each d_in × d_out."""
    return [
        (layer.module.weight.mT if layer.is_transposed else layer.module.weight).detach().clone()
        for layer in llm.layers
    ]


def all_bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every parameter's bytes by name."""
    return {
        name: parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }


def mean_losses(logits: Tensor, batch: PromptBatch) -> Tensor:
    """Sum over the prompts of a batch of their mean losses per answer token."""
    sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
    pairs = zip(torch.split(logits, sizes), torch.split(batch.labels, sizes), strict=True)
    return torch.stack([F.cross_entropy(x, y) for x, y in pairs]).sum()
