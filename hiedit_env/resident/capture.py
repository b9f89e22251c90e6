"""What one pass over a request leaves behind: keys and value gradients of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


class PassGraph:
    """One forward pass over one request or several, whose backward pass runs when it is asked for.

    Args:
        losses: A, of the answer tokens of all requests, each depending on its own request only.
        weights: A, what each counts in the loss that is differentiated.
        inputs: Per layer N × T × d_in.
        outputs: Per layer N × T × d_out.
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
            self._rows = GradientRows(tuple(u.detach() for u in self._inputs), gradients)
            self._losses, self._inputs, self._outputs = None, [], []
        return self._rows


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
