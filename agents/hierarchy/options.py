"""Options: a high level chooses one for each fact, a low level carries it out.

The vocabulary is that of Sutton, Precup and Singh (Artificial Intelligence 112, 1999): an option is
where it may begin (*initiation*), what it does (*intra-option policy*) and when it ends
(*termination*). Here it works on one fact: the high level fixes the layers, the low level computes
the updates of these layers, again and again, until the fact is answered or the horizon is reached.

The high level sees a semi-Markov decision process: one decision per fact, each lasting k primitive
steps. :class:`HierarchicalAgent` composes any high level with any low level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.layer_choice import make_choice


@dataclass(frozen=True, slots=True)
class Option:
    """One way to treat the present fact.

    Args:
        layers: L bool, the layers that may be written.
        policy: The intra-option policy: from the fact's capture to updates of these layers.
        max_steps: Horizon, in primitive steps.
        stop_when_answered: Whether being answered ends the option (and keeps it from beginning).
    """

    layers: NDArray[np.bool_]
    policy: UpdateRule
    max_steps: int = 5
    stop_when_answered: bool = True

    def can_begin(self, capture: Capture) -> bool:
        """Initiation: whether there is anything to do on this fact."""
        return not self.is_over(capture, 0)

    def updates(self, capture: Capture) -> Updates:
        """Intra-option policy: the next primitive step, L entries, detached."""
        return self.policy.propose(capture, self.layers)

    def is_over(self, capture: Capture, steps: int) -> bool:
        """Termination, after ``steps`` primitive steps have led to ``capture``."""
        return steps >= self.max_steps or (self.stop_when_answered and capture.answered)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a high level decided for one fact.

    Args:
        layers: L bool.
        log_probability: Scalar tensor of a sampled choice, differentiable in the policy's
            parameters; None if nothing was sampled.
        entropy: Scalar tensor, of what a sampled choice was drawn from, differentiable likewise.
        gates: L float32, equal to ``layers`` going forward and differentiable going back
            (straight-through estimator); None if there is no such gradient.
    """

    layers: NDArray[np.bool_]
    log_probability: Tensor | None = None
    entropy: Tensor | None = None
    gates: Tensor | None = None


@runtime_checkable
class HighLevel(Protocol):
    """A policy over options: which layers to edit for a fact.

    One that is trained (see :class:`~hiedit_agents.protocol.Trainable`) learns by the policy
    gradient, from the ``log_probability`` of what it sampled; or, with an attribute
    ``straight_through = True``, from the gradient of the low level's objective in its ``gates``.

    One with an attribute ``looks = False`` chooses without its arguments, and an editor need not
    compute them.
    """

    @property
    def name(self) -> str:
        """How it is called on the command line."""

    def reset(self, seed: int) -> None:
        """Called when an episode begins; ``seed`` is the only source of randomness."""

    def choose(
        self, observation: Observation, capture: Capture, generator: torch.Generator | None = None
    ) -> Choice:
        """The layers for the present fact.

        Args:
            observation: The environment's observation.
            capture: The fact's keys and value gradients.
            generator: Samples from the policy if given (training); without it, the choice is the
                one to act with, which may be the best one or be drawn from what ``reset`` was
                seeded with.
        """


class UntrainedChoice:
    """The environment's simple layer choices as a high level: the controls.

    Args:
        name: A name of :data:`hiedit_env.rules.layer_choice.CHOICES`.
        num_layers: L.
        layers_per_edit: For choices that have a size; half of the layers where None.
    """

    def __init__(self, name: str, num_layers: int, layers_per_edit: int | None = None) -> None:
        self.name = name
        self._choice = make_choice(name, num_layers, layers_per_edit)
        self._generator = np.random.default_rng(0)

    @property
    def looks(self) -> bool:
        """Whether a choice depends on the observation or the capture."""
        return self.name == "gradient-norm"

    def reset(self, seed: int) -> None:
        """Seeds the random choice."""
        # Not the bits that Gymnasium draws the stream of facts from.
        self._generator = np.random.default_rng([seed, 1])

    def choose(
        self, observation: Observation, capture: Capture, generator: torch.Generator | None = None
    ) -> Choice:
        """The layers for the present fact; the same in training and evaluation."""
        return Choice(self._choice(capture, self._generator))


class HierarchicalAgent(FixedAgent):
    """Any high level over any low level, on ``hiedit/LayerSelection-v1``.

    The environment runs the options: :meth:`reset` gives it the low level.

    Args:
        name: How the agent is called in tables and files.
        high: Chooses the layers.
        low: Computes the updates; None for the environment's own update rule.
        max_steps_per_edit: Horizon of the options; None for the environment's own.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/LayerSelection-v1", num_edits=2)
    >>> agent = HierarchicalAgent("fixed", UntrainedChoice("fixed-layers", 6, 2))
    >>> agent.reset(env, seed=0)
    >>> agent.select_action(*env.reset(seed=0)).tolist()
    [1, 1, 0, 0, 0, 0]
    """

    def __init__(
        self,
        name: str,
        high: HighLevel,
        low: UpdateRule | None = None,
        max_steps_per_edit: int | None = None,
    ) -> None:
        self.name, self.high, self.low = name, high, low
        self.max_steps_per_edit = max_steps_per_edit
        self._env: EditingEnv | None = None

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Seeds both levels and hands the low one to the environment.

        Raises:
            SettingsError: not a LayerSelection environment, other layers than the low level's, or a
                low level that lacks something.
        """
        self._env = layer_selection(env, self.name)
        if self.low is not None:
            self.low.require_ready()
        self._env.use_low_level(self.low, max_steps_per_edit=self.max_steps_per_edit)
        self.high.reset(seed)
        if self.low is not None:
            self.low.seed(seed)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, the layers for the present fact."""
        if self._env is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        with torch.no_grad():
            choice = self.high.choose(observation, self._env.capture)
        return choice.layers.astype(np.int8)


def layer_selection(env: gym.Env[Any, Any], name: str) -> EditingEnv:
    """The hiedit environment inside its wrappers, if it is a LayerSelection environment.

    Raises:
        SettingsError: it is another one.
    """
    inner = env.unwrapped
    if not isinstance(inner, EditingEnv) or not isinstance(env.action_space, spaces.MultiBinary):
        raise SettingsError(
            f"agent {name!r} acts on hiedit/LayerSelection-v1, whose actions are MultiBinary; "
            f"this environment's are {env.action_space}"
        )
    return inner
