"""The structure of a decoder, read from its modules: its blocks, and the matrices in them.

Nothing here knows a model type. It is what models outside the table of
:mod:`hiedit_env.model.architectures` are edited by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiedit_env.errors import LayerError

_IS_INPUT = re.compile(r"gate|query|key|value|^[qkv]+_|qkv")

EDITABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights that can be edited."""


@dataclass(frozen=True, slots=True)
class DepthRange:
    """Blocks between two relative depths, both included; part of the default rule.

    Args:
        matrix: Name of the matrix inside a block, e.g. ``"mlp.gate_proj"``.
        first: Index of the first block divided by the number of blocks.
        last: Index of the last block divided by the number of blocks.
    """

    matrix: str
    first: Fraction
    last: Fraction

    def blocks(self, num_blocks: int) -> range:
        """Block indices in a model of ``num_blocks`` blocks, rounded half up, never empty.

        >>> DepthRange("mlp.up_proj", Fraction(18, 32), Fraction(24, 32)).blocks(30)
        range(17, 24)
        """
        exact = (depth * num_blocks + Fraction(1, 2) for depth in (self.first, self.last))
        first, last = (min(floor(index), num_blocks - 1) for index in exact)
        return range(first, last + 1)


GATE = DepthRange("gate", Fraction(11, 32), Fraction(15, 32))
"""Depths of gate projections in the Llama-3-8B preset (32 blocks)."""

UP = DepthRange("up", Fraction(18, 32), Fraction(24, 32))
"""Depths of up projections in the Llama-3-8B preset (32 blocks)."""

OUT = DepthRange("out", Fraction(18, 28), Fraction(26, 28))
"""Depths of an MLP's second matrix in the GPT-J preset (28 blocks)."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the decoder; the whole where there is no part."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several parts could be meant
        return cast(PreTrainedConfig, getattr(config, "decoder", config))


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the blocks, as transformers finds it; else ``model.base_model``."""
    try:
        decoder = cast(Any, model).get_decoder()
    except (AttributeError, NotImplementedError):
        return model.base_model
    has_lists = isinstance(decoder, nn.Module) and any(
        isinstance(module, nn.ModuleList) for module in decoder.modules()
    )
    return cast(nn.Module, decoder) if has_lists else model.base_model


def find_blocks(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The decoder's blocks and their dotted name relative to ``model.base_model``.

    They are the only ``nn.ModuleList`` of the decoder with ``num_hidden_layers`` entries that hold
    weight matrices; where there is none of that length, the longest list. Lists inside lists do
    not count, nor do lists deeper in the model than another one.

    Raises:
        LayerError: there is no such list, or more than one.
    """
    base = model.base_model
    inside = {id(module) for module in decoder_of(model).modules()}
    lists = {name: m for name, m in base.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {
        name: modules
        for name, modules in lists.items()
        if id(modules) in inside
        and not any(name.startswith(f"{other}.") for other in lists)
        and any(isinstance(m, nn.Linear | Conv1D) for m in modules.modules())
    }
    depth = getattr(text_config(model.config), "num_hidden_layers", None)
    found = [name for name, modules in outer.items() if len(modules) == depth]
    if not found:
        longest = max((len(modules) for modules in outer.values()), default=0)
        found = [name for name, modules in outer.items() if len(modules) == longest]
    # Lists of other parts, such as a vision tower, lie deeper.
    found = [n for n in found if n.count(".") == min(other.count(".") for other in found)]
    if len(found) != 1:
        raise LayerError(
            f"model type {model.config.model_type!r}: expected one nn.ModuleList of {depth} blocks "
            f"(config.num_hidden_layers) in {type(base).__name__}, found {found}; not editable"
        )
    return outer[found[0]], found[0]


def is_editable(module: nn.Module) -> bool:
    """Whether a module is a weight matrix of ordinary floating-point numbers."""
    if not isinstance(module, nn.Linear | Conv1D) or hasattr(module, "qweight"):
        return False
    weight = module.weight
    return weight.dtype in EDITABLE_DTYPES and type(weight.data) is torch.Tensor


def sizes(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of an ``nn.Linear`` or ``Conv1D``."""
    # The type decides: a square weight says nothing about which side is the input.
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def default_layers(blocks: Sequence[nn.Module], hidden: int) -> list[str]:
    """The generic default: names relative to the list of blocks, in no particular order.

    Block by block, at the relative depths of published work:

    - an MLP of three matrices (two from the hidden size to one inner size and one back, a shared
      expert included): the first from 11/32 to 15/32, the second from 18/32 to 24/32;
    - otherwise, from 18/28 to 26/28, the matrix that writes to the residual stream: the last of
      the MLP or mixer, the attention output where the MLP has none, such as a mixture of experts.

    Experts that see only the tokens routed to them, and matrices that several blocks share, are
    never among them. Where the depths hold nothing, all blocks do.

    Args:
        blocks: The decoder's blocks.
        hidden: Size of the residual stream.
    """
    uses = Counter(id(m.weight) for b in blocks for _, m in _matrices(b))
    chosen: list[str] = []
    fallback: list[str] = []
    for index, block in enumerate(blocks):
        own = {name: m for name, m in _matrices(block) if uses[id(m.weight)] == 1}
        gated = _gated(own, hidden)
        out = _output(own, hidden)
        pairs = zip((GATE, UP), gated, strict=True) if gated else ((OUT, out),)
        for depths, name in pairs:
            if name is None:
                continue
            fallback.append(f"{index}.{name}")
            if index in depths.blocks(len(blocks)):
                chosen.append(f"{index}.{name}")
    return chosen or fallback


def matrices_to_measure(blocks: Sequence[nn.Module], hidden: int) -> list[str]:
    """Matrices of all blocks that may hold facts: names relative to the list of blocks.

    Per block the first matrices of the MLP (gate and up, or the one that widens), the matrix of the
    MLP or mixer that writes to the residual stream, and the attention output. Experts that see only
    the tokens routed to them, and matrices that several blocks share, are left out.

    Args:
        blocks: The decoder's blocks.
        hidden: Size of the residual stream.
    """
    uses = Counter(id(m.weight) for b in blocks for _, m in _matrices(b))
    found: list[str] = []
    for index, block in enumerate(blocks):
        own = {name: m for name, m in _matrices(block) if uses[id(m.weight)] == 1}
        rest = {name: m for name, m in own.items() if not _is_attention(name)}
        attention = {name: m for name, m in own.items() if name not in rest}
        chosen: list[str | None] = [*(_gated(own, hidden) or ())]
        out = _output(rest, hidden)
        if out is not None and not chosen:
            inner, parent = sizes(rest[out])[0], out.rpartition(".")[0]
            chosen += [
                name
                for name, m in rest.items()
                if name != out
                and name.rpartition(".")[0] == parent
                and sizes(m)[0] == hidden
                and sizes(m)[1] % inner == 0
            ]
        back = _output(attention, hidden)
        if back is not None and _IS_INPUT.search(back.rpartition(".")[2]):
            back = None
        found += [f"{index}.{name}" for name in (*chosen, out, back) if name is not None]
    return found


def mlp_outputs(blocks: Sequence[nn.Module], hidden: int) -> list[nn.Module]:
    """The matrix of every block's MLP or mixer that writes to the residual stream, in order.

    A block without one has none in the list: what belongs to attention, to experts that see only
    the tokens routed to them and to several blocks does not count.

    Args:
        blocks: The decoder's blocks.
        hidden: Size of the residual stream.
    """
    uses = Counter(id(m.weight) for b in blocks for _, m in _matrices(b))
    found: list[nn.Module] = []
    for block in blocks:
        own = {
            name: m
            for name, m in _matrices(block)
            if uses[id(m.weight)] == 1 and not _is_attention(name)
        }
        name = _output(own, hidden)
        if name is not None:
            found.append(own[name])
    return found


def _matrices(block: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Editable matrices of a block that all tokens of a text pass."""
    if "CrossAttention" in type(block).__name__:
        return  # idle without an image or a sound
    for name, module in block.named_modules():
        if is_editable(module) and not _is_expert(block, name):
            yield name, cast("nn.Linear | Conv1D", module)


def _is_expert(block: nn.Module, name: str) -> bool:
    """Whether a matrix belongs to one of several experts."""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(
        "expert" in path and isinstance(block.get_submodule(path), nn.ModuleList | nn.ModuleDict)
        for path in above
    )


def _is_attention(name: str) -> bool:
    return any("attn" in part.lower() or "attention" in part.lower() for part in name.split("."))


def _gated(matrices: Mapping[str, nn.Module], hidden: int) -> tuple[str, str] | None:
    """The two first matrices of the block's last gated MLP."""
    found = None
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in matrices):
        inside = [n for n in matrices if n.rpartition(".")[0] == parent]
        inner = [n for n in inside if sizes(matrices[n])[0] == hidden]
        back = [n for n in inside if sizes(matrices[n])[1] == hidden]
        if len(inside) != 3 or not back or _is_attention(parent):
            continue
        width = sizes(matrices[back[-1]])[0]
        inner = [n for n in inner if n != back[-1] and sizes(matrices[n])[1] == width]
        if len(inner) == 2:
            # As in Llama, whatever the order in which they are registered.
            inner.sort(key=lambda n: "gate" not in n.rpartition(".")[2])
            found = inner[0], inner[1]
    return found


def _output(matrices: Mapping[str, nn.Module], hidden: int) -> str | None:
    """The matrix that writes to the residual stream: the widest of the MLP, else of attention."""
    back = [name for name in matrices if sizes(matrices[name])[1] == hidden]

    def rank(name: str) -> tuple[bool, int]:
        # Gates, queries, keys and values may have the same shape as an output.
        return not _IS_INPUT.search(name.rpartition(".")[2]), sizes(matrices[name])[0]

    # sorted() is stable: of equally wide ones the last.
    for part in ([n for n in back if not _is_attention(n)], back):
        if part:
            return sorted(part, key=rank)[-1]
    return None
