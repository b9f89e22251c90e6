"""The ends of prompts behind one another in one row, where padding would cost too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

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

#: Most tokens in one row: the first pass multiplies and masks all pairs of them.
LONGEST_ROW = 1024


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """Prompts as one row of N tokens: what stands ahead of their ends, and the ends behind it.

    Prompts that begin alike, as in one chat template, share the tokens of their beginning.

    Args:
        ids: N tokens.
        order: N, their positions in their prompts.
        ahead: Per prompt, places in the row of the tokens ahead of its end, int64.
        ends: Per prompt, places of its end's tokens, int64.
    """

    ids: tuple[int, ...]
    order: tuple[int, ...]
    ahead: tuple[Tensor, ...]
    ends: tuple[Tensor, ...]

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt], positions: Sequence[int]) -> Self:
        """The row of some prompts, whose ends begin at these positions.

        >>> some = [EncodedPrompt("", "", (7, 8, token), (1, 2)) for token in (5, 6)]
        >>> row = Row.of(some, (2, 1))
        >>> row.ids, row.order
        ((7, 8, 5, 1, 8, 6, 1), (0, 1, 2, 3, 1, 2, 3))
        >>> [places.tolist() for places in (*row.ahead, *row.ends)]
        [[0, 1], [0], [2, 3], [4, 5, 6]]
        """
        # By the token before and the token itself: what is the same up to here is there once.
        places: dict[tuple[int, int], int] = {}
        chains: list[list[int]] = []
        order: list[int] = []
        for prompt, at in zip(prompts, positions, strict=True):
            chains.append([])
            for place, token in enumerate(prompt.input_ids[:at]):
                key = chains[-1][-1] if place else -1, token
                if key not in places:
                    places[key] = len(places)
                    order.append(place)
                chains[-1].append(places[key])
        ids, ends = [token for _, token in places], []
        for prompt, at in zip(prompts, positions, strict=True):
            ends.append(torch.arange(len(ids), len(ids) + prompt.length - at))
            ids += prompt.input_ids[at:]
            order += range(at, prompt.length)
        ahead = tuple(torch.tensor(chain, dtype=torch.int64) for chain in chains)
        return cls(tuple(ids), tuple(order), ahead, tuple(ends))

    @property
    def shared(self) -> int:
        """Number of tokens ahead of the ends; they come first."""
        return len(self.ids) - sum(map(len, self.ends))

    def mask(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """What some tokens see of some others: those of their own prompts, up to themselves.

        Args:
            rows: T places.
            columns: S places.
            dtype: Of the mask.

        Returns:
            1 × 1 × T × S, 0 where seen, else the least number.

        >>> some = [EncodedPrompt("", "", (7, token), (1, 2)) for token in (5, 6)]
        >>> row = Row.of(some, (1, 1))
        >>> (row.mask(torch.arange(1, 5), torch.arange(5), torch.float32)[0, 0] == 0).int().tolist()
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
        """
        seen = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for ahead, end in zip(self.ahead, self.ends, strict=True):
            own = torch.cat((ahead, end))
            seen[own[:, None], own] |= torch.ones(len(own), len(own), dtype=torch.bool).tril()
        mask = torch.zeros(len(rows), len(columns), dtype=dtype)
        hidden = ~seen[rows][:, columns]
        return mask.masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def packing_pays(row: Row) -> bool:
    """Whether the ends of prompts cost less behind one another than padded to one length.

    Padding makes tokens; packing makes pairs of tokens that the attention multiplies and masks.

    >>> short, long = EncodedPrompt("a", "b", (1, 2), (3,)), EncodedPrompt("a", "b", (1,) * 9, (2,))
    >>> pays = [packing_pays(Row.of(some, (1, 1))) for some in ((short, long), (long, long))]
    >>> longest = EncodedPrompt("a", "b", (1,) * LONGEST_ROW, (2,))
    >>> pays, packing_pays(Row.of((short, longest), (1, 1)))
    ([True, False], False)
    """
    if len(row.ids) > LONGEST_ROW:
        return False
    sizes = [len(end) for end in row.ends]
    packed, padded = sum(sizes), len(sizes) * max(sizes)
    pairs = packed * len(row.ids) - padded * (max(map(len, row.ahead)) + max(sizes))
    return row.shared > 0 and packed + pairs / PAIRS < padded


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
        row, device = self._all_tokens, self.llm.device
        ends = torch.cat([row.ends[i] for i in chosen])
        before: Tensor = torch.cat([row.ahead[i] for i in chosen]).unique()  # type: ignore[no-untyped-call]
        known = [(k[:, :, before], v[:, :, before]) for k, v in self._known]
        mask = row.mask(ends, torch.cat((before, ends)), self._half.dtype).to(device)
        ids, order = self._tokens(ends.tolist())
        return self._made(self._hidden[:, ends - row.shared], known, ids, mask, order)

    def _tokens(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens at some places of the row, and their positions in their prompts: 1 × T each."""
        row = self._all_tokens
        return self._row([row.ids[i] for i in places]), self._row([row.order[i] for i in places])

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
        self._all_tokens = row = Row.of(self.prompts, self.positions)
        last = max(self.llm.layers[layer].block for layer in self.layers)
        entering, left = self._lower(lower, last)
        layers = cast(Sequence[Any], lower.layers)[: last + 1]
        shared = slice(row.shared)
        known = [(layer.keys[:, :, shared], layer.values[:, :, shared]) for layer in layers]
        if left is not None:
            known += self._upper(left[:, shared], last + 1)
        return known, entering[:, row.shared :]

    def _upper(self, hidden: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the tokens ahead in the blocks from one on.

        Args:
            hidden: 1 × tokens × hidden size, what enters the block.
            first: Its index in the model.
        """
        cache, places = self._fresh(()), torch.arange(hidden.shape[1])
        mask = self._all_tokens.mask(places, places, self._half.dtype).to(self.llm.device)
        skipped = first - self._half.first
        ids, order = self._tokens(places.tolist())
        arguments = self._noted(ids, mask, order, cache)[skipped:]
        self._half.update(self.llm)
        with self._half.hooked(self.llm, {}):
            through(self._half.blocks[skipped:], arguments, hidden.to(self._half.dtype))
        layers = cast(Sequence[Any], cache.layers)[first:]
        return [(layer.keys, layer.values) for layer in layers]

    def _lower(self, cache: DynamicCache, last: int) -> tuple[Tensor, Tensor | None]:
        """Runs all tokens up to the last block that a vector is added in.

        Sets ``keys`` and ``lengths``.

        Args:
            cache: An empty one, which is filled.
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
        row = self._all_tokens
        places = torch.arange(len(row.ids))
        mask = row.mask(places, places, self.llm.dtype).to(self.llm.device)
        ids, order = self._tokens(places.tolist())
        left, handles = None, []
        try:
            handles.append(blocks[self._half.first].register_forward_pre_hook(note))
            if last + 1 < len(blocks):
                handles.append(blocks[last + 1].register_forward_pre_hook(stop))
            with self.llm.with_changes(), self._measured([int(end[0]) for end in row.ends]):
                try:
                    self._run(ids, mask, cache, order)
                except _Reached as reached:
                    left = reached.hidden
        finally:
            for handle in handles:
                handle.remove()
        return entering[0], left
