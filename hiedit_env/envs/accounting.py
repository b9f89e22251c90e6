"""From the primitive steps of an action to reward and information: the same for every id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.envs.episode import EditingEpisode, NumericalCollapse
from hiedit_env.envs.scheduler import Passes
from hiedit_env.envs.state import EditRecord, History
from hiedit_env.errors import NonFiniteUpdateError
from hiedit_env.evaluation.info_metrics import METRICS, column_of
from hiedit_env.evaluation.reward_terms import Metrics, UnitMetrics, as_read, not_measured
from hiedit_env.resident.reading import Reading

#: When updates that were handed in are judged.
Judging = Literal["step", "fact", "never"]
#: Runs the primitive steps of an action, or of the same action with all layers if its argument is
#: True; gives L bool, the layers written.
Write = Callable[[bool], Passes[NDArray[np.bool_]]]
#: A step without its observation: reward (a float, or a scalar tensor where the evaluator keeps
#: terms on the device), whether the episode has ended, information.
Outcome = tuple[Any, bool, dict[str, Any]]


class StepError(IntEnum):
    """Why a step ended the episode early: ``info["error_type"]``, a number that arrays can hold."""

    NONE = 0
    #: The model's loss is no longer finite.
    NUMERICAL_COLLAPSE = 1
    #: The update rule's update is not finite.
    NON_FINITE_UPDATE = 2


@dataclass(slots=True)
class Attempt:
    """Reward terms, metrics, layers written and the error of one try."""

    terms: dict[str, Any]
    measured: UnitMetrics
    layers: NDArray[np.bool_]
    error: StepError = StepError.NONE


@dataclass(slots=True)
class Accounting:
    """Rewards and information of one episode; see the class docstring of ``LifelongEdit``.

    Args:
        episode: What is written to and judged.
        weights: Weight of every reward term.
        intrinsic: Whether each term counts relative to the same step with all layers.
    """

    episode: EditingEpisode
    weights: dict[str, float]
    intrinsic: bool
    #: The finished edits.
    history: History = field(init=False)
    #: Sum of the rewards of the present fact so far.
    edit_reward: Any = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets the finished edits: a new episode begins."""
        self.history = History(self.episode.llm.names, len(self.episode.facts))
        self.edit_reward = 0.0

    def first(self) -> dict[str, Any]:
        """The information of ``reset``."""
        none = np.zeros(len(self.episode.llm.layers), bool)
        nothing = dict.fromkeys((*self.episode.terms, "collapse"), 0.0)
        standing = self.episode.standing
        known = self._as_read(self.episode.reading) if standing is None else standing.measured
        return self._info(Attempt(nothing, known, none), 0, 0)

    def step(
        self, write: Write, *, rule_made: bool = True, judge: Judging = "step"
    ) -> Passes[Outcome]:
        """Carries out an action, judges it, and goes on to the next fact if this one is over.

        Args:
            write: The action.
            rule_made: Whether updates that are not finite end the episode, or are an error of the
                caller's.
            judge: When the model is judged; with ``intrinsic`` every step is.

        Raises:
            NonFiniteUpdateError: ``rule_made`` is False; nothing has changed.
        """
        episode = self.episode
        index = episode.position
        done = yield from self._weigh(write, rule_made, judge)
        reward: Any = sum(done.terms.values())
        reward = reward if isinstance(reward, Tensor) else float(reward)
        self.edit_reward = self.edit_reward + reward
        steps, over = episode.steps, False
        if done.error:
            episode.ended = True
        else:
            over = steps >= episode.max_steps_per_edit or (
                episode.stop_when_answered and bool(done.measured.unit["answered"])
            )
        info = self._info(done, index, steps, over)
        if over:
            self._record(done.measured.facts)
            yield from episode.advance()
        return reward, episode.ended, info

    def attempt(
        self,
        write: Write,
        *,
        everything: bool = False,
        rule_made: bool = True,
        judge: Judging = "step",
    ) -> Passes[Attempt]:
        """Runs and judges primitive steps, without book-keeping; if they fail, all is as before.

        Args:
            write: The action; the episode stays where it ends.
            everything: Whether with all layers.
            rule_made: As for :meth:`step`.
            judge: As for :meth:`step`.
        """
        episode, weights = self.episode, self.weights
        nothing = dict.fromkeys((*episode.terms, "collapse"), 0.0)
        try:
            with episode.transaction():
                # Called in here: proposing updates already changes the rule's statistics.
                layers = yield from write(everything)
                if judge == "never" or (judge == "fact" and not episode.edit_over):
                    reading = yield from episode.read()
                    if not np.isfinite(reading.loss):
                        raise NumericalCollapse
                    return Attempt(nothing, self._as_read(reading), layers)
                increase, quality = yield from episode.judge()
        except NumericalCollapse:
            error = StepError.NUMERICAL_COLLAPSE
        except NonFiniteUpdateError:
            # Updates handed in by the caller are the caller's mistake; the rule's are an outcome.
            if not rule_made:
                raise
            error = StepError.NON_FINITE_UPDATE
        else:
            terms = {term: weights[term] * increase[term] for term in episode.terms}
            return Attempt({**terms, "collapse": 0.0}, quality.measured, layers)
        none = np.zeros(len(episode.llm.layers), bool)
        unknown = not_measured(len(episode.unit), self._by_form)
        # Every fact that is lost with the episode, so that an early end never pays.
        lost = 1 if episode.version == 1 else episode.units_left
        return Attempt({**nothing, "collapse": -lost * weights["collapse"]}, unknown, none, error)

    # -- inside -----------------------------------------------------------------------------------

    def _weigh(self, write: Write, rule_made: bool, judge: Judging) -> Passes[Attempt]:
        """An attempt, relative to all layers where the reward is intrinsic."""
        if not self.intrinsic:
            return (yield from self.attempt(write, rule_made=rule_made, judge=judge))
        before = self.episode.save()
        every = yield from self.attempt(write, everything=True)
        self.episode.restore(before)
        done = yield from self.attempt(write, rule_made=rule_made)
        done.terms = {term: value - every.terms[term] for term, value in done.terms.items()}
        return done

    def _info(self, done: Attempt, index: int, steps: int, over: bool = False) -> dict[str, Any]:
        info = {
            "reward_terms": done.terms,
            "metrics": done.measured.unit,
            "layers": done.layers.astype(np.int8),
            "weights_fingerprint": fingerprint_number(self.episode.llm.weights_fingerprint()),
            "edit_index": index,
            "edit_steps": steps,
            "edit_over": over,
            "error_type": int(done.error),
        }
        if self.episode.edits_per_step > 1:
            info["unit_size"] = len(done.measured.facts)
            info["fact_metrics"] = _columns(done.measured.facts, self.episode.edits_per_step)
        if self._by_form:
            info["form_metrics"] = dict(done.measured.forms)
        return info

    @property
    def _by_form(self) -> bool:
        return self.episode.evaluator.prompt_form == "both"

    def _as_read(self, reading: Reading) -> UnitMetrics:
        return as_read(self.episode.unit, reading, self._by_form)

    def _record(self, facts: Sequence[Metrics]) -> None:
        episode = self.episode
        for i, (fact, metrics) in enumerate(zip(episode.unit, facts, strict=True)):
            self.history.records.append(
                EditRecord(
                    edit_index=episode.position + i,
                    prompt=fact.request.prompt,
                    answer=fact.request.answer,
                    layers=episode.written.copy(),
                    steps=episode.steps,
                    reward=float(self.edit_reward),
                    metrics={name: value for name, value in metrics.items() if np.isfinite(value)},
                )
            )
        self.edit_reward = 0.0


def _columns(facts: Sequence[Metrics], size: int) -> dict[str, NDArray[Any]]:
    """Metrics of a unit's facts as arrays of one size; NaN and False behind the last fact."""
    rest = size - len(facts)
    columns: dict[str, NDArray[Any]] = {
        name: column_of([float(fact[name]) for fact in facts] + [np.nan] * rest) for name in METRICS
    }
    return {**columns, "answered": np.array([bool(f["answered"]) for f in facts] + [False] * rest)}


def fingerprint_number(digits: str) -> int:
    """A fingerprint of 16 hexadecimal digits as a signed 64-bit number, which arrays can hold.

    >>> fingerprint_number("ffffffffffffffff"), fingerprint_number("0000000000000010")
    (-1, 16)
    """
    return int.from_bytes(bytes.fromhex(digits), "big", signed=True)
