"""Ways to run the prompts of a search again and again: their ends alone, or as wholes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hiedit_env.errors import ModelError
from hiedit_env.model.architectures import block_list
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.split_model import BlockArguments, SplitModel
from hiedit_env.resident.upper_half import UpperHalf, cast_all

if TYPE_CHECKING:
    from hiedit_env.resident.resident import ResidentLLM

#: Indices of some of the prompts, rising.
Chosen = tuple[int, ...]


class Runner(ABC):
    """A way to get the logits at the answers of some prompts.

    Args:
        llm: The model.
        prompts: P prompts that may share a batch.
        positions: A position in each.
        layers: Layers whose inputs at the positions are wanted, as indices into ``llm.layers``.

    Attributes:
        keys: Per layer P × d_in, what it is given at the positions, in the model's own precision.
        lengths: P float32, how long the hidden states at the positions are behind the layers'
            blocks, mean over the blocks.
    """

    keys: list[Tensor]
    lengths: Tensor

    def __init__(
        self,
        llm: ResidentLLM,
        prompts: Sequence[EncodedPrompt],
        positions: Sequence[int],
        layers: Sequence[int],
    ) -> None:
        self.llm, self.prompts, self.positions = llm, tuple(prompts), tuple(positions)
        self.layers, self.all = tuple(layers), tuple(range(len(prompts)))
        self._batches: dict[Chosen, PromptBatch] = {}

    def batch(self, chosen: Chosen) -> PromptBatch:
        """The chosen prompts."""
        if chosen not in self._batches:
            self._batches[chosen] = self.llm.batch([self.prompts[i] for i in chosen])
        return self._batches[chosen]

    @abstractmethod
    def places(self, chosen: Chosen) -> list[int]:
        """Where the chosen prompts' positions stand among all tokens that are run, row by row."""

    @abstractmethod
    def logits(self, chosen: Chosen) -> Tensor:
        """Answer tokens × vocabulary of the chosen prompts, in order."""

    @abstractmethod
    def hooked(self, hooks: Mapping[int, Any]) -> AbstractContextManager[None]:
        """Registers forward hooks on candidate layers, by index, for the time of the body."""

    @contextmanager
    def _measured(self, places: Sequence[int]) -> Iterator[None]:
        """Sets ``keys`` and ``lengths`` by a pass of the model, which the body runs.

        Args:
            places: Where the positions stand among all tokens of the pass, row by row.
        """
        at = torch.tensor(places, device=self.llm.device)
        keys: dict[int, Tensor] = {}
        sizes: list[Tensor] = []

        def hook(layer: int) -> Any:
            def note(_module: Any, args: tuple[Tensor, ...], _output: Any) -> None:
                keys[layer] = args[0].reshape(-1, args[0].shape[-1])[at].detach()

            return note

        def measure(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            sizes.append(hidden.flatten(0, 1)[at].detach().float().norm(dim=-1))

        blocks, _ = block_list(self.llm.model)
        used = sorted({self.llm.layers[layer].block for layer in self.layers})
        handles = [blocks[block].register_forward_hook(measure) for block in used]
        try:
            with self.llm.hooked({layer: hook(layer) for layer in self.layers}):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self.keys = [keys[layer] for layer in self.layers]
        self.lengths = torch.stack(sizes).mean(0)


class WholePrompts(Runner):
    """Runs all tokens, as every other pass does."""

    def measured(self) -> Tensor:
        """Sets ``keys`` and ``lengths``; gives what :meth:`logits` of all prompts gives."""
        with torch.inference_mode(False), torch.no_grad(), self._measured(self.places(self.all)):
            return self.logits(self.all)

    def places(self, chosen: Chosen) -> list[int]:
        """The positions in rows that are padded on the right."""
        width = self.batch(chosen).longest
        return [row * width + self.positions[i] for row, i in enumerate(chosen)]

    def logits(self, chosen: Chosen) -> Tensor:
        """As in the base class."""
        return self.llm.answer_logits(self.batch(chosen))

    def hooked(self, hooks: Mapping[int, Any]) -> AbstractContextManager[None]:
        """As in the base class."""
        return self.llm.hooked(hooks)


@dataclass(frozen=True, eq=False, slots=True)
class _Layout:
    """Some prompts as one batch of beginnings, padded on the left, and ends, padded on the right.

    Args:
        first: B × before int64, tokens in front of the positions.
        ends: B × width int64, the other tokens.
        mask: B × (before + width) int64, 1 at real tokens.
        order: B × width int64, the ends' positions in their prompts.
    """

    first: Tensor
    ends: Tensor
    mask: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """All that running the ends of some prompts takes.

    Args:
        hidden: B × width × hidden size, what enters the first block; 1 × tokens × hidden size where
            the ends are packed.
        arguments: What each block is given besides; with ``cache`` in it.
        cache: As it was when the arguments were noted.
        known: Per block of the model, keys and values of the tokens before.
    """

    hidden: Tensor
    arguments: Sequence[BlockArguments]
    cache: DynamicCache
    known: Sequence[tuple[Tensor, Tensor]]


class Ends(Runner):
    """Runs the tokens from the positions on, from one block on, behind cached keys and values.

    Args:
        llm: The model, at its present weights; they must not change while this object is used.
        prompts, positions, layers: As in the base class. Nothing in front of the first of the
            layers' blocks is run again.
        dtype: The precision; the first pass is in the model's own.

    Raises:
        ModelError: the model's blocks cannot be run by themselves, or its cache is of another kind.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        prompts: Sequence[EncodedPrompt],
        positions: Sequence[int],
        layers: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(llm, prompts, positions, layers)
        half = llm.upper.find(llm, self._first(), dtype)
        if half is None:
            raise ModelError("the model's blocks cannot be run by themselves")
        self._half: UpperHalf = half
        with torch.inference_mode(False), torch.no_grad():
            self._known, self._hidden = self._first_pass()
        self._parts: dict[Chosen, Part] = {}

    def places(self, chosen: Chosen) -> list[int]:
        """The ends begin at the positions."""
        width = max(self.prompts[i].length - self.positions[i] for i in chosen)
        return [row * width for row in range(len(chosen))]

    def logits(self, chosen: Chosen) -> Tensor:
        """As in the base class, float32."""
        if chosen not in self._parts:
            # Only the last two are kept, as halves may be run in turn: those of many are large.
            last = list(self._parts)[-1:]
            self._parts = {key: self._parts[key] for key in last} | {chosen: self._part(chosen)}
        part, batch = self._parts[chosen], self.batch(chosen)
        # Copies are shared with forks, which may have run since.
        self._half.update(self.llm)
        # Running the ends makes a cache longer, so that every run needs one of its own.
        cache = self._fresh(part.known)
        arguments = [
            BlockArguments(*(_replaced(items, part.cache, cache) for items in given))
            for given in part.arguments
        ]
        features = self._half.features(arguments, part.hidden).flatten(0, 1)
        starts = [at - self.positions[i] for at, i in zip(self.places(chosen), chosen, strict=True)]
        shift = torch.tensor(starts, device=self.llm.device)
        return self._half.project(features[batch.positions + shift[batch.rows]])

    def hooked(self, hooks: Mapping[int, Any]) -> AbstractContextManager[None]:
        """As in the base class."""
        return self._half.hooked(self.llm, hooks)

    # -- inside -----------------------------------------------------------------------------------

    def _first(self) -> int:
        """Index of the first block that is run again."""
        return min(self.llm.layers[layer].block for layer in self.layers)

    def _layout(self, chosen: Chosen) -> _Layout:
        device = self.llm.device
        pairs = [(self.prompts[i], self.positions[i]) for i in chosen]
        before = max(1, *(at for _, at in pairs))
        width = max(prompt.length - at for prompt, at in pairs)
        ids = torch.zeros(len(pairs), before + width, dtype=torch.int64)
        real = torch.zeros_like(ids)
        for row, (prompt, at) in enumerate(pairs):
            # Padded on both sides, so that all ends begin in one column.
            columns = slice(before - at, before - at + prompt.length)
            ids[row, columns] = torch.tensor(prompt.input_ids)
            real[row, columns] = 1
        ids, real = ids.to(device), real.to(device)
        starts = torch.tensor([at for _, at in pairs], device=device)
        order = starts[:, None] + torch.arange(width, device=device)
        return _Layout(ids[:, :before], ids[:, before:], real, order)

    def _part(self, chosen: Chosen) -> Part:
        layout = self._layout(chosen)
        before, width = layout.first.shape[1], layout.ends.shape[1]
        rows = list(chosen)
        known = [(k[rows, :, -before:], v[rows, :, -before:]) for k, v in self._known]
        return self._made(self._hidden[rows, :width], known, layout.ends, layout.mask, layout.order)

    def _made(
        self,
        hidden: Tensor,
        known: Sequence[tuple[Tensor, Tensor]],
        ids: Tensor,
        mask: Tensor,
        order: Tensor,
    ) -> Part:
        """A part from what enters the first block, keys and values, and how tokens see each other.

        Args:
            hidden: B × width × hidden size, what enters the first block.
            known: Per block of the model, keys and values of the tokens before, in any precision.
            ids: B × width int64, the ends' tokens.
            mask: B × (before + width) int64, 1 at real tokens; or 1 × 1 × width × (before + width),
                0 where a token sees another, else the least number.
            order: B × width int64, the tokens' positions in their prompts.
        """
        cache = self._fresh(known)
        noted = self._noted(ids, mask, order, cache)
        dtype = self._half.dtype
        return Part(hidden, noted, cache, [(k.to(dtype), v.to(dtype)) for k, v in known])

    def _noted(
        self, ids: Tensor, mask: Tensor, order: Tensor, cache: DynamicCache
    ) -> list[BlockArguments]:
        """What the blocks from the first one on are given, in the precision of the runs."""
        split = cast(SplitModel, self.llm.halves)
        noted = split.noted(
            ids, attention_mask=mask, position_ids=order, past_key_values=cache, use_cache=True
        )[self._half.first - split.first :]
        return [BlockArguments(*cast_all(tuple(given), self._half.dtype)) for given in noted]

    def _first_pass(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of the tokens before, and what enters the first block at the ends.

        Per block B × heads × before × size each, and B × width × hidden size.
        """
        layout, entering = self._layout(self.all), []
        before, width = layout.first.shape[1], layout.ends.shape[1]

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            entering.append(args[0][:, before:])

        cache, ids = self._fresh(()), torch.cat((layout.first, layout.ends), 1)
        block = cast(SplitModel, self.llm.halves).block(self._half.first)
        handle = block.register_forward_pre_hook(note)
        try:
            places = [row * (before + width) + before for row in self.all]
            with self.llm.with_changes(), self._measured(places):
                self._run(ids, layout.mask, cache)
        finally:
            handle.remove()
        # Other kinds of caches hold no keys and values; the error is taken for a no.
        layers = cast(Sequence[Any], cache.layers)
        if any(layer.keys.shape[-2] != before + width for layer in layers):
            # A layer with a window drops what is behind it, and then has to see nothing else.
            cache = self._fresh(())
            with self.llm.with_changes():
                self._run(layout.first, layout.mask[:, :before], cache)
            layers = cast(Sequence[Any], cache.layers)
        known = [(layer.keys[:, :, :before], layer.values[:, :, :before]) for layer in layers]
        return known, entering[0]

    def _fresh(self, known: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
        cache = DynamicCache(config=self.llm.model.config)
        for index, (keys, values) in enumerate(known):
            cache.update(keys, values, index)
        return cache

    def _run(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache, order: Tensor | None = None
    ) -> None:
        """Runs the model; a mask of four dimensions needs the positions in the prompts as well."""
        self.llm.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0) if order is None else order,
            past_key_values=cache,
            use_cache=True,
        )


def _replaced(items: Any, old: object, new: object) -> Any:
    """Positional or keyword arguments with one object in the place of another."""
    if isinstance(items, Mapping):
        return {key: new if item is old else item for key, item in items.items()}
    return tuple(new if item is old else item for item in items)
