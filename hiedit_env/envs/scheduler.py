"""Requests for forward passes, as dataclasses, so that several environments can share a pass.

What an environment does is written as generators that *yield* a forward request and are sent its
result. :func:`run` answers one environment; :func:`run_together` advances several in step and
answers requests of one kind together. An environment does not know which of the two drives it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hiedit_env.evaluation.reward import Evaluator, evaluate_together, prepare_together
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.batched import read_together
from hiedit_env.resident.reading import Reading
from hiedit_env.resident.resident import ResidentLLM

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Read:
    """Reads an edit unit, ready for a backward pass; answered by a ``Reading``."""

    llm: ResidentLLM
    prompts: Sequence[EncodedPrompt]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Computes a unit's references, see :func:`.reward.prepare_together`; answered by None."""

    evaluator: Evaluator
    unit: Sequence[EncodedFact]
    remembered: Sequence[EncodedFact]


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges an edit, see :func:`.reward.evaluate_together`; answered by a ``Quality``."""

    evaluator: Evaluator
    unit: Sequence[EncodedFact]
    remembered: Sequence[EncodedFact]
    reading: Reading | None


#: A forward request.
Pass = Read | Prepare | Judge
#: Part of an episode: yields forward requests, is sent their results, and returns a T.
Passes = Generator[Pass, Any, T]


def run(passes: Passes[T]) -> T:
    """Drives one environment.

    Returns:
        What the generator returns.
    """
    [result] = run_together([passes])
    if isinstance(result, BaseException):
        raise result
    return result


def run_together(several: Sequence[Passes[T]]) -> list[T | BaseException]:
    """Drives environments of one model in step.

    Readings are answered first, then references, then judgements, so that the expensive kinds wait
    until most environments ask for them.

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
        kind = next(
            k for k in (Read, Prepare, Judge) if any(type(p) is k for p in waiting.values())
        )
        chosen = [i for i, wanted in waiting.items() if type(wanted) is kind]
        asked = [waiting.pop(i) for i in chosen]
        try:
            answers = _answer(asked)
        except BaseException as error:
            # An interruption too: otherwise a generator would undo itself when it is collected.
            for i in chosen:
                advance(i, None, error)
            continue
        for i, answer in zip(chosen, answers, strict=True):
            advance(i, answer)
    return [results[i] for i in range(len(several))]


def _answer(asked: Sequence[Pass]) -> Sequence[Any]:
    """Requests of one kind, in as few forward passes as fit."""
    readings = [(p.llm, p.prompts) for p in asked if isinstance(p, Read)]
    if readings:
        return read_together(readings)
    references = [(p.evaluator, p.unit, p.remembered) for p in asked if isinstance(p, Prepare)]
    if references:
        prepare_together(references)
        return [None] * len(references)
    return evaluate_together(
        [(p.evaluator, p.unit, p.remembered, p.reading) for p in asked if isinstance(p, Judge)]
    )
