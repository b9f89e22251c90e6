"""Greedy generation: batched, and by nothing but the argmax whatever settings a model brings."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder

#: Most tokens in one pass: nothing is kept for a backward pass, but keys and values of every token.
MAX_TOKENS = 4096


def end_ids(model: PreTrainedModel, encoder: PromptEncoder) -> frozenset[int]:
    """Tokens that end a generated text: the tokenizer's, those the model came with, the encoder's.

    Chat models often have several, of which the tokenizer knows one.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list | tuple) else [own]
    known = (encoder.tokenizer.eos_token_id, *several, encoder.end_id)
    return frozenset(i for i in known if i is not None)


def generate(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    prompts: Sequence[str | EncodedPrompt],
    max_new_tokens: Sequence[int],
    max_batch: int,
    max_tokens: int = MAX_TOKENS,
) -> list[str]:
    """Greedy continuations as texts; arguments of :func:`continuations`."""
    found = continuations(model, encoder, prompts, max_new_tokens, max_batch, max_tokens)
    ends = end_ids(model, encoder)
    return [text_of(encoder, tokens, ends) for tokens in found]


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    prompts: Sequence[str | EncodedPrompt],
    max_new_tokens: Sequence[int],
    max_batch: int,
    max_tokens: int = MAX_TOKENS,
    use_cache: bool = True,
) -> list[list[int]]:
    """Tokens of greedy continuations, each up to the first of :func:`end_ids`, which is kept.

    Args:
        model: Causal LM; its own generation settings are in place again afterwards.
        encoder: Of the model's tokenizer and context length.
        prompts: Texts to continue, or encoded prompts, whose own tokens are continued (those of
            the chat form are not what the text alone gives).
        max_new_tokens: Budget of each; generation also ends at a token of :func:`end_ids` and where
            the model's context ends.
        max_batch: Most prompts in one pass.
        max_tokens: Most tokens in one pass, padding and new ones included; a prompt that needs more
            goes alone.
        use_cache: Whether keys and values of earlier tokens are kept; slower, but right, without,
            where a model's cache does not work. Then ``max_batch`` must be 1.
    """
    encoded = [
        encoder.encode_prompt(prompt) if isinstance(prompt, str) else prompt.prompt_ids
        for prompt in prompts
    ]
    # The last new token is never read, so it needs no position.
    room = [(encoder.max_length or sys.maxsize) + 1 - len(ids) for ids in encoded]
    budgets = [min(pair) for pair in zip(max_new_tokens, room, strict=True)]
    found: list[list[int]] = [[] for _ in prompts]
    tokenizer = encoder.tokenizer
    pad, ends = tokenizer.pad_token_id or 0, end_ids(model, encoder)
    make_config = cast(Any, GenerationConfig)  # untyped in transformers
    for group in _groups([len(ids) for ids in encoded], budgets, room, max_batch, max_tokens):
        longest = max(len(encoded[i]) for i in group)
        ids = torch.full((len(group), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):
            ids[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, longest - len(encoded[i]) :] = 1
        config = make_config(
            do_sample=False,
            max_new_tokens=max(budgets[i] for i in group),
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            bos_token_id=tokenizer.bos_token_id,
        )
        if not use_cache:
            (i,) = group
            found[i] = _plain(model, encoded[i], budgets[i], ends)
            continue
        # Penalties and sampling settings that came with the model would be taken from its own.
        own, model.generation_config = model.generation_config, make_config()
        try:
            output = cast(Any, model).generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
        finally:
            model.generation_config = own
        for row, i in enumerate(group):
            new = output[row, longest : longest + budgets[i]].tolist()
            # What pads a row that has ended need not be a special token.
            stop = next((place for place, token in enumerate(new) if token in ends), len(new))
            found[i] = new[: stop + 1]
    return found


def text_of(encoder: PromptEncoder, tokens: Sequence[int], ends: Collection[int]) -> str:
    """A continuation as text, without the token that ends it and without special tokens.

    Args:
        encoder: As for :func:`continuations`.
        tokens: What that gave.
        ends: What :func:`end_ids` gives.
    """
    whole = not tokens or tokens[-1] not in ends
    return encoder.decode(tokens if whole else tokens[:-1])


def _plain(
    model: PreTrainedModel, prompt: Sequence[int], budget: int, ends: frozenset[int]
) -> list[int]:
    """Greedy continuation by whole passes, up to an end token, which is kept."""
    ids = list(prompt)
    for _ in range(budget):
        read = torch.tensor([ids], dtype=torch.int64, device=model.device)
        token = int(model(input_ids=read, use_cache=False).logits[0, -1].argmax())
        ids.append(token)
        if token in ends:
            break
    return ids[len(prompt) :]


def _groups(
    lengths: Sequence[int],
    budgets: Sequence[int],
    room: Sequence[int],
    size: int,
    max_tokens: int,
) -> list[list[int]]:
    """Prompts to continue together: not too many, and none beyond the end of its context."""
    groups: list[list[int]] = []
    for i in sorted(range(len(budgets)), key=lambda i: (budgets[i], -room[i])):
        # Budgets rise, so this prompt's is how long all of its group go on.
        last = groups[-1] if groups else []
        longest = max((lengths[j] for j in (*last, i)), default=0) + budgets[i]
        fits = len(last) < size and (len(last) + 1) * longest <= max_tokens
        if last and fits and budgets[i] <= min(room[j] for j in last):
            last.append(i)
        else:
            groups.append([i])
    return groups
