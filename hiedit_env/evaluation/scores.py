"""Scores of single prompts: how well several environments answer them, in few passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.batched import logits_together
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.resident import ResidentLLM


def scores_together(
    asked: Sequence[tuple[ResidentLLM, Sequence[EncodedPrompt], Mapping[EncodedPrompt, Tensor]]],
    updates: Updates | None = None,
) -> list[Tensor]:
    """How well several environments answer their prompts; equal prompts of one are run once.

    Args:
        asked: Forks of one model (or a single model of any kind), each with its P prompts and the
            reference's log-probabilities (answer tokens × vocabulary) of some of them.
        updates: Overlay, differentiable; for a single environment only.

    Returns:
        Per environment P × 4 float32: −nats, token accuracy, KL from the reference, argmax
        agreement with it; the last two are 0 for prompts without a reference.
    """
    models = [llm for llm, _, _ in asked]
    unique, numbers = zip(*(_numbered(prompts) for _, prompts, _ in asked), strict=True)
    known = [
        [references.get(prompt) for prompt in own]
        for own, (_, _, references) in zip(unique, asked, strict=True)
    ]
    parts: list[Tensor] = []
    rows: dict[tuple[int, int], int] = {}
    for places, batch, logits in logits_together(list(zip(models, unique, strict=True)), updates):
        start = sum(len(part) for part in parts)
        values = _scores(batch, [known[member][i] for member, i in places], logits.float())
        rows |= {place: start + i for i, place in enumerate(places)}
        parts.append(batch.column_means(torch.stack(values, 1)))
    if not parts:
        return [torch.zeros(0, 4, device=model.device) for model in models]
    table = torch.cat(parts)
    return [
        table[torch.tensor([rows[member, i] for i in own], dtype=torch.int64, device=table.device)]
        for member, own in enumerate(numbers)
    ]


def _numbered(prompts: Sequence[EncodedPrompt]) -> tuple[list[EncodedPrompt], list[int]]:
    """The different prompts, and for every prompt its place among them."""
    places: dict[EncodedPrompt, int] = {}
    numbers = [places.setdefault(prompt, len(places)) for prompt in prompts]
    return list(places), numbers


def _scores(
    batch: PromptBatch, references: Sequence[Tensor | None], logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per answer token: −nats, whether it is the argmax, KL from the reference, agreement."""
    log_probs, predictions = logits.log_softmax(-1), logits.argmax(-1)
    losses = log_probs.gather(1, batch.labels[:, None])[:, 0]
    correct = (predictions == batch.labels).float()
    kl, agree = torch.zeros_like(losses), torch.zeros_like(losses)
    rows: list[int] = []
    start = 0
    for prompt, known in zip(batch.prompts, references, strict=True):
        stop = start + len(prompt.answer_ids)
        if known is not None:
            rows += range(start, stop)
        start = stop
    if rows:
        index = torch.tensor(rows, device=logits.device)
        reference = torch.cat([known for known in references if known is not None])
        now = log_probs[index]
        divergence = F.kl_div(now, reference, reduction="none", log_target=True).sum(-1)
        kl = kl.index_put((index,), divergence)
        equal = (predictions[index] == reference.argmax(-1)).float()
        agree = agree.index_put((index,), equal)
    return losses, correct, kl, agree
