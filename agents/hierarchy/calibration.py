"""The prompts that a low level is shown at the unedited weights, before its first edit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder


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
