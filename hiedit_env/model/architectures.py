"""Where the editable weight matrices of a language model are: the table and the search.

A *layer* is one candidate weight matrix of a block. Kinds of models whose default layers were
chosen by hand are rows of :data:`ARCHITECTURES`; the layers that were edited in published work are
in :mod:`.presets`. All other models are read by their structure, see :mod:`.structure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hiedit_env.errors import LayerError
from hiedit_env.model.layer_files import is_layer_file, read_layers, structure_fingerprint
from hiedit_env.model.patterns import match
from hiedit_env.model.presets import PRESETS, Preset, find_preset
from hiedit_env.model.structure import (
    GATE,
    OUT,
    UP,
    DepthRange,
    default_layers,
    find_blocks,
    is_editable,
    matrices_to_measure,
    mlp_outputs,
    sizes,
    text_config,
)

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "Architecture",
    "CandidateLayer",
    "DepthRange",
    "Preset",
    "all_candidates",
    "block_list",
    "find_candidates",
    "find_preset",
    "model_structure",
    "outputs_of_mlps",
]


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
    gate = replace(GATE, matrix="mlp.gate_proj")
    up = replace(UP, matrix="mlp.up_proj")
    return Architecture(model_type, blocks, _GATED, (gate, up))


def _two_matrices(model_type: str, blocks: str, matrices: tuple[str, str]) -> Architecture:
    out = replace(OUT, matrix=matrices[1])
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


def block_list(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The model's decoder blocks and their dotted name relative to ``model.base_model``.

    For a ``model_type`` outside :data:`ARCHITECTURES`, see :func:`.structure.find_blocks`.

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
    return find_blocks(model)


def find_candidates(
    model: PreTrainedModel, layers: str | Sequence[str] | None = None, name: str | None = None
) -> tuple[CandidateLayer, ...]:
    """The candidate layers of a model in forward order: by block, then within the block.

    Args:
        model: A decoder-only language model.
        layers: None for the preset of ``name`` or, failing that, the default rule (see
            :data:`ARCHITECTURES` and :func:`.structure.default_layers`); the name of a preset; or
            one or several patterns over the names in ``model.named_modules()``. A pattern is a
            shell-style glob in which ``{10-14}`` and ``{1,3,5-7}`` stand for numbers and
            ``{up,gate}`` for names; each must match. A pattern that ends in ``.json`` is the path
            of a file that ``hiedit layers`` wrote, see :mod:`.layer_files`.
        name: Name, hub id or path of the model; its last part selects the preset. A preset of
            another model type or number of blocks is not this model's and is passed over.

    Returns:
        At least one layer, without repetition.

    Raises:
        LayerError: if a pattern is malformed, matches nothing, or matches something that is not a
            floating-point ``nn.Linear`` or ``Conv1D`` inside a block; if a preset or a file asked
            for is for another model; if no pattern is given and no block holds a matrix that can be
            edited.
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
        patterns = [f"{root}.{layer}" for layer in _own_layers(model, blocks, name)]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise LayerError("layers is empty; give at least one pattern, or None for the default")
    matched: set[str] = set()
    for pattern in patterns:
        if is_layer_file(pattern):
            own = structure_fingerprint(kind, modules, root)
            matched.update(read_layers(pattern, own, modules))
        else:
            matched.update(match(pattern, modules))
    # Modules are registered in forward order within a block in every architecture of the table.
    return tuple(_candidate(n, m, root) for n, m in modules.items() if n in matched)


def _own_layers(model: PreTrainedModel, blocks: nn.ModuleList, name: str | None) -> Sequence[str]:
    """Relative names of the preset or default layers."""
    kind = model.config.model_type
    preset = find_preset(name) if name is not None else None
    if preset is not None and preset.fits(kind, len(blocks)):
        return preset.layers
    if (architecture := ARCHITECTURES.get(kind)) is not None:
        return [
            f"{block}.{rule.matrix}"
            for rule in architecture.default
            for block in rule.blocks(len(blocks))
        ]
    found = default_layers(list(blocks), _hidden(model))
    if not found:
        raise LayerError(
            f"no block of {type(model).__name__} holds a matrix (nn.Linear or Conv1D) that all "
            f"tokens pass and that writes to the residual stream; name layers by a pattern"
        )
    return found


def all_candidates(model: PreTrainedModel) -> tuple[CandidateLayer, ...]:
    """Every matrix of every block that is worth measuring, in forward order.

    The matrices of the MLP and the attention output, see :func:`.structure.matrices_to_measure`.

    Raises:
        LayerError: there is none.
    """
    blocks, _ = block_list(model)
    modules = dict(model.named_modules())
    root = next(full for full, module in modules.items() if module is blocks)
    names = {f"{root}.{name}" for name in matrices_to_measure(list(blocks), _hidden(model))}
    if not names:
        raise LayerError(
            f"no block of {type(model).__name__} holds a matrix (nn.Linear or Conv1D of ordinary "
            "floating-point numbers) that all tokens pass; name layers by a pattern"
        )
    return tuple(_candidate(n, m, root) for n, m in modules.items() if n in names)


def outputs_of_mlps(model: PreTrainedModel, layers: Sequence[CandidateLayer]) -> tuple[int, ...]:
    """Indices of the layers that lead an MLP back to the residual stream, such as ``down_proj``.

    Args:
        model: The model.
        layers: Its candidate layers.
    """
    outputs = mlp_outputs(list(block_list(model)[0]), _hidden(model))
    return tuple(i for i, layer in enumerate(layers) if any(layer.module is one for one in outputs))


def model_structure(model: PreTrainedModel) -> str:
    """Fingerprint by which files of layers know the model, see :mod:`.layer_files`."""
    blocks, _ = block_list(model)
    modules = dict(model.named_modules())
    root = next(full for full, module in modules.items() if module is blocks)
    return structure_fingerprint(model.config.model_type, modules, root)


def _hidden(model: PreTrainedModel) -> int:
    """Size of the residual stream."""
    hidden = getattr(text_config(model.config), "hidden_size", None)
    if hidden is None:
        hidden = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[-1]
    return int(hidden)


def _candidate(name: str, module: nn.Module, root: str) -> CandidateLayer:
    weight = getattr(module, "weight", None)
    if hasattr(module, "qweight") or (
        isinstance(module, nn.Linear | Conv1D) and not is_editable(module)
    ):
        # Quantisation libraries store integers or 8-bit floats, or wrap the tensor in a subclass.
        raise LayerError(
            f"layer {name!r} ({type(module).__name__}) holds quantised weights "
            f"({getattr(weight, 'dtype', None)}), which cannot be edited; load the model in "
            f"float32, bfloat16 or float16"
        )
    if not isinstance(module, nn.Linear | Conv1D):
        fused = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if fused:
            raise LayerError(
                f"module {name!r} ({type(module).__name__}) holds routed experts fused in "
                f"3-D parameters ({', '.join(fused)}); each expert sees only some of the tokens, "
                f"so they cannot be edited; name a shared expert or the attention output"
            )
        raise LayerError(
            f"module {name!r} is a {type(module).__name__}, not nn.Linear or Conv1D; "
            f"let the pattern name weight matrices only"
        )
    d_in, d_out = sizes(module)
    index = name.removeprefix(f"{root}.").partition(".")[0]
    if not name.startswith(f"{root}.") or not index.isdecimal():
        raise LayerError(f"layer {name!r} lies outside the blocks {root!r} and cannot be edited")
    return CandidateLayer(name, module, int(index), d_in, d_out, isinstance(module, nn.Linear))
