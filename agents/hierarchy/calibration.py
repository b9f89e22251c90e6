"""What a low level is shown at the unedited weights, before its first edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.writing import mentions
from hiedit_env.model.sampling import beginnings, sampled_texts
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder
from hiedit_env.resident.resident import ResidentLLM

#: Tokens of a text that the model writes from nothing, and of a prompt that it goes on with.
TEXT_TOKENS, PROMPT_TOKENS = 224, 48


def calibration_prompts(
    requests: Sequence[Request], encoder: PromptEncoder, count: int, seed: int, *, every: bool
) -> list[EncodedPrompt]:
    """Prompts of some facts, each once and in one form, in random order.

    Args:
        requests: The facts.
        encoder: Makes tokens of them.
        count: Largest number of prompts.
        seed: Of which, and in which order.
        every: Whether the facts' own prompts and their paraphrases are among them, beside the
            unrelated ones, and every fourth is in chat form where the tokenizer has one.
    """
    rng = np.random.default_rng([seed, 2])
    probes = list(dict.fromkeys(p for request in requests for p in request.locality))
    if every:
        asked = ((r, p) for r in requests for p in (r.prompt, *r.paraphrases))
        own = (Probe(prompt, request.answer) for request, prompt in asked)
        probes = list(dict.fromkeys((*probes, *own)))
    chosen = [probes[i] for i in rng.permutation(len(probes))[:count]]
    chat = every and getattr(encoder.tokenizer, "chat_template", None)
    return [
        encoder.encode_forms(p.prompt, p.answer, "chat" if chat and not i % 4 else "plain")[0]
        for i, p in enumerate(chosen)
    ]


def own_texts(
    llm: ResidentLLM,
    requests: Sequence[Request],
    count: int,
    seed: int,
    on_texts: Callable[[int], None] | None = None,
) -> list[EncodedPrompt]:
    """Texts that the model writes itself (:func:`.sampling.sampled_texts`).

    One third begins with nothing, or with the user's turn of a chat; two thirds go on, in both
    forms as well, with the facts' prompts up to their subjects, so that they are about other
    subjects in the same relations.

    Args:
        llm: The model, whose unedited weights are used.
        requests: Facts.
        count: Number of texts.
        seed: Of the draws.
        on_texts: Called with the number of texts after every few of them.

    Raises:
        PromptError: the tokenizer has no token that a text begins with.
    """
    rng = np.random.default_rng([seed, 3])
    free = -(-count // 3)
    nothing, forms = beginnings(llm.encoder, free), beginnings(llm.encoder, count - free)
    openings = _openings(requests) or [""]
    drawn = [openings[i] for i in rng.integers(len(openings), size=count - free)]
    ids = [tuple(llm.encoder.tokenizer(o, add_special_tokens=False)["input_ids"]) for o in drawn]
    room = llm.encoder.max_length or TEXT_TOKENS
    begun = [(*form, *own)[: room - 1] for form, own in zip(forms, ids, strict=True)]
    longest = PROMPT_TOKENS + max(map(len, forms), default=0)
    found: list[EncodedPrompt] = []
    with llm.unedited():
        for part, (begin, length) in enumerate(((nothing, TEXT_TOKENS), (begun, longest))):
            found += sampled_texts(
                llm.model,
                begin,
                min(length, room),
                int(rng.integers(2**31)) + part,
                use_cache=not llm.generates_whole,
                on_texts=on_texts,
            )
    return found


def _openings(requests: Sequence[Request]) -> list[str]:
    """What stands before the subject in facts' prompts and paraphrases, each once, in order."""
    found: dict[str, None] = {}
    for request in requests:
        for text in (request.prompt, *request.paraphrases):
            spans = mentions(text, request.subject) if request.subject else ()
            if spans and text[: spans[0][0]].strip():
                found[text[: spans[0][0]].rstrip()] = None
    return list(found)
