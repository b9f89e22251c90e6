"""The ways to run a model, cheapest first.

The blocks from the first candidate on and the model's vocabulary projection; the same with all the
model does to logits after it (scaling, soft-capping, further projections); the model as a whole.
Which one is taken is decided in :mod:`.forward_check`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hiedit_env.model.architectures import block_list
from hiedit_env.model.structure import decoder_of, text_config
from hiedit_env.resident.split_model import SplitModel


class Halves(Protocol):
    """What is below and above the first candidate."""

    def prefix(self, input_ids: Tensor) -> Tensor:
        """What enters the upper half: B × T or B × T × hidden size, no gradient."""

    def suffix(self, hidden: Tensor) -> Tensor:
        """B × T × features from what entered; the head makes logits of the features."""


class WholeModel:
    """A model that is not cut: what enters the upper half are the tokens.

    Args:
        model: Causal LM.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def prefix(self, input_ids: Tensor) -> Tensor:
        """The tokens, B × T int64."""
        return input_ids

    def suffix(self, hidden: Tensor) -> Tensor:
        """B × T × vocabulary: the model's own logits."""
        return own_logits(self._model, hidden)


def own_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The model's own forward: B × T × vocabulary."""
    return cast(Tensor, model(input_ids=input_ids, use_cache=False).logits)


def forget_lengths(model: nn.Module) -> None:
    """Lets dynamic rotary positions depend on the present prompt alone.

    In transformers they keep the scale of the longest prompt so far, until one fits the original
    context, so a model's logits depend on what it read before. A hook on each such module of the
    model restores the original frequencies before every pass.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", "")
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if hasattr(module, "original_max_seq_len") and any("dynamic" in str(k) for k in kinds):
            module.register_forward_pre_hook(_restore_frequencies)


def _restore_frequencies(module: Any, _: object) -> None:
    end = "original_inv_freq"
    names = [name for name in (*vars(module), *module._buffers) if name.endswith(end)]
    for prefix in (name.removesuffix(end) for name in names):
        longest = f"{prefix}max_seq_len_cached"
        if getattr(module, longest, 0) > module.original_max_seq_len:
            present = getattr(module, f"{prefix}inv_freq")
            original = getattr(module, f"{prefix}{end}").to(present.device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, longest, module.original_max_seq_len)


def no_head(features: Tensor) -> Tensor:
    """For features that are logits."""
    return features


class CappedHead:
    """The vocabulary projection, soft-capped if the configuration says so.

    Args:
        projection: Vocabulary projection.
        cap: Bound of the logits, or None.
    """

    def __init__(self, projection: nn.Module, cap: float | None) -> None:
        self.projection, self._cap = projection, cap

    def __call__(self, features: Tensor) -> Tensor:
        """N × hidden size to N × vocabulary."""
        logits = cast(Tensor, self.projection(features))
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def to(self, dtype: torch.dtype) -> CappedHead:
        """The same in another precision, with weights of its own."""
        return CappedHead(copy.deepcopy(self.projection).to(dtype), self._cap)


class OwnHead:
    """All that a causal LM does after its decoder, in its own code.

    Args:
        model: Causal LM.
        decoder: The module in it whose output is given.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module) -> None:
        name = next(name for name, module in model.named_modules() if module is decoder)
        if not name:
            raise ValueError("the decoder is the model itself")
        self._given = _Given(decoder)
        self._twin = _with_module(model, name, self._given)

    def __call__(self, features: Tensor) -> Tensor:
        """N × hidden size to N × vocabulary."""
        self._given.features = features[None]
        ids = torch.zeros(1, len(features), dtype=torch.int64, device=features.device)
        try:
            return cast(Tensor, self._twin(input_ids=ids, use_cache=False).logits[0])
        finally:
            self._given.features = None


class _Given(nn.Module):
    """Stands in for a decoder and gives the hidden states it was told to."""

    features: Tensor | None = None

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "decoder", decoder)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["decoder"], name)

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=cast(Any, self.features))


class _Output(BaseModelOutputWithPast):
    """An output without anything but hidden states, whatever else a head may ask for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _with_module(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """``root`` with another module in one place; all parameters are the same objects."""
    twin = copy.copy(root)
    twin.__dict__["_modules"] = dict(root._modules)
    first, _, rest = name.partition(".")
    child = cast(nn.Module, root._modules[first])
    twin.__dict__["_modules"][first] = _with_module(child, rest, module) if rest else module
    return twin


@dataclass(slots=True)
class Forward:
    """A way to run a model.

    Args:
        halves: Below and above the first candidate.
        head: From features at answer positions (N × features) to logits (N × vocabulary).
        alone_beyond: Longest prompt of a batch up to which prompts of different length may share
            it; -1 if they never may, None if they always may.
        generates_alone: Whether the model's own generation is wrong for padded batches.
        generates_whole: Whether it is wrong with its cache.
        notes: What a user should know about it, one line each.
    """

    halves: Halves
    head: Callable[[Tensor], Tensor]
    alone_beyond: int | None = None
    generates_alone: bool = False
    generates_whole: bool = False
    notes: list[str] = field(default_factory=list)

    def shares(self, lengths: Sequence[int]) -> bool:
        """Whether prompts of these lengths may run in one batch."""
        if self.alone_beyond is None or max(lengths) <= self.alone_beyond:
            return True
        return len(lengths) == 1


def ways(model: PreTrainedModel, first_block: int) -> Iterator[tuple[str, Callable[[], Forward]]]:
    """Ways to run a model, cheapest first; making one may raise anything."""
    base = model.base_model
    projection = cast(Any, model).get_output_embeddings()
    cap = getattr(text_config(model.config), "final_logit_softcapping", None)
    halves: list[SplitModel] = []

    def cut(owner: nn.Module) -> SplitModel:
        if not halves or halves[-1].base is not owner:
            blocks, _ = block_list(model)
            name = next(name for name, module in owner.named_modules() if module is blocks)
            halves.append(SplitModel(owner, name, first_block))
        return halves[-1]

    def split(owner: nn.Module) -> Iterator[tuple[str, Callable[[], Forward]]]:
        if projection is not None:
            yield "in two halves", lambda: Forward(cut(owner), CappedHead(projection, cap))
        yield "in two halves with its own head", lambda: Forward(cut(owner), OwnHead(model, owner))

    yield from split(base)
    decoder = decoder_of(model)
    if decoder is not base:
        yield from split(decoder)

    def whole() -> Forward:
        note = "its blocks cannot be run by themselves, so all of it is run for every prompt"
        return Forward(WholeModel(model), no_head, notes=[f"{type(model).__name__}: {note}"])

    yield "as a whole", whole
