"""An environment in the form an algorithm can act in, described by plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import TransformAction
from numpy.typing import NDArray

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.named.checkpoints import fact_hashes
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError, whole_number
from hiedit_env.model.relatives import environment_for
from hiedit_env.wrappers import BoxLayers, DiscreteSubsets, SequentialSelection

#: Form → the actions an algorithm sees.
FORMS: Mapping[str, str] = {
    "layers": "MultiBinary(L), the environment as it is",
    "box": "Box(L), a layer is written above 0 (BoxLayers)",
    "discrete": "Discrete, one of all subsets of K layers (DiscreteSubsets)",
    "sequential": "Discrete(L + 1), one layer after another or stop (SequentialSelection)",
    "step-sizes": "Box(L), step sizes of hiedit/StepSize-v1",
}
#: Form → the arguments its wrapper takes.
_OPTIONS: Mapping[str, frozenset[str]] = {
    "discrete": frozenset({"size", "limit"}),
    "sequential": frozenset({"max_layers", "allow_empty", "stop_at_max", "masked"}),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a policy was made for.

    Args:
        observation: Numbers in an observation of the environment, before any wrapper.
        layers: L.
        names: The candidate layers; empty where the environment has no model.
        facts: :func:`~hiedit_agents.named.checkpoints.fact_hashes` of the facts it was trained on.
    """

    observation: int
    layers: int
    names: tuple[str, ...] = ()
    facts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Task:
    """What a policy is trained on.

    Args:
        form: One of :data:`FORMS`.
        env: Keyword arguments of the environment, and ``id`` if it is not the one that follows from
            the form: ``hiedit/StepSize-v1`` for ``step-sizes``, else that of
            :func:`~hiedit_env.model.built_in.environment_for`.
        options: Arguments of the form's wrapper: ``size`` of ``discrete``; ``max_layers``,
            ``allow_empty``, ``stop_at_max``, ``masked`` of ``sequential``.

    Raises:
        SettingsError: an unknown form or option, or an id whose actions do not fit the form.

    >>> Task("sequential", {"model": "planted", "num_edits": 2}).make_env().action_space
    Discrete(7)
    """

    form: str
    env: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise SettingsError(f"unknown form {self.form!r}; choose one of {', '.join(FORMS)}")
        unknown = sorted(set(self.options) - _OPTIONS.get(self.form, frozenset()))
        if unknown:
            known = sorted(_OPTIONS.get(self.form, frozenset()))
            raise SettingsError(f"form {self.form!r} has no options {unknown}; it has {known}")
        if (self.form == "step-sizes") != (self.id == "hiedit/StepSize-v1"):
            raise SettingsError(
                f"form {self.form!r} does not fit {self.id}: 'step-sizes' is hiedit/StepSize-v1, "
                "the other forms are of ids whose actions are MultiBinary(L)"
            )

    @property
    def id(self) -> str:
        """The environment's id."""
        if "id" in self.env:
            return str(self.env["id"])
        if self.form == "step-sizes":
            return "hiedit/StepSize-v1"
        return environment_for(self.env.get("model"), self.env.get("dataset"))

    @property
    def settings(self) -> dict[str, Any]:
        """The environment's keyword arguments."""
        return {name: value for name, value in self.env.items() if name != "id"}

    def with_env(self, **changes: Any) -> Task:
        """The same task with other arguments of the environment."""
        return Task(self.form, {**self.env, **changes}, self.options)

    # -- environments -----------------------------------------------------------------------------

    def wrap(self, env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        """An environment of the task's id in the task's form.

        Raises:
            SettingsError: an action space the form's wrapper is not for.
        """
        if self.form == "box":
            return BoxLayers(env)
        if self.form == "discrete":
            return DiscreteSubsets(env, **{"size": 1, **self.options})
        if self.form == "sequential":
            return SequentialSelection(env, **self.options)
        return env

    def make_env(self, **overrides: Any) -> gym.Env[Any, Any]:
        """One environment in the task's form; ``overrides`` are arguments for this one only."""
        return self.wrap(gym.make(self.id, **{**self.settings, **overrides}))

    def make_envs(self, count: int, **overrides: Any) -> list[gym.Env[Any, Any]]:
        """``count`` environments in the task's form that share one resident model."""
        whole_number(count, "count", 1)
        first = gym.make(self.id, **{**self.settings, **overrides})
        inner = first.unwrapped
        if not isinstance(inner, EditingEnv):
            others = [gym.make(self.id, **{**self.settings, **overrides}) for _ in range(count - 1)]
            return [self.wrap(env) for env in (first, *others)]
        return [self.wrap(inner.fork()) for _ in range(count)]

    def make_vec(
        self,
        count: int,
        *,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        **overrides: Any,
    ) -> VectorEnv[Any, Any, Any]:
        """``count`` environments on one resident model as one Gymnasium vector environment.

        Batched passes serve all environments at once wherever they step together, that is in every
        form but ``sequential``. ``call("action_masks")`` gives the masks of that one.
        """
        whole_number(count, "count", 1)
        if self.form == "sequential" or gym.spec(self.id).vector_entry_point is None:
            envs = self.make_envs(count, **overrides)
            return SyncVectorEnv(
                [partial(_same, env) for env in envs], autoreset_mode=autoreset_mode
            )
        vector: VectorEnv[Any, Any, Any] = gym.make_vec(
            self.id,
            count,
            vectorization_mode="vector_entry_point",
            autoreset_mode=autoreset_mode,
            **{**self.settings, **overrides},
        )
        if self.form in ("layers", "step-sizes"):
            return vector
        inner: Any = vector.unwrapped
        shape = self.wrap(inner.envs[0])
        assert isinstance(shape, gym.ActionWrapper)

        def each(actions: Any) -> NDArray[np.int8]:
            return np.stack([shape.action(action) for action in actions])

        return TransformAction(vector, each, single_action_space=shape.action_space)

    # -- spaces -----------------------------------------------------------------------------------

    def sizes(self, env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> Sizes:
        """Of an environment that this task made, single or vector."""
        found: Any = env.unwrapped
        inner = found.envs[0].unwrapped if isinstance(env, VectorEnv) else found
        sizes = Sizes(inner.observation_space.shape[0], inner.action_space.shape[0])
        if isinstance(inner, EditingEnv):
            sizes = replace(sizes, names=tuple(inner.llm.names), facts=fact_hashes(inner.requests))
        return sizes

    def spaces(self, sizes: Sizes) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
        """Observation and action space in the task's form, without making an environment."""
        base = _Spaces(sizes)
        if self.form == "step-sizes":
            return base.observation_space, spaces.Box(-1.0, 1.0, (sizes.layers,), np.float32)
        wrapped = self.wrap(base)
        return wrapped.observation_space, wrapped.action_space

    # -- JSON -------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain values, for :meth:`from_json`."""
        return {"form": self.form, "id": self.id, "env": self.settings, "options": {**self.options}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Task:
        """The task that :meth:`to_json` described."""
        return cls(record["form"], {"id": record["id"], **record["env"]}, record["options"])


class _Spaces(gym.Env[NDArray[np.float32], Any]):
    """Has the spaces of a layer selection and nothing else."""

    def __init__(self, sizes: Sizes) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (sizes.observation,), np.float32)
        self.action_space = spaces.MultiBinary(sizes.layers)


def _same(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env
