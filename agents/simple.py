"""Agents that do not learn: the controls every learned one is compared with."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from agents.protocol import Observation
from hiedit_env.errors import SettingsError
from hiedit_env.layer_choice import CHOICES, LayerChoice, make_choice


class LayerChoiceAgent:
    """Chooses layers on ``hiedit/LayerSelection-v0`` by an untrained rule.

    Args:
        name: A name of :data:`hiedit_env.layer_choice.CHOICES`.
        layers_per_edit: Layers per fact, for the choices that have a size (``random-layers``,
            ``fixed-layers``: the first ones, ``gradient-norm``); half of the layers where None.

    Raises:
        SettingsError: unknown name.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/LayerSelection-v0", num_edits=2)
    >>> agent = LayerChoiceAgent("fixed-layers", layers_per_edit=2)
    >>> agent.reset(env, seed=0)
    >>> agent.select_action(*env.reset(seed=0)).tolist()
    [1, 1, 0, 0, 0, 0]
    """

    def __init__(self, name: str, layers_per_edit: int | None = None) -> None:
        if name not in CHOICES:
            raise SettingsError(
                f"unknown layer choice {name!r}; choose one of {', '.join(CHOICES)}"
            )
        self.name = name
        self.layers_per_edit = layers_per_edit
        self._env: Any = None
        self._choice: LayerChoice | None = None
        self._generator = np.random.default_rng(0)

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes the choice for the environment's number of layers and seeds it.

        Raises:
            SettingsError: not a LayerSelection environment, or ``layers_per_edit`` outside 1 … L.
        """
        space = env.action_space
        if not isinstance(space, spaces.MultiBinary):
            raise SettingsError(
                f"agent {self.name!r} acts on hiedit/LayerSelection-v0, whose actions are "
                f"MultiBinary; this environment's are {space}"
            )
        self._choice = make_choice(self.name, int(space.shape[0]), self.layers_per_edit)
        self._env = env.unwrapped
        # Not from the seed alone: the environment's generator, which draws the stream, is seeded
        # with it too, and both would give the same numbers.
        self._generator = np.random.default_rng([seed, 1])

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, the layers for the present fact."""
        if self._choice is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        return self._choice(self._env.capture, self._generator).astype(np.int8)

    def update(
        self,
        observation: Observation,
        action: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
        next_observation: Observation,
        info: dict[str, Any],
    ) -> None:
        """Learns nothing."""
