"""A library's policy as an agent of ``hiedit compare``, whatever form it was trained in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.options import UntrainedChoice
from hiedit_agents.hierarchy.step_sizes import RescaledRule
from hiedit_agents.policies.record import PolicyRecord
from hiedit_agents.policies.task import Sizes
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_env.envs.actions import check_only_step_sizes
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import StepSizeSettings
from hiedit_env.errors import ActionError, CheckpointError, SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import make_rule
from hiedit_env.wrappers import SequentialSelection

Mask = NDArray[np.bool_] | None


class Policy(Protocol):
    """A trained policy, as it acts when it is used: without exploring."""

    def begin(self) -> None:
        """A new episode begins; policies with a memory forget."""

    def __call__(self, observation: Observation, mask: Mask) -> Any:
        """An action of the form's action space.

        Args:
            observation: One observation as the form's wrapper shows it.
            mask: Which actions are allowed, for ``sequential``; else None.
        """


class FunctionPolicy:
    """A function without a memory as a :class:`Policy`."""

    def __init__(self, function: Callable[[Observation, Mask], Any]) -> None:
        self._function = function

    def begin(self) -> None:
        """Nothing to forget."""

    def __call__(self, observation: Observation, mask: Mask) -> Any:
        """What the function says."""
        return self._function(observation, mask)


class PolicyStepSizes(RescaledRule):
    """A closed-form rule whose step sizes a policy chooses from the environment's observation.

    What ``hiedit/StepSize-v1`` does with the policy's actions, inside an option.

    Args:
        rule: The rule.
        policy: One without a memory: the same one serves every episode that is tried.
    """

    name: ClassVar[str] = "policy-step-sizes"
    default_step_size: ClassVar[float] = 1.0

    def __init__(self, rule: UpdateRule, policy: Policy) -> None:
        self.policy = policy
        super().__init__(rule)

    def look(self, observe: Callable[[], Observation]) -> None:
        """Keeps the observation for the next proposal."""
        self._observation: Observation | None = observe()

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The rule's updates with the policy's step sizes."""
        observation, self._observation = self._observation, None
        if observation is None:
            raise SettingsError(
                "a policy over step sizes sees the environment's observation; use it through step()"
            )
        own = check_only_step_sizes(self.policy(observation, None), len(self.shapes))
        return self.rule.compute(capture, layers, own if multipliers is None else own * multipliers)

    def reset(self) -> None:
        """Forgets the rule's statistics and what was seen."""
        self._observation = None
        super().reset()


class PolicyAgent(FixedAgent):
    """A policy on ``hiedit/LayerSelection-v1``, ``hiedit/Planted-v1`` or the toy.

    ``layers``, ``box`` and ``discrete`` choose layers with one action. ``sequential`` is asked
    again and again for one fact, until it stops. ``step-sizes`` is a low level: the layers are
    those of the trained environment's high level, and rule and horizon are the ones it was trained
    with. In the other forms the update rule is the environment's own.

    Args:
        record: What is known about the policy.
        policy: The policy.
    """

    def __init__(self, record: PolicyRecord, policy: Policy) -> None:
        self.name = f"{record.library}:{record.folder}"
        self.record, self.policy = record, policy
        self._wrapped: gym.Env[Any, Any] | None = None
        self._choice: UntrainedChoice | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two agents of one name different."""
        return {"weights": [self.record.digest], "task": self.record.task.to_json()}

    def candidate_layers(self, model: str) -> list[str] | None:
        """The layers it was trained for on a model of this name; None for another model."""
        trained = self.record.task.settings.get("model", "tiny")
        return list(self.record.sizes.names) or None if model == trained else None

    def training_facts(self, model: str) -> frozenset[str]:
        """:func:`~hiedit_agents.named.checkpoints.fact_hashes` of what it was trained on."""
        return self.record.sizes.facts

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes ready for an episode; a policy over step sizes becomes the low level.

        Raises:
            CheckpointError: other spaces than the policy was trained with.
        """
        _check_fits(self.name, self.record, env)
        self.policy.begin()
        task = self.record.task
        if task.form != "step-sizes":
            self._wrapped = task.wrap(env)
            return
        inner = env.unwrapped
        if not isinstance(inner, EditingEnv):
            raise CheckpointError(f"{self.name} chooses step sizes; {env} has none")
        settings = StepSizeSettings(**task.settings)
        rule = make_rule(settings.rule, inner.llm.shapes, inner.llm.device, settings.rule_settings)
        inner.use_low_level(
            PolicyStepSizes(rule, self.policy), max_steps_per_edit=settings.max_steps_per_edit
        )
        self._choice = UntrainedChoice(
            settings.high_level, self.record.sizes.layers, settings.layers_per_edit
        )
        self._choice.reset(seed)
        self._wrapped = env

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, the layers for the present fact."""
        wrapped = self._wrapped
        if wrapped is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        if self._choice is not None:
            inner: Any = wrapped.unwrapped
            return self._choice.choose(observation, inner.capture).layers.astype(np.int8)
        if isinstance(wrapped, SequentialSelection):
            return self._pick(wrapped, observation)
        action = self.policy(observation, None)
        if isinstance(wrapped, gym.ActionWrapper):
            action = wrapped.action(action)
        layers: NDArray[np.int8] = np.asarray(action).astype(np.int8)
        return layers

    def _pick(self, wrapped: SequentialSelection, observation: Observation) -> NDArray[np.int8]:
        """What the wrapped environment would have been stepped with after the last pick."""
        picked = np.zeros(self.record.sizes.layers, np.int8)
        while True:
            wrapped.picked = picked
            seen = np.concatenate((observation, picked), dtype=np.float32)
            mask = wrapped.action_masks()
            try:
                picked, stops = wrapped.pick(self.policy(seen, mask))
            except ActionError as error:
                raise CheckpointError(f"the policy of {self.name}: {error}") from error
            if stops:
                return picked


def _check_fits(name: str, record: PolicyRecord, env: gym.Env[Any, Any]) -> None:
    sizes, seen, acted = record.sizes, env.observation_space, env.action_space
    same = seen.shape == (sizes.observation,) and acted == spaces.MultiBinary(sizes.layers)
    if same:
        return
    raise CheckpointError(
        f"{name} was trained on {sizes.observation} observed numbers and {sizes.layers} layers "
        f"(form {record.task.form!r}); this environment has observations of shape {seen.shape} and "
        f"actions {acted}: {_remedy(env, sizes)}"
    )


def _remedy(env: gym.Env[Any, Any], sizes: Sizes) -> str:
    acted, whole = env.action_space, env.unwrapped.action_space
    if isinstance(acted, spaces.MultiBinary):
        return "use the model and layers it was trained with, or train a policy for these"
    if isinstance(whole, spaces.MultiBinary):
        return "give it the environment without wrappers; it brings the one of its form"
    if isinstance(acted, spaces.Dict):
        return "FixedStepSize around it leaves MultiBinary(L)"
    return "it acts in hiedit/LayerSelection-v1, whose actions are MultiBinary(L)"
