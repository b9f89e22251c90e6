"""The result of one pass over a request: keys and value gradients of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hiedit_env.errors import LayerError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.tokenization import EncodedPrompt


@dataclass(frozen=True, slots=True)
class Capture:
    """What one forward and backward pass over a request leaves behind.

    Args:
        prompt: The request as tokens.
        keys: Per layer T × d_in, the layer's input at the T tokens the model read (u_l).
        value_gradients: Per layer T × d_out, gradient of ``loss`` at the layer's output (v_l).
        loss: −log p(answer | prompt), mean over answer tokens, in nats.
        predictions: A int64, the argmax at each of the A answer positions.
        correct: A bool, whether the prediction is the answer's token.
        summary: ``loss`` and the share of correct answer tokens as a float32 tensor; computed from
            them where None.

    All tensors are detached and live on the model's device in the model's dtype. The plain gradient
    of layer l is ``keys[l].T @ value_gradients[l]`` (d_in × d_out).
    """

    prompt: EncodedPrompt
    keys: tuple[Tensor, ...]
    value_gradients: tuple[Tensor, ...]
    loss: float
    predictions: Tensor
    correct: Tensor
    summary: Tensor | None = None
    _stacked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        if self.summary is not None:
            return self.summary
        accuracy = self.correct.float().mean()
        return torch.stack((torch.full_like(accuracy, self.loss), accuracy))

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
        value_gradients: The same with d_out, gradient of the loss at the layer's output.

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


class PassGraph:
    """One forward pass over one request or several, whose backward pass runs when it is asked for.

    Args:
        losses: A, of the answer tokens of all requests, each depending on its own request only.
        weights: A, what each counts in the loss that is differentiated.
        inputs: Per layer N × T × d_in.
        outputs: Per layer N × T × d_out, in any arrangement of the first two.
    """

    def __init__(
        self, losses: Tensor, weights: Tensor, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        self._losses: Tensor | None = losses
        self._weights = weights
        self._inputs, self._outputs = inputs, outputs
        self._rows: GradientRows | None = None

    @torch.inference_mode(False)
    def rows(self) -> GradientRows:
        """Keys and value gradients, N × T × size per layer; runs once, then frees the graph."""
        if self._rows is None:
            assert self._losses is not None
            gradients = torch.autograd.grad(self._losses, self._outputs, self._weights)
            self._rows = GradientRows(
                tuple(u.detach() for u in self._inputs), as_rows(gradients, self._inputs)
            )
            self._losses, self._inputs, self._outputs = None, [], []
        return self._rows


def as_rows(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients at layer outputs, N × T × d_out as the inputs are N × T × d_in."""
    pairs = zip(gradients, inputs, strict=True)
    return tuple(v.reshape(*u.shape[:2], v.shape[-1]) for v, u in pairs)


class Reading:
    """A request as the model reads it; the backward pass is done only if it is asked for.

    Args:
        prompt: The request.
        loss: −log p(answer | prompt), mean over answer tokens, in nats.
        accuracy: Share of answer tokens that are predicted.
        summary: The two again, as a float32 tensor on the model's device.
        logits: A × vocabulary, at the answer positions.
        predictions: A int64, their argmax.
        correct: A bool, whether that is the answer's token.
        graph: The pass it was read in.
        row: Its place there.
    """

    def __init__(
        self,
        prompt: EncodedPrompt,
        loss: float,
        accuracy: float,
        summary: Tensor,
        logits: Tensor,
        predictions: Tensor,
        correct: Tensor,
        graph: PassGraph,
        row: int,
    ) -> None:
        self.prompt, self.loss, self.accuracy, self.summary = prompt, loss, accuracy, summary
        self.logits, self.predictions, self.correct = logits, predictions, correct
        self.answered = accuracy == 1.0
        self._graph: PassGraph | None = graph
        self._row = row
        self._capture: Capture | None = None

    @property
    def metrics(self) -> dict[str, float | bool]:
        """``efficacy``, the share of answer tokens that are predicted, and ``answered``."""
        return {"efficacy": self.accuracy, "answered": self.answered}

    def capture(self) -> Capture:
        """Keys and value gradients; the first call runs the backward pass and frees the graph."""
        if self._capture is None:
            assert self._graph is not None
            rows, row, length = self._graph.rows(), self._row, self.prompt.length
            self._capture = Capture(
                prompt=self.prompt,
                keys=tuple(u[row, :length] for u in rows.keys),
                value_gradients=tuple(v[row, :length] for v in rows.value_gradients),
                loss=self.loss,
                predictions=self.predictions,
                correct=self.correct,
                summary=self.summary,
            )
            self.release()
        return self._capture

    def release(self) -> None:
        """Frees the graph of a reading whose backward pass is not wanted."""
        self._graph = None
