"""What the unedited model says to unrelated prompts: what levels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.prefix_cache import TensorCache
from hiedit_env.resident.resident import ResidentLLM


class UneditedLogProbs:
    """The unedited model's log-probabilities at the answers of prompts, each run alone.

    Args:
        llm: The model; asked at its unedited weights, whatever its present ones are.
        cache_bytes: Bound of the memory for what is known already.
    """

    def __init__(self, llm: ResidentLLM, cache_bytes: int) -> None:
        self.llm = llm
        self._cache = TensorCache(cache_bytes)

    def get(self, prompt: EncodedPrompt) -> Tensor:
        """Answer tokens × vocabulary, float32; without gradient, but no inference tensor."""
        known = self._cache.get(prompt)
        if known is None:
            with torch.inference_mode(False), self.llm.unedited(), torch.no_grad():
                known = self.llm.answer_logits(self.llm.batch([prompt])).float().log_softmax(-1)
            self._cache.put(prompt, known)
        return known
