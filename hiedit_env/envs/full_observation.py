"""Everything that is known about the present fact, in environments of either version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Probe
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.effects import Effects, choose_controls, control_keys
from hiedit_env.envs.episode import EditingEpisode
from hiedit_env.envs.observations import Observer
from hiedit_env.envs.scheduler import Judge, Passes, run
from hiedit_env.envs.settings import EditingSettings
from hiedit_env.errors import whole_number
from hiedit_env.evaluation.reward_terms import Metrics, Quality
from hiedit_env.model.encoded import EncodedFact


class FullObservation:
    """The observation of version 2 behind ``ObserveEffects``, whatever environment is played.

    An agent that learned from such observations can so act where they are shorter. In version 1,
    and where the environment remembers other facts, the model is judged on the fact before it is
    edited, which costs a pass; nothing else changes.

    Call :meth:`read` before every step.

    Args:
        env: An environment of one fact per step on a language model.
        controls: As for :class:`~hiedit_env.wrappers.observe_effects.ObserveEffects`.
        retention_window: Number of past facts that ``recent_retention`` is of, whatever the
            environment's own window is; their weights are the environment's own.

    Raises:
        SettingsError: several facts per step, no controls, or a negative window.
    """

    def __init__(
        self,
        env: EditingEnv,
        controls: Sequence[Probe] | None = None,
        *,
        retention_window: int = EditingSettings.retention_window,
    ) -> None:
        self._env = env
        self._window = whole_number(retention_window, "retention_window", 0)
        chosen = choose_controls(env, controls, "FullObservation")
        self._effects = Effects(control_keys(env.llm, chosen))
        self._observer = Observer(env.llm, version=2)

    def read(self) -> NDArray[np.float32]:
        """The observation of the present fact, L · (23 + ``EFFECTS``) + 7 float32.

        Raises:
            ResetNeeded: there is no present fact.
        """
        env = self._env
        env._require_running()
        view = env.view()
        past = env.episode.last_edited(self._window)
        if view.standing is None or past != env.episode.remembered:
            view = replace(view, standing=run(_judged(env.episode, past)))
        observation: NDArray[np.float32] = self._observer.batch([view])[0].cpu().numpy()
        effects = self._effects.now(env).ravel()
        self._effects.keep(env)
        return np.concatenate((observation, effects))


def _judged(episode: EditingEpisode, past: Sequence[EncodedFact]) -> Passes[Metrics]:
    """What the model is like on the present unit; unlike ``judge``, counts nothing."""
    quality: Quality = yield Judge(episode.evaluator, episode.unit, past, episode.reading)
    return quality.metrics
