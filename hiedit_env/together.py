"""Several lives on one resident model, answered by few passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.capture import Reading
from hiedit_env.resident import ResidentLLM
from hiedit_env.tokenization import EncodedPrompt, PromptBatch
from hiedit_env.updates import Updates

#: A life, and its place among those asked, with the places of its prompts in a batch's rows.
Places = list[tuple[int, int]]


def read_together(asked: Sequence[tuple[ResidentLLM, EncodedPrompt]]) -> list[Reading]:
    """One request of each of several lives, as :meth:`.resident.ResidentLLM.read` would read it.

    Args:
        asked: Forks of one model, each with its request; or a single model of any kind.
    """
    longest = max(prompt.length for _, prompt in asked)
    size = max(1, asked[0][0].max_batch_tokens // longest)
    readings: list[Reading] = []
    for start in range(0, len(asked), size):
        lives, prompts = zip(*asked[start : start + size], strict=True)
        readings += lives[0].read_lives(prompts, lives)
    return readings


def logits_together(
    asked: Sequence[tuple[ResidentLLM, Sequence[EncodedPrompt]]], updates: Updates | None = None
) -> Iterator[tuple[Places, PromptBatch, Tensor]]:
    """Answer logits of the prompts of several lives, batch by batch.

    Prompts are sorted by length within every life, and every batch holds equally many of each, so
    that a life's rows lie together; where one has fewer left, its last is run again.

    Args:
        asked: Forks of one model, each with its prompts; or a single model of any kind.
        updates: Overlay; for a single life only.

    Yields:
        For every row of the batch ``(life, prompt)`` as indices into ``asked``; the batch; and its
        logits, answer tokens × vocabulary. A pair may come twice.
    """
    tables = [sorted(range(len(p)), key=lambda i: p[i].length) for _, p in asked]
    present = [life for life, table in enumerate(tables) if table]
    if not present:
        return
    width = max(len(table) for table in tables)
    limit = asked[0][0].max_batch_tokens

    def prompt(life: int, column: int) -> int:
        return tables[life][min(column, len(tables[life]) - 1)]

    def longest(lives: Sequence[int], column: int) -> int:
        return max(asked[life][1][prompt(life, column)].length for life in lives)

    most = max(1, limit // longest(present, width - 1))
    for first in range(0, len(present), most):
        lives = present[first : first + most]
        start = 0
        while start < width:
            stop = start + 1
            # Lengths rise from column to column.
            while stop < width and (
                len(lives) * (stop + 1 - start) * longest(lives, stop) <= limit
            ):
                stop += 1
            columns = range(start, stop)
            places = [(life, prompt(life, column)) for life in lives for column in columns]
            llm = asked[lives[0]][0]
            batch = llm.batch([asked[life][1][i] for life, i in places])
            forks = [asked[life][0] for life in lives]
            yield places, batch, llm.answer_logits(batch, updates, lives=forks)
            start = stop


def scores_together(
    asked: Sequence[tuple[ResidentLLM, Sequence[EncodedPrompt], Mapping[EncodedPrompt, Tensor]]],
    updates: Updates | None = None,
) -> list[Tensor]:
    """How well several lives answer their prompts. A life's same prompt twice is run once.

    Args:
        asked: Forks of one model (or a single model of any kind), each with its P prompts and the
            reference's log-probabilities (answer tokens × vocabulary) of some of them.
        updates: Overlay, differentiable; for a single life only.

    Returns:
        Per life P × 4 float32: −nats, token accuracy, KL from the reference, argmax agreement with
        it; the last two are 0 for prompts without a reference.
    """
    unique = [list(dict.fromkeys(prompts)) for _, prompts, _ in asked]
    models = [llm for llm, _, _ in asked]
    parts: list[Tensor] = []
    rows: dict[tuple[int, int], int] = {}
    for places, batch, logits in logits_together(list(zip(models, unique, strict=True)), updates):
        references = [
            asked[life][2].get(prompt)
            for (life, _), prompt in zip(places, batch.prompts, strict=True)
        ]
        values = _scores(batch, references, logits.float())
        start = sum(len(part) for part in parts)
        rows |= {place: start + i for i, place in enumerate(places)}
        parts.append(batch.column_means(torch.stack(values, 1)))
    if not parts:
        return [torch.zeros(0, 4, device=model.device) for model in models]
    table = torch.cat(parts)
    result: list[Tensor] = []
    for life, (_, prompts, _) in enumerate(asked):
        place = {prompt: rows[life, i] for i, prompt in enumerate(unique[life])}
        index = torch.tensor([place[p] for p in prompts], dtype=torch.int64, device=table.device)
        result.append(table[index])
    return result


def _scores(
    batch: PromptBatch, references: Sequence[Tensor | None], logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per answer token: −nats, whether it is the argmax, KL from the reference, agreement."""
    predictions = logits.argmax(-1)
    losses = -F.cross_entropy(logits, batch.labels, reduction="none")
    correct = (predictions == batch.labels).float()
    kl, agree = torch.zeros_like(losses), torch.zeros_like(losses)
    sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    rows: list[int] = []
    for known, start, size in zip(references, starts, sizes, strict=True):
        if known is not None:
            rows += range(start, start + size)
    if rows:
        index = torch.tensor(rows, device=logits.device)
        reference = torch.cat([known for known in references if known is not None])
        now = logits[index].log_softmax(-1)
        divergence = F.kl_div(now, reference, reduction="none", log_target=True).sum(-1)
        kl = kl.index_put((index,), divergence)
        equal = (predictions[index] == reference.argmax(-1)).float()
        agree = agree.index_put((index,), equal)
    return losses, correct, kl, agree
