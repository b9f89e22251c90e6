"""One answer of a model that is served: tokens are drawn one by one and sent as text at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hiedit_agents.serving.text_out import TextOut


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a model.

    Args:
        ids: Tokens of the prompt.
        budget: Largest number of new tokens; at least 1.
        temperature: 0 for the likeliest token each time.
        top_p: Probability of the likeliest tokens that are drawn from, in (0, 1].
        seed: Of the draws; None for one of the system's.
        stops: Texts that end the answer and are left out.
        gone: Set when nobody waits for the answer any more.
    """

    ids: tuple[int, ...]
    budget: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    gone: Event = field(default_factory=Event)


@dataclass(frozen=True, slots=True)
class Answered:
    """The end of an answer.

    Args:
        tokens: Number of new tokens, a last end token included.
        reason: ``"stop"`` at an end token or a stop text, ``"length"`` where the budget ran out.
    """

    tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class Speaker:
    """How models of one kind are asked.

    Args:
        decode: Tokens into text, without special tokens; called from any thread.
        ends: Tokens that end an answer.
        pad: Token that stands for nothing.
        use_cache: Whether keys and values of earlier tokens are kept.
    """

    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int]
    pad: int
    use_cache: bool = True

    @torch.inference_mode()
    def answer(
        self, model: PreTrainedModel, question: Question, send: Callable[[str], None]
    ) -> Answered:
        """Generates an answer.

        Args:
            model: Any snapshot.
            question: What is asked.
            send: Called with each piece of text, in order; the pieces together are the answer.
        """
        out = TextOut(self.decode, question.stops)
        watch = _Watch(self, question, out, send)
        ids = torch.tensor([question.ids], dtype=torch.int64, device=model.device)
        config = cast(Any, GenerationConfig)(
            # Draws are made by _Draw with a generator of their own.
            do_sample=False,
            max_new_tokens=question.budget,
            pad_token_id=self.pad,
            eos_token_id=sorted(self.ends) or None,
            use_cache=self.use_cache,
        )
        cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [_Draw(question)] if question.temperature > 0 else []
            ),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        if rest := out.finish():
            send(rest)
        return Answered(watch.count, "stop" if watch.ended or out.stopped else "length")


class _Watch(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Sends the text of each new token, and stops where the answer ends."""

    def __init__(
        self, speaker: Speaker, question: Question, out: TextOut, send: Callable[[str], None]
    ) -> None:
        self._ends, self._question, self._out, self._send = speaker.ends, question, out, send
        self.count = 0
        self.ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        token = int(input_ids[0, -1])
        self.count += 1
        self.ended = token in self._ends
        if not self.ended and (piece := self._out.push(token)):
            self._send(piece)
        stop = self.ended or self._out.stopped or self._question.gone.is_set()
        return torch.full((1,), stop, dtype=torch.bool, device=input_ids.device)


class _Draw(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Draws the next token with a generator of its own, and leaves no other token."""

    def __init__(self, question: Question) -> None:
        self._temperature, self._top_p = question.temperature, question.top_p
        self._generator = torch.Generator()
        if question.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(question.seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = draw(scores[0].float().cpu(), self._temperature, self._top_p, self._generator)
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0
        return only


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws one token.

    Args:
        logits: Of the vocabulary, float32, on the CPU.
        temperature: Above 0.
        top_p: The fewest likeliest tokens with at least this probability are drawn from.
        generator: Of the CPU.

    >>> numbers = torch.tensor([0.6, 0.3, 0.1]).log()
    >>> generator = torch.Generator().manual_seed(0)
    >>> sorted({draw(numbers, 1.0, 0.7, generator) for _ in range(100)})
    [0, 1]
    """
    shares, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    # A token is kept while those before it have less than top_p.
    kept = shares * (shares.cumsum(-1) - shares < top_p)
    return int(order[int(torch.multinomial(kept, 1, generator=generator))])
