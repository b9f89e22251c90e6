"""The answers and log-probabilities of the unedited model: the reference for damage by edits."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.prefix_cache import TensorCache
from hiedit_env.resident.resident import ResidentLLM

#: ``(stage, done, total)``: called after every batch of prompts.
Progress = Callable[[str, int, int], None]

#: Greedy tokens of the unedited model that ``agreement`` compares with.
REFERENCE_TOKENS = 5


class UneditedModel:
    """Asks the unedited model, whatever the present weights are, and remembers the results.

    Share one object among agents and seeds that ask the same prompts, so that each is run once.

    Args:
        llm: The model.
        max_tokens: Maximum number of tokens of an answer; fewer where a token of ``llm.end_ids``
            comes first.
        cache_bytes: Bound of the memory for log-probabilities. Answers are small and always kept.

    Raises:
        SettingsError: ``max_tokens`` below 1.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        max_tokens: int = REFERENCE_TOKENS,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        if max_tokens < 1:
            raise SettingsError(f"max_tokens must be at least 1, got {max_tokens!r}")
        self.llm, self.max_tokens = llm, max_tokens
        self._log_probs = TensorCache(cache_bytes)
        self._answers: dict[tuple[int, ...], EncodedPrompt] = {}
        self._texts: dict[EncodedPrompt, str] = {}

    def __len__(self) -> int:
        """Number of different prompts answered so far."""
        return len(self._answers)

    def clone_for(self, llm: ResidentLLM) -> Self:
        """The same for a fork of the model; both share all results, past and future."""
        twin = copy.copy(self)
        twin.llm = llm
        return twin

    def shares_with(self, other: UneditedModel) -> bool:
        """Whether the two share their results, as clones do."""
        return self._answers is other._answers

    def log_probs(self, prompts: Sequence[EncodedPrompt]) -> dict[EncodedPrompt, Tensor]:
        """Log-probabilities at the answers of prompts, which are run together.

        Results are remembered for the whole sequence: which prompts are batched together changes
        the last bits, so equal calls give equal bits, whatever was asked before.

        Args:
            prompts: Different prompts.

        Returns:
            Per prompt answer tokens × vocabulary, float32; without gradient, but no inference
            tensor.
        """
        return self.log_probs_of([tuple(prompts)])[0]

    def log_probs_of(
        self, groups: Sequence[tuple[EncodedPrompt, ...]], *, together: bool = False
    ) -> list[dict[EncodedPrompt, Tensor]]:
        """:meth:`log_probs` of several groups of prompts.

        Args:
            groups: Each of different prompts.
            together: Whether groups that are not known yet share passes: fewer passes, values
                equal up to rounding.
        """
        known = {g: found for g in groups if (found := self._log_probs.get(g)) is not None}
        missing = [group for group in dict.fromkeys(groups) if group and group not in known]
        with self.llm.unedited():
            for part in [missing] if together and missing else [[group] for group in missing]:
                prompts = list(dict.fromkeys(prompt for group in part for prompt in group))
                rows = answer_log_probs(self.llm, prompts)
                for group in part:
                    known[group] = torch.cat([rows[prompt] for prompt in group])
                    self._log_probs.put(group, known[group])
        return [_split(group, known[group]) if group else {} for group in groups]

    def text(self, prompt: EncodedPrompt) -> str:
        """The greedy continuation, of the answer's tokens and a few more."""
        if prompt not in self._texts:
            with self.llm.unedited(), torch.no_grad():
                budget = len(prompt.answer_ids) + EXTRA_TOKENS
                [self._texts[prompt]] = self.llm.generate([prompt], [budget])
        return self._texts[prompt]

    def answers(
        self, prompts: Sequence[EncodedPrompt], progress: Progress | None = None
    ) -> list[EncodedPrompt]:
        """The prompts with the unedited model's greedy tokens in place of their answers.

        Args:
            prompts: Their own answers play no part.
            progress: Called with the stage ``"reference"`` where something has to be computed.
        """
        missing = {p.prompt_ids: p for p in prompts if p.prompt_ids not in self._answers}
        if missing:
            with self.llm.unedited(), torch.inference_mode():
                self._answer(list(missing.values()), progress)
        return [self._answers[p.prompt_ids] for p in prompts]

    def _answer(self, prompts: list[EncodedPrompt], progress: Progress | None) -> None:
        # What counts is the argmax of whole passes, as teacher forcing gives them, so that the
        # unedited model agrees with itself also where two tokens are close. What it generates with
        # cached keys is a guess, which one whole pass confirms up to the first other token.
        limit, ends = self.llm.encoder.max_length, self.llm.end_ids
        found: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        while running:
            begun = [
                EncodedPrompt(p.prompt, p.answer, (*p.prompt_ids, *found[i]), (0,))
                for i, p in ((i, prompts[i]) for i in running)
            ]
            budgets = [
                max(1, min(self.max_tokens - len(found[i]), (limit or sys.maxsize) - len(own)))
                for i, own in zip(running, (p.prompt_ids for p in begun), strict=True)
            ]
            guesses = self._guesses(begun, budgets)
            reads = [
                EncodedPrompt(p.prompt, p.answer, p.prompt_ids, tuple(guess))
                for p, guess in zip(begun, guesses, strict=True)
            ]
            for bucket in self.llm.buckets(reads):
                batch = self.llm.batch([reads[k] for k in bucket])
                best = self.llm.answer_logits(batch, remember=False).argmax(-1)
                parts = torch.split(best, [len(guesses[k]) for k in bucket])
                for k, tokens in zip(bucket, parts, strict=True):
                    found[running[k]] += _confirmed(guesses[k], tokens.tolist())
            running = [
                i
                for i in running
                if found[i][-1] not in ends
                and len(found[i]) < self.max_tokens
                and (limit is None or len(prompts[i].prompt_ids) + len(found[i]) < limit)
            ]
            if progress is not None:
                progress("reference", len(prompts) - len(running), len(prompts))
        for p, ids in zip(prompts, found, strict=True):
            answer = self.llm.encoder.decode(ids)
            self._answers[p.prompt_ids] = EncodedPrompt(p.prompt, answer, p.prompt_ids, tuple(ids))

    def _guesses(
        self, prompts: Sequence[EncodedPrompt], budgets: Sequence[int]
    ) -> Sequence[Sequence[int]]:
        """Tokens that may be what follows, at least one for each prompt."""
        if self.llm.generates_whole or not self.llm.model.can_generate():
            # Any token is a guess, which a whole pass puts right.
            return [(0,) for _ in prompts]
        return self.llm.continuations(prompts, budgets)


def _confirmed(guess: Sequence[int], best: Sequence[int]) -> list[int]:
    """The most probable tokens behind a prompt, up to the first one that was guessed wrongly.

    Args:
        guess: Tokens that the model has read behind the prompt.
        best: Per token of these what the model would rather have had.

    >>> _confirmed([5, 6, 7], [5, 6, 7]), _confirmed([5, 6, 7], [5, 8, 9]), _confirmed([0], [4])
    ([5, 6, 7], [5, 8], [4])
    """
    wrong = (place for place, (a, b) in enumerate(zip(guess, best, strict=True)) if a != b)
    return list(best[: next(wrong, len(best)) + 1])


def answer_log_probs(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt]
) -> dict[EncodedPrompt, Tensor]:
    """Log-probabilities at the answers of prompts at the present weights.

    Returns:
        Per prompt answer tokens × vocabulary, float32; without gradient, but no inference tensor.
    """
    rows: dict[EncodedPrompt, Tensor] = {}
    # Never inference tensors, wherever this is called from: they later enter autograd graphs.
    with torch.inference_mode(False), torch.no_grad():
        for bucket in llm.buckets(prompts):
            batch = llm.batch([prompts[i] for i in bucket])
            found = llm.answer_logits(batch).float().log_softmax(-1)
            rows |= _split(batch.prompts, found)
    return rows


def _split(prompts: Sequence[EncodedPrompt], rows: Tensor) -> dict[EncodedPrompt, Tensor]:
    """The rows of all answer tokens, prompt by prompt."""
    sizes = [len(prompt.answer_ids) for prompt in prompts]
    return dict(zip(prompts, torch.split(rows, sizes), strict=True))
