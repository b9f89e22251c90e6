"""The resident LLM: the one model that is read, probed and edited.

Everything that touches the network's weights or activations is here, and weights are written in
two methods only: :meth:`ResidentLLM.commit` and :meth:`ResidentLLM.restore`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiedit_env.architectures import CandidateLayer, block_list
from hiedit_env.capture import GradientRows, Reading
from hiedit_env.errors import ModelError
from hiedit_env.generation import end_ids, generate
from hiedit_env.suffix import SplitModel
from hiedit_env.tensor_cache import TensorCache
from hiedit_env.tokenization import (
    EncodedPrompt,
    PromptBatch,
    PromptEncoder,
    length_buckets,
    make_batch,
)
from hiedit_env.updates import Updates, check_updates


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Bit-exact state of candidate weights, by layer index.

    Args:
        changes: The accumulated changes, float32 in the weight's own layout; None for a layer
            that was never edited. They are never written in place.
    """

    changes: Mapping[int, Tensor | None]


class ResidentLLM:
    """A causal LM in memory, its candidate layers, and the cheapest exact way to run it.

    Only the blocks from the first candidate on are run (what is below is cached per prompt), only
    answer positions meet the vocabulary projection, and prompts are batched by length.

    An edited weight is always the unedited one plus an accumulated float32 change, so that small
    updates add up in half precision too, and the way back is exact.

    Args:
        model: Causal LM in eval mode; its parameters stop requiring gradients.
        tokenizer: Its tokenizer.
        layers: Candidate layers in forward order.
        cache_bytes: Bound of the prefix cache.
        max_batch_tokens: Bound of prompts × longest prompt in one pass.

    Raises:
        ModelError: if running the model in two halves does not give its own logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[CandidateLayer],
        *,
        cache_bytes: int = 256 * 2**20,
        max_batch_tokens: int = 1024,
    ) -> None:
        self.model = model.train(False).requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = tuple(layers)
        self.max_batch_tokens = max_batch_tokens
        self.names = tuple(layer.name for layer in self.layers)
        self.shapes = tuple((layer.d_in, layer.d_out) for layer in self.layers)
        weight = self._weight(0)
        self.device, self.dtype = weight.device, weight.dtype
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.encoder = PromptEncoder(tokenizer, limit)
        self.cache = TensorCache(cache_bytes)
        self.first_block = min(layer.block for layer in self.layers)
        _, blocks_name = block_list(model)
        self._split = SplitModel(model.base_model, blocks_name, self.first_block)
        self._head = cast(torch.nn.Module, cast(Any, model).get_output_embeddings())
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._base = tuple(self._weight(i).detach().clone() for i in range(len(self.layers)))
        self._changes: list[Tensor | None] = [None] * len(self.layers)
        self._digests: dict[int, tuple[tuple[int, int], bytes]] = {}
        self._check_split()

    # -- running ------------------------------------------------------------------------------

    def encode(self, prompt: str, answer: str) -> EncodedPrompt:
        """Tokens of a prompt and its answer, see :class:`.tokenization.PromptEncoder`."""
        return self.encoder.encode(prompt, answer)

    def batch(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """The prompts as one right-padded batch on the model's device."""
        return make_batch(prompts, self.device)

    def buckets(self, prompts: Sequence[EncodedPrompt]) -> list[list[int]]:
        """Indices of the prompts grouped by length within ``max_batch_tokens``."""
        return length_buckets(prompts, self.max_batch_tokens)

    def answer_logits(
        self, batch: PromptBatch, updates: Updates | None = None, *, remember: bool = True
    ) -> Tensor:
        """Logits at the answer positions of a batch.

        Args:
            batch: From :meth:`batch`; N answer tokens in all.
            updates: Overlay to apply for this pass only; gradients flow into its factors.
            remember: Whether to use the prefix cache; without it the lower blocks run on the
                batch as a whole, which is quicker for prompts met only once.

        Returns:
            N × vocabulary, in the model's dtype.
        """
        hidden = self._prefix(batch) if remember else self._split.prefix(batch.input_ids)
        if updates is None:
            return self._logits(self._split.suffix(hidden), batch)
        with self._overlay(updates):
            return self._logits(self._split.suffix(hidden), batch)

    @torch.inference_mode(False)
    def read(self, prompt: EncodedPrompt) -> Reading:
        """Runs one request forward, recording what a later backward pass needs.

        Works in every gradient mode of the caller.
        """
        batch = self.batch([prompt])
        logits, inputs, outputs = self._record(batch)
        with torch.enable_grad():
            loss = F.cross_entropy(logits.float(), batch.labels)
        reading = Reading(prompt, loss, logits, batch.labels)
        reading._inputs, reading._outputs = inputs, outputs
        return reading

    @torch.inference_mode(False)
    def gradients(
        self, prompts: Sequence[EncodedPrompt], loss: Callable[[Tensor, PromptBatch], Tensor]
    ) -> GradientRows:
        """One forward and backward pass of any loss over several prompts, at the present weights.

        Args:
            prompts: At least one; all in one batch.
            loss: From logits (answer tokens × vocabulary, float32, in the order of the prompts) and
                the batch to a scalar.

        Returns:
            Rows of the tokens that were read, padding left out.
        """
        batch = self.batch(prompts)
        logits, inputs, outputs = self._record(batch)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(logits.float(), batch), outputs)
        places = torch.arange(batch.input_ids.shape[1], device=self.device)
        real = places < batch.lengths[:, None]
        return GradientRows(
            keys=tuple(u.detach()[real] for u in inputs),
            value_gradients=tuple(v[real] for v in gradients),
        )

    def _record(self, batch: PromptBatch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits of a batch, and every layer's input and output, ready for a backward pass."""
        hidden = self._prefix(batch)
        inputs: list[Tensor | None] = [None] * len(self.layers)
        outputs: list[Tensor | None] = [None] * len(self.layers)

        def record(index: int) -> Any:
            def hook(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if not output.requires_grad:
                    output.requires_grad_(True)
                inputs[index], outputs[index] = args[0], output

            return hook

        with torch.enable_grad(), self._hooks({i: record(i) for i in range(len(self.layers))}):
            logits = self._logits(self._split.suffix(hidden), batch)
        return logits, cast(list[Tensor], inputs), cast(list[Tensor], outputs)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generated text, see :func:`.generation.end_ids`."""
        return end_ids(self.model, self.tokenizer)

    def generate(self, prompts: Sequence[str], max_new_tokens: Sequence[int]) -> list[str]:
        """Greedy continuations, see :func:`.generation.generate`.

        Args:
            prompts: Texts to continue.
            max_new_tokens: Budget of each.
        """
        size = max(1, self.max_batch_tokens // 64)
        return generate(self.model, self.encoder, prompts, max_new_tokens, size)

    # -- weights ------------------------------------------------------------------------------

    # Never inference tensors, wherever this is called from: a change outlives the caller's mode.
    @torch.inference_mode(False)
    def commit(self, updates: Updates) -> WeightSnapshot:
        """Writes updates into the weights: all of them, or none if anything fails on the way.

        Args:
            updates: One per layer; None leaves a layer alone.

        Returns:
            The weights of the changed layers as they were, for :meth:`restore`.

        Raises:
            NonFiniteUpdateError, UpdateShapeError: before anything is written.
        """
        self._check(updates)
        changed = {i: update for i, update in enumerate(updates) if update is not None}
        before = self.snapshot(changed)
        try:
            with torch.no_grad():
                for i, update in changed.items():
                    left, right = update.left.detach().float(), update.right.detach().float()
                    if self.layers[i].is_transposed:
                        left, right = right, left
                    change = self._changes[i]
                    # A new tensor: snapshots hold the old one.
                    self._changes[i] = (
                        left.mT @ right if change is None else torch.addmm(change, left.mT, right)
                    )
                    self._write(i)
        except BaseException:
            self.restore(before)
            raise
        return before

    def snapshot(self, indices: Iterable[int] | None = None) -> WeightSnapshot:
        """Bit-exact state of the weights of some layers (all by default); copies nothing."""
        chosen = range(len(self.layers)) if indices is None else indices
        return WeightSnapshot({i: self._changes[i] for i in chosen})

    def restore(self, snapshot: WeightSnapshot) -> None:
        """Puts the weights of a snapshot back, bit for bit."""
        for i, change in snapshot.changes.items():
            if change is not self._changes[i]:
                self._changes[i] = change
                self._write(i)

    def restore_unedited(self) -> None:
        """Puts the weights of the unedited model back, bit for bit."""
        for i, change in enumerate(self._changes):
            if change is not None:
                self._changes[i] = None
                self._write(i)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Runs the body with the unedited weights; copies nothing and always switches back."""
        edited = {i: self._weight(i).data for i, c in enumerate(self._changes) if c is not None}
        try:
            for i in edited:
                self._weight(i).data = self._base[i]
            yield
        finally:
            for i, weight in edited.items():
                self._weight(i).data = weight

    def change(self, index: int) -> Tensor | None:
        """Edited minus unedited weight of one layer, d_in × d_out float32; None if never edited."""
        change = self._changes[index]
        if change is None:
            return None
        return change.mT if self.layers[index].is_transposed else change

    def base_norm(self, index: int) -> float:
        """Frobenius norm of one layer's unedited weight."""
        return float(torch.linalg.vector_norm(self._base[index].float()))

    def weights_fingerprint(self) -> str:
        """16 hexadecimal digits that change when any single bit of a candidate weight changes.

        Row and column sums of the weights' bits as integers, hashed: equal weights give equal
        fingerprints on every machine, and a layer is read again only after it was written.
        """
        digest = hashlib.blake2b(digest_size=8)
        for i in range(len(self.layers)):
            weight = self._weight(i)
            known = self._digests.get(i)
            # The version alone does not tell the unedited weights of :meth:`unedited` apart.
            version = (weight.data_ptr(), weight._version)
            if known is None or known[0] != version:
                bits = weight.detach().view(_BITS[weight.element_size()])
                sums = torch.cat([bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)])
                known = (version, hashlib.blake2b(sums.cpu().numpy().tobytes()).digest())
                self._digests[i] = known
            digest.update(known[1])
        return digest.hexdigest()

    # -- inside -------------------------------------------------------------------------------

    def _check(self, updates: Updates) -> None:
        check_updates(updates, self.shapes, self.names, self.device, torch.finfo(self.dtype).max)

    def _weight(self, index: int) -> Tensor:
        return cast(Tensor, self.layers[index].module.weight)

    def _write(self, index: int) -> None:
        """Makes one weight the unedited one plus its accumulated change."""
        weight, base, change = self._weight(index), self._base[index], self._changes[index]
        if weight.data_ptr() == base.data_ptr():
            raise RuntimeError("weights cannot be written inside ResidentLLM.unedited()")
        with torch.inference_mode(False), torch.no_grad():
            if change is None:
                weight.copy_(base)
            elif weight.dtype == torch.float32:
                torch.add(base, change, out=weight)
            else:
                # In float32, or in float64 for float64 weights.
                weight.copy_(base + change)

    def _prefix(self, batch: PromptBatch) -> Tensor:
        """Hidden states entering the first candidate block, B × T × hidden size.

        Computed one prompt at a time, so that a prompt's value never depends on what it was first
        batched with: equal seeds give equal trajectories whatever happened before.
        """
        entries = []
        for prompt in batch.prompts:
            hidden = self.cache.get(prompt.input_ids)
            if hidden is None:
                ids = torch.tensor([prompt.input_ids], dtype=torch.int64, device=self.device)
                hidden = self._split.prefix(ids)[0]
                self.cache.put(prompt.input_ids, hidden)
            entries.append(hidden)
        if len(entries) == 1:
            return entries[0][None]
        return torch.nn.utils.rnn.pad_sequence(entries, batch_first=True)

    def _logits(self, hidden: Tensor, batch: PromptBatch) -> Tensor:
        logits = cast(Tensor, self._head(hidden[batch.rows, batch.positions]))
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    @contextmanager
    def _hooks(self, hooks: Mapping[int, Any]) -> Iterator[None]:
        handles = []
        try:
            for i, hook in hooks.items():
                handles.append(self.layers[i].module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _overlay(self, updates: Updates) -> Iterator[None]:
        def add(index: int) -> Any:
            update = updates[index]
            assert update is not None

            def hook(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + update.apply(args[0])

            return hook

        self._check(updates)
        with self._hooks({i: add(i) for i, update in enumerate(updates) if update is not None}):
            yield

    @torch.inference_mode()
    def _check_split(self) -> None:
        """Compares the two halves with the model's own forward on three tokens."""
        ids = torch.arange(3, device=self.device)[None]
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        hidden = self._split.suffix(self._split.prefix(ids))
        ours = cast(Tensor, self._head(hidden))
        if self._softcap is not None:
            ours = torch.tanh(ours / self._softcap) * self._softcap
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        error = float((ours.float() - own).abs().max() / own.abs().max().clamp_min(1e-6))
        if not error <= tolerance:
            raise ModelError(
                f"running {type(self.model).__name__} in two halves changes its logits by a "
                f"relative {error:.2g}; this architecture computes its logits in a way hiedit does "
                "not know"
            )


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
