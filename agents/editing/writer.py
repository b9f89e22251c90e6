"""Writes one fact into a model by an agent's two levels: an option, step by step.

This is what ``hiedit/LayerSelection-v1`` does with the same agent and seed, update for update,
without rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hiedit_agents.editing.levels import Levels
from hiedit_agents.editing.low_rank_sum import compacted, ranks
from hiedit_env.envs.observations import Observer, View
from hiedit_env.errors import NonFiniteUpdateError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.weights import WeightSnapshot

_COLLAPSED = "the model's loss is not finite any more; a smaller step_size may help"


@dataclass(frozen=True, slots=True)
class Written:
    """What writing one fact did.

    Args:
        steps: Number of primitive steps.
        updates: What was committed: the updates of every step, or all of them as one.
        layers: Indices of the layers written.
        loss_before, loss_after: −log p(answer | prompt) in nats per answer token; infinite or NaN
            where the model collapsed.
        answered: Whether every answer token is the argmax afterwards.
        problem: Why it was broken off; None if it was not.
    """

    steps: int
    updates: tuple[Updates, ...]
    layers: tuple[int, ...]
    loss_before: float
    loss_after: float
    answered: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class WriterState:
    """Weights and statistics at one moment, for :meth:`FactWriter.restore`."""

    weights: WeightSnapshot
    statistics: Any
    position: int
    written_counts: NDArray[np.int64]


class FactWriter:
    """Writes facts, one after another.

    Args:
        llm: The model.
        levels: Who writes.
        max_error: Relative error with which the updates of a fact are put together into one of a
            smaller rank, see :func:`.low_rank_sum.compacted`; 0 leaves them as they were computed.
    """

    def __init__(self, llm: ResidentLLM, levels: Levels, max_error: float = 0.0) -> None:
        self.llm, self.levels, self.max_error = llm, levels, max_error
        self._observer = Observer(llm)
        self._position = 0
        self._counts = np.zeros(len(llm.layers), np.int64)

    def forget(self, remembered: Sequence[EncodedPrompt]) -> None:
        """Begins new statistics, since the edits in place are no longer those they were of.

        Args:
            remembered: The facts in place, for a low level that rehearses them; earliest first.
        """
        remember = getattr(self.levels.low, "remember", None)
        if remember is not None:
            remember(remembered)
        self.levels.low.reset()

    def save(self) -> WriterState:
        """The present state; copies nothing large."""
        return WriterState(
            self.llm.snapshot(), self.levels.low.statistics(), self._position, self._counts.copy()
        )

    def restore(self, state: WriterState) -> None:
        """Puts weights and statistics back, bit for bit."""
        self.llm.restore(state.weights)
        self.levels.low.load_statistics(state.statistics)
        self._position, self._counts = state.position, state.written_counts.copy()

    def write(self, prompts: Sequence[EncodedPrompt], share: float = 0.0) -> Written:
        """Runs one option on a fact.

        Args:
            prompts: The fact in every form asked.
            share: Share of the stream that is done, in [0, 1], for levels that look at it.

        Raises:
            BaseException: whatever goes wrong; the weights may be half way, see :meth:`restore`.
        """
        llm, levels, unwritten = self.llm, self.levels, self.llm.snapshot()
        looks = getattr(levels.high, "looks", True)
        # Where nobody looks at gradients, they are not computed.
        read = partial(llm.read, *prompts, gradients=looks or levels.low.uses_gradients)
        reading = read()
        before = reading.loss
        capture = reading.capture()
        observation = self._observe(capture, 0, share) if looks else np.zeros(0, np.float32)
        with torch.no_grad():
            layers = levels.high.choose(observation, capture).layers
        steps: list[Updates] = []
        problem = None
        while layers.any() and len(steps) < levels.max_steps and not reading.answered:
            capture = reading.capture()
            levels.low.look(partial(self._observe, capture, len(steps), share))
            levels.low.observe(capture)
            updates = levels.low.propose(capture, layers)
            try:
                llm.commit(updates)
            except NonFiniteUpdateError as error:
                problem = str(error)
                break
            steps.append(updates)
            reading = read()
            if not math.isfinite(reading.loss):
                problem = _COLLAPSED
                break
        recorded = steps
        if self.max_error and steps and problem is None:
            smaller = compacted(steps, self.max_error)
            recorded = [smaller] if len(steps) > 1 or ranks(smaller) < ranks(steps[0]) else steps
        if recorded is not steps:
            # What is recorded is what is written.
            llm.restore(unwritten)
            llm.commit(recorded[0])
            reading = read()
            if not math.isfinite(reading.loss):
                problem = _COLLAPSED
        self._position += 1
        written = np.array([any(s[i] is not None for s in steps) for i in range(len(llm.layers))])
        self._counts = self._counts + written
        return Written(
            len(steps),
            tuple(recorded),
            tuple(int(i) for i in np.flatnonzero(written)),
            before,
            reading.loss,
            problem is None and bool(reading.answered),
            problem,
        )

    def _observe(self, capture: Capture, steps: int, share: float) -> NDArray[np.float32]:
        view = View(
            llm=self.llm,
            capture=capture,
            written_share=(self._counts / max(self._position, 1)).astype(np.float32),
            steps_share=min(steps / self.levels.max_steps, 1.0),
            stream_share=share,
        )
        observation: NDArray[np.float32] = self._observer.batch([view])[0].cpu().numpy()
        return observation
