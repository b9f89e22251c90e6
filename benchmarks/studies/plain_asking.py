"""Asks a model by transformers alone: ``generate``, and one forward pass for given answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hiedit_env.model.encoded import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

#: Prompts that are run together.
BATCH = 16


def generated(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt], budgets: Sequence[int]
) -> list[str]:
    """Greedy continuations.

    Args:
        llm: Its model and tokenizer are used, and nothing else of it.
        prompts: P.
        budgets: P numbers of tokens.

    Returns:
        P texts without special tokens, each up to the first token that ends a text.
    """
    found = _continued(llm, prompts, budgets)
    ends = set(llm.end_ids)
    texts = [[*itertools.takewhile(lambda token: token not in ends, own)] for own in found]
    return [llm.encoder.decode(own) for own in texts]


def first_tokens(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt], number: int
) -> list[EncodedPrompt]:
    """The prompts with the model's own first tokens in place of their answers.

    Args:
        llm: As for :func:`generated`.
        prompts: P.
        number: Of tokens; fewer where one that ends a text comes first, which is kept.
    """
    found = _continued(llm, prompts, [number] * len(prompts))
    return [
        replace(p, answer=llm.encoder.decode(own), answer_ids=tuple(own))
        for p, own in zip(prompts, found, strict=True)
    ]


def _continued(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt], budgets: Sequence[int]
) -> list[list[int]]:
    """Greedy tokens, at most so many, each text up to the first that ends it, which is kept."""
    model = cast(PreTrainedModel, llm.model)
    found: list[list[int]] = [[] for _ in prompts]
    ends = set(llm.end_ids)
    for places in _batches([p.prompt_ids for p in prompts]):
        ids, mask = _padded(llm, [prompts[i].prompt_ids for i in places])
        more = max(budgets[i] for i in places)
        out = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=more,
            do_sample=False,
            pad_token_id=min(ends),
        )
        for i, row in zip(places, out[:, ids.shape[1] :].tolist(), strict=True):
            own = row[: budgets[i]]
            last = next((at for at, token in enumerate(own) if token in ends), len(own))
            found[i] = own[: last + 1]
    return found


def tokens_kept(llm: ResidentLLM, prompts: Sequence[EncodedPrompt]) -> list[float]:
    """Share of the answer tokens of each prompt that are the most probable ones.

    Args:
        llm: As for :func:`generated`.
        prompts: P, with the answers that are looked for.
    """
    found = [0.0] * len(prompts)
    texts = [(*p.prompt_ids, *p.answer_ids) for p in prompts]
    for places in _batches(texts):
        ids, mask = _padded(llm, [texts[i] for i in places])
        best: Tensor = llm.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        for row, i in enumerate(places):
            wanted = torch.tensor(prompts[i].answer_ids, device=ids.device)
            said = best[row, -len(wanted) - 1 : -1]
            found[i] = float((said == wanted).float().mean())
    return found


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of texts of similar lengths."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _padded(llm: ResidentLLM, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Texts with padding in front, and which of their tokens are real: both B × T."""
    longest = max(map(len, texts))
    some = next(iter(llm.end_ids))
    ids = torch.full((len(texts), longest), some, device=llm.device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = torch.tensor(list(text), device=llm.device)
        mask[row, longest - len(text) :] = 1
    return ids, mask
