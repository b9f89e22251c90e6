"""Model folders: which can be edited, and where in their safetensors files a tensor is stored.

Nothing here loads a model: the header of a safetensors file says name, shape, dtype and place of
every tensor. https://github.com/huggingface/safetensors describes the format.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from hiedit_env.errors import ModelError
from hiedit_env.files import parse_json

#: The files that ``from_pretrained`` takes the weights from, the first one that exists.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Weights in other formats, which hiedit neither reads nor changes.
OTHER_WEIGHTS = (
    *("*.gguf", "pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack", "*.ckpt"),
    *("consolidated*.pth", "consolidated*.safetensors", "pytorch_model.bin.index.json"),
)
#: Weights that were exported for other programs, from which transformers makes no model.
EXPORTED_WEIGHTS = (
    *("*.onnx", "*.onnx_data*", "*.ort", "*.ot", "*.tflite", "*.mlmodel"),
    *("openvino_*model*.bin", "openvino_*model*.xml"),
)
#: Dtypes of weights that can be edited: name in a safetensors header → dtype.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_ADAPTER = "adapter_config.json"
#: Files in which earlier versions of GPTQ and AWQ say that weights are quantised.
_QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_MAX_HEADER = 100_000_000
_LFS = b"version "  # https://git-lfs.com/spec/v1 begins a pointer with it
#: Files that loading reads, and that a copy without Git LFS has as pointers only.
_MAY_BE_POINTERS = (
    *("config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "merges.txt"),
)
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies on disk.

    Args:
        file: The safetensors file.
        name: Its name in there.
        dtype: Its dtype as the header writes it, such as ``"BF16"``.
        shape: Its shape.
        start, end: Its bytes within the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor as it is stored.

        Raises:
            ModelError: of a dtype that cannot be edited.
        """
        if self.dtype not in DTYPES:
            raise ModelError(
                f"tensor {self.name!r} in {self.file} has dtype {self.dtype}; weights that can be "
                f"edited have one of {', '.join(DTYPES)}"
            )
        with self.file.open("rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.end - self.start))
        if not data:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in its own order.

    Raises:
        ModelError: it is damaged, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            if start == _LFS:
                raise _pointer(file)
            length = int.from_bytes(start, "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(opened.read(length))
        header.pop("__metadata__", None)
        found = [
            StoredTensor(
                file,
                name,
                entry["dtype"],
                tuple(int(n) for n in entry["shape"]),
                *(8 + length + int(place) for place in entry["data_offsets"]),
            )
            for name, entry in header.items()
        ]
        for tensor in found:
            if not 8 + length <= tensor.start <= tensor.end <= size:
                raise ValueError(f"tensor {tensor.name!r} lies outside the file")
            kind = DTYPES.get(tensor.dtype)
            wanted = 0 if kind is None else kind.itemsize * math.prod(tensor.shape)
            if kind is not None and tensor.end - tensor.start != wanted:
                raise ValueError(f"tensor {tensor.name!r} has another size than its shape says")
    except ModelError:  # is a ValueError, too
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} cannot be read as safetensors: {error}; copy the file again"
        ) from error
    return sorted(found, key=lambda tensor: tensor.start)


def _pointer(file: Path) -> ModelError:
    return ModelError(
        f"{file} is a pointer of Git LFS in the place of the file; fetch it with 'git lfs pull'"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads, in order of their names.

    Raises:
        ModelError: the index is damaged, names a file that is missing, or one outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} cannot be read: {type(error).__name__}: {error}; copy the file again"
        ) from error
    for name, file in zip(names, files, strict=True):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{index} names {name!r}, a file outside the folder; correct the name")
        if not file.is_file():
            raise ModelError(f"{index} names {name!r}, which is missing; copy the file again")
    return files


def check_folder(folder: Path) -> None:
    """Refuses folders that hold something else than one whole model in safetensors.

    Raises:
        ModelError: an adapter, quantised weights, weights in other formats or under other names
            only, a pointer of Git LFS, or a damaged tokenizer.json or file of weights; names the
            file and the remedy.
    """
    if (folder / _ADAPTER).exists():
        whole = (folder / "config.json").is_file()
        raise ModelError(
            f"{folder / _ADAPTER} is an adapter "
            + (
                "beside a model, and transformers would add it to the weights; move it away if it "
                "is merged already, else merge it"
                if whole
                else "without its model; merge it into its model"
            )
            + " (merge_and_unload() of peft, then save_pretrained) and edit the merged folder"
        )
    for name in _QUANTIZED:
        if (folder / name).is_file():
            raise ModelError(
                f"{folder / name} says that the weights are quantised, and quantised weights "
                "cannot be edited; edit the model they were made from, then quantise the result"
            )
    for name in _MAY_BE_POINTERS:
        if (folder / name).is_file() and _start(folder / name, len(_LFS)) == _LFS:
            raise _pointer(folder / name)
    _check_tokenizer(folder / "tokenizer.json")
    config = _read_json(folder / "config.json")
    refuse_quantized(config, str(folder))
    files = weight_files(folder)
    for file in files:
        stored_tensors(file)
    if files or not config:
        return
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    other = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    if gguf or other:
        option = f", gguf_file={gguf[0]!r}" if gguf else ""
        raise ModelError(
            f"folder {str(folder)!r} holds its weights as {(gguf or other)[0]} and not as "
            f"*.safetensors; save it anew with AutoModelForCausalLM.from_pretrained({str(folder)!r}"
            f"{option}).save_pretrained(DIR), and its tokenizer likewise, then edit DIR"
        )
    _refuse_names(folder)


def _refuse_names(folder: Path) -> None:
    """Refuses a folder whose safetensors files have names that transformers does not look for."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        return
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        raise ModelError(
            f"folder {str(folder)!r} holds {shards[0]} but no {INDEX}, which says where each "
            "weight is stored; copy it, too"
        )
    raise ModelError(
        f"folder {str(folder)!r} holds its weights as {names[0]}, a name that transformers does "
        f"not look for; rename it to {WEIGHTS}"
    )


def _start(file: Path, length: int) -> bytes:
    """The first bytes of a file; none where it cannot be read, which loading will say."""
    try:
        with file.open("rb") as opened:
            return opened.read(length)
    except OSError:
        return b""


def refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    """Refuses a configuration whose weights are quantised.

    Args:
        config: ``config.json``.
        name: How the message calls the model.

    Raises:
        ModelError: names the method and the remedy.
    """
    for part in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        for key in ("quantization_config", "compression_config", "quantization"):
            settings = part.get(key)
            if not settings:
                continue
            method = "unknown method"
            if key == "quantization":  # as MLX writes it
                method = "MLX"
            elif isinstance(settings, Mapping):
                bits = [key for key in settings if str(key).startswith("load_in")]
                method = settings.get("quant_method") or (bits and "bitsandbytes") or method
            raise ModelError(
                f"the weights of {name} are quantised ({method}, says {key} in "
                "config.json), and quantised weights cannot be edited; edit the model they were "
                "made from, then quantise the result"
            )


def require_decoder(config: PreTrainedConfig, name: str) -> None:
    """Refuses the configuration of a model that is no decoder of text.

    Args:
        config: The configuration.
        name: How the message calls the model.

    Raises:
        ModelError: an encoder, an encoder-decoder model, or a type without a language model.
    """
    kind = config.model_type
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # Encoders such as BERT are also in the causal table, for use with is_decoder=True.
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    bidirectional = encoder and not getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder model"
    elif bidirectional or not (
        remote
        or kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or kind in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    ):
        problem = "not a causal language model"
    else:
        return
    raise ModelError(
        f"model {name!r} (type {kind!r}) is {problem}; only decoder-only models can be edited"
    )


def require_shapes(
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]], kind: str, source: str
) -> None:
    """Refuses weights whose shapes are not those that the configuration asks for.

    Args:
        mismatched: Name, stored shape and wanted shape of each.
        kind: The model's class.
        source: Where the weights are.

    Raises:
        ModelError: names the first of them with both shapes.
    """
    for name, stored, wanted in sorted(mismatched):
        raise ModelError(
            f"the weights in {source} do not fit config.json: {name!r} has the shape "
            f"{tuple(stored)}, where {kind} needs {tuple(wanted)}; copy both from one place"
        )


def unread_weights(names: Collection[str], source: str) -> str:
    """One line about weights in the files that the model has no place for.

    >>> unread_weights({"b", "a"}, "DIR")
    "2 weights in DIR, such as 'a', have no place in the model and stay as they are"
    """
    return (
        f"{len(names)} weights in {source}, such as {min(names)!r}, have no place in the model and "
        "stay as they are"
    )


def require_finite(model: nn.Module, source: str) -> None:
    """Refuses a loaded model whose weights hold NaN or infinity.

    Raises:
        ModelError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        # Of least and greatest, both are NaN if anything is.
        if parameter.numel() and not all(v.isfinite() for v in torch.aminmax(parameter)):
            raise ModelError(
                f"the weights in {source} are damaged: {name!r} holds numbers that are not finite "
                "(NaN or infinity); copy the folder again"
            )


def _check_tokenizer(file: Path) -> None:
    """Refuses a tokenizer file that is none, of which transformers says only what it misses."""
    if not file.is_file():
        return
    try:
        model = parse_json(file.read_text(encoding="utf-8"))["model"]
        problem = None if isinstance(model, dict) else "its field 'model' is no object"
    except (OSError, ValueError) as error:
        problem = str(error)
    except (KeyError, TypeError, IndexError):
        problem = "it has no field 'model'"
    if problem is not None:
        raise ModelError(f"{file} is damaged: {problem}; copy the file again")


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read, which loading will say."""
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder once all links are followed."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))
