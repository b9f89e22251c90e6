"""Encoded prompts as padded batches, and which prompts go into one batch.

Batches are padded on the right whatever the tokenizer's ``padding_side`` says: the models are
causal, so no real position ever sees the padding and no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.model.tokenization import EncodedPrompt


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts as right-padded tensors on one device; made by :func:`make_batch`.

    B prompts, T tokens in the longest, N answer tokens in all, prompt after prompt.
    ``logits[rows, positions]`` are the (N, vocabulary) logits to be judged against ``labels``.

    Args:
        prompts: The B prompts, in order.
        rows: (N,) int64, each answer token's row in the batch.
        positions: (N,) int64, the position whose logits predict it.
        labels: (N,) int64, its id.
        lengths: (B,) int64, number of real tokens in each row.
        answer_lengths: (B,) int64, number of answer tokens of each prompt.
        pad_id: Id that fills the rest of a row.
    """

    prompts: tuple[EncodedPrompt, ...]
    rows: Tensor
    positions: Tensor
    labels: Tensor
    lengths: Tensor
    answer_lengths: Tensor
    pad_id: int

    @property
    def longest(self) -> int:
        """T."""
        return max(prompt.length for prompt in self.prompts)

    @cached_property
    def input_ids(self) -> Tensor:
        """(B, T) int64, padded on the right; made when it is asked for."""
        longest = self.longest
        padded = [
            [*prompt.input_ids, *[self.pad_id] * (longest - prompt.length)]
            for prompt in self.prompts
        ]
        return torch.tensor(padded, dtype=torch.int64, device=self.rows.device)

    @cached_property
    def _columns(self) -> Tensor:
        """(N,) int64, each answer token's place (from 0) within its own answer."""
        before = self.answer_lengths.cumsum(0) - self.answer_lengths
        return torch.arange(len(self.rows), device=self.rows.device) - before[self.rows]

    def to_rows(self, values: Tensor, fill: float | bool) -> Tensor:
        """Lay out one value per answer token as one row per prompt.

        Args:
            values: (N,) tensor of any dtype.
            fill: What stands after a row's own values.

        Returns:
            (B, longest answer) tensor of the same dtype, differentiable in ``values``.

        Raises:
            SettingsError: if ``values`` is not of shape (N,).

        >>> batch = make_batch(
        ...     [EncodedPrompt("a", "b", (1, 2), (3,)), EncodedPrompt("c", "d", (4,), (5, 6))],
        ...     "cpu",
        ... )
        >>> batch.to_rows(torch.tensor([10, 20, 30]), fill=0).tolist()
        [[10, 0], [20, 30]]
        """
        if values.shape != self.rows.shape:
            raise SettingsError(
                f"values have shape {tuple(values.shape)}; the batch has {len(self.rows)} answer "
                f"tokens, so the shape must be ({len(self.rows)},)"
            )
        longest = max(len(prompt.answer_ids) for prompt in self.prompts)
        empty = values.new_full((len(self.prompts), longest), fill)
        # Each place is written once: unlike with index_add, a GPU's order of work cannot matter.
        return empty.index_put((self.rows, self._columns), values)

    def column_means(self, values: Tensor) -> Tensor:
        """Mean over each prompt's answer tokens, all columns in one product; differentiable.

        Args:
            values: (N, columns) float32.

        Returns:
            (B, columns) float32; the mean of ones is exactly 1.
        """
        places = torch.arange(len(self.prompts), device=self.rows.device)
        belongs = (places[:, None] == self.rows).to(values.dtype)
        # Divided at the end: a sum of rounded quotients would miss 1 by an ulp.
        return (belongs @ values) / self.answer_lengths[:, None]


def make_batch(
    prompts: Sequence[EncodedPrompt], device: torch.device | str, pad_id: int = 0
) -> PromptBatch:
    """Pad prompts on the right into one batch on ``device``.

    Args:
        prompts: At least one prompt; the order is kept.
        device: Where the tensors go.
        pad_id: Id that fills the rest of a row. Any id of the vocabulary will do, since no real
            position of a causal model sees it.

    Raises:
        PromptError: if there are no prompts.

    >>> batch = make_batch(
    ...     [EncodedPrompt("a", "b", (1, 2, 3), (4, 5)), EncodedPrompt("c", "d", (6,), (7,))], "cpu"
    ... )
    >>> batch.input_ids.tolist()
    [[1, 2, 3, 4], [6, 0, 0, 0]]
    >>> batch.rows.tolist(), batch.positions.tolist(), batch.labels.tolist()
    ([0, 0, 1], [2, 3, 0], [4, 5, 7])
    """
    if not prompts:
        raise PromptError("a batch needs at least one prompt, got none")
    rows: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for row, prompt in enumerate(prompts):
        rows += [row] * len(prompt.answer_ids)
        positions += range(prompt.first_position, prompt.length)
        labels += prompt.answer_ids
    sizes = [prompt.length for prompt in prompts], [len(prompt.answer_ids) for prompt in prompts]

    # Together, since every tensor is a copy to the device.
    tokens = torch.tensor((rows, positions, labels), dtype=torch.int64, device=device)
    counts = torch.tensor(sizes, dtype=torch.int64, device=device)
    return PromptBatch(
        tuple(prompts), tokens[0], tokens[1], tokens[2], counts[0], counts[1], pad_id
    )


def length_buckets(prompts: Sequence[EncodedPrompt], max_tokens: int) -> list[list[int]]:
    """Group prompts of similar length, so that batches hold little padding.

    Args:
        prompts: Any number of prompts.
        max_tokens: Most tokens of a padded batch, count times longest. A prompt longer than this
            gets a bucket of its own.

    Returns:
        Indices into ``prompts``, each exactly once, in buckets. Lengths never fall from one index
        to the next, equal lengths keep their order, and the same input gives the same buckets.

    Raises:
        SettingsError: if ``max_tokens`` is below 1.

    >>> prompts = [EncodedPrompt("a", "b", (1,) * n, (2,)) for n in (4, 2, 9, 2)]
    >>> length_buckets(prompts, max_tokens=8)
    [[1, 3], [0], [2]]
    """
    if max_tokens < 1:
        raise SettingsError(f"max_tokens must be at least 1, got {max_tokens!r}")
    buckets: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: prompts[i].length):
        # Lengths rise, so this prompt would be the longest of the bucket it joins.
        if buckets and (len(buckets[-1]) + 1) * prompts[index].length <= max_tokens:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets
