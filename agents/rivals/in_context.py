"""The fact put into the prompt: no weight changes, and every question is asked behind the fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_agents.hierarchy.options import layer_selection
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_env.datasets.requests import NEIGHBOUR, Request
from hiedit_env.datasets.writing import space_between
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.questions import is_neighbour, portability_probes
from hiedit_env.evaluation.unedited import Progress, UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt


class InContext(FixedAgent):
    """Edits nothing: the model is asked with the new fact in front of every prompt that judges it.

    With ``facts="own"`` the prompts of a fact, the unrelated ones too, are asked behind that fact
    alone, as if a perfect search had found it (an upper bound of what a memory of facts can do, and
    the hardest test of what it must leave alone). With ``"all"`` every prompt is asked behind all
    facts of the stream. ``agreement`` compares with the unedited model asked without the facts. No
    demonstrations are given, unlike in IKE (arXiv 2305.12740).

    Args:
        facts: ``"own"`` or ``"all"``.
        template: Of one fact, ``{fact}`` being its prompt and new answer.

    Raises:
        SettingsError: another value of ``facts``, or a template without ``{fact}``.
    """

    name: ClassVar[str] = "in-context"

    def __init__(self, *, facts: str = "own", template: str = "New fact: {fact}.\n") -> None:
        if facts not in ("own", "all"):
            raise SettingsError(f"facts must be 'own' or 'all', got {facts!r}")
        if "{fact}" not in template:
            raise SettingsError(f"template must hold {{fact}}, got {template!r}")
        self.facts, self.template = facts, template
        self._num_layers: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, by which a comparison that is resumed knows the agent."""
        return {"facts": self.facts, "template": self.template}

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Notes the number of layers.

        Raises:
            SettingsError: not a LayerSelection environment.
        """
        inner = layer_selection(env, self.name)
        inner.use_low_level(None)
        self._num_layers = len(inner.llm.layers)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L zeros."""
        if self._num_layers is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        return np.zeros(self._num_layers, np.int8)

    def judged(
        self, requests: Sequence[Request], reference: UneditedModel
    ) -> tuple[list[Request], UneditedModel]:
        """What the evaluation asks in the place of the facts' own prompts.

        Args:
            requests: The stream.
            reference: The unedited model.

        Returns:
            The requests with the facts in front of all their prompts, and a reference that is asked
            without them.
        """
        lines = [self.template.replace("{fact}", _statement(request)) for request in requests]
        contexts = lines if self.facts == "own" else ["".join(lines)] * len(requests)
        pairs = zip(requests, contexts, strict=True)
        return [_behind(request, text) for request, text in pairs], _Without(reference, contexts)


def _statement(request: Request) -> str:
    return request.prompt + space_between(request.prompt, request.answer) + request.answer


def _behind(request: Request, context: str) -> Request:
    """The request with a text in front of every prompt.

    What an evaluation finds out by the words of the fact's own prompt is written down before: which
    unrelated prompts are neighbours, and the prompts under other names of the subject.
    """
    locality = tuple(
        replace(
            probe,
            prompt=context + probe.prompt,
            kind=NEIGHBOUR if is_neighbour(request, probe) else probe.kind,
        )
        for probe in request.locality
    )
    portability = tuple(
        replace(probe, prompt=context + probe.prompt) for probe in portability_probes(request)
    )
    return replace(
        request,
        prompt=context + request.prompt,
        paraphrases=tuple(context + text for text in request.paraphrases),
        locality=locality,
        portability=portability,
        subject_aliases=(),
    )


class _Without(UneditedModel):
    """The unedited model's answers to prompts without the facts in front of them.

    Args:
        of: The unedited model; all its results are shared.
        contexts: The texts that stand in front.
    """

    def __init__(self, of: UneditedModel, contexts: Sequence[str]) -> None:
        self.__dict__.update(of.__dict__)
        # The longest first: one may begin another.
        self._contexts = sorted(set(contexts), key=len, reverse=True)

    def answers(
        self, prompts: Sequence[EncodedPrompt], progress: Progress | None = None
    ) -> list[EncodedPrompt]:
        """The prompts as they are asked, with the answers that they get without the facts."""
        own = super().answers([self._bare(p) for p in prompts], progress)
        return [
            replace(p, answer=answered.answer, answer_ids=answered.answer_ids)
            for p, answered in zip(prompts, own, strict=True)
        ]

    def _bare(self, asked: EncodedPrompt) -> EncodedPrompt:
        """The prompt without the text in front, in the same form."""
        context = next((text for text in self._contexts if text in asked.prompt), "")
        text = asked.prompt.replace(context, "", 1)
        if asked.form == "plain":
            return replace(asked, prompt=text, prompt_ids=self.llm.encoder.encode_prompt(text))
        # What a chat template has written brings all special tokens itself.
        ids = self.llm.tokenizer.encode(text, add_special_tokens=False)
        return replace(asked, prompt=text, prompt_ids=tuple(ids))
