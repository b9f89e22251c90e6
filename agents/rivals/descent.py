"""Fine-tuning of whole matrices as changes that an environment writes: Adam on dense changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import WholeRule


class GivenChange(WholeRule):
    """An update rule that proposes dense changes made elsewhere.

    Args:
        llm: The model whose layers are changed; only its shapes are kept.
    """

    name: ClassVar[str] = "given-change"
    default_step_size: ClassVar[float] = 1.0

    def __init__(self, llm: ResidentLLM) -> None:
        super().__init__(llm.shapes, llm.device)

    def reset(self) -> None:
        """Forgets the changes."""
        #: Layer → d_in × d_out float32, proposed from now on.
        self.changes: dict[int, Tensor] = {}

    def statistics(self) -> dict[str, Any]:
        """The changes; they are never written in place."""
        return {"changes": dict(self.changes)}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved changes back."""
        self.changes = dict(statistics["changes"])

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The changes of the chosen layers, whatever the capture says."""
        return tuple(
            dense(self.changes[i]) if layers[i] and i in self.changes else None
            for i in range(len(self.shapes))
        )


def dense(change: Tensor) -> LowRankUpdate:
    """A dense d_in × d_out change as factors of rank d_in."""
    return LowRankUpdate(torch.eye(change.shape[0], device=change.device), change)


class Descent:
    """Adam on the changes of some layers, on top of the model's present weights.

    Args:
        llm: The model; its weights are not written.
        layers: Indices of the layers that change.
        learning_rate: Of Adam.
        enough: No step is taken where the loss of a batch is below, in nats per token.
    """

    def __init__(
        self, llm: ResidentLLM, layers: Sequence[int], learning_rate: float, enough: float = 0.0
    ) -> None:
        self.llm, self.enough = llm, enough
        with torch.inference_mode(False):
            self.changes = {
                i: torch.zeros(*llm.shapes[i], device=llm.device, requires_grad=True)
                for i in layers
            }
            self._eyes = {i: torch.eye(llm.shapes[i][0], device=llm.device) for i in layers}
        self._adam = torch.optim.Adam(list(self.changes.values()), lr=learning_rate)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(
        self,
        prompts: Sequence[EncodedPrompt],
        reference: Mapping[EncodedPrompt, Tensor] | None = None,
        weight: float = 0.0,
    ) -> tuple[float, bool]:
        """One step on −log p(answer), mean over tokens, then over prompts.

        Args:
            prompts: The batch.
            reference: Log-probabilities of the unedited model at the answers of other prompts, to
                which a penalty KL[unedited ‖ present], mean over tokens, then prompts, holds.
            weight: Of the penalty.

        Returns:
            The loss before the step, without the penalty, and whether all answer tokens were the
            argmax.
        """
        self._adam.zero_grad()
        total, right = 0.0, True
        for bucket in self.llm.buckets(prompts):
            chosen = [prompts[i] for i in bucket]
            losses = []
            for prompt, rows in zip(chosen, self._log_probs(chosen), strict=True):
                labels = torch.tensor(prompt.answer_ids, device=rows.device)
                right = right and bool((rows.argmax(-1) == labels).all())
                losses.append(F.nll_loss(rows, labels))
            loss = torch.stack(losses).sum() / len(prompts)
            total += float(loss.detach())
            torch.autograd.backward(loss)
        if total < self.enough:
            return total, right
        others = dict(reference or {})
        prompts = list(others)
        for bucket in self.llm.buckets(prompts) if weight else []:
            chosen = [prompts[i] for i in bucket]
            divergences = [
                F.kl_div(rows, others[prompt], reduction="batchmean", log_target=True)
                for prompt, rows in zip(chosen, self._log_probs(chosen), strict=True)
            ]
            torch.autograd.backward(weight * torch.stack(divergences).sum() / len(prompts))
        self._adam.step()
        return total, right

    def result(self) -> dict[int, Tensor]:
        """The changes so far, without gradients."""
        return {i: change.detach().clone() for i, change in self.changes.items()}

    def _log_probs(self, prompts: Sequence[EncodedPrompt]) -> Sequence[Tensor]:
        """Per prompt answer tokens × vocabulary, float32, with gradients in the changes."""
        updates: list[LowRankUpdate | None] = [None] * len(self.llm.layers)
        for i, change in self.changes.items():
            updates[i] = LowRankUpdate(self._eyes[i], change)
        batch = self.llm.batch(list(prompts))
        rows = self.llm.answer_logits(batch, updates).float().log_softmax(-1)
        return torch.split(rows, [len(prompt.answer_ids) for prompt in prompts])


def references(
    unedited: UneditedModel, prompts: Sequence[EncodedPrompt]
) -> dict[EncodedPrompt, Tensor]:
    """Log-probabilities of the unedited model at its own answers to prompts."""
    return unedited.log_probs(list(dict.fromkeys(unedited.answers(prompts))))


def chosen_layer(llm: ResidentLLM, layer: int | None, agent: str) -> int:
    """Index of the layer to fine-tune.

    Args:
        llm: The model.
        layer: Index among its candidates; None for the one nearest to 22/32 of the depth, an MLP's
            last matrix before others (LocFT-BF's choice on Llama-3-8B).
        agent: For the message.

    Raises:
        SettingsError: no such candidate.
    """
    count = len(llm.layers)
    if layer is not None:
        if not isinstance(layer, int) or not 0 <= layer < count:
            raise SettingsError(
                f"agent {agent!r}: layer must be the index of a candidate, 0 to {count - 1}, got "
                f"{layer!r}"
            )
        return layer
    last = max(candidate.block for candidate in llm.layers)
    depth = int(getattr(llm.model.config, "num_hidden_layers", last + 1))

    def far(index: int) -> tuple[bool, float]:
        candidate = llm.layers[index]
        # Back to the residual stream: fewer outputs than inputs.
        return candidate.d_out >= candidate.d_in, abs(candidate.block / depth - 22 / 32)

    return min(range(count), key=far)
