"""A model as one GGUF file, for llama.cpp, ollama and whatever else reads it.

Written for Llama models with a byte-level BPE tokenizer; llama.cpp's own converter makes the file
from a saved folder of any other. ``f32`` holds the weights bit for bit. The other types round
them, matrix by matrix as llama.cpp does; the vocabulary's matrices of a 4-bit file have 8 bits.
The package ``gguf`` comes with the extra ``demo``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiedit_agents.editing.gguf_tokens import vocabulary_of
from hiedit_env.errors import OutputError, ResultsExistError, SettingsError

GgufType = Literal["f32", "f16", "q8_0", "q4_0", "q4_1"]
TYPES: tuple[GgufType, ...] = ("f32", "f16", "q8_0", "q4_0", "q4_1")
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
#: Numbers of a row that are rounded together, in the types with fewer than 16 bits.
_BLOCK = 32


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | PathLike[str],
    type: GgufType = "f16",
    name: str = "",
) -> int:
    """Writes a model as a GGUF file, which appears whole or not at all.

    Args:
        model: A Llama model.
        tokenizer: Its tokenizer, a byte-level BPE.
        path: The file; there must be none.
        type: How weights are stored: ``"f32"``, ``"f16"``, ``"q8_0"``, ``"q4_0"``, ``"q4_1"``.
        name: Name of the model, for whoever reads the file.

    Returns:
        Its size in bytes.

    Raises:
        SettingsError: another kind of model or tokenizer; says what else to do.
        ResultsExistError: there is such a file.
        OutputError: it cannot be written; nothing is left.
    """
    path = Path(path)
    if type not in TYPES:
        raise SettingsError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
    config = _llama_config(model)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    if path.exists():
        raise ResultsExistError(f"{path} exists; give another --out")
    work = path.with_name(f".{path.name}.hiedit-new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(work, "llama")
        _write_config(writer, config, name)
        writer.add_file_type(_FILE_TYPES[type])
        vocabulary.write(writer)
        for tensor, data, kind in tensors_of(model, type):
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        size = work.stat().st_size
        os.replace(work, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            work.unlink()
    return size


def tensors_of(
    model: PreTrainedModel, type: GgufType
) -> Iterator[tuple[str, NDArray[Any], gguf.GGMLQuantizationType]]:
    """The tensors of a Llama model as they are stored: name, data, type."""
    config = cast(Any, model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for own, weight in model.named_parameters():  # of tied matrices the first one only
        found = names.get_name(own, try_suffixes=(".weight",))
        if found is None:
            raise SettingsError(f"GGUF has no place for the parameter {own!r} of this model")
        data = _numbers(weight)
        part = own.split(".")[-2]
        if part in heads:
            data = _turned(data, heads[part])
        kind = stored_as(own, data, type)
        yield found, gguf.quants.quantize(data, kind), kind


def stored_as(name: str, data: NDArray[Any], type: GgufType) -> gguf.GGMLQuantizationType:
    """The type of one tensor.

    Args:
        name: Of the parameter.
        data: Its numbers.
        type: Of the file.
    """
    kinds = gguf.GGMLQuantizationType
    if data.ndim < 2 or type == "f32":
        return kinds.F32
    if type == "f16" or data.shape[-1] % _BLOCK:
        return kinds.F16
    is_vocabulary = "embed_tokens" in name or "lm_head" in name
    return kinds.Q8_0 if type == "q8_0" or is_vocabulary else kinds[type.upper()]


def rounded(name: str, weight: Tensor, type: GgufType) -> Tensor:
    """A parameter as a file of a type holds it, in its own dtype and on its own device."""
    import torch

    data = _numbers(weight)
    kind = stored_as(name, data, type)
    back = gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind)
    return torch.from_numpy(back.reshape(data.shape).copy()).to(weight)


def _numbers(weight: Tensor) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = weight.detach().float().cpu().numpy()
    return numbers


def _turned(data: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in llama.cpp's order: it turns neighbouring pairs of numbers, transformers two halves.

    >>> _turned(np.arange(8, dtype=np.float32).reshape(8, 1), 2).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    rows, columns = data.shape
    halves = data.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _llama_config(model: PreTrainedModel) -> Any:
    config = cast(Any, model.config)
    rope = getattr(config, "rope_parameters", None) or {}
    problem = ""
    if config.model_type != "llama":
        problem = f"is a {config.model_type}"
    elif config.attention_bias or config.mlp_bias:
        problem = "has biases"
    elif rope.get("rope_type", "default") != "default":
        problem = f"scales its positions ({rope['rope_type']})"
    if problem:
        raise SettingsError(
            f"GGUF is written for plain Llama models, and this one {problem}; save it with "
            "--as folder and use llama.cpp's convert_hf_to_gguf.py"
        )
    return config


def _write_config(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name or "edited")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
