"""Requests for forward passes, as dataclasses, so that several environments can share a pass.

An environment is written as generators that *yield* a pass and are sent its result. :func:`run`
answers them one by one; :func:`run_together` advances several lives in step and answers what they
ask for at the same time together. Nothing of an environment's meaning depends on which of the two
drives it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hiedit_env.evaluation.reward import Evaluator, evaluate_together
from hiedit_env.evaluation.reward_terms import Quality
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.batched import read_together
from hiedit_env.resident.capture import Reading
from hiedit_env.resident.resident import ResidentLLM

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Read:
    """One request forward, ready for a backward pass; answered by a ``Reading``."""

    llm: ResidentLLM
    prompt: EncodedPrompt


@dataclass(frozen=True, slots=True)
class Judge:
    """How good an edit is, see :meth:`.reward.Evaluator.evaluate`; answered by a ``Quality``."""

    evaluator: Evaluator
    fact: EncodedFact
    remembered: Sequence[EncodedFact]
    reading: Reading | None


Pass = Read | Judge
#: A piece of an environment: yields passes, is sent their results, and returns a T.
Passes = Generator[Pass, Any, T]


def run(passes: Passes[T]) -> T:
    """Drives one environment alone.

    Returns:
        What the generator returns.
    """
    [result] = run_together([passes])
    if isinstance(result, BaseException):
        raise result
    return result


def run_together(several: Sequence[Passes[T]]) -> list[T | BaseException]:
    """Drives environments of one model in step; readings first, so that judgements wait.

    Args:
        several: Any number of generators.

    Returns:
        What each returns or raises, in order. A pass that fails is raised inside every environment
        that waited for it, so that each can undo what it had begun.
    """
    results: dict[int, T | BaseException] = {}
    waiting: dict[int, Pass] = {}

    def advance(i: int, answer: Any, error: BaseException | None = None) -> None:
        try:
            waiting[i] = several[i].throw(error) if error is not None else several[i].send(answer)
        except StopIteration as stop:
            results[i] = stop.value
        except BaseException as raised:
            results[i] = raised

    for i in range(len(several)):
        advance(i, None)
    while waiting:
        kind = Read if any(isinstance(p, Read) for p in waiting.values()) else Judge
        chosen = [i for i, wanted in waiting.items() if isinstance(wanted, kind)]
        asked = [waiting.pop(i) for i in chosen]
        try:
            answers = _answer(asked)
        except BaseException as error:
            # An interruption too: otherwise an environment would undo itself whenever it is
            # collected.
            for i in chosen:
                advance(i, None, error)
            continue
        for i, answer in zip(chosen, answers, strict=True):
            advance(i, answer)
    return [results[i] for i in range(len(several))]


def _answer(asked: Sequence[Pass]) -> Sequence[Reading] | Sequence[Quality]:
    """Passes of one kind, in as few forward passes as fit."""
    readings = [wanted for wanted in asked if isinstance(wanted, Read)]
    if readings:
        return read_together([(wanted.llm, wanted.prompt) for wanted in readings])
    return evaluate_together(
        [(p.evaluator, p.fact, p.remembered, p.reading) for p in asked if isinstance(p, Judge)]
    )
