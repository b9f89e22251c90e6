"""Tiny random models of all causal-LM classes of the installed transformers.

Each configuration class is shrunk by one generic rule: known size fields get small values, lists
with one entry per block are cut, and nested configurations are shrunk the same way. The few classes
that need other values have a row in :data:`SPECIAL`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""``model_type`` of every configuration that transformers has a causal language model for."""

BLOCKS = 4

_SMALL: dict[int, str] = {
    32: "vocab_size hidden_size d_model n_embd embedding_size word_embed_proj_dim lru_width "
    "embedding_dim decoder_vocab_size vocab_size_per_layer_input input_embedding_size "
    "output_embedding_size attention_hidden_size emb_dim unpadded_vocab_size",
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
    1: "first_k_dense_replace num_dense_layers moe_layer_start_index num_kv_shared_layers",
}
_SIZES = {name: size for size, names in _SMALL.items() for name in names.split()}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

SPECIAL: dict[str, dict[str, Any]] = {}
"""Fields of single configuration classes, beside the generic rule; for the text configuration."""


def shrink(settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration (as its ``to_dict`` gives them) with small values."""
    depth = next(
        (settings[k] for k in _SIZES if _SIZES[k] == BLOCKS and "layer" in k and settings.get(k)),
        None,
    )
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = shrink(value, fields)
        elif key in _IDS or key.endswith("_token_id"):
            small[key] = None if value is None else _IDS.get(key, 3)
        elif key in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, _SIZES[key]) or value
        elif isinstance(value, list) and len(value) == depth:
            small[key] = value[-BLOCKS:] if key != "no_rope_layers" else value[:BLOCKS]
        elif isinstance(value, list) and key.endswith("layers"):
            small[key] = [i for i in value if isinstance(i, int) and i < BLOCKS]
        else:
            small[key] = value
    return small


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest configuration of a type that still has all its parts."""
    kind = CONFIG_MAPPING[model_type]
    settings = shrink(kind().to_dict(), {})
    settings |= SPECIAL.get(model_type, {})
    config: PreTrainedConfig = kind.from_dict(settings)
    for part in (config, config.get_text_config(decoder=True)):
        for key in ("is_encoder_decoder", "is_decoder"):
            if hasattr(part, key):
                setattr(part, key, key == "is_decoder")
    return config


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model whose weights are large enough for its logits to depend on all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type))
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.weight.normal_(std=1 / math.sqrt(module.weight.shape[-1]))
    return model.eval()
