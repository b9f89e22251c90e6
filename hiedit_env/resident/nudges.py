"""Prompts run again and again while vectors are added to what layers give at one token of each.

This is how a value is found that makes the model answer as wanted, as in ROME (arXiv 2202.05262,
section 3.1, step 2), here for several layers and several prompts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from hiedit_env.errors import HieditError, SettingsError
from hiedit_env.model.architectures import block_list
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt

if TYPE_CHECKING:
    from hiedit_env.resident.resident import ResidentLLM

#: Largest difference, in nats, up to which running the ends of prompts counts as running them.
TOLERANCE = 2e-3


class Nudges:
    """Losses of prompts under vectors that are added to layers' outputs.

    Only tokens from the nudged one on are run, behind the keys and values of those before it, where
    that gives this model's own losses (compared once for every model); else whole prompts.

    Args:
        llm: The model, at its present weights; they must not change while this object is used.
        prompts: P prompts with their answers.
        positions: P positions in ``input_ids``, one of each prompt, where vectors are added.
        layers: The G layers, as indices into ``llm.layers``.

    Attributes:
        keys: Per layer P × d_in, what the layer was given at the positions in the last run.
        worst: P float32, the largest −log p of a single answer token in the last run.

    Raises:
        SettingsError: a position outside its prompt.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        prompts: Sequence[EncodedPrompt],
        positions: Sequence[int],
        layers: Sequence[int],
    ) -> None:
        for prompt, position in zip(prompts, positions, strict=True):
            if not 0 <= position <= prompt.first_position:
                raise SettingsError(
                    f"position {position} is not in the prompt {prompt.prompt!r:.60}, which has "
                    f"{len(prompt.prompt_ids)} tokens"
                )
        self.llm, self.layers = llm, tuple(layers)
        self.keys: list[Tensor] = [torch.empty(0)] * len(self.layers)
        self.worst = torch.empty(0)
        self._positions = tuple(positions)
        self._batch = llm.batch(prompts)
        self._alone: list[Nudges] = []
        if len(prompts) > 1 and not llm.can_share(self._batch):
            pairs = zip(prompts, positions, strict=True)
            self._alone = [Nudges(llm, [prompt], [at], layers) for prompt, at in pairs]
            return
        self._sizes: list[Tensor] = []
        self._run = self._chosen()

    def losses(self, vectors: Sequence[Tensor]) -> Tensor:
        """−log p per answer token of every prompt, in nats.

        Args:
            vectors: Per layer P × d_out (or 1 × d_out for one vector everywhere), added at the
                positions; gradients flow into them.

        Returns:
            P float32; the layers' inputs at the positions are left in ``keys``.
        """
        if self._alone:
            rows = [[v if len(v) == 1 else v[i : i + 1] for v in vectors] for i in self._indices()]
            found = [one.losses(own) for one, own in zip(self._alone, rows, strict=True)]
            self.keys = [
                torch.cat(keys) for keys in zip(*(n.keys for n in self._alone), strict=True)
            ]
            self.worst = torch.cat([one.worst for one in self._alone])
            return torch.cat(found)
        measured = nullcontext() if self._sizes else self._measured()
        with self._nudged(self._run, vectors), measured:
            logits = self._run.logits()
        return self._mean(logits)

    def _indices(self) -> range:
        return range(len(self._positions))

    def _mean(self, logits: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.float(), self._batch.labels, reduction="none")
        nothing = losses.detach().new_zeros(len(self._positions))
        self.worst = nothing.scatter_reduce(0, self._batch.rows, losses.detach(), "amax")
        return self._batch.column_means(losses[:, None])[:, 0]

    @property
    def lengths(self) -> Tensor:
        """P float32, how long the hidden states at the positions are behind the layers' blocks.

        As they were in the first run, mean over the blocks: what lengths of vectors are compared
        with.
        """
        if self._alone:
            return torch.cat([one.lengths for one in self._alone])
        return torch.stack(self._sizes).mean(0)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Notes the lengths of the hidden states behind the layers' blocks."""
        blocks, _ = block_list(self.llm.model)
        rows = torch.arange(len(self._positions), device=self.llm.device)
        at = torch.tensor(self._run.columns, device=self.llm.device)

        def note(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._sizes.append(hidden[rows, at].detach().float().norm(dim=-1))

        used = sorted({self.llm.layers[layer].block for layer in self.layers})
        handles = [blocks[block].register_forward_hook(note) for block in used]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _chosen(self) -> _Runner:
        """The ends alone, if this model gives with them what it gives with whole prompts."""
        llm, parts = self.llm, (self.llm, self._batch, self._positions)
        if llm.runs_ends is None:
            with torch.no_grad():
                own = self._mean(_WholePrompts(*parts).logits())
                # Whatever a model's code raises here means only that it cannot be run like this.
                try:
                    off = (self._mean(_Ends(*parts).logits()) - own).abs()
                    llm.runs_ends = bool((off <= TOLERANCE * (1 + own)).all())
                except (HieditError, MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception:
                    llm.runs_ends = False
        return _Ends(*parts) if llm.runs_ends else _WholePrompts(*parts)

    @contextmanager
    def _nudged(self, run: _Runner, vectors: Sequence[Tensor]) -> Iterator[None]:
        hooks: dict[int, Any] = {}
        rows = torch.arange(len(self._positions), device=self.llm.device)
        at = torch.tensor(run.columns, device=self.llm.device)
        shape = (len(self._positions), run.width)

        def hook(place: int) -> Callable[..., Tensor]:
            def add(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                given = args[0].reshape(*shape, args[0].shape[-1])
                self.keys[place] = given[rows, at].detach()
                vector = vectors[place].to(output.dtype)
                added = output.reshape(*shape, output.shape[-1]).clone()
                added[rows, at] = added[rows, at] + vector
                return added.reshape(output.shape)

            return add

        for place, layer in enumerate(self.layers):
            hooks[layer] = hook(place)
        with self.llm.hooked(hooks):
            yield


class _Runner:
    """A way to get the logits at the answers of a batch.

    Attributes:
        columns: Where each prompt's position stands in what is run.
        width: Number of tokens that are run of each prompt, padding included.
    """

    columns: Sequence[int]
    width: int

    def logits(self) -> Tensor:
        """Answer tokens × vocabulary, prompt after prompt."""
        raise NotImplementedError


class _WholePrompts(_Runner):
    def __init__(self, llm: ResidentLLM, batch: PromptBatch, positions: Sequence[int]) -> None:
        self._llm, self._batch = llm, batch
        self.columns, self.width = positions, batch.longest

    def logits(self) -> Tensor:
        return self._llm.answer_logits(self._batch)


class _Ends(_Runner):
    """Runs the tokens from the positions on, behind cached keys and values of those before."""

    def __init__(self, llm: ResidentLLM, batch: PromptBatch, positions: Sequence[int]) -> None:
        self._llm = llm
        device, prompts = llm.device, batch.prompts
        before = max(1, *positions)
        # Padded on the left, so that all ends begin in one column.
        first = torch.zeros(len(prompts), before, dtype=torch.int64)
        seen = torch.zeros(len(prompts), before, dtype=torch.int64)
        rest = [p.input_ids[at:] for p, at in zip(prompts, positions, strict=True)]
        self.width = max(map(len, rest))
        ends = torch.zeros(len(prompts), self.width, dtype=torch.int64)
        here = torch.zeros(len(prompts), self.width, dtype=torch.int64)
        for row, (prompt, at, end) in enumerate(zip(prompts, positions, rest, strict=True)):
            if at:
                first[row, before - at :] = torch.tensor(prompt.input_ids[:at])
                seen[row, before - at :] = 1
            ends[row, : len(end)] = torch.tensor(end)
            here[row, : len(end)] = 1
        offsets = torch.tensor(positions, device=device)
        self.columns = [0] * len(prompts)
        self._ids = ends.to(device)
        self._mask = torch.cat((seen, here), 1).to(device)
        self._order = offsets[:, None] + torch.arange(self.width, device=device)
        self._rows = batch.rows
        self._places = batch.positions - offsets[batch.rows]
        with torch.no_grad():
            mask = seen.to(device)
            cache = self._pass(first.to(device), mask, (mask.cumsum(1) - 1).clamp_min(0), None)[1]
        # Kept apart, since running the ends makes a cache longer. Other kinds of caches hold no
        # keys and values, and are refused with an error that the caller takes for a no.
        self._known = [(cast(Any, layer).keys, cast(Any, layer).values) for layer in cache.layers]

    def logits(self) -> Tensor:
        cache = DynamicCache(config=self._llm.model.config)
        for index, (keys, values) in enumerate(self._known):
            cache.update(keys, values, index)
        hidden = self._pass(self._ids, self._mask, self._order, cache)[0]
        return self._llm.project(hidden[self._rows, self._places])

    def _pass(
        self, ids: Tensor, mask: Tensor, order: Tensor, cache: DynamicCache | None
    ) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache(config=self._llm.model.config) if cache is None else cache
        with self._llm.with_changes():
            output = self._llm.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=order,
                past_key_values=cache,
                use_cache=True,
            )
        return output[0], output.past_key_values
