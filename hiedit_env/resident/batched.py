"""Several environments on one resident model, answered by few passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.reading import Reading
from hiedit_env.resident.resident import ResidentLLM

#: An environment, and its place among those asked, with the places of its prompts in a batch's
#: rows.
Places = list[tuple[int, int]]


def read_together(asked: Sequence[tuple[ResidentLLM, Sequence[EncodedPrompt]]]) -> list[Reading]:
    """Reads one edit unit for each of several forks, in few passes.

    Args:
        asked: Forks of one model (or a single model of any kind), each with the prompts of its
            unit, at least one.

    Returns:
        One reading each, in order. Works in every gradient mode of the caller.
    """
    prompts = [prompt for _, unit in asked for prompt in unit]
    forks = [llm for llm, unit in asked for _ in unit]
    counts = [len(unit) for _, unit in asked for _ in unit]
    parts = iter(forks[0].read_forks(prompts, forks, counts))
    return [Reading(list(itertools.islice(parts, len(unit)))) for _, unit in asked]


def logits_together(
    asked: Sequence[tuple[ResidentLLM, Sequence[EncodedPrompt]]], updates: Updates | None = None
) -> Iterator[tuple[Places, PromptBatch, Tensor]]:
    """Answer logits of the prompts of several environments, batch by batch.

    Prompts are sorted by length within every environment, and every batch holds equally many of
    each, so that an environment's rows lie together; where one has fewer left, its last is run
    again.

    Args:
        asked: Forks of one model, each with its prompts; or a single model of any kind.
        updates: Overlay; for a single environment only.

    Yields:
        For every row of the batch ``(environment, prompt)`` as indices into ``asked``; the batch;
        and its logits, answer tokens × vocabulary. A pair may come twice.
    """
    tables = [sorted(range(len(p)), key=lambda i: p[i].length) for _, p in asked]
    present = [member for member, table in enumerate(tables) if table]
    if not present:
        return
    width = max(len(table) for table in tables)
    limit = asked[0][0].max_batch_tokens

    def prompt(member: int, column: int) -> int:
        return tables[member][min(column, len(tables[member]) - 1)]

    # Rising from column to column.
    lengths = [
        max(asked[member][1][prompt(member, column)].length for member in present)
        for column in range(width)
    ]
    most = max(1, limit // lengths[-1])
    for first in range(0, len(present), most):
        members = present[first : first + most]
        forks = [asked[member][0] for member in members]
        start = 0
        while start < width:
            stop = start + 1
            while stop < width and len(members) * (stop + 1 - start) * lengths[stop] <= limit:
                stop += 1
            columns = range(start, stop)
            places = [(member, prompt(member, column)) for member in members for column in columns]
            batch = forks[0].batch([asked[member][1][i] for member, i in places])
            yield places, batch, forks[0].answer_logits(batch, updates, forks=forks)
            start = stop
