"""Where the editable weight matrices of a language model are: the table, the presets, the search.

A *layer* is one candidate weight matrix of a block. Everything that depends on the kind of model is
a row of :data:`ARCHITECTURES`; the layers that were edited in published work are in
:data:`PRESETS`. Models that are in neither can be edited too, by giving patterns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import floor
from pathlib import PurePath
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiedit_env.errors import LayerError
from hiedit_env.model.built_in import BUILT_IN


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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of model, as transformers 5 builds it.

    Args:
        model_type: ``config.model_type``.
        blocks: Dotted name of the list of blocks, relative to ``model.base_model``.
        matrices: MLP weight matrices inside a block, in the order in which they are executed.
        default: The layers taken when no preset fits and no pattern is given.
    """

    model_type: str
    blocks: str
    matrices: tuple[str, ...]
    default: tuple[DepthRange, ...]


_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _gated(model_type: str, blocks: str = "layers") -> Architecture:
    # Default: the depths of the Llama-3-8B preset (32 blocks).
    gate = DepthRange("mlp.gate_proj", Fraction(11, 32), Fraction(15, 32))
    up = DepthRange("mlp.up_proj", Fraction(18, 32), Fraction(24, 32))
    return Architecture(model_type, blocks, _GATED, (gate, up))


def _two_matrices(model_type: str, blocks: str, matrices: tuple[str, str]) -> Architecture:
    # Default: the depths of the GPT-J preset (28 blocks).
    out = DepthRange(matrices[1], Fraction(18, 28), Fraction(26, 28))
    return Architecture(model_type, blocks, matrices, (out,))


_ROWS = (
    _gated("llama"),
    _gated("mistral"),
    _gated("qwen2"),
    _gated("qwen3"),
    _gated("gemma2"),
    _gated("gemma3", "language_model.layers"),
    _gated("gemma3_text"),
    _two_matrices("gpt2", "h", ("mlp.c_fc", "mlp.c_proj")),
    _two_matrices("gptj", "h", ("mlp.fc_in", "mlp.fc_out")),
    _two_matrices("phi", "layers", ("mlp.fc1", "mlp.fc2")),
    _two_matrices("phi3", "layers", ("mlp.gate_up_proj", "mlp.down_proj")),
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({r.model_type: r for r in _ROWS})
"""Model type to :class:`Architecture`.

The default rule, for models without a preset, carries published relative depths over to the
model's number of blocks n (index = depth × n, rounded half up). Where gate and up projections are
separate: ``gate_proj`` from 11/32 to 15/32 and ``up_proj`` from 18/32 to 24/32 (Llama-3-8B in
HiEdit). Where the MLP has two matrices: the second one from 18/28 to 26/28 (GPT-J in UltraEdit).
"""


@dataclass(frozen=True, slots=True)
class Preset:
    """The layers edited in one published setting.

    Args:
        model_types: Values of ``config.model_type`` this preset is for.
        num_blocks: Number of blocks of the model it is for.
        layers: Names relative to the list of blocks, e.g. ``"11.mlp.gate_proj"``, forward order.
        source: Where the choice was taken from.
        aliases: Further names of the model, lower case: the last part of a hub id or path.
    """

    model_types: tuple[str, ...]
    num_blocks: int
    layers: tuple[str, ...]
    source: str
    aliases: tuple[str, ...] = ()

    def fits(self, model_type: str, num_blocks: int) -> bool:
        """Whether the preset is for a model of this type and number of blocks."""
        return model_type in self.model_types and num_blocks == self.num_blocks


def _names(*ranges: tuple[str, int, int]) -> tuple[str, ...]:
    """Relative layer names of ``(matrix, first block, last block)``, in forward order."""
    pairs = [
        (block, order, f"{block}.mlp.{matrix}")
        for order, (matrix, first, last) in enumerate(ranges)
        for block in range(first, last + 1)
    ]
    return tuple(name for _, _, name in sorted(pairs))


_ULTRA = "XiaojieGu/UltraEdit config/model/"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": Preset(
            ("llama",),
            3,
            _names(*BUILT_IN["tiny"].layers),
            "this package: all but the first block of its built-in tiny model",
        ),
        "planted": Preset(
            ("llama",),
            7,
            _names(*BUILT_IN["planted"].layers),
            "this package: where the facts of its built-in planted model are",
        ),
        "smollm2-135m": Preset(
            ("llama",),
            30,
            _names(*BUILT_IN["smollm2-135m"].layers),
            "this package: the Llama-3-8B depths on 30 blocks",
            ("smollm2-135m-instruct",),
        ),
        "llama-3-8b": Preset(
            ("llama",),
            32,
            _names(("gate_proj", 11, 15), ("up_proj", 18, 24)),
            f"yangfanww/hiedit config/model/llama-3.yaml and {_ULTRA}llama-3-instruct.yaml",
            ("llama-3", "llama-3-instruct", "meta-llama-3-8b", "meta-llama-3-8b-instruct"),
        ),
        "gemma-2-9b": Preset(
            ("gemma2",),
            42,
            _names(("gate_proj", 32, 40), ("up_proj", 32, 40)),
            "yangfanww/hiedit config/model/gemma-2.yaml",
            ("gemma-2", "gemma-2-9b-it"),
        ),
        "gpt-j-6b": Preset(
            ("gptj",), 28, _names(("fc_out", 18, 26)), f"{_ULTRA}gpt-j.yaml", ("gpt-j",)
        ),
        "mistral-7b": Preset(
            ("mistral",),
            32,
            _names(("down_proj", 29, 30)),
            f"{_ULTRA}mistral-7b.yaml",
            ("mistral-7b-v1.3", "mistral-7b-instruct-v1.3"),
        ),
        "qwen2.5-7b": Preset(
            ("qwen2",),
            28,
            _names(("gate_proj", 18, 26), ("up_proj", 18, 26)),
            f"{_ULTRA}qwen2.5-7b.yaml",
            ("qwen2.5-7b-instruct",),
        ),
        "phi-4": Preset(("phi3",), 40, _names(("down_proj", 30, 38)), f"{_ULTRA}phi-4.yaml"),
        "gemma-3-27b": Preset(
            ("gemma3", "gemma3_text"),
            62,
            _names(("gate_proj", 52, 60), ("up_proj", 52, 60)),
            f"{_ULTRA}gemma-3-27b.yaml",
            ("gemma-3-27b-it", "gemma-3-27b-pt"),
        ),
    }
)
"""Model name to :class:`Preset`: the lines of the files named as source that are not commented out
(files as of HiEdit commit 1d76ab4; UltraEdit sets other layers for some data sets in comments)."""


@dataclass(frozen=True, slots=True)
class CandidateLayer:
    """One weight matrix that may be edited.

    Args:
        name: Full dotted name in ``model.named_modules()``.
        module: The ``nn.Linear`` or transformers ``Conv1D``.
        block: Index of the block it belongs to.
        d_in: Size of the layer's input.
        d_out: Size of the layer's output.
        is_transposed: True if the weight is stored as d_out × d_in (``nn.Linear``), False if it is
            stored as d_in × d_out (``Conv1D``).
    """

    name: str
    module: nn.Module
    block: int
    d_in: int
    d_out: int
    is_transposed: bool


def find_preset(name: str) -> Preset | None:
    """The preset of a model name, hub id or path, or None.

    >>> find_preset("HuggingFaceTB/SmolLM2-135M-Instruct").layers[0]
    '10.mlp.gate_proj'
    """
    key = PurePath(name).name.casefold()
    for preset_name, preset in PRESETS.items():
        if key == preset_name or key in preset.aliases:
            return preset
    return None


def block_list(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The model's decoder blocks and their dotted name relative to ``model.base_model``.

    For a ``model_type`` outside :data:`ARCHITECTURES` it is the only ``nn.ModuleList`` of the base
    model, not counting lists inside lists, that has ``config.num_hidden_layers`` entries.

    Raises:
        LayerError: if there is no such list, or more than one.
    """
    base = model.base_model
    architecture = ARCHITECTURES.get(model.config.model_type)
    lists = {name: m for name, m in base.named_modules() if isinstance(m, nn.ModuleList)}
    if architecture is not None:
        if architecture.blocks not in lists:
            raise LayerError(
                f"{type(base).__name__} has no list of blocks {architecture.blocks!r}, which "
                f"model type {architecture.model_type!r} has in transformers 5; found {list(lists)}"
            )
        return lists[architecture.blocks], architecture.blocks
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        name
        for name, modules in lists.items()
        if len(modules) == depth and not any(name.startswith(f"{outer}.") for outer in lists)
    ]
    if len(found) != 1:
        raise LayerError(
            f"model type {model.config.model_type!r}: expected one nn.ModuleList of {depth} blocks "
            f"(config.num_hidden_layers) in {type(base).__name__}, found {found}; not editable"
        )
    return lists[found[0]], found[0]


def find_candidates(
    model: PreTrainedModel, layers: str | Sequence[str] | None = None, name: str | None = None
) -> tuple[CandidateLayer, ...]:
    """The candidate layers of a model in forward order: by block, then within the block.

    Args:
        model: A decoder-only language model.
        layers: None for the preset of ``name`` or, failing that, the default rule (see
            :data:`ARCHITECTURES`); the name of a preset; or one or several patterns over the
            names in ``model.named_modules()``. A pattern is a shell-style glob in which ``{10-14}``
            and ``{1,3,5-7}`` stand for numbers and ``{up,gate}`` for names; each must match.
        name: Name, hub id or path of the model; its last part selects the preset. A preset of
            another model type or number of blocks is not this model's and is passed over.

    Returns:
        At least one layer, without repetition.

    Raises:
        LayerError: if a pattern is malformed, matches nothing, or matches something that is not a
            floating-point ``nn.Linear`` or ``Conv1D`` inside a block; if a preset asked for is for
            another model; if no pattern is given for a model type without a default rule.
    """
    blocks, _ = block_list(model)
    kind = model.config.model_type
    modules = dict(model.named_modules())
    root = next(full for full, module in modules.items() if module is blocks)
    if isinstance(layers, str) and (preset := find_preset(layers)) is not None:
        if not preset.fits(kind, len(blocks)):
            raise LayerError(
                f"preset {layers!r} is for {' or '.join(preset.model_types)} models of "
                f"{preset.num_blocks} blocks; this is a {kind} model of {len(blocks)} blocks; "
                f"give patterns, or layers=None for the default"
            )
        patterns = [f"{root}.{layer}" for layer in preset.layers]
    elif layers is None:
        patterns = [f"{root}.{layer}" for layer in _own_layers(kind, len(blocks), name)]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise LayerError("layers is empty; give at least one pattern, or None for the default")
    matched = {found for pattern in patterns for found in _match(pattern, modules)}
    # Modules are registered in forward order within a block in every architecture of the table.
    return tuple(_candidate(n, m, root) for n, m in modules.items() if n in matched)


def _own_layers(model_type: str, num_blocks: int, name: str | None) -> tuple[str, ...]:
    """Relative names of the preset or default layers."""
    preset = find_preset(name) if name is not None else None
    if preset is not None and preset.fits(model_type, num_blocks):
        return preset.layers
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise LayerError(
            f"no default layers for model type {model_type!r} (known: {', '.join(ARCHITECTURES)}); "
            f"give a pattern such as layers='model.layers.{{1-2}}.mlp.up_proj'"
        )
    return tuple(
        f"{block}.{rule.matrix}"
        for rule in architecture.default
        for block in rule.blocks(num_blocks)
    )


def _expand(pattern: str, whole: str) -> Iterator[str]:
    """Replace every ``{...}`` by each of its parts, lazily: a range may be absurdly long."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        if "}" in pattern:
            raise LayerError(f"pattern {whole!r} has a '}}' without '{{'")
        yield pattern
        return
    body, closing, tail = rest.partition("}")
    for part in body.split(","):
        if closing and "}" not in head and re.fullmatch(r"[A-Za-z_]\w*", part):
            yield from _expand(f"{head}{part}{tail}", whole)
            continue
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if ends is None or not closing or "}" in head or int(ends[1]) > int(ends[2] or ends[1]):
            raise LayerError(
                f"pattern {whole!r}: braces hold numbers {{1,3}}, rising ranges {{10-14}} or names "
                "{up,gate}"
            )
        for number in range(int(ends[1]), int(ends[2] or ends[1]) + 1):
            yield from _expand(f"{head}{number}{tail}", whole)


def _match(pattern: object, modules: Mapping[str, nn.Module]) -> list[str]:
    if not isinstance(pattern, str):
        raise LayerError(f"a layer pattern must be text, got {type(pattern).__name__}")
    matched: list[str] = []
    for single in _expand(pattern, pattern):
        found = [name for name in modules if name and fnmatchcase(name, single)]
        if not found:
            pool = [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)]
            close = difflib.get_close_matches(single, pool, n=3, cutoff=0.3) or pool[:3]
            part = "" if single == pattern else f" (part of {pattern!r})"
            raise LayerError(
                f"pattern {single!r}{part} matches no module; close names: {', '.join(close)}"
            )
        matched.extend(found)
    return matched


_EDITABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _candidate(name: str, module: nn.Module, root: str) -> CandidateLayer:
    weight = getattr(module, "weight", None)
    stored = getattr(weight, "dtype", None)
    if hasattr(module, "qweight") or (
        isinstance(module, nn.Linear | Conv1D)
        # Quantisation libraries store integers or 8-bit floats, or wrap the tensor in a subclass.
        and (stored not in _EDITABLE_DTYPES or type(module.weight.data) is not torch.Tensor)
    ):
        raise LayerError(
            f"layer {name!r} ({type(module).__name__}) holds quantised weights ({stored}), which "
            f"cannot be edited; load the model in float32, bfloat16 or float16"
        )
    # The type decides: a square weight says nothing about which side is the input.
    if isinstance(module, nn.Linear):
        d_in, d_out, is_transposed = module.in_features, module.out_features, True
    elif isinstance(module, Conv1D):
        d_in, d_out, is_transposed = module.nx, module.nf, False
    else:
        raise LayerError(
            f"module {name!r} is a {type(module).__name__}, not nn.Linear or Conv1D; "
            f"let the pattern name weight matrices only"
        )
    index = name.removeprefix(f"{root}.").partition(".")[0]
    if not name.startswith(f"{root}.") or not index.isdecimal():
        raise LayerError(f"layer {name!r} lies outside the blocks {root!r} and cannot be edited")
    return CandidateLayer(name, module, int(index), d_in, d_out, is_transposed)
