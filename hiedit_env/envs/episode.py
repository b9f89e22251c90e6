"""One episode: a stream of facts written, one after another, into one resident LLM.

No Gymnasium here. The environments add spaces, checks and information to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Request
from hiedit_env.envs.reward_weights import Version
from hiedit_env.envs.scheduler import Judge, Passes, Prepare, Read
from hiedit_env.envs.units import check_units
from hiedit_env.errors import SettingsError, whole_number
from hiedit_env.evaluation.reward import Evaluator, References
from hiedit_env.evaluation.reward_terms import Quality
from hiedit_env.model.tokenization import EncodedFact
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.reading import Reading
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.weights import WeightSnapshot
from hiedit_env.rules.base import UpdateRule

#: Terms of the reward that measure a state; the reward is their increase within a fact.
TERMS = ("edit", "locality", "sparsity", "recent_retention")
#: Those of version 2, where steps have a price.
TERMS_2 = (*TERMS, "steps")


class NumericalCollapse(Exception):
    """The model's loss stopped being finite; raised inside, after nothing can be kept."""


@dataclass(frozen=True, slots=True)
class EpisodeState:
    """Everything needed to go on from a point of an episode, bit for bit.

    Args:
        facts: The whole stream.
        position: Index of the present unit's first fact; the length of the stream when it is over.
        steps: Primitive steps taken on the present unit.
        writes: Those of them that wrote a layer.
        written: L bool, layers written for the present unit.
        counted: Terms that the rewards of the present unit sum up to so far.
        written_counts: L int64, number of finished facts that wrote each layer.
        ended: Whether the episode is over, by its stream's end or by collapse.
        weights: State of the candidate weights.
        rule: Statistics of the update rule.
        references: What unrelated prompts are compared with.
        reading: The present unit at the present weights, if it was read already.
        observed: The capture the rule's statistics have taken in last, if of the present unit.
        standing: The quality of the model as it was last judged on the present unit.

    Tensors are shared with the episode, which never writes them in place, so saving is cheap.
    """

    facts: tuple[EncodedFact, ...]
    position: int
    steps: int
    written: NDArray[np.bool_]
    counted: Mapping[str, float]
    written_counts: NDArray[np.int64]
    ended: bool
    weights: WeightSnapshot
    rule: Mapping[str, Any]
    references: References
    reading: Reading | None
    observed: Capture | None
    writes: int = 0
    standing: Quality | None = None


class EditingEpisode:
    """The state machine behind every environment.

    What is edited together is a unit: ``edits_per_step`` facts of the stream, or those that are
    left at its end. The present fact is, where a unit has several, all of them.

    ``start`` → (``primitive`` … → ``judge``) … → ``advance`` to the next unit → … → ended. These
    four are generators that yield forward requests: :func:`.scheduler.run` drives them. Nothing
    else here runs the model, except the first use of ``capture``, a backward pass.

    Args:
        llm: The resident model.
        rule: Turns captures into updates; keeps the lifelong statistics.
        evaluator: Judges the edited model.
        max_steps_per_edit: Maximum number of primitive steps on one fact.
        stop_when_answered: Whether a fact ends as soon as it is answered (teacher-forced argmax),
            and is left alone if it is answered before the first step. If not, every fact takes
            exactly ``max_steps_per_edit`` steps.
        retention_window: k, how many past edits are remembered.
        edits_per_step: n, the facts of a unit.
        version: Of the ids. In 1 the terms of a fact count from 0 and ``sparsity`` is the share of
            layers left alone; in 2 they count from the model before the fact, ``sparsity`` is minus
            the number of layers written, and ``steps`` minus that of primitive steps that wrote.
    """

    counted: dict[str, float]
    _reading: Reading | None
    _observed: Capture | None
    standing: Quality | None

    def __init__(
        self,
        llm: ResidentLLM,
        rule: UpdateRule,
        evaluator: Evaluator,
        *,
        max_steps_per_edit: int,
        stop_when_answered: bool,
        retention_window: int,
        edits_per_step: int = 1,
        version: Version = 1,
    ) -> None:
        self.version = version
        #: Names of the terms.
        self.terms = TERMS if version == 1 else TERMS_2
        self.llm, self.evaluator = llm, evaluator
        self.edits_per_step = whole_number(edits_per_step, "edits_per_step", 1)
        self.stop_when_answered = stop_when_answered
        self.retention_window = whole_number(retention_window, "retention_window", 0)
        self.use(rule, max_steps_per_edit)

    def use(self, rule: UpdateRule, max_steps_per_edit: int) -> None:
        """Takes another rule and number of steps; an episode under way is over without a trace."""
        self.max_steps_per_edit = whole_number(max_steps_per_edit, "max_steps_per_edit", 1)
        self.rule = rule
        self.facts: tuple[EncodedFact, ...] = ()
        self.ended = True
        self._reset_fact()

    # -- where we are ---------------------------------------------------------------------------

    @property
    def unit(self) -> tuple[EncodedFact, ...]:
        """The facts edited together at present; the last ones when the stream is over."""
        return self.facts[self._present : self._present + self.edits_per_step]

    @property
    def fact(self) -> EncodedFact:
        """The first fact of the present unit."""
        return self.facts[self._present]

    @property
    def remembered(self) -> tuple[EncodedFact, ...]:
        """The last k facts edited before the present unit, latest first."""
        return self.last_edited(self.retention_window)

    def last_edited(self, count: int) -> tuple[EncodedFact, ...]:
        """At most so many facts edited before the present unit, latest first."""
        return self.facts[max(0, self._present - count) : self._present][::-1]

    @property
    def _present(self) -> int:
        """Index of the present unit's first fact."""
        last = (len(self.facts) - 1) // self.edits_per_step * self.edits_per_step
        return min(self.position, last)

    @property
    def reading(self) -> Reading:
        """The present unit at the present weights, as the last step or ``start`` read it.

        After the last unit of the stream, that unit at the final weights.
        """
        if self._reading is None:
            raise RuntimeError("the present fact has not been read; call start() or read() first")
        return self._reading

    @property
    def capture(self) -> Capture:
        """Keys and value gradients of the present fact at the present weights."""
        return self.reading.capture()

    @property
    def edit_over(self) -> bool:
        """Whether the present fact needs, or may have, no further step."""
        if self.steps >= self.max_steps_per_edit:
            return True
        return self.stop_when_answered and self.reading.answered

    # -- the way forward ------------------------------------------------------------------------

    def start(self, requests: Sequence[Request]) -> Passes[None]:
        """Begins a new episode: unedited weights, fresh statistics, the first fact.

        Raises:
            PromptError: a request that cannot be tokenised; the episode is left as it was.
            SettingsError: no request, or facts of one unit that contradict each other; likewise.
        """
        if not requests:
            raise SettingsError("a stream needs at least one request")
        facts = tuple(self.evaluator.encode(request) for request in requests)
        check_units(facts, self.edits_per_step)
        self.llm.restore_unedited()
        self.rule.reset()
        self.evaluator.forget_references()
        self.facts, self.position, self.ended = facts, 0, False
        self.written_counts = np.zeros(len(self.llm.layers), np.int64)
        yield from self._begin_fact()

    def propose(
        self, layers: NDArray[np.bool_], multipliers: NDArray[np.float32] | None = None
    ) -> Updates:
        """The rule's updates for the present fact; its statistics take the capture in once."""
        return self.rule.propose(self.observe(), layers, multipliers)

    def observe(self) -> Capture:
        """The present fact's capture, after the rule's statistics took it in (once)."""
        capture = self.capture
        if self._observed is not capture:
            self.rule.observe(capture)
            self._observed = capture
        return capture

    def primitive(self, updates: Updates) -> Passes[NDArray[np.bool_]]:
        """Writes updates and reads the fact again: one primitive step.

        Returns:
            L bool, the layers written.

        Raises:
            NonFiniteUpdateError, UpdateShapeError: nothing was written.
            NumericalCollapse: the fact's loss is no longer finite; the caller rolls back.
        """
        self.llm.commit(updates)
        layers = np.array([update is not None for update in updates])
        self.written |= layers
        self.steps += 1
        self.writes += bool(layers.any())
        # After the last step nothing needs the fact alone: it is judged with the other prompts,
        # always, so that what it is judged with never depends on an earlier save or restore.
        last = self.steps >= self.max_steps_per_edit
        if last or layers.any():
            self._reading = None
        if not last:
            reading = yield from self.read()
            if not np.isfinite(reading.loss):
                raise NumericalCollapse
        return layers

    def read(self) -> Passes[Reading]:
        """Reads the present fact at the present weights, unless it was read already."""
        if self._reading is None:
            self._reading = yield Read(self.llm, [p for fact in self.unit for p in fact.prompts])
        return self._reading

    def judge(self) -> Passes[tuple[dict[str, float], Quality]]:
        """Terms of the present unit: their increase since the last judgement.

        Returns:
            ``(differences by term, quality)``. Summed over a fact, the differences are its final
            terms (less those before it in version 2), however many primitive steps it took.

        Raises:
            NumericalCollapse: the quality is not finite; the caller rolls back.
        """
        quality: Quality = yield Judge(self.evaluator, self.unit, self.remembered, self._reading)
        if not quality.finite:
            raise NumericalCollapse
        terms = {**quality.terms, **self.prices}
        increase = {term: terms[term] - self.counted[term] for term in self.terms}
        self.counted, self.standing = terms, quality
        return increase, quality

    @property
    def prices(self) -> dict[str, float]:
        """Terms that need no forward pass."""
        if self.version == 1:
            return {"sparsity": self.sparsity}
        return {"sparsity": -float(self.written.sum()), "steps": -float(self.writes)}

    @property
    def units_left(self) -> int:
        """Units of the stream that are not finished, the present one included."""
        return -(-(len(self.facts) - self.position) // self.edits_per_step)

    @property
    def sparsity(self) -> float:
        """Share of the candidate layers left alone for the present fact."""
        return 1.0 - float(self.written.mean())

    def advance(self) -> Passes[None]:
        """Ends the present unit and begins the next, or ends the episode."""
        count = len(self.unit)
        self.written_counts = self.written_counts + count * self.written
        self.position += count
        if self.position == len(self.facts):
            self.ended = True
            # The last observation is of the last unit at the final weights.
            yield from self.read()
        else:
            yield from self._begin_fact()

    # -- the way back ---------------------------------------------------------------------------

    def save(self) -> EpisodeState:
        """The present state, for :meth:`restore`."""
        return EpisodeState(
            facts=self.facts,
            position=self.position,
            steps=self.steps,
            written=self.written.copy(),
            counted=dict(self.counted),
            written_counts=self.written_counts.copy(),
            ended=self.ended,
            weights=self.llm.snapshot(),
            rule=self.rule.statistics(),
            references=self.evaluator.references,
            reading=self._reading,
            observed=self._observed,
            writes=self.writes,
            standing=self.standing,
        )

    def restore(self, state: EpisodeState) -> None:
        """Goes back to a saved state, bit for bit."""
        self.llm.restore(state.weights)
        self.rule.load_statistics(state.rule)
        self.facts = state.facts
        self.position, self.steps = state.position, state.steps
        self.written = state.written.copy()
        self.counted = dict(state.counted)
        self.written_counts = state.written_counts.copy()
        self.ended = state.ended
        # Not read again: it would be another capture to the rule, to be taken in once more.
        self._reading, self._observed = state.reading, state.observed
        self.evaluator.references = state.references
        self.writes, self.standing = state.writes, state.standing

    def branch(self, state: EpisodeState) -> EditingEpisode:
        """An episode that goes on from a state, on a branch of the model with a rule of its own.

        Args:
            state: Of this episode, at the present weights.
        """
        twin = copy.copy(self)
        twin.llm = self.llm.branch()
        twin.rule = self.rule.clone_for(twin.llm)
        twin.evaluator = self.evaluator.clone_for(twin.llm)
        twin.restore(state)
        return twin

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undoes everything done in the body, weights included, if the body raises."""
        before = self.save()
        try:
            yield
        except BaseException:
            self.restore(before)
            raise

    # -- inside ---------------------------------------------------------------------------------

    def _reset_fact(self) -> None:
        self.position = 0
        self.written_counts = np.zeros(len(self.llm.layers), np.int64)
        self._reset_unit()

    def _reset_unit(self) -> None:
        self.steps = self.writes = 0
        self.written = np.zeros(len(self.llm.layers), bool)
        self.counted = dict.fromkeys(self.terms, 0.0)
        self.standing = None
        self._reading = None
        self._observed = None

    def _begin_fact(self) -> Passes[None]:
        self._reset_unit()
        yield Prepare(self.evaluator, self.unit, self.remembered)
        reading = yield from self.read()
        if self.version == 1:
            return
        quality: Quality = yield Judge(self.evaluator, self.unit, self.remembered, reading)
        self.standing = quality
        # A loss that is infinite before the fact cannot be counted from.
        if quality.finite:
            self.counted |= quality.terms
