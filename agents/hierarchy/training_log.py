"""The training log: what happened on the facts of an episode, and its means."""

from __future__ import annotations

import math

import numpy as np

from hiedit_agents.hierarchy.option_runner import Outcome

#: A row of the training log: one per episode.
LogRow = dict[str, float]


class Tally:
    """What happened on the facts of an episode: a list per quantity."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.efficacy: list[float] = []
        self.layers: list[float] = []
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._counted = 0

    def add(self, outcome: Outcome, *, judged: bool) -> None:
        """Takes in a finished fact, whose loss is in already, if it has one.

        Args:
            outcome: What became of it.
            judged: Whether its reward is the environment's. If not, it is minus the loss that was
                learned from, plus the environment's reward for an early end of the episode.
        """
        own = self.losses[self._counted :]
        self._counted = len(self.losses)
        self.rewards.append(outcome.reward if judged else outcome.reward - sum(own))
        # Not measured after a collapse, which answers nothing.
        efficacy = float(outcome.info["metrics"]["efficacy"])
        self.efficacy.append(0.0 if math.isnan(efficacy) else efficacy)
        self.layers.append(float(np.asarray(outcome.info["layers"]).sum()))
        self.steps.append(float(outcome.steps))

    def row(self) -> LogRow:
        """Means, see :meth:`Trainer.episode`."""

        def mean(values: list[float]) -> float:
            return float(np.mean(values)) if values else 0.0

        return {
            "reward": mean(self.rewards),
            "loss": mean(self.losses),
            "right_after": mean(self.efficacy),
            "layers": mean(self.layers),
            "steps": mean(self.steps),
            "updates": float(len(self.norms)),
            "gradient_norm": mean(self.norms),
        }
