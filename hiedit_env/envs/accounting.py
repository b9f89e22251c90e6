"""What a step is paid and what it tells: the semantics all environments share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.envs.episode import LEVELS, EditingEpisode, NumericalCollapse
from hiedit_env.envs.scheduler import Passes
from hiedit_env.envs.state import EditRecord, History
from hiedit_env.errors import NonFiniteUpdateError
from hiedit_env.resident.resident import ResidentLLM

#: When updates that were handed in are judged.
Judging = Literal["step", "fact", "never"]
#: Runs one or more primitive steps; gives L bool, the layers written.
Body = Callable[[], Passes[NDArray[np.bool_]]]
#: A step without its observation: reward (a float, or a scalar tensor where levels are kept on the
#: device), whether the episode has ended, information.
Paid = tuple[Any, bool, dict[str, Any]]


class StepSemantics:
    """From a body of primitive steps to reward and information; see :class:`.LifelongEdit`."""

    llm: ResidentLLM
    episode: EditingEpisode
    history: History
    weights_of_terms: dict[str, float]
    intrinsic: bool
    _edit_reward: Any

    @abstractmethod
    def _begin_fact(self) -> None:
        """Called when a new fact begins."""

    def _pay(
        self, body: Body, body_all: Body, *, rule_made: bool = True, judge: Judging = "step"
    ) -> Passes[Paid]:
        baseline: dict[str, float] = {}
        if self.intrinsic:
            state = self.episode.save()
            baseline, *_ = yield from self._attempt(body_all, rule_made=True)
            self.episode.restore(state)
        terms, metrics, layers, error = yield from self._attempt(
            body, rule_made=rule_made, judge="step" if self.intrinsic else judge
        )
        terms = {term: value - baseline.get(term, 0.0) for term, value in terms.items()}
        reward: Any = sum(terms.values())
        # A tensor where the evaluator keeps levels on the device.
        reward = reward if isinstance(reward, Tensor) else float(reward)
        self._edit_reward = self._edit_reward + reward
        edit_index, steps = self.episode.position, self.episode.steps
        edit_over = False
        if error is not None:
            self.episode.ended = True
        else:
            edit_over = steps >= self.episode.max_steps_per_edit or (
                self.episode.stop_when_answered and bool(metrics["answered"])
            )
        info = self._info(terms, metrics, layers, edit_index, steps, edit_over)
        if error is not None:
            info["error_type"] = error
        if edit_over:
            self._record(dict(metrics))
            yield from self.episode.advance()
            if not self.episode.ended:
                self._begin_fact()
        return reward, self.episode.ended, info

    def _attempt(
        self, body: Body, *, rule_made: bool, judge: Judging = "step"
    ) -> Passes[tuple[dict[str, float], dict[str, float | bool], NDArray[np.bool_], str | None]]:
        """Runs and judges a body: terms, metrics, layers, error.

        After a collapse, which the error names, everything is as before.
        """
        weights = self.weights_of_terms
        error = "numerical_collapse"
        try:
            with self.episode.transaction():
                layers = yield from body()
                if judge == "never" or (judge == "fact" and not self.episode.edit_over):
                    if not np.isfinite(self.episode.reading.loss):
                        raise NumericalCollapse
                    nothing = dict.fromkeys((*LEVELS, "collapse"), 0.0)
                    return nothing, self.episode.reading.metrics, layers, None
                rises, quality = yield from self.episode.judge()
        except NumericalCollapse:
            pass
        except NonFiniteUpdateError:
            # Updates handed in by the caller are the caller's mistake; the rule's are an outcome.
            if not rule_made:
                raise
            error = "non_finite_update"
        else:
            terms = {term: weights[term] * rises[term] for term in LEVELS}
            found = {k: v for k, v in quality.metrics.items() if np.isfinite(v)}
            found["answered"] = found["efficacy"] == 1.0
            return {**terms, "collapse": 0.0}, found, layers, None
        terms = {**dict.fromkeys(LEVELS, 0.0), "collapse": -weights["collapse"]}
        return terms, {}, np.zeros(len(self.llm.layers), bool), error

    def _info(
        self,
        terms: dict[str, float],
        metrics: Mapping[str, float | bool],
        layers: NDArray[np.bool_],
        edit_index: int,
        steps: int = 0,
        edit_over: bool = False,
    ) -> dict[str, Any]:
        return {
            "reward_terms": dict(terms),
            "metrics": dict(metrics),
            "layers": layers.astype(np.int8),
            "weights_fingerprint": self.llm.weights_fingerprint(),
            "edit_index": edit_index,
            "edit_steps": steps,
            "edit_over": edit_over,
        }

    def _record(self, metrics: dict[str, float]) -> None:
        fact = self.episode.fact.request
        self.history.records.append(
            EditRecord(
                edit_index=self.episode.position,
                prompt=fact.prompt,
                answer=fact.answer,
                layers=self.episode.written.copy(),
                steps=self.episode.steps,
                reward=float(self._edit_reward),
                metrics=metrics,
            )
        )
        self._edit_reward = 0.0
