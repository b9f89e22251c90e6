"""Requests as the model reads them: one pass forward, and backward only where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.model.batches import PromptBatch, length_buckets
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture, GradientRows, as_rows


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
        """Keys and value gradients, N × T × size per layer; runs once, then frees the graph.

        Of a pass without gradients the keys alone.
        """
        if self._rows is None:
            assert self._losses is not None
            own: tuple[Tensor, ...] = ()
            if self._losses.requires_grad:
                found = torch.autograd.grad(self._losses, self._outputs, self._weights)
                own = as_rows(found, self._inputs)
            self._rows = GradientRows(tuple(u.detach() for u in self._inputs), own)
            self._losses, self._inputs, self._outputs = None, [], []
        return self._rows


@dataclass(frozen=True, slots=True)
class PromptReading:
    """One prompt as a pass has read it.

    Args:
        prompt: The prompt.
        loss: −log p(answer | prompt), mean over answer tokens, in nats.
        accuracy: Share of answer tokens that are predicted.
        summary: The two again, as a float32 tensor on the model's device.
        logits: A × vocabulary, at the answer positions.
        predictions: A int64, their argmax.
        correct: A bool, whether that is the answer's token.
        graph: The pass it was read in.
        row: Its place there.
    """

    prompt: EncodedPrompt
    loss: float
    accuracy: float
    summary: Tensor
    logits: Tensor
    predictions: Tensor
    correct: Tensor
    graph: PassGraph
    row: int

    def rows(self) -> GradientRows:
        """Keys and value gradients of its own tokens, T × size per layer, without padding."""
        found, length = self.graph.rows(), self.prompt.length
        return GradientRows(
            tuple(u[self.row, :length] for u in found.keys),
            tuple(v[self.row, :length] for v in found.value_gradients),
        )


class Reading:
    """An edit unit as the model reads it: the prompts that one step edits, of one fact or several.

    Its loss is the mean over its prompts of the mean nats per answer token, and so is its accuracy;
    it is answered if every prompt is. The backward pass is done only if it is asked for.

    Args:
        parts: One per prompt; at least one.

    Attributes:
        prompts: The P prompts.
        loss: In nats per answer token.
        accuracies: Share of answer tokens that are predicted, of every prompt.
        accuracy: Their mean.
        answered: Whether all answer tokens are predicted.
        summaries: P × 2 float32 on the model's device, loss and accuracy of every prompt.
        logits: A × vocabulary, at the answer positions, prompt after prompt.
        predictions: A int64, their argmax.
        correct: A bool, whether that is the answer's token.
    """

    def __init__(self, parts: Sequence[PromptReading]) -> None:
        self.prompts = tuple(part.prompt for part in parts)
        self.loss = sum(part.loss for part in parts) / len(parts)
        self.accuracies = tuple(part.accuracy for part in parts)
        self.accuracy = sum(self.accuracies) / len(parts)
        self.answered = all(share == 1.0 for share in self.accuracies)
        self.summaries = torch.stack([part.summary for part in parts])
        self.logits = _joined([part.logits for part in parts])
        self.predictions = _joined([part.predictions for part in parts])
        self.correct = _joined([part.correct for part in parts])
        self._parts: Sequence[PromptReading] | None = parts
        self._capture: Capture | None = None

    @property
    def prompt(self) -> EncodedPrompt:
        """The first prompt."""
        return self.prompts[0]

    @property
    def metrics(self) -> dict[str, float | bool]:
        """``efficacy``, the share of answer tokens that are predicted, and ``answered``."""
        return {"efficacy": self.accuracy, "answered": self.answered}

    def capture(self) -> Capture:
        """Keys and value gradients; the first call runs the backward pass and frees the graph."""
        if self._capture is None:
            assert self._parts is not None
            rows = [part.rows() for part in self._parts]
            self._capture = Capture(
                prompts=self.prompts,
                keys=tuple(map(_joined, zip(*(r.keys for r in rows), strict=True))),
                value_gradients=tuple(
                    map(_joined, zip(*(r.value_gradients for r in rows), strict=True))
                ),
                loss=self.loss,
                predictions=self.predictions,
                correct=self.correct,
                summaries=self.summaries,
            )
            self.release()
        return self._capture

    def release(self) -> None:
        """Frees the graph of a reading whose backward pass is not wanted."""
        self._parts = None


def read_batch(
    batch: PromptBatch,
    logits: Tensor,
    inputs: list[Tensor],
    outputs: list[Tensor],
    counts: Sequence[int],
) -> list[PromptReading]:
    """The prompts of a batch from what a pass with gradients gave.

    Args:
        batch: Of N prompts, A answer tokens in all.
        logits: A × vocabulary, ready for a backward pass.
        inputs: Per layer N × T × d_in.
        outputs: Per layer N × T × d_out, in any arrangement of the first two.
        counts: How many prompts the unit of each prompt has.
    """
    with torch.enable_grad():
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
    weights = 1 / batch.answer_lengths[batch.rows]
    if max(counts) > 1:
        weights = weights / torch.tensor(counts, device=weights.device)[batch.rows]
    graph = PassGraph(losses, weights, inputs, outputs)
    logits = logits.detach()
    predictions = logits.argmax(-1)
    correct = predictions == batch.labels
    summaries = batch.column_means(torch.stack((losses.detach(), correct.float()), 1))
    sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
    parts = [torch.split(part, sizes) for part in (logits, predictions, correct)]
    numbers = summaries.tolist()
    return [
        PromptReading(
            prompt=prompt,
            loss=numbers[i][0],
            accuracy=numbers[i][1],
            summary=summaries[i],
            logits=parts[0][i],
            predictions=parts[1][i],
            correct=parts[2][i],
            graph=graph,
            row=i,
        )
        for i, prompt in enumerate(batch.prompts)
    ]


def reading_buckets(
    prompts: Sequence[EncodedPrompt], counts: Sequence[int], limit: int
) -> list[list[int]]:
    """Which prompts of edit units are read in one pass, as indices.

    Args:
        prompts: At least one.
        counts: How many prompts the unit of each has.
        limit: Most tokens of a padded batch; a prompt that is longer is read alone.
    """
    if max(counts) > 1:
        return length_buckets(prompts, limit)
    # One prompt each: not sorted, so that rows lie as they are asked.
    size = max(1, limit // max(prompt.length for prompt in prompts))
    places = range(len(prompts))
    return [list(places[start : start + size]) for start in places[::size]]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all prompts; the tensor itself, not copied, where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
