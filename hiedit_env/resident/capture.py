"""The result of one pass over an edit unit: keys and value gradients of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hiedit_env.errors import LayerError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.asking import Tokens
from hiedit_env.model.tokenization import EncodedPrompt


@dataclass(frozen=True, slots=True)
class Capture:
    """What one forward and backward pass over an edit unit leaves behind.

    An edit unit is what one primitive step edits together: the prompts of one fact or several, each
    in every form asked. The rows of its P prompts are joined along the token axis, prompt after
    prompt, padding left out.

    Args:
        prompts: The P prompts as tokens; at least one.
        keys: Per layer T × d_in, the layer's input at the T tokens the model read (u_l).
        value_gradients: Per layer T × d_out, gradient of ``loss`` at the layer's output (v_l);
            empty where the pass was made without gradients.
        loss: −log p(answer | prompt), mean over the answer tokens of a prompt, then over the
            prompts, in nats.
        predictions: A int64, the argmax at each of the A answer positions.
        correct: A bool, whether the prediction is the answer's token.
        summaries: P × 2 float32, loss and share of correct answer tokens of every prompt; where
            None, ``loss`` stands for the loss of each.

    All tensors are detached and live on the model's device in the model's dtype. The plain gradient
    of layer l is ``keys[l].T @ value_gradients[l]`` (d_in × d_out).
    """

    prompts: tuple[EncodedPrompt, ...]
    keys: tuple[Tensor, ...]
    value_gradients: tuple[Tensor, ...]
    loss: float
    predictions: Tensor
    correct: Tensor
    summaries: Tensor | None = None
    _stacked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def prompt(self) -> EncodedPrompt:
        """The first prompt."""
        return self.prompts[0]

    def rows(self, tokens: Tokens) -> slice | list[int]:
        """Where some of every prompt's tokens stand along the token axis.

        Args:
            tokens: Which, see :meth:`.tokenization.EncodedPrompt.positions`.

        Returns:
            A slice where the rows lie side by side, else their indices; for any axis of T rows.
        """
        found: list[int] = []
        start = 0
        for prompt in self.prompts:
            found += (start + position for position in prompt.positions(tokens))
            start += prompt.length
        if found[-1] - found[0] == len(found) - 1:
            return slice(found[0], found[-1] + 1)
        return found

    def parts(self, counts: Sequence[int]) -> tuple[Capture, ...]:
        """The captures of some prompts each, with the gradients of their own mean losses.

        Args:
            counts: How many prompts each holds, in order; they add up to P.

        Returns:
            This capture itself where there is one count.
        """
        if len(counts) == 1:
            return (self,)
        table, total = self._table(), len(self.prompts)
        found: list[Capture] = []
        first = row = token = 0
        for count in counts:
            prompts = self.prompts[first : first + count]
            rows = slice(row, row + sum(prompt.length for prompt in prompts))
            tokens = slice(token, token + sum(len(prompt.answer_ids) for prompt in prompts))
            own = table[first : first + count]
            found.append(
                Capture(
                    prompts=prompts,
                    keys=tuple(u[rows] for u in self.keys),
                    # The joint loss is a mean over all prompts, this one over fewer.
                    value_gradients=tuple(v[rows] * (total / count) for v in self.value_gradients),
                    loss=float(own[:, 0].mean()),
                    predictions=self.predictions[tokens],
                    correct=self.correct[tokens],
                    summaries=own,
                )
            )
            first, row, token = first + count, rows.stop, tokens.stop
        return tuple(found)

    def stacked(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and value gradients of layers of one shape side by side; made once per group.

        Args:
            group: G indices of layers, see :func:`.low_rank.layer_groups`.

        Returns:
            G × T × d_in and G × T × d_out, float32; not to be written.
        """
        name = tuple(group)
        known = self._stacked.get(name)
        if known is None:
            # Never inference tensors, wherever this is called from: they may enter autograd graphs.
            with torch.inference_mode(False):
                keys = torch.stack([self.keys[i] for i in name]).float()
                known = keys, torch.stack([self.value_gradients[i] for i in name]).float()
            self._stacked[name] = known
        return known

    @property
    def answered(self) -> bool:
        """Whether every answer token is the argmax under teacher forcing."""
        return bool(self.correct.all())

    def numbers(self) -> Tensor:
        """Loss and share of correct answer tokens, float32, on the model's device."""
        table = self._table()
        return table[0] if len(table) == 1 else table.mean(0)

    def _table(self) -> Tensor:
        """Loss and share of correct answer tokens of every prompt, P × 2 float32."""
        if self.summaries is not None:
            return self.summaries
        sizes = [len(prompt.answer_ids) for prompt in self.prompts]
        shares = torch.stack([part.float().mean() for part in torch.split(self.correct, sizes)])
        return torch.stack((torch.full_like(shares, self.loss), shares), 1)

    def gradient_norms(self) -> Tensor:
        """‖u_lᵀ v_l‖_F per layer, L float32, from T × T Gram matrices."""
        # In half precision the squares of small gradients would vanish.
        pairs = zip(self.keys, self.value_gradients, strict=True)
        grams = [(u.float() @ u.float().mT) * (v.float() @ v.float().mT) for u, v in pairs]
        squares = [gram.sum() for gram in grams]
        return torch.stack(squares).clamp_min(0).sqrt()


@dataclass(frozen=True, slots=True)
class GradientRows:
    """Keys and value gradients of a loss over several prompts.

    Args:
        keys: Per layer N × d_in, the layer's input at the N tokens read, prompt after prompt; or
            prompts × tokens × d_in with the padding left in.
        value_gradients: The same with d_out, gradient of the loss at the layer's output; empty
            where there are none.

    Detached, on the model's device, in the model's dtype.
    """

    keys: tuple[Tensor, ...]
    value_gradients: tuple[Tensor, ...]


class LayerRecorder:
    """Notes what candidate layers are given and give in one forward pass with gradients.

    Layers may see tokens in any arrangement (prompts × tokens × size, or flattened) as long as they
    see each exactly once, prompt after prompt.

    Args:
        layers: Candidate layers.
        prompts: Number of prompts in the pass, N.
        tokens: Number of tokens of each, padding included, T.
    """

    def __init__(self, layers: Sequence[CandidateLayer], prompts: int, tokens: int) -> None:
        self._layers, self._shape = layers, (prompts, tokens)
        self._inputs: list[Tensor | None] = [None] * len(layers)
        #: Per layer, in the layer's own shape: what a loss is differentiated by.
        self.outputs: list[Tensor] = [torch.empty(0)] * len(layers)

    def hooks(self) -> dict[int, Any]:
        """A forward hook for every layer."""
        return {i: self._hook(i) for i in range(len(self._layers))}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Registers the hooks for the time of the body."""
        handles = []
        try:
            for i, hook in self.hooks().items():
                handles.append(self._layers[i].module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self) -> list[Tensor]:
        """Per layer N × T × d_in.

        Raises:
            LayerError: a layer did not run in the pass.
        """
        for layer, rows in zip(self._layers, self._inputs, strict=True):
            if rows is None:
                raise LayerError(
                    f"layer {layer.name!r} is not run on text by itself: the part it belongs to is "
                    "idle, or its weight is read in another way; choose other layers"
                )
        return [rows for rows in self._inputs if rows is not None]

    def _hook(self, index: int) -> Any:
        layer, (prompts, tokens) = self._layers[index], self._shape

        def hook(_module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            given = args[0]
            if self._inputs[index] is not None:
                raise LayerError(
                    f"layer {layer.name!r} is run more than once in a pass, such as a matrix that "
                    "several blocks share, so its change is not defined; choose other layers"
                )
            if given.numel() != prompts * tokens * layer.d_in:
                rows = given.numel() // layer.d_in
                raise LayerError(
                    f"layer {layer.name!r} sees {rows} rows for {prompts * tokens} tokens"
                    f"{', as a routed expert does' * (rows < prompts * tokens)}, so its change is "
                    "not defined; choose a shared expert, another MLP or the attention output"
                )
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_(True)
            self._inputs[index] = given.reshape(prompts, tokens, layer.d_in)
            self.outputs[index] = output
            # Another tensor, because some models go on to write into what a layer gives.
            return output.clone()

        return hook


def as_rows(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients at layer outputs, N × T × d_out as the inputs are N × T × d_in."""
    pairs = zip(gradients, inputs, strict=True)
    return tuple(v.reshape(*u.shape[:2], v.shape[-1]) for v, u in pairs)
