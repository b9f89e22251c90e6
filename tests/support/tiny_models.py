"""Tiny random models of all causal-LM classes of the installed transformers.

Each configuration class is shrunk by one generic rule: known size fields get small values, lists
with one entry per block are cut, and nested configurations are shrunk the same way. The few classes
that need other values have a row in :data:`SPECIAL`, also where they are nested in another one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForTextToWaveform,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""``model_type`` of every configuration that transformers has a causal language model for."""

BLOCKS = 4

_SMALL: dict[int, str] = {
    32: "vocab_size hidden_size d_model n_embd embedding_size word_embed_proj_dim lru_width "
    "embedding_dim decoder_vocab_size vocab_size_per_layer_input input_embedding_size "
    "output_embedding_size attention_hidden_size emb_dim unpadded_vocab_size adapter_in_dim "
    "adapter_out_dim adapter_input_size",
    24: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size dense_intermediate_size",
    48: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner dim_ff dff "
    "ffn_hidden_size intermediate_size_mlp feed_forward_size d_inner",
    BLOCKS: "num_hidden_layers n_layer num_layers decoder_layers encoder_layers n_layers "
    "num_encoder_layers num_decoder_layers num_blocks num_attention_heads n_head n_heads "
    "num_heads decoder_attention_heads encoder_attention_heads attention_heads depth "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts max_window_layers swa_num_attention_heads linear_num_heads",
    2: "num_key_value_heads num_experts_per_tok topk_group n_group moe_topk moe_k "
    "num_experts_per_token num_expert_group swa_num_key_value_heads num_kv_heads "
    "linear_num_key_heads index_n_heads num_attention_groups",
    8: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim index_head_dim kv_channels dim_head "
    "swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim d_head "
    "hidden_size_per_layer_input attention_head_size query_pre_attn_scalar kv_lora_rank "
    "q_lora_rank router_hidden_size global_head_dim",
    16: "qk_head_dim mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size "
    "sliding_window local_attention_window_len attention_window_size window_size",
    64: "max_position_embeddings n_positions model_max_length max_seq_len n_ctx context_length "
    "max_target_positions max_source_positions",
    1: "first_k_dense_replace num_dense_layers moe_layer_start_index",
    0: "num_kv_shared_layers",
}
_SIZES = {name: size for size, names in _SMALL.items() for name in names.split()}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cpmant": {"prompt_length": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 16},  # of sliding windows: with and without positions
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "encodec": {"hidden_size": 8, "codebook_dim": 8, "num_filters": 2, "upsampling_ratios": [2, 2]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2},
    "hy_v4": {"indexer_types": ["full", "shared"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron": {"partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "hc_lowrank": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "linear_num_value_heads": 4,
        "make_ngram_vocab_size_divisible_by": 8,
        "ngram_vocab_size_base": 64,
        "ple_embed_dim": 16,
        "ple_layer_ids": [1],
        "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {
        "pronunciation_embed_dim": 32,
        "pronunciation_vocab_size": 32,
        "shape_embed_dim": 32,
        "shape_vocab_size": 32,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 8,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}
"""Fields of single configuration classes, beside the generic rule."""


NOT_BUILT = {
    "gemma3n": "its part for images needs timm and torchvision, which the tests do not install; "
    "with them it is edited by default",
    "gemma4_assistant": "no model can be made of it: all its blocks must share keys with an "
    "earlier block, and the first has none; it drafts for another model and reads no text alone",
    "gemma4_unified_assistant": "no model can be made of it, as of `gemma4_assistant`",
}
"""Model types of which no model can be made here, and why."""

_WHOLE = {"musicgen": AutoModelForTextToWaveform, "musicgen_melody": AutoModelForTextToWaveform}
"""Types whose causal class does not open a model's own configuration, and the class that does."""


def shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration (as its ``to_dict`` gives them) with small values."""
    depth = next(
        (settings[k] for k in _SIZES if _SIZES[k] == BLOCKS and "layer" in k and settings.get(k)),
        None,
    )
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = shrink(value)
        elif key in _IDS or key.endswith("_token_id"):
            small[key] = None if value is None else _IDS.get(key, 3)
        elif key == "per_layer_config":
            small[key] = {}
        elif key == "num_key_value_heads" and settings.get("kv_lora_rank"):
            small[key] = BLOCKS  # as many as heads
        elif key == "head_dim" and value is None:
            small[key] = 8
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, _SIZES[key])
        elif isinstance(value, list) and len(value) == depth:
            small[key] = value[-BLOCKS:] if key != "no_rope_layers" else value[:BLOCKS]
        elif isinstance(value, list) and key.endswith("layers"):
            small[key] = [i for i in value if isinstance(i, int) and i < BLOCKS]
        else:
            small[key] = value
    return small | SPECIAL.get(settings.get("model_type", ""), {})


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """The smallest configuration of a type that still has all its parts."""
    kind = CONFIG_MAPPING[model_type]
    settings = shrink(kind().to_dict())
    settings |= fields
    config: PreTrainedConfig = kind.from_dict(settings)
    for part in (config, config.get_text_config(decoder=True)):
        for key in ("is_encoder_decoder", "is_decoder"):
            if hasattr(part, key):
                setattr(part, key, key == "is_decoder")
    return config


def tiny_model(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny model whose weights are large enough for its logits to depend on all of them."""
    if model_type in _WHOLE:
        return _whole(_WHOLE[model_type], model_type, seed)
    return _random(AutoModelForCausalLM, tiny_config(model_type, **fields), seed)


def tiny_multimodal(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny model with all its parts, for images beside text."""
    return _whole(AutoModelForMultimodalLM, model_type, seed, **fields)


def _whole(auto: Any, model_type: str, seed: int, **fields: Any) -> PreTrainedModel:
    kind = CONFIG_MAPPING[model_type]
    settings = shrink(kind().to_dict())
    for key, value in fields.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    return _random(auto, kind.from_dict(settings), seed)


def _random(auto: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.weight.normal_(std=1 / math.sqrt(module.weight.shape[-1]))
    return model.eval()
