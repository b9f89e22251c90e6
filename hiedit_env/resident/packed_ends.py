"""The ends of prompts behind one another in one row, where padding would cost too much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hiedit_env.errors import ModelError
from hiedit_env.model.architectures import block_list
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.ends import Chosen, Ends, Part
from hiedit_env.resident.split_model import through

#: Pairs of tokens in the attention that cost as much as one token in all matrix products of a
#: block, at 576 features; with more features they are more, in proportion.
PAIRS = 3000

#: Most tokens of whole prompts in one row: the first pass multiplies and masks all pairs of them.
LONGEST_ROW = 1024


def packing_pays(prompts: Sequence[EncodedPrompt], positions: Sequence[int]) -> bool:
    """Whether the ends of prompts cost less behind one another than padded to one length.

    Padding makes tokens; packing makes pairs of tokens that the attention multiplies and masks.

    >>> short, long = EncodedPrompt("a", "b", (1, 2), (3,)), EncodedPrompt("a", "b", (1,) * 9, (2,))
    >>> packing_pays([short, long], [1, 1]), packing_pays([long, long], [1, 1])
    (True, False)
    >>> packing_pays([short, EncodedPrompt("a", "b", (1,) * LONGEST_ROW, (2,))], [1, 1])
    False
    """
    if sum(prompt.length for prompt in prompts) > LONGEST_ROW:
        return False
    sizes = [prompt.length - at for prompt, at in zip(prompts, positions, strict=True)]
    packed, ahead = sum(sizes), sum(positions)
    padded = len(sizes) * max(sizes)
    pairs = packed * (ahead + packed) - padded * (max(positions) + max(sizes))
    return ahead > 0 and packed + pairs / PAIRS < padded


class _Reached(Exception):
    """Carries the hidden states out of a pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class PackedEnds(Ends):
    """As :class:`.ends.Ends`, in one row, in which every token sees those of its own prompt alone.

    Its first pass is in the model's own precision up to the last block that a vector is added in,
    and in that of the runs behind it.

    Raises:
        ModelError: as in the base class, or the mask alone does not decide what a token sees.
    """

    def places(self, chosen: Chosen) -> list[int]:
        """Each end starts right after the one before it."""
        sizes = self._sizes(chosen)
        return [sum(sizes[:row]) for row in range(len(sizes))]

    def _sizes(self, chosen: Chosen) -> list[int]:
        return [self.prompts[i].length - self.positions[i] for i in chosen]

    def _part(self, chosen: Chosen) -> Part:
        ahead, sizes = [self.positions[i] for i in chosen], self._sizes(chosen)
        of_ends, of_ahead = self._rows(self._sizes(self.all)), self._rows(self.positions)
        ends = torch.cat([of_ends[i] for i in chosen])
        before = torch.cat([of_ahead[i] for i in chosen])
        known = [(k[:, :, before], v[:, :, before]) for k, v in self._known]
        ids = [t for i in chosen for t in self.prompts[i].input_ids[self.positions[i] :]]
        order = [t for i in chosen for t in range(self.positions[i], self.prompts[i].length)]
        mask = own_tokens(ahead, sizes, self._half.dtype).to(self.llm.device)
        return self._made(self._hidden[:, ends], known, self._row(ids), mask, self._row(order))

    def _rows(self, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Of a row of parts of these sizes, the places of each part."""
        return torch.split(torch.arange(sum(sizes), device=self.llm.device), list(sizes))

    def _row(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor([numbers], dtype=torch.int64, device=self.llm.device)

    def _first_pass(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of the tokens ahead, and what enters the first block at the ends.

        Per block 1 × heads × tokens × size each, and 1 × tokens × hidden size. All tokens are run
        up to the last block that a vector is added in, and behind it only those ahead of the ends,
        in the precision of the runs.
        """
        lower = self._fresh(())
        if not all(type(layer) is DynamicLayer for layer in lower.layers):
            raise ModelError("a cache that drops tokens cannot hold those of several prompts")
        lengths = [prompt.length for prompt in self.prompts]
        firsts = [sum(lengths[:i]) for i in self.all]
        places = [first + at for first, at in zip(firsts, self.positions, strict=True)]
        last = max(self.llm.layers[layer].block for layer in self.layers)
        entering, left = self._lower(lower, lengths, places, last)
        pairs = list(zip(self._rows(lengths), self.positions, strict=True))
        before = torch.cat([own[:at] for own, at in pairs])
        layers = cast(Sequence[Any], lower.layers)[: last + 1]
        known = [(layer.keys[:, :, before], layer.values[:, :, before]) for layer in layers]
        if left is not None:
            known += self._upper(left[:, before], last + 1)
        return known, entering[:, torch.cat([own[at:] for own, at in pairs])]

    def _upper(self, hidden: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the tokens ahead in the blocks from one on.

        Args:
            hidden: 1 × tokens × hidden size, what enters the block.
            first: Its index in the model.
        """
        cache, ahead = self._fresh(()), self.positions
        pairs = list(zip(self.prompts, ahead, strict=True))
        ids = self._row([token for prompt, at in pairs for token in prompt.input_ids[:at]])
        order = self._row([place for at in ahead for place in range(at)])
        mask = own_tokens([0] * len(ahead), ahead, self._half.dtype).to(self.llm.device)
        skipped = first - self._half.first
        arguments = self._noted(ids, mask, order, cache)[skipped:]
        self._half.update(self.llm)
        with self._half.hooked(self.llm, {}):
            through(self._half.blocks[skipped:], arguments, hidden.to(self._half.dtype))
        layers = cast(Sequence[Any], cache.layers)[first:]
        return [(layer.keys, layer.values) for layer in layers]

    def _lower(
        self, cache: DynamicCache, lengths: Sequence[int], places: Sequence[int], last: int
    ) -> tuple[Tensor, Tensor | None]:
        """Runs all tokens up to the last block that a vector is added in.

        Sets ``keys`` and ``lengths``.

        Args:
            cache: An empty one, which is filled.
            lengths: P, tokens of each prompt.
            places: P, where the positions stand in the row.
            last: Index of that block.

        Returns:
            1 × tokens × hidden size, what enters the first block that is run again, and what leaves
            the last one; None for the latter where it is the model's last one.
        """
        entering: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            entering.append(args[0])

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        blocks, _ = block_list(self.llm.model)
        ids = [token for prompt in self.prompts for token in prompt.input_ids]
        order = [place for length in lengths for place in range(length)]
        mask = own_tokens([0] * len(lengths), lengths, self.llm.dtype).to(self.llm.device)
        given = self._row(ids), mask, cache, self._row(order)
        left, handles = None, []
        try:
            handles.append(blocks[self._half.first].register_forward_pre_hook(note))
            if last + 1 < len(blocks):
                handles.append(blocks[last + 1].register_forward_pre_hook(stop))
            with self.llm.with_changes(), self._measured(places):
                try:
                    self._run(*given)
                except _Reached as reached:
                    left = reached.hidden
        finally:
            for handle in handles:
                handle.remove()
        return entering[0], left


def own_tokens(ahead: Sequence[int], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What tokens in a row of parts see: those ahead of their part, and it up to themselves.

    Args:
        ahead: Per part the number of tokens ahead of it, which stand in a row of their own.
        sizes: Per part its number of tokens.
        dtype: Of the mask.

    Returns:
        1 × 1 × tokens × (tokens ahead + tokens), 0 where seen, else the least number.

    >>> (own_tokens((1, 2), (2, 1), torch.float32)[0, 0] == 0).int().tolist()
    [[1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]
    """
    parts = torch.arange(len(sizes))
    own = parts.repeat_interleave(torch.tensor(sizes))
    before = parts.repeat_interleave(torch.tensor(ahead))
    places = torch.arange(len(own))
    seen = (own[:, None] == own) & (places[:, None] >= places)
    seen = torch.cat((own[:, None] == before, seen), 1)
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
