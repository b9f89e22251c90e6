"""Settings as data classes: names, types, defaults, ranges and meanings, each in one place.

Environments, comparisons, training and the command line read them from here. The docstring below a
field is its help on the command line. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from hiedit_env.datasets.difficulty import WorldName, read_difficulty
from hiedit_env.envs.reward_weights import Version, checked_weights, reward_weights
from hiedit_env.errors import SettingsError, shown
from hiedit_env.evaluation.names import AskedForm, LocalityReference, RewardKind
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.relatives import belongings

T = TypeVar("T")

LayerChoiceName = Literal["no-edit", "all-layers", "random-layers", "fixed-layers", "gradient-norm"]
RenderMode = Literal["ansi", "rgb_array"]
MemoryCheck = Literal["refuse", "warn", "off"]
RENDER_MODES: tuple[RenderMode, ...] = get_args(RenderMode)


# -- settings in general --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Must:
    """What a value must be, in words, for the error ``NAME must be …, got VALUE; remedy``."""

    be: str
    remedy: str = ""


_FLOAT = {"allow_inf_nan": False}
AtLeast0 = Annotated[int, Field(ge=0), Must("≥ 0 and a whole number")]
AtLeast1 = Annotated[int, Field(ge=1), Must("≥ 1 and a whole number")]
Positive = Annotated[float, Field(gt=0, **_FLOAT), Must("a positive finite number")]
Weight = Annotated[float, Field(ge=0, **_FLOAT), Must("a finite number ≥ 0")]
Discount = Annotated[float, Field(gt=0, le=1, **_FLOAT), Must("a number in (0, 1]")]
StepLength = Annotated[float, Field(gt=0, **_FLOAT), Must("a positive number", "give a finite one")]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Makes a frozen data class whose values are checked when it is made.

    Values must have the declared types; only NumPy scalars are converted, and whole numbers pass as
    floating-point ones. ``dataclasses.replace`` and ``asdict`` work as for every data class.

    Raises:
        SettingsError: (by the class) an unknown name, or a value of another type or range; one line
            that names the value and what would be right.

    >>> @settings
    ... class Mine:
    ...     count: AtLeast1 = 1
    >>> Mine(count=0)
    Traceback (most recent call last):
    hiedit_env.errors.SettingsError: count must be ≥ 1 and a whole number, got 0
    >>> Mine(cuont=2)
    Traceback (most recent call last):
    hiedit_env.errors.SettingsError: there is no setting 'cuont'; did you mean 'count'?
    """
    config = ConfigDict(strict=True, extra="forbid")
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    checked = made.__init__

    @functools.wraps(checked)
    def make(self: Any, **values: Any) -> None:
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        try:
            checked(self, **plain)
        except ValidationError as error:
            raise SettingsError(_in_one_line(made, error)) from error

    made.__init__ = make
    return made  # type: ignore[no-any-return]


def unknown_name(name: str, known: Sequence[str], what: str = "setting") -> str:
    """The error about a name that is none, with the nearest right one.

    >>> unknown_name("modle", ["model", "dataset"])
    "there is no setting 'modle'; did you mean 'model'?"
    >>> unknown_name("x", ["model", "dataset"])
    "there is no setting 'x'; there are model, dataset"
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
    return f"there is no {what} {name!r}; {remedy}"


def _in_one_line(cls: Any, error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors()[0]
    name, value = (str(first["loc"][0]) if first["loc"] else ""), first["input"]
    if first["type"] == "unexpected_keyword_argument":
        return unknown_name(name, [field.name for field in fields(cls)])
    if first["type"].startswith("missing"):
        return f"{name} must be given"
    if first["type"] == "value_error":
        return str(first.get("ctx", {}).get("error", first["msg"]))
    right = _right(get_type_hints(cls, include_extras=True).get(name, Any))
    text = shown(value) if isinstance(value, _PLAIN) else type(value).__name__
    remedy = f"; {right.remedy}" if right.remedy else ""
    return f"{name} must be {right.be or first['msg']}, got {text}{remedy}"


#: Values that are shown as they are; of others the type is.
_PLAIN = (type(None), bool, int, float, str, bytes, list, tuple, dict, set)


def _right(hint: Any) -> Must:
    """What values of a type must be."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Must):
            return extra
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _right(inner[0])
    if kind in (Union, UnionType):
        parts = [_right(part) for part in inner if part is not type(None)]
        words = dict.fromkeys(part.be for part in parts if part.be)
        return Must(" or ".join(words), parts[0].remedy)
    if kind is Literal:
        return Must(f"one of {', '.join(map(repr, inner))}")
    words_of = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return Must(words_of.get(hint, ""))


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _patterns(value: Any) -> Any:
    """One pattern or several as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


# -- the environments' -----------------------------------------------------------------------------

Name = Annotated[
    str,
    BeforeValidator(_path),
    Must(
        "a name or a path",
        "gym.make copies its arguments, so a live model cannot be passed",
    ),
]
Dataset = Annotated[str, BeforeValidator(_path), Must("a name, a path or None")]
Patterns = Annotated[tuple[str, ...], Must("a pattern, several patterns or None")]
LayerPatterns = Annotated[Patterns | None, BeforeValidator(_patterns)]
NumEdits = Annotated[int, Field(ge=1), Must("≥ 1 and a whole number")]


@settings
class ModelSettings:
    """Which model is edited, where it lives, and which of its matrices may change."""

    model: Name = "tiny"
    """smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a Hugging Face
    id"""
    layers: LayerPatterns = None
    """candidate weight matrices, such as 'model.layers.{10-14}.mlp.gate_proj', or a .json file that
    'hiedit layers' wrote; by default those of published work on the model, or matrices at the same
    relative depth"""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps"""
    dtype: str = "float32"
    """float32, bfloat16 or float16"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    memory_check: MemoryCheck | None = None
    """what is done if the model seems not to fit into memory: refuse, warn or off; by default
    $HIEDIT_MEMORY_CHECK, else refuse"""


@settings
class AskingSettings(ModelSettings):
    """How facts are edited and asked."""

    prompt_form: PromptForm | None = None
    """how facts are edited and asked: plain, chat (through the tokenizer's chat template), or both;
    by default plain"""
    end_token: bool | None = None
    """put the token that ends the model's turn behind every answer"""

    @property
    def forms(self) -> tuple[AskedForm, ...]:
        """How an evaluation asks: plain always, in chat where facts are edited in chat."""
        return ("plain", "chat") if self.prompt_form in ("chat", "both") else ("plain",)


@settings
class RuleSettings(AskingSettings):
    """How one fact is written."""

    max_steps_per_edit: AtLeast1 | None = None
    """maximum number of updates per fact; by default the agent's own, or 5"""
    update_rule: Annotated[str, Must("a name or 'module:Class'")] | None = None
    """decorrelated, outer-product, ridge, gradient or module:Class; by default the rule that
    belongs to the model"""
    step_size: StepLength | None = None
    """nominal step size of the update rule; by default the rule's own"""
    edits_per_step: AtLeast1 = 1
    """n, facts that one step edits together, with the same layers"""

    @property
    def rule(self) -> str:
        """The update rule: the given one, or the one that belongs to the model."""
        return self.update_rule or belongings(self.model).rule


@settings
class EditingSettings(RuleSettings):
    """Which facts are written, and how an edit is rewarded."""

    dataset: Dataset | None = None
    """world-facts, tiny-facts, planted-facts, or a .json or .jsonl file; by default the facts that
    belong to the model"""
    num_edits: NumEdits | None = 32
    """facts per stream; None for all facts"""
    reward: RewardKind = "loss"
    """unit of the reward's terms: nats per token, share of right tokens, or generated answers"""
    retention_window: AtLeast0 = 10
    """k, how many past edits are remembered in the reward"""

    @property
    def facts(self) -> str:
        """The data set: the given one, or the one that belongs to the model."""
        return self.dataset or belongings(self.model).dataset


@settings
class EnvSettings(EditingSettings):
    """All arguments of :class:`hiedit_env.envs.lifelong_edit.LifelongEdit`."""

    max_steps_per_edit: AtLeast1 = 5
    """maximum number of updates per fact; 1 is the papers' setting"""
    prompt_form: PromptForm = "plain"
    """how facts are edited and asked: plain, chat (through the tokenizer's chat template), or
    both"""
    end_token: bool = False
    """put the token that ends the model's turn behind every answer"""
    reward_weights: Annotated[Mapping[str, float] | None, BeforeValidator(checked_weights)] = None
    """weights of the reward's terms that differ from the default"""
    render_mode: RenderMode | None = None
    """ansi, rgb_array or None"""
    intrinsic: bool = False
    """reward the advantage over all layers"""
    retention_decay: Discount = 0.95
    """μ, weight of a remembered edit per edit of age"""
    locality_reference: LocalityReference = "unedited"
    """the model that answers to unrelated prompts are compared with"""
    stop_when_answered: bool = True
    """end a fact as soon as it is answered"""
    update_rule_settings: Annotated[dict[str, Any] | None, Must("a dict")] = None
    """other arguments of the update rule"""
    shuffle: bool = True
    """draw the stream at random; if not, take the first facts in their order"""
    progress: bool = False
    """show progress while the model is loaded"""
    version: Version = 1
    """version of the id: what the reward pays for and what the observation holds; the ids set it"""

    def __post_init__(self) -> None:
        reward_weights(self.reward_weights, self.version, self.reward)
        rule_settings(self.model, self.rule, self.step_size, self.update_rule_settings)

    @property
    def rule_settings(self) -> dict[str, Any]:
        """Arguments of the update rule; those tuned for the model only where none are given."""
        return rule_settings(self.model, self.rule, self.step_size, self.update_rule_settings)


@settings
class PlantedSettings(EnvSettings):
    """All arguments of :class:`hiedit_env.envs.planted.Planted`."""

    model: Name = "planted"
    """the planted model, planted:DIFFICULTY:SEED, or a folder of another one with planted facts"""
    world_seed: AtLeast0 | None = None
    """seed of a world that is made on demand; from 1,000,000 on they are kept for tests"""
    difficulty: str | None = None
    """of that world: flat, plain, pairs, decoys, crowded, hard, or fields of it, as in
    'plain,layers=4'; by default plain"""

    def __post_init__(self) -> None:
        if self.world_seed is not None or self.difficulty is not None:
            difficulty = read_difficulty(self.difficulty or "plain")
            world = str(WorldName(difficulty, self.world_seed or 0))
            if self.model not in ("planted", world):
                raise SettingsError(
                    f"model={self.model!r} is given beside world_seed={self.world_seed!r} and "
                    f"difficulty={self.difficulty!r}, which name the model {world!r}; leave one out"
                )
            object.__setattr__(self, "model", world)
        super().__post_init__()


@settings
class StepSizeSettings(EnvSettings):
    """All arguments of :class:`hiedit_env.envs.step_size.StepSize`."""

    high_level: LayerChoiceName = "all-layers"
    """the simple choice of layers under which step sizes are chosen"""
    layers_per_edit: AtLeast1 | None = None
    """K, for a choice that has a size; by default half of the layers"""


def rule_settings(
    model: str,
    rule: str,
    step_size: float | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of an update rule; those tuned for the model only where none are given.

    Args:
        model: Name of the model.
        rule: Name of the rule.
        step_size: Nominal step size; None for the model's or the rule's own.
        given: Other arguments.

    Raises:
        SettingsError: two step sizes.

    >>> rule_settings("tiny", "ridge"), rule_settings("tiny", "ridge", 0.5)
    ({'step_size': 0.0005}, {'step_size': 0.5})
    """
    chosen = dict(given or {})
    if step_size is not None:
        if "step_size" in chosen:
            raise SettingsError(
                f"step_size={step_size!r} and update_rule_settings['step_size']="
                f"{chosen['step_size']!r} are both given; leave one of them out"
            )
        chosen["step_size"] = step_size
    return {**belongings(model).rule_settings.get(rule, {}), **chosen}
