"""Agents that do not learn: the controls every learned one is compared with."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_agents.hierarchy.options import HierarchicalAgent, UntrainedChoice, layer_selection
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_env.envs.planted import Planted
from hiedit_env.errors import SettingsError
from hiedit_env.rules.layer_choice import CHOICES


class LayerChoiceAgent(HierarchicalAgent):
    """Chooses layers on ``hiedit/LayerSelection-v1`` by an untrained rule.

    The low level is the environment's own update rule.

    Args:
        name: A name of :data:`hiedit_env.rules.layer_choice.CHOICES`.
        layers_per_edit: Layers per fact, for the choices that have a size (``random-layers``,
            ``fixed-layers``: the first ones, ``gradient-norm``); half of the layers where None.

    Raises:
        SettingsError: unknown name.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/LayerSelection-v1", num_edits=2)
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
        # Made for as many layers as there are when an environment is met.
        super().__init__(name, UntrainedChoice(name, 1, 1))
        self.layers_per_edit = layers_per_edit

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes the choice for the environment's number of layers and seeds it.

        Raises:
            SettingsError: not a LayerSelection environment, or ``layers_per_edit`` outside 1 … L.
        """
        num_layers = len(layer_selection(env, self.name).llm.layers)
        self.high = UntrainedChoice(self.name, num_layers, self.layers_per_edit)
        super().reset(env, seed)


class OracleAgent(FixedAgent):
    """Asks ``hiedit/Planted-v1`` for the best layers of every fact: what a choice can reach.

    Its regret is 0 by definition. The low level is the environment's own update rule.

    >>> import gymnasium, hiedit_env
    >>> agent = OracleAgent()
    >>> env = gymnasium.make("hiedit/Planted-v1", num_edits=2)
    >>> agent.reset(env, seed=0)
    >>> observation, info = env.reset(seed=0)
    >>> bool((agent.select_action(observation, info) == info["true_layers"]).all())
    True
    """

    name: ClassVar[str] = "oracle"

    def __init__(self) -> None:
        self._env: Planted | None = None

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Keeps the environment.

        Raises:
            SettingsError: it knows no right answers.
        """
        inner = env.unwrapped
        if not isinstance(inner, Planted):
            raise SettingsError(
                "agent 'oracle' acts on hiedit/Planted-v1 only, where the right answer is known: "
                "compare with --model planted"
            )
        inner.use_low_level(None)
        self._env = inner

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, the best layers for the present fact."""
        if self._env is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        return self._env.oracle().layers.astype(np.int8)
