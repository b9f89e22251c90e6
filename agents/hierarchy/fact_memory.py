"""The base of low levels that write at subjects: which facts they were given, by subject."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import WholeRule

#: The prompts of one fact, in every form asked.
Unit = tuple[EncodedPrompt, ...]


def subject_of(llm: ResidentLLM, prompt: EncodedPrompt) -> str:
    """The subject as it is written in the prompt, in lower case; empty where it is not in it."""
    if prompt.subject_missing or not prompt.subject_spans:
        return ""
    start, stop = prompt.subject_spans[-1]
    return llm.encoder.decode(prompt.prompt_ids[start:stop]).strip().casefold()


def units_of(llm: ResidentLLM, prompts: Sequence[EncodedPrompt]) -> list[Unit]:
    """Prompts by fact: side by side, of one subject and with one answer."""

    def fact(prompt: EncodedPrompt) -> tuple[str, str]:
        return subject_of(llm, prompt), prompt.answer

    return [tuple(group) for _, group in itertools.groupby(prompts, fact)]


class FactMemory(WholeRule):
    """A rule that seeks values on a model and knows the facts it was given before.

    A subclass sets ``llm`` before it calls the base class, and calls :meth:`recall` in ``reset``.
    """

    llm: ResidentLLM
    _earlier: tuple[Unit, ...] = ()
    _past: tuple[Unit, ...] = ()

    def parameters(self) -> list[torch.nn.Parameter]:
        """Nothing of it is learned by gradients."""
        return []

    def remember(self, facts: Sequence[EncodedPrompt]) -> None:
        """Facts that were edited into the model before; known from the next reset on.

        Args:
            facts: Earliest first; prompts of one fact stand side by side.
        """
        self._earlier = tuple(units_of(self.llm, facts))

    def recall(self) -> None:
        """Knows only what was given by :meth:`remember`."""
        self._past = self._earlier

    def observe(self, capture: Capture) -> None:
        """Takes the facts of a capture into the memory; of two answers to a prompt, the later."""
        new = units_of(self.llm, capture.prompts)
        self._past = (*self.others(new), *new)

    def others(self, present: Sequence[Unit]) -> list[Unit]:
        """Earlier facts, without those that ask one of the present prompts."""
        asked = {prompt.prompt_ids for unit in present for prompt in unit}
        return [u for u in self._past if not asked & {p.prompt_ids for p in u}]
