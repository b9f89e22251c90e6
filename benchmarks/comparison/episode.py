"""Runs one episode: one agent edits one stream of facts; records each edit and its metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiedit_agents.protocol import Agent, begin_episode
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.accounting import StepError
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.planted import Oracle, Planted
from hiedit_env.evaluation.unedited import Progress


@dataclass(frozen=True, slots=True)
class FinishedEdit:
    """One fact's edit.

    Args:
        layers: L bool, layers written.
        steps: Primitive steps taken.
        reward: Reward of the edit; of facts that were edited together, that of all of them.
        metrics: The environment's metrics at the end of the edit; shares from 0 to 1.
        oracle: The reward of every option, where the environment knows it.
        true_layers: L bool, the layers that held the fact, where the environment knows.
    """

    layers: NDArray[np.bool_]
    steps: int
    reward: float
    metrics: dict[str, float]
    oracle: Oracle | None = None
    true_layers: NDArray[np.bool_] | None = None

    @property
    def one_step_regret(self) -> float:
        """Reward of the best option minus the agent's; NaN where the best is not known."""
        return float("nan") if self.oracle is None else self.oracle.reward - self.reward


@dataclass(frozen=True, slots=True)
class PlayedEpisode:
    """One episode.

    Args:
        requests: The F facts of the stream.
        edits: One per finished edit; fewer than F where the episode ended early.
        error_type: Why it ended early, None if it did not.
        seconds: Wall-clock time of choosing, editing and judging, without the reset and without
            asking the oracle.
        ending: Reward for the fact at which it ended early, 0 if it did not.
    """

    requests: tuple[Request, ...]
    edits: tuple[FinishedEdit, ...]
    error_type: str | None
    seconds: float
    ending: float = 0.0

    def right_after(self) -> dict[str, float]:
        """Efficacy of each fact right after its own edit, mean over edits in percent."""
        accuracy = [edit.metrics["efficacy"] for edit in self.edits]
        answered = [edit.metrics["answered"] for edit in self.edits]
        return {"token_accuracy": _percent(accuracy), "exact_match": _percent(answered)}

    def forgetting(self, at_the_end: NDArray[np.float64]) -> float:
        """Efficacy right after each fact's own edit minus after the last edit, in points.

        Args:
            at_the_end: F float64 in percent, token accuracy after the last edit.

        Returns:
            Mean over the finished edits; NaN where there are none.
        """
        lost = [
            100.0 * edit.metrics["efficacy"] - float(end)
            for edit, end in zip(self.edits, at_the_end, strict=False)
        ]
        return float(np.mean(lost)) if lost else float("nan")

    def against_oracle(self, best: Sequence[float] | None) -> dict[str, float]:
        """Compares the choices of layers with those of the oracle, where there is one.

        Args:
            best: Reward of the oracle for each fact of the same stream, with the environment's own
                low level; None where there is no oracle.

        Returns:
            Nothing where ``best`` is None. Otherwise the numbers below; regrets are in the unit of
            the reward and per fact, shares in percent of the facts that the model did not answer
            before their edit.

        The numbers:

        - ``regret``: the oracle's reward minus the agent's. Where the episode ended early, the last
          reward counts for that fact and for those that the episode did not reach.
        - ``one_step_regret``: the reward of the best option minus the agent's, at the agent's own
          states with its own low level, mean over the finished edits. It is small where the model
          is damaged or the low level writes nothing, since no option helps there.
        - ``true_layer_share``: the agent wrote the true layers, perhaps others too.
        - ``true_layer_exact_share``: it wrote the true layers and no others.
        - ``true_layer_best_share``: writing just the true layers was the oracle's best option.
        """
        known = [e for e in self.edits if e.oracle is not None and e.true_layers is not None]
        if best is None:
            return {}
        among, exact, is_best = [], [], []
        for edit in known:
            assert edit.oracle is not None and edit.true_layers is not None  # noqa: PT018
            if edit.steps == 0:
                continue
            among.append(bool((edit.layers | ~edit.true_layers).all()))
            exact.append(np.array_equal(edit.layers, edit.true_layers))
            is_best.append(np.array_equal(edit.oracle.layers, edit.true_layers))
        gained = [edit.reward for edit in known]
        # Otherwise an agent would gain by ending early where the remaining facts cost much.
        gained += [self.ending] * (len(best) - len(gained))
        one_step = [edit.one_step_regret for edit in known]
        return {
            "regret": float(np.mean(best) - np.mean(gained)),
            "one_step_regret": float(np.mean(one_step)) if one_step else float("nan"),
            "true_layer_share": _percent(among),
            "true_layer_exact_share": _percent(exact),
            "true_layer_best_share": _percent(is_best),
        }


def play(
    env: gym.Env[Any, Any],
    agent: Agent,
    seed: int,
    *,
    options: dict[str, Any] | None = None,
    progress: bool = True,
) -> PlayedEpisode:
    """Runs one episode in ``hiedit/LayerSelection-v1``; the edited model stays in the environment.

    Args:
        env: The environment.
        agent: Reset with ``seed``, as the environment is.
        seed: Same seed, same stream, whatever the agent.
        options: Passed to ``env.reset``.
        progress: Whether to show a bar on standard error.
    """
    inner = unwrapped(env)
    observation, info = begin_episode(env, agent, seed, options=options)
    requests = inner.stream
    edits: list[FinishedEdit] = []
    ended, error, ending = False, None, 0.0
    start, asking = time.perf_counter(), 0.0
    with bar(f"{agent.name}, seed {seed}: editing", len(requests), progress) as shown:
        accuracy = 0.0
        while not ended:
            oracle = None
            if isinstance(inner, Planted):
                began = time.perf_counter()
                oracle = inner.oracle()
                asking += time.perf_counter() - began
            action = agent.select_action(observation, info)
            true = info.get("true_layers")
            following, reward, terminated, truncated, info = env.step(action)
            agent.update(observation, action, float(reward), terminated, truncated, following, info)
            observation, ended = following, terminated or truncated
            if info["error_type"]:
                error = StepError(info["error_type"]).name.lower()
            if not info["edit_over"]:
                ending = float(reward)
                continue
            written = np.asarray(info["layers"], bool)
            for metrics in _fact_by_fact(info):
                edits.append(
                    FinishedEdit(
                        layers=written,
                        steps=int(info["edit_steps"]),
                        reward=float(reward),
                        metrics=metrics,
                        oracle=oracle,
                        true_layers=None if oracle is None else np.asarray(true, bool),
                    )
                )
                accuracy += metrics["efficacy"]
                shown.update()
            # Not refreshed here: update() decides when the bar is drawn.
            shown.set_postfix_str(
                f"right after {100 * accuracy / len(edits):.1f} %, {edits[-1].layers.sum()} layers",
                refresh=False,
            )
    seconds = time.perf_counter() - start - asking
    return PlayedEpisode(requests, tuple(edits), error, seconds, ending if error else 0.0)


def _fact_by_fact(info: Mapping[str, Any]) -> list[dict[str, float]]:
    """The finite metrics of every fact of the unit that is over."""
    if "fact_metrics" in info:
        columns = info["fact_metrics"].items()
        facts = [{name: column[i] for name, column in columns} for i in range(info["unit_size"])]
    else:
        facts = [info["metrics"]]
    return [
        {name: float(value) for name, value in fact.items() if np.isfinite(value)} for fact in facts
    ]


def unwrapped(env: gym.Env[Any, Any]) -> EditingEnv:
    """The hiedit environment inside its wrappers."""
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    return inner


@contextmanager
def bar(label: str, total: int, shown: bool) -> Iterator[Any]:
    """A progress bar on standard error; in a log file it moves every ten seconds only."""
    interval = 0.3 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, desc=label, file=sys.stderr, disable=not shown, mininterval=interval
    ) as made:
        yield made


@contextmanager
def stage_bars(label: str, shown: bool) -> Iterator[Progress]:
    """A ``Progress`` callback that shows one bar, renamed with every stage."""
    with bar(label, 1, shown) as made:

        def progress(stage: str, done: int, total: int) -> None:
            made.total = total
            made.set_description_str(f"{label}: {stage}", refresh=False)
            # Going back at a new stage: tqdm only counts up by itself.
            made.n = done
            made.refresh() if done == total else made.update(0)

        yield progress


def _percent(values: Sequence[float]) -> float:
    return 100.0 * float(np.mean(values)) if values else float("nan")
