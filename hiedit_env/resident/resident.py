"""The resident LLM: the one model that is read, probed and edited.

Everything that touches the activations of the network is here; its weights are in
:mod:`.resident.weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiedit_env.errors import SettingsError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.batches import PromptBatch, length_buckets, make_batch
from hiedit_env.model.generation import continuations, end_ids, text_of
from hiedit_env.model.structure import text_config
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder, vocabulary_size
from hiedit_env.resident.capture import GradientRows, LayerRecorder, as_rows
from hiedit_env.resident.forward_check import find_forward
from hiedit_env.resident.low_rank import Updates, products
from hiedit_env.resident.prefix_cache import TensorCache
from hiedit_env.resident.reading import PromptReading, Reading, read_batch, reading_buckets
from hiedit_env.resident.upper_half import UpperHalves
from hiedit_env.resident.weights import EditableWeights


class ResidentLLM(EditableWeights):
    """A causal LM in memory, its candidate layers, and the cheapest exact way to run it.

    Only the blocks from the first candidate on are run (what is below is cached per prompt), only
    answer positions meet the vocabulary projection, and prompts are batched by length.

    Args:
        model: Causal LM in eval mode; its parameters stop requiring gradients.
        tokenizer: Its tokenizer.
        layers: Candidate layers in forward order.
        cache_bytes: Bound of the prefix cache.
        max_batch_tokens: Bound of prompts × longest prompt in one pass.
        end_id: The token put behind every answer; None for none.

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
        end_id: int | None = None,
    ) -> None:
        self.model = model.train(False).requires_grad_(False)
        super().__init__(layers)
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        limit = getattr(text_config(model.config), "max_position_embeddings", None)
        # Some configurations say -1 for no limit.
        limit = limit if limit is None or limit > 0 else None
        self.encoder = PromptEncoder(tokenizer, limit, end_id, vocabulary_size(model))
        self.cache = TensorCache(cache_bytes)
        self.first_block = min(layer.block for layer in self.layers)
        #: How the model is run, see :mod:`.forward_check`.
        self._way = find_forward(model, self.layers, self.first_block)
        self.halves, self.head = self._way.halves, self._way.head
        self.upper = UpperHalves()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how this model is run, one line each; usually nothing."""
        return tuple(self._way.notes)

    def fork(self) -> ResidentLLM:
        """Another environment's view of the same model: shared base weights, changes of its own.

        What is committed to it is never written into the model but added to the layers' outputs as
        it runs (in the model's dtype), so any number of forks live beside each other.
        Caches are shared.

        Raises:
            SettingsError: this one has been edited; its forks would begin with its edits.
        """
        if any(change is not None for change in self._changes) and self.is_resident:
            raise SettingsError(
                "only an unedited model can be forked; call restore_unedited() first"
            )
        twin = copy.copy(self)
        twin.is_resident = False
        twin._forget()
        return twin

    def branch(self) -> ResidentLLM:
        """A fork that begins with the present changes, for as long as these stay as they are.

        Of a resident model only what a branch commits is added as it runs: what was edited before
        is in the weights. The branch must not be run once this model has been written to.
        """
        twin = copy.copy(self)
        twin._forget()
        twin.is_resident = False
        twin._changes = list(self._changes)
        if self.is_resident:
            twin._origin, twin._trunk = list(self._changes), self
        else:
            twin._origin, twin._trunk = list(self._origin), self._trunk
        return twin

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
        self,
        batch: PromptBatch,
        updates: Updates | None = None,
        *,
        remember: bool = True,
        forks: Sequence[ResidentLLM] = (),
    ) -> Tensor:
        """Logits at the answer positions of a batch.

        Args:
            batch: From :meth:`batch`; N answer tokens in all.
            updates: Overlay to apply for this pass only; gradients flow into its factors.
            remember: Whether to use the prefix cache; without it the lower blocks run on the
                batch as a whole, which is quicker for prompts met only once.
            forks: Forks of one model that share the pass, the first with the first rows and so
                on, each with equally many; none for this one alone.

        Returns:
            N × vocabulary, in the model's dtype.
        """
        if not self.can_share(batch):
            forks = forks or (self,)
            each = len(batch.prompts) // len(forks)
            return torch.cat(
                [
                    self.answer_logits(
                        self.batch([prompt]), updates, remember=remember, forks=[forks[i // each]]
                    )
                    for i, prompt in enumerate(batch.prompts)
                ]
            )
        hidden = self.entering(batch) if remember else self.halves.prefix(batch.input_ids)
        with self._edited(forks or (self,)), self._overlay(updates):
            return self._logits(self.halves.suffix(hidden), batch)

    def read(self, *prompts: EncodedPrompt, gradients: bool = True) -> Reading:
        """Runs an edit unit forward, recording what a later backward pass needs.

        Works in every gradient mode of the caller.

        Args:
            prompts: The prompts of the unit, at least one.
            gradients: Whether a backward pass may follow; without, captures have keys alone.
        """
        count = len(prompts)
        return Reading(self.read_forks(prompts, [self] * count, [count] * count, gradients))

    @torch.inference_mode(False)
    def read_forks(
        self,
        prompts: Sequence[EncodedPrompt],
        forks: Sequence[ResidentLLM],
        counts: Sequence[int],
        gradients: bool = True,
    ) -> list[PromptReading]:
        """Prompts of several environments' units in few passes, see :func:`.batched.read_together`.

        Args:
            prompts: All prompts of all units.
            forks: The fork of one model that each prompt is read by, or this one for all.
            counts: How many prompts the unit of each has.
            gradients: Whether a backward pass may follow.
        """
        found: dict[int, PromptReading] = {}
        buckets = reading_buckets(prompts, counts, self.max_batch_tokens)
        for bucket in buckets:
            shared = self._way.shares([prompts[i].length for i in bucket])
            for places in [bucket] if shared else [[i] for i in bucket]:
                batch = self.batch([prompts[i] for i in places])
                owners, sizes = [forks[i] for i in places], [counts[i] for i in places]
                alone = all(fork is owners[0] for fork in owners)
                owners = owners[:1] if alone else owners
                read = read_batch(batch, *self._record(batch, owners, gradients=gradients), sizes)
                if len(buckets) > 1 and 2 * batch.longest > self.max_batch_tokens:
                    read[0].graph.rows()  # the graphs of several long prompts take too much memory
                found |= dict(zip(places, read, strict=True))
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode(False)
    def gradients(
        self,
        prompts: Sequence[EncodedPrompt],
        loss: Callable[[Tensor, PromptBatch], Tensor],
        updates: Updates | None = None,
    ) -> GradientRows:
        """One forward and backward pass of any loss over several prompts, at the present weights.

        Args:
            prompts: At least one; all in one batch.
            loss: From logits (answer tokens × vocabulary, float32, in the order of the prompts) and
                the batch to a scalar.
            updates: Added to the weights for this pass only; constants, whatever they come from.

        Returns:
            Rows of the tokens that were read, padding left out.
        """
        batch = self.batch(prompts)
        parts = [batch] if self.can_share(batch) else [self.batch([prompt]) for prompt in prompts]
        passes = [self._record(part, (self,), updates) for part in parts]
        outputs = [output for _, _, given in passes for output in given]
        with torch.enable_grad():
            logits = torch.cat([logits for logits, _, _ in passes]).float()
            flat = torch.autograd.grad(loss(logits, batch), outputs)
        keys: list[tuple[Tensor, ...]] = []
        gradients: list[tuple[Tensor, ...]] = []
        for i, (part, (_, inputs, _)) in enumerate(zip(parts, passes, strict=True)):
            own = as_rows(flat[i * len(inputs) : (i + 1) * len(inputs)], inputs)
            real = torch.arange(part.longest, device=self.device) < part.lengths[:, None]
            keys.append(tuple(u.detach()[real] for u in inputs))
            gradients.append(tuple(v[real] for v in own))
        return GradientRows(
            keys=tuple(map(torch.cat, zip(*keys, strict=True))),
            value_gradients=tuple(map(torch.cat, zip(*gradients, strict=True))),
        )

    def _record(
        self,
        batch: PromptBatch,
        forks: Sequence[ResidentLLM],
        updates: Updates | None = None,
        gradients: bool = True,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits of a batch, and every layer's input and output, ready for a backward pass."""
        hidden = self.entering(batch)
        recorder = LayerRecorder(self.layers, len(batch.prompts), batch.longest)
        fixed = updates and [None if update is None else update.detach() for update in updates]
        edited = self._edited(forks)
        hooks = self.hooked(recorder.hooks())
        with torch.set_grad_enabled(gradients), edited, self._overlay(fixed), hooks:
            logits = self._logits(self.halves.suffix(hidden), batch)
        return logits, recorder.inputs(), recorder.outputs

    def can_share(self, batch: PromptBatch) -> bool:
        """Whether the prompts of a batch give their own logits beside each other."""
        return self._way.shares([prompt.length for prompt in batch.prompts])

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generated text, see :func:`.generation.end_ids`."""
        return end_ids(self.model, self.encoder)

    @property
    def generates_whole(self) -> bool:
        """Whether this model's cache is wrong, so that every token is generated from all before."""
        return self._way.generates_whole

    def generate(
        self, prompts: Sequence[str | EncodedPrompt], max_new_tokens: Sequence[int]
    ) -> list[str]:
        """Greedy continuations as texts, without special tokens.

        Args:
            prompts: Texts to continue, or encoded prompts.
            max_new_tokens: Budget of each.
        """
        found = self.continuations(prompts, max_new_tokens)
        return [text_of(self.encoder, tokens, self.end_ids) for tokens in found]

    def continuations(
        self, prompts: Sequence[str | EncodedPrompt], max_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        """The tokens of what :meth:`generate` gives, see :func:`.generation.continuations`."""
        size = 1 if self._way.generates_alone else max(1, self.max_batch_tokens // 64)
        encoded = [
            self.encoder.encode_prompt(p) if isinstance(p, str) else p.prompt_ids for p in prompts
        ]
        # What grows past this length while it is continued would change the others of its batch.
        limit = self._way.alone_beyond or 0
        alone = [
            0 < limit < len(ids) + budget
            for ids, budget in zip(encoded, max_new_tokens, strict=True)
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        with self._edited((self,)):
            for most, kind in ((size, False), (1, True)):
                chosen = [i for i, by_itself in enumerate(alone) if by_itself is kind]
                found = continuations(
                    self.model,
                    self.encoder,
                    [prompts[i] for i in chosen],
                    [max_new_tokens[i] for i in chosen],
                    most,
                    # Nothing is kept for a backward pass.
                    4 * self.max_batch_tokens,
                    use_cache=not self.generates_whole,
                )
                for i, own in zip(chosen, found, strict=True):
                    tokens[i] = own
        return tokens

    def entering(self, batch: PromptBatch) -> Tensor:
        """What enters the first candidate block: B × T × hidden size, in the model's dtype.

        Of a model that is only run as a whole, its tokens. Computed one prompt at a time, so that a
        prompt's value never depends on what it was first batched with: equal seeds give equal
        episodes whatever happened before. What is behind the end of a prompt is 0.
        """
        entries = []
        for prompt in batch.prompts:
            hidden = self.cache.get(prompt.input_ids)
            if hidden is None:
                ids = torch.tensor([prompt.input_ids], dtype=torch.int64, device=self.device)
                hidden = self.halves.prefix(ids)[0]
                self.cache.put(prompt.input_ids, hidden)
            entries.append(hidden)
        if len(entries) == 1:
            return entries[0][None]
        return torch.nn.utils.rnn.pad_sequence(entries, batch_first=True)

    # -- inside -------------------------------------------------------------------------------

    def _logits(self, hidden: Tensor, batch: PromptBatch) -> Tensor:
        return self.head(hidden[batch.rows, batch.positions])

    @contextmanager
    def hooked(self, hooks: Mapping[int, Any]) -> Iterator[None]:
        """Registers forward hooks on candidate layers, by index, for the time of the body."""
        handles = []
        try:
            for i, hook in hooks.items():
                handles.append(self.layers[i].module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def with_changes(self) -> AbstractContextManager[None]:
        """The model as this object sees it: a fork's changes are added for the time of the body."""
        return self._edited((self,))

    @contextmanager
    def _edited(self, forks: Sequence[ResidentLLM]) -> Iterator[None]:
        """Adds the changes of forks; those of the resident model are in its weights."""

        def add(changes: Sequence[Tensor | None]) -> Any:
            def hook(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                rows = args[0].reshape(len(changes), -1, args[0].shape[-1])
                added = products(rows, changes, output.shape[-1])
                return output + added.reshape(output.shape)

            return hook

        hooks: dict[int, Any] = {}
        for i, layer in enumerate(self.layers):
            changes = [fork._added(i) for fork in forks]
            if layer.is_transposed:
                changes = [None if change is None else change.mT for change in changes]
            if any(change is not None for change in changes):
                hooks[i] = add(changes)
        with self.hooked(hooks):
            yield

    @contextmanager
    def _overlay(self, updates: Updates | None) -> Iterator[None]:
        if updates is None:
            yield
            return

        def add(index: int) -> Any:
            update = updates[index]
            assert update is not None

            def hook(_module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + update.apply(args[0])

            return hook

        self._check(updates)
        with self.hooked({i: add(i) for i, update in enumerate(updates) if update is not None}):
            yield
