"""The layers that were edited in published work, by the name of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType

from hiedit_env.datasets.difficulty import is_world
from hiedit_env.model.built_in import BUILT_IN, built_in


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
            ("mistral-7b-v0.3", "mistral-7b-instruct-v0.3"),
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


def find_preset(name: str) -> Preset | None:
    """The preset of a model name, hub id or path, or None; of a planted world its own layers.

    >>> find_preset("HuggingFaceTB/SmolLM2-135M-Instruct").layers[0]
    '10.mlp.gate_proj'
    """
    if is_world(name):
        ((matrix, first, last),) = built_in(name).layers
        layers = _names((matrix, first, last))
        return Preset(
            ("llama",), 1 + last, layers, "this package: where a planted world's facts are"
        )
    key = PurePath(name).name.casefold()
    for preset_name, preset in PRESETS.items():
        if key == preset_name or key in preset.aliases:
            return preset
    return None
