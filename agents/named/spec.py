"""An agent as plain data: which high level over which low level, with which settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hiedit_agents.hierarchy.anchored import Anchored
from hiedit_agents.hierarchy.hypernetwork import RULE_OF_FORM, Hypernetwork
from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.options import HighLevel, UntrainedChoice
from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_agents.hierarchy.routers import PolicyRouter, StraightThroughRouter
from hiedit_agents.hierarchy.step_sizes import StepSizePolicy
from hiedit_agents.protocol import Trainable
from hiedit_env.errors import (
    CheckpointError,
    HieditError,
    SettingsError,
    arguments_of,
    import_named,
    require_known,
    whole_number,
)
from hiedit_env.model.relatives import belongings
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.layer_choice import CHOICES
from hiedit_env.rules.names import RULES, check_rule, make_rule

#: Learned high levels; the simple choices of the environment are high levels too.
ROUTERS: Mapping[str, type] = {k.name: k for k in (StraightThroughRouter, PolicyRouter)}
#: Low levels besides the closed-form update rules. ``fine-tuning`` is the rule ``gradient``.
LEARNED_LOW: Mapping[str, type] = {
    k.name: k for k in (Anchored, Hypernetwork, Neuron, Rehearsal, StepSizePolicy)
}
FINE_TUNING = "fine-tuning"

#: Above all wrong settings, and sizes for which there is no memory; torch says so by RuntimeError.
_CANNOT_BE_MADE = (TypeError, ValueError, OverflowError, RuntimeError, MemoryError)

HIGH_LEVELS = (*CHOICES, *ROUTERS)
LOW_LEVELS = (*RULES, FINE_TUNING, *LEARNED_LOW)


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """How to build an agent for a model.

    Args:
        name: How the agent is called.
        high: A name of :data:`HIGH_LEVELS`, or ``"module:Class"``, made as ``Class(num_layers,
            device, **high_settings)``.
        low: A name of :data:`LOW_LEVELS` or ``"module:Class"``; None for the environment's own.
        high_settings, low_settings: Keyword arguments of the two.
        max_steps_per_edit: Horizon of an option; None for the environment's own.
        train: Defaults of :class:`hiedit_agents.hierarchy.trainer.TrainSettings` for this agent.
        source: Where the settings come from.
        given: Settings that were given by name, as ``high.name`` and ``low.name``, and the horizon;
            for a named agent, only these change what ships.

    Raises:
        SettingsError: an unknown level.
    """

    name: str
    high: str
    low: str | None = None
    high_settings: Mapping[str, Any] = field(default_factory=dict)
    low_settings: Mapping[str, Any] = field(default_factory=dict)
    max_steps_per_edit: int | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        if self.high not in HIGH_LEVELS and ":" not in self.high:
            raise SettingsError(
                f"unknown high level {self.high!r}; choose one of {', '.join(HIGH_LEVELS)}, or "
                "give 'module:Class'"
            )
        if self.low is not None and self.low not in LOW_LEVELS and ":" not in self.low:
            raise SettingsError(
                f"unknown low level {self.low!r}; choose one of {', '.join(LOW_LEVELS)}, or give "
                "'module:Class'"
            )

    def check(self, *, high: bool = True, low: bool = True) -> None:
        """Checks the arguments of the levels.

        Args:
            high: Whether the high one.
            low: Whether the low one.

        Raises:
            SettingsError: one that a level does not take.
        """
        if high:
            self._check_high()
        if low and self.low is not None:
            if self.low in LEARNED_LOW:
                owner = f"low level {self.low!r}"
                check_arguments(LEARNED_LOW[self.low], self.low_settings, owner)
            else:
                check_rule(self._rule(), self.low_settings)

    def _check_high(self) -> None:
        owner = f"high level {self.high!r}"
        if self.high in ROUTERS:
            check_arguments(ROUTERS[self.high], self.high_settings, owner)
            return
        if self.high in CHOICES:
            for name in self.high_settings:
                require_known(name, ["layers_per_edit"], owner)
        # Of fixed layers it may be a list.
        if isinstance(count := self.high_settings.get("layers_per_edit"), str | float):
            whole_number(count, "layers_per_edit", 1)

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return self.learned_high or self.learned_low

    @property
    def learned_high(self) -> bool:
        """Whether the high level has parameters."""
        return _is_trainable(ROUTERS, self.high, "high level")

    @property
    def learned_low(self) -> bool:
        """Whether the low level has parameters."""
        return self.low is not None and _is_trainable(LEARNED_LOW, self.low, "low level")

    def with_seed(self, seed: int, *, high: bool = False, low: bool = False) -> AgentSpec:
        """The same with a seed for the initial values of levels that take one and have none yet."""
        settings = {"high": dict(self.high_settings), "low": dict(self.low_settings)}
        for wanted, level, known, name in (
            (high, "high", ROUTERS, self.high),
            (low, "low", LEARNED_LOW, self.low),
        ):
            kind = _class_of(known, name, f"{level} level") if wanted and name else None
            if kind is not None and "seed" in inspect.signature(kind).parameters:
                settings[level].setdefault("seed", seed)
        return replace(self, high_settings=settings["high"], low_settings=settings["low"])

    def with_layers_per_edit(self, layers_per_edit: int | None) -> AgentSpec:
        """The same with another K; unchanged where None."""
        if layers_per_edit is None:
            return self
        settings = {**self.high_settings, "layers_per_edit": layers_per_edit}
        given = self.given | {"high.layers_per_edit"}
        return replace(self, high_settings=settings, given=given)

    def make_high(self, llm: ResidentLLM) -> HighLevel:
        """A fresh high level for a model.

        Raises:
            SettingsError: settings it does not take.
        """
        settings = dict(self.high_settings)
        try:
            if self.high == StraightThroughRouter.name:
                return StraightThroughRouter(llm.shapes, llm.device, **settings)
            if self.high == PolicyRouter.name:
                return PolicyRouter(len(llm.layers), llm.device, **settings)
            own = _class_of({}, self.high, "high level")
            if own is not None:
                made = own(len(llm.layers), llm.device, **settings)
                if not isinstance(made, HighLevel):
                    raise SettingsError(
                        f"{self.high!r} is no high level; it needs name, reset and choose"
                    )
                return made
            return UntrainedChoice(self.high, len(llm.layers), **settings)
        except HieditError:
            raise
        except _CANNOT_BE_MADE as error:
            raise SettingsError(f"high level {self.high!r}: {_first_line(error)}") from error

    def make_low(self, llm: ResidentLLM, model: str = "") -> UpdateRule | None:
        """A fresh low level for a model; None for the environment's own.

        Args:
            llm: The model.
            model: Its name, which may have settings of its own.

        Raises:
            SettingsError: settings it does not take.
        """
        if self.low is None:
            return None
        known = dict(belongings(model).rule_settings.get(self._rule(), {}))
        if self.low in LEARNED_LOW:
            # They share the rule's nominal step size and have arguments of their own.
            known = {name: value for name, value in known.items() if name == "step_size"}
        settings = {**known, **self.low_settings}
        try:
            if self.low == Hypernetwork.name:
                return Hypernetwork(llm.shapes, llm.device, **settings)
            if self.low == Rehearsal.name:
                return Rehearsal(llm, **settings)
            if self.low == Anchored.name:
                return Anchored(llm, **settings)
            if self.low == Neuron.name:
                return Neuron(llm, **settings)
            if self.low == StepSizePolicy.name:
                return StepSizePolicy(llm.shapes, llm.device, **settings)
        except HieditError:
            raise
        except _CANNOT_BE_MADE as error:
            raise SettingsError(f"low level {self.low!r}: {_first_line(error)}") from error
        name = self._rule()
        return make_rule(name, llm.shapes, llm.device, settings)

    def _rule(self) -> str:
        """The closed-form rule that the low level is or begins as."""
        if self.low == Hypernetwork.name:
            return RULE_OF_FORM.get(self.low_settings.get("form", "outer"), "")
        if self.low == Rehearsal.name:
            return RULE_OF_FORM["decorrelated"]
        if self.low == StepSizePolicy.name:
            return str(self.low_settings.get("rule", "decorrelated"))
        if self.low in (Anchored.name, Neuron.name):
            return ""  # its steps are not those of any rule
        return "gradient" if self.low == FINE_TUNING else str(self.low)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of :meth:`from_json`."""
        return {
            "name": self.name,
            "high": {"name": self.high, "settings": dict(self.high_settings)},
            "low": {"name": self.low, "settings": dict(self.low_settings)},
            "max_steps_per_edit": self.max_steps_per_edit,
            "train": dict(self.train),
            "source": self.source,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, allow_code: bool = False) -> AgentSpec:
        """The spec of a trained agent's record.

        Args:
            record: As :meth:`to_json` made it.
            allow_code: Whether a level may be a ``"module:Class"``, which is imported and called.

        Raises:
            CheckpointError: an entry is missing, is one that this version does not know, or names
                code that was not allowed; nothing is imported then.
        """
        own = [level for part in ("high", "low") if ":" in (level := record[part]["name"] or "")]
        if own and not allow_code:
            raise CheckpointError(
                f"the agent {record['name']!r} needs code that does not belong to hiedit: "
                f"{' and '.join(own)}. If you trust it, add the argument allow_code=true to the "
                "agent's folder"
            )
        try:
            spec = cls(
                name=record["name"],
                high=record["high"]["name"],
                low=record["low"]["name"],
                high_settings=record["high"]["settings"],
                low_settings=record["low"]["settings"],
                max_steps_per_edit=record["max_steps_per_edit"],
                train=record["train"],
                source=record["source"],
            )
            spec.check()
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the record of a trained agent is incomplete: {error}"
            ) from error
        except SettingsError as error:
            raise CheckpointError(
                f"the record of a trained agent says what this version does not know: {error}"
            ) from error
        return spec


def _first_line(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "there is not enough memory for its sizes; give smaller ones"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _class_of(known: Mapping[str, type], name: str, what: str) -> Any:
    """The class of a learned level or of one of your own; None for all others."""
    return import_named(name, what) if ":" in name else known.get(name)


def _is_trainable(known: Mapping[str, type], name: str, what: str) -> bool:
    kind = _class_of(known, name, what)
    return isinstance(kind, type) and issubclass(kind, Trainable)


def check_arguments(kind: type, arguments: Mapping[str, Any], owner: str) -> None:
    """Refuses keyword arguments that a class does not take.

    Args:
        kind: A class whose settings are its constructor's keyword-only arguments. One with
            ``**settings`` passes those on to the next class.
        arguments: By name.
        owner: How messages call the class.

    Raises:
        SettingsError: an unknown name, or a value of another type than the constructor says; whole
            numbers pass as floating-point ones, and nothing else is converted.

    >>> class Rule:
    ...     def __init__(self, *, ridge: float = 3.0) -> None: ...
    >>> check_arguments(Rule, {"ridge": 1}, "rule 'mine'")
    >>> check_arguments(Rule, {"ridge": "much"}, "rule 'mine'")
    Traceback (most recent call last):
    hiedit_env.errors.SettingsError: rule 'mine': ridge='much': Input should be a valid number
    """
    known = arguments_of(kind)
    for name, value in arguments.items():
        require_known(name, known, owner)
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(one["msg"] for one in error.errors()))
            raise SettingsError(f"{owner}: {name}={value!r}: {said}") from error
