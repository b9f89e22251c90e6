"""The blocks of a model from one on, run again and again, in a precision of choice.

Passes that only look for a direction, as the search for a value does, need less precision than the
model's own. Where the processor multiplies bfloat16 matrices, they cost half as much or less.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hiedit_env.errors import SettingsError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.memory_budget import available_memory
from hiedit_env.resident.forward import CappedHead, Halves
from hiedit_env.resident.split_model import BlockArguments, SplitModel, through
from hiedit_env.resident.weights import same_version

#: Fewest parameters of a model for which copies in another precision pay.
_LARGE = 50_000_000


class Model(Protocol):
    """What is used of a :class:`.resident.ResidentLLM`; see there."""

    layers: tuple[CandidateLayer, ...]
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    halves: Halves
    head: Callable[[Tensor], Tensor]

    def version(self, index: int) -> tuple[object, ...]:
        """Differs whenever one layer's weight differs."""

    def present_weight(self, index: int) -> Tensor:
        """One layer's weight as the model runs with it."""

    def with_changes(self) -> AbstractContextManager[None]:
        """The model as this object sees it."""

    def hooked(self, hooks: Mapping[int, Any]) -> AbstractContextManager[None]:
        """Registers forward hooks on candidate layers."""


class UpperHalf:
    """Blocks from one on, and the vocabulary projection.

    In the model's own precision these are the model's own modules; in another one they are copies,
    brought up to date by :meth:`update`.

    Args:
        llm: The model.
        split: Its halves.
        first: Index of the first block; not below the first candidate's.
        dtype: Floating point type that it is run in.
    """

    def __init__(self, llm: Model, split: SplitModel, first: int, dtype: torch.dtype) -> None:
        self.first, self.dtype, self._split = first, dtype, split
        self._own = list(split.blocks[first - split.first :])
        self.blocks = self._own
        self._head = llm.head
        #: Whether it holds weights of its own.
        self.is_copy = dtype != llm.dtype
        if self.is_copy:
            self.blocks = [copy.deepcopy(block).to(dtype) for block in self._own]
            if isinstance(llm.head, CappedHead):
                self._head = llm.head.to(dtype)
        self._twins = {
            id(own): twin
            for block, copied in zip(self._own, self.blocks, strict=True)
            for own, twin in zip(block.modules(), copied.modules(), strict=True)
        }
        self._candidates = {
            id(layer.module): i for i, layer in enumerate(llm.layers) if layer.block >= first
        }
        self._versions: dict[tuple[int, str], tuple[object, ...]] = {}

    @torch.inference_mode(False)
    def update(self, llm: Model) -> None:
        """Takes over the weights that were changed since the last call.

        Args:
            llm: The model, or a fork of it whose changes count.
        """
        if self.dtype == llm.dtype:
            return
        with torch.no_grad():
            for block in self._own:
                for module in block.modules():
                    index = self._candidates.get(id(module))
                    for name, own in module.named_parameters(recurse=False):
                        version: tuple[object, ...] = (own.data_ptr(), own._version)
                        if index is not None and name == "weight":
                            version = llm.version(index)
                        key = id(module), name
                        if same_version(self._versions.get(key, ()), version):
                            continue
                        weight: Tensor = own
                        if index is not None and name == "weight":
                            weight = llm.present_weight(index)
                        getattr(self._twins[id(module)], name).copy_(weight)
                        self._versions[key] = version

    def features(self, arguments: Sequence[BlockArguments], hidden: Tensor) -> Tensor:
        """Final hidden states, B × T × hidden size, in the model's own dtype.

        Args:
            arguments: What each block is given besides, in this half's dtype.
            hidden: B × T × hidden size, what enters the first block.
        """
        left = through(self.blocks, arguments, hidden.to(self.dtype))
        return self._split.finished(left.to(hidden.dtype))

    def project(self, features: Tensor) -> Tensor:
        """N × features to N × vocabulary float32."""
        own = isinstance(self._head, CappedHead) and self.dtype != features.dtype
        return self._head(features.to(self.dtype) if own else features).float()

    @contextmanager
    def hooked(self, llm: Model, hooks: Mapping[int, Any]) -> Iterator[None]:
        """Registers forward hooks on candidate layers, by index, for the time of the body.

        Args:
            llm: Whose changes are added where the modules are the model's own.
            hooks: By index of a candidate layer.
        """
        if self.dtype == llm.dtype:
            with llm.with_changes(), llm.hooked(hooks):
                yield
            return
        handles = []
        try:
            for i, hook in hooks.items():
                twin: nn.Module = self._twins[id(llm.layers[i].module)]
                handles.append(twin.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(slots=True)
class Compared:
    """For how long rows one way of running a model was compared with the model's own.

    A window, for example, changes nothing in rows that are shorter than it is.

    Args:
        right: Tokens of the longest row for which it gave the same.
        wrong: Tokens of the shortest row for which it did not.
    """

    right: int = 0
    wrong: float = math.inf


class UpperHalves:
    """Those of one model and its forks that were asked for, with what is known of them.

    Attributes:
        run_ends: By precision and layout (packed or not), for how long rows the ends of prompts,
            run behind cached keys and values, gave what whole prompts give.
        run_alike: By number of tokens, the same for prompts behind a beginning that all have.
    """

    def __init__(self) -> None:
        self.run_ends: dict[tuple[torch.dtype, bool], Compared] = {}
        self.run_alike: dict[int, Compared] = {}
        self._made: dict[tuple[int, torch.dtype], UpperHalf] = {}

    def find(self, llm: Model, first: int, dtype: torch.dtype) -> UpperHalf | None:
        """One of them, to be updated before it runs; None where blocks cannot run by themselves.

        Args:
            llm: The model, or a fork of it.
            first: Index of the first block; not below the first candidate's.
            dtype: Floating point type.
        """
        if not isinstance(llm.halves, SplitModel):
            return None
        key = first, dtype
        if key not in self._made:
            # Of copies only the last ones are kept.
            self.drop_copies()
            self._made[key] = UpperHalf(llm, llm.halves, first, dtype)
        return self._made[key]

    def drop_copies(self) -> None:
        """Frees what is in another precision than the model; :meth:`find` makes it anew."""
        self._made = {key: half for key, half in self._made.items() if not half.is_copy}


def cast_all(value: Any, dtype: torch.dtype) -> Any:
    """Nested tuples, lists and mappings with all floating point tensors in one dtype."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dtype == dtype:
            return value
        # A mask's largest negative number stays finite.
        limit = torch.finfo(dtype)
        return value.clamp(limit.min, limit.max).to(dtype)
    if isinstance(value, Mapping):
        return {key: cast_all(item, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(cast_all(item, dtype) for item in value)
    return value


def quick_dtype(llm: Model, chosen: str) -> torch.dtype:
    """The precision that passes which only look for a direction are run in.

    Args:
        llm: The model.
        chosen: ``"own"`` for the model's; ``"bfloat16"``; ``"auto"`` for bfloat16 where a float32
            model of 50 million parameters or more is on a device that multiplies such matrices and
            has twice the memory that a copy takes.

    Raises:
        SettingsError: another word.
    """
    if chosen not in ("own", "bfloat16", "auto"):
        raise SettingsError(f"the precision must be own, bfloat16 or auto, got {chosen!r}")
    if chosen == "own" or llm.dtype != torch.float32:
        return llm.dtype
    if chosen == "bfloat16":
        return torch.bfloat16
    size = sum(p.numel() for p in llm.model.parameters())
    if size < _LARGE or not _multiplies_bfloat16(llm.device):
        return llm.dtype
    free = available_memory(llm.device)
    return torch.bfloat16 if free is None or free > 2 * size * 2 else llm.dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
