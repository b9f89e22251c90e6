"""From a name on the command line to an agent.

========================  =====================================================================
``all-layers``, …         a simple choice of layers over the environment's update rule
``hiedit``, ``rledit``, … a named agent with the weights that ship with it
``oracle``                the best choice, on ``hiedit/Planted-v1`` only
``DIR``                   a trained agent: a folder that ``hiedit train`` wrote
``HIGH+LOW``              any high level over any low level; either may also be a DIR, of which
                          that level is taken, or a ``module:Class`` of your own
``ppo:DIR``               a policy that ``python -m hiedit_agents.rl.ppo`` trained; so do
                          ``sb3:DIR`` and the prefixes of the other libraries
``module:Class``          an agent of your own
========================  =====================================================================

``?name=value&name=value`` changes arguments: of the level itself after a HIGH or a LOW, of the low
level after a named agent or a DIR, where ``high.name=value`` reaches the high one; after a part of
HIGH+LOW only that level's.
``hiedit?facts=0`` does not rehearse facts, ``policy?size=learned+ridge`` learns how many layers,
``hiedit?max_steps_per_edit=1`` has another horizon. ``DIR?allow_code=true`` allows a DIR whose
levels are a ``module:Class`` to import them; without it no folder runs code.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium as gym
from hiedit_agents.hierarchy.options import HierarchicalAgent, layer_selection
from hiedit_agents.hierarchy.simple import LayerChoiceAgent, OracleAgent
from hiedit_agents.named.checkpoints import (
    LEVELS,
    POLICY,
    check_fits,
    kind_of,
    part,
    read_record,
    read_state,
    trained_facts,
    weights_of,
)
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.named.spec import HIGH_LEVELS, LOW_LEVELS, AgentSpec
from hiedit_agents.policies.networks import library_of
from hiedit_agents.protocol import Agent, FixedAgent, Observation, Trainable
from numpy.typing import NDArray

from hiedit_env.errors import CheckpointError, SettingsError, import_named
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.layer_choice import CHOICES, SIZELESS

#: Where the trained agents that ship with hiedit are: a folder per agent and model.
SHIPPED = Path(__file__).parent / "trained"

#: Arguments of training that one level's preset sets for that level alone.
_OF_THE_HIGH = frozenset({"train_high", "high_learning_rate"})
_OF_THE_LOW = frozenset(
    {"train_low", "low_learning_rate", "future_damage", "future_damage_prompts"}
)
#: Policies trained in another way: prefix → module whose ``load(folder)`` makes an agent.
LOADERS: Mapping[str, str] = MappingProxyType(
    {
        "ppo": "hiedit_agents.rl.ppo",
        "sb3": "hiedit_agents.rl.train_sb3",
        "sb3-contrib": "hiedit_agents.rl.train_sb3_contrib",
        # Played without the libraries that trained them.
        **dict.fromkeys(
            ("rllib", "skrl", "tianshou", "torchrl"), "hiedit_agents.policies.networks"
        ),
    }
)

#: Arguments that parameters were trained for.
_STRUCTURE = frozenset(
    {
        *("form", "network", "rank", "blocks", "keys", "gradients"),
        *("hidden", "embedding", "rule", "size", "normalize"),
    }
)

#: Belongs to the low level, though it is no argument of it.
_HORIZON = "max_steps_per_edit"

#: Argument of a folder: levels that its record gives as ``module:Class`` may be imported.
_ALLOW_CODE = "allow_code=true"

#: Names of the agents that come with hiedit, in the order they are listed.
AGENTS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(CHOICES, "a simple choice of layers"),
        **{n: s.source for n, s in PRESETS.items()},
        OracleAgent.name: "the best layers, found by trying all; on hiedit/Planted-v1 only",
    }
)


class SpecAgent(FixedAgent):
    """An agent that is built from its parts when it meets a model.

    Args:
        name: How it is called in tables and files.
        high, low: Spec of which the high and the low level are taken, and the folder with their
            trained parameters (None: as the spec makes them).
        layers_per_edit: Overrides the high level's K, unless that is taken from a folder.

    Raises:
        CheckpointError: a folder that is no trained agent.
        SettingsError: arguments that a learned level does not take.
    """

    def __init__(
        self,
        name: str,
        high: tuple[AgentSpec, Path | None],
        low: tuple[AgentSpec, Path | None],
        layers_per_edit: int | None = None,
    ) -> None:
        self.name = name
        spec, self._high_folder = high
        self._high = spec if self._high_folder else spec.with_layers_per_edit(layers_per_edit)
        self._low, self._low_folder = low
        for spec in (self._high, self._low):
            spec.check()
        self._built: tuple[ResidentLLM, HierarchicalAgent] | None = None

    @property
    def spec(self) -> AgentSpec:
        """The whole agent's spec."""
        return AgentSpec(
            name=self.name,
            high=self._high.high,
            low=self._low.low,
            high_settings=self._high.high_settings,
            low_settings=self._low.low_settings,
            max_steps_per_edit=self._low.max_steps_per_edit,
            # Whether and how a level is trained is not for the other one's preset to say.
            train={
                **{k: v for k, v in self._low.train.items() if k not in _OF_THE_HIGH},
                **{k: v for k, v in self._high.train.items() if k not in _OF_THE_LOW},
            },
            source=self._high.source if self._high is self._low else "",
        )

    @property
    def keeps_size(self) -> str | None:
        """Why ``layers_per_edit`` changes nothing about it; None if it does."""
        if self._high_folder is not None:
            return f"the high level of {self._high_folder} keeps the size it was trained with"
        if self._high.high in SIZELESS:
            return f"the high level {self._high.high!r} has no such setting"
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two agents of one name different: their settings and trained weights."""
        folders = dict.fromkeys(f for f in (self._high_folder, self._low_folder) if f is not None)
        weights = [weights_of(read_record(folder)) for folder in folders]
        spec = self.spec.to_json()
        return {
            "high": spec["high"],
            "low": spec["low"],
            "max_steps_per_edit": spec["max_steps_per_edit"],
            "weights": weights,
        }

    def candidate_layers(self, model: str) -> list[str] | None:
        """The layers it was trained for on a model of this name; None if it takes any."""
        for spec, folder in ((self._high, self._high_folder), (self._low, self._low_folder)):
            found = folder or shipped(spec.name, model)
            if found is not None and (folder is not None or spec.learns):
                layers: list[str] = read_record(found)["model"]["layers"]
                return layers
        return None

    def training_facts(self, model: str, *, trained: bool = True) -> frozenset[str]:
        """Hashes of the facts that its learned levels were trained on, as far as records say.

        Args:
            model: Name of the model it is for.
            trained: As for :meth:`build`.
        """
        found: frozenset[str] = frozenset()
        for own, folder, learned in (
            (self._high, self._high_folder, self._high.learned_high),
            (self._low, self._low_folder, self._low.learned_low),
        ):
            _, place = self._resolved(own, folder, model, trained)
            if learned and place is not None:
                found |= trained_facts(read_record(place))
        return found

    def seeded(self, seed: int) -> SpecAgent:
        """The same agent with initial values drawn from a seed, where none was given."""
        high, low = self._high, self._low
        if self._high_folder is None:
            high = high.with_seed(seed, high=True, low=high is low and self._low_folder is None)
        if low is self._high:
            low = high
        elif self._low_folder is None:
            low = low.with_seed(seed, low=True)
        return SpecAgent(self.name, (high, self._high_folder), (low, self._low_folder))

    def with_low_settings(self, **settings: Any) -> SpecAgent:
        """The same agent with other arguments of its low level."""
        spec = replace(
            self._low,
            low_settings={**self._low.low_settings, **settings},
            given=self._low.given | {f"low.{name}" for name in settings},
        )
        high = spec if self._high is self._low else self._high
        return SpecAgent(self.name, (high, self._high_folder), (spec, self._low_folder))

    def build(
        self, llm: ResidentLLM, model: str = "", *, trained: bool = True
    ) -> HierarchicalAgent:
        """The agent for a model.

        Args:
            llm: The model.
            model: Its name, to find the weights that ship for it.
            trained: If False, parameters of named agents are left as they are made, for training.

        Raises:
            CheckpointError: its trained parameters do not fit the model.
            SettingsError: settings that do not fit, or a learned agent without trained parameters.
        """
        high_spec, high_folder = self._resolved(self._high, self._high_folder, model, trained)
        low_spec, low_folder = self._resolved(self._low, self._low_folder, model, trained)
        high, low = high_spec.make_high(llm), low_spec.make_low(llm, model)
        for level, kind, spec, found in (
            (high, "high", self._high, high_folder),
            (low, "low", self._low, low_folder),
        ):
            if not isinstance(level, Trainable):
                continue
            if found is not None:
                record = read_record(found)
                check_fits(found, record, llm)
                try:
                    level.load_state_dict(part(read_state(found, record, llm.device), kind))
                except (RuntimeError, KeyError, TypeError) as error:
                    raise CheckpointError(
                        f"the {kind} level in {found} does not fit its own settings: {error}"
                    ) from error
            elif spec.name in PRESETS and trained:
                raise SettingsError(
                    f"agent {self.name!r} has to be trained, and no trained one ships for model "
                    f"{model!r}: run 'hiedit train {spec.name} --model … --out DIR' and give DIR "
                    "in its place"
                )
        return HierarchicalAgent(self.name, high, low, low_spec.max_steps_per_edit)

    @staticmethod
    def _resolved(
        spec: AgentSpec, folder: Path | None, model: str, trained: bool
    ) -> tuple[AgentSpec, Path | None]:
        """Settings and folder that count: those of the agent that ships, for a named one.

        What ships was trained with settings of its own, which a preset may have left since; only
        arguments that were given by name go before them.
        """
        preset = PRESETS.get(spec.name)
        found = shipped(spec.name, model) if preset and trained and folder is None else None
        if preset is None or found is None:
            return spec, folder
        own = AgentSpec.from_json(read_record(found))
        fixed = sorted(given for given in spec.given if given.rpartition(".")[2] in _STRUCTURE)
        if fixed:
            raise SettingsError(
                f"{', '.join(fixed)} of the agent {spec.name!r} that ships for {model} was fixed "
                "when it was trained; train one of your own, or give its folder"
            )
        high = {k: v for k, v in spec.high_settings.items() if f"high.{k}" in spec.given}
        low = {k: v for k, v in spec.low_settings.items() if f"low.{k}" in spec.given}
        horizon = (spec if _HORIZON in spec.given else own).max_steps_per_edit
        return replace(
            own,
            high_settings={**own.high_settings, **high},
            low_settings={**own.low_settings, **low},
            max_steps_per_edit=horizon,
        ), found

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Builds the agent for the environment's model, once, and makes it ready for an episode."""
        inner = layer_selection(env, self.name)
        if self._built is None or self._built[0] is not inner.llm:
            self._built = inner.llm, self.build(inner.llm, inner.model_name)
        self._built[1].reset(env, seed)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[Any]:
        """L int8, the layers for the present fact."""
        if self._built is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        return self._built[1].select_action(observation, info)


def make_agent(name: str, *, layers_per_edit: int | None = None) -> Agent:
    """An agent by name, see the table above.

    Args:
        name: What to make.
        layers_per_edit: Layers per fact, for agents that have such a setting. A class of your own
            is made as ``Class(layers_per_edit=...)``.

    Raises:
        SettingsError: unknown name, a module or class that cannot be imported, or a class that is
            no agent.
        CheckpointError: a folder that is no trained agent.

    >>> make_agent("all-layers").name, make_agent("random-layers+ridge").name
    ('all-layers', 'random-layers+ridge')
    """
    if name in CHOICES:
        return LayerChoiceAgent(name, layers_per_edit=layers_per_edit)
    if name == OracleAgent.name:
        return OracleAgent()
    prefix, colon, place = name.partition(":")
    if colon and prefix in LOADERS and not is_trained(name):
        agent: Agent = importlib.import_module(LOADERS[prefix]).load(Path(place))
        trained_by = agent.name.partition(":")[0]
        if trained_by != prefix:
            raise CheckpointError(
                f"{place} was trained by {trained_by}, not by {prefix}; name it {agent.name}"
            )
        return agent
    if ":" in name and "+" not in name and not is_trained(name.partition("?")[0]):
        made = _import(name)(layers_per_edit=layers_per_edit)
        if not isinstance(made, Agent):
            raise SettingsError(
                f"{name!r} is no agent; it needs name, reset, select_action and update"
            )
        return made
    return spec_agent(name, layers_per_edit)


def spec_agent(name: str, layers_per_edit: int | None = None) -> SpecAgent:
    """An agent that has a spec: a named one, a trained one, or ``HIGH+LOW``.

    Raises:
        SettingsError: unknown name, or arguments that are none.
        CheckpointError: a folder that is no trained agent, or that of a library's policy.
    """
    # A folder or a number may have a "+" in it: the first one between two known parts counts.
    pluses = [] if is_trained(name) else [i for i, sign in enumerate(name) if sign == "+"]
    for place in pluses:
        high, low = _high_part(name[:place]), _low_part(name[place + 1 :])
        if high is not None and low is not None:
            _refuse_unused(name[:place], "high")
            _refuse_unused(name[place + 1 :], "low")
            return SpecAgent(name, high, low, layers_per_edit)
    whole = _part(name)
    if whole is not None:
        values = [*whole[0].high_settings.values(), *whole[0].low_settings.values()]
        if not any(isinstance(value, str) and "+" in value for value in values):
            return SpecAgent(name, whole, whole, layers_per_edit)
    if kind_of(Path(name)) == POLICY:
        library = library_of(Path(name))
        raise CheckpointError(f"{name} holds a policy of {library}; name it {library}:{name}")
    if name == OracleAgent.name:
        raise SettingsError(
            f"agent {name!r} has no levels, so nothing to train: it tries all choices of layers"
        )
    if not pluses:
        raise SettingsError(
            f"unknown agent {name!r}; choose one of {', '.join(AGENTS)}, give the folder of a "
            "trained agent, HIGH+LOW for any two levels, or 'module:Class'"
        )
    place = next((i for i in pluses if _high_part(name[:i]) is not None), pluses[0])
    first, second = name[:place], name[place + 1 :]
    if _high_part(first) is None:
        raise SettingsError(
            f"unknown high level {first!r}; choose one of {', '.join(HIGH_LEVELS)}, a named agent, "
            "the folder of a trained one, or 'module:Class'"
        )
    raise SettingsError(
        f"unknown low level {second!r}; choose one of {', '.join(LOW_LEVELS)}, a named agent, the "
        "folder of a trained one, or 'module:Class'"
    )


def shipped(name: str, model: str) -> Path | None:
    """Folder of the trained agent that ships for a model; None if there is none."""
    folder = SHIPPED / f"{name}-{model}"
    return folder if model and is_trained(str(folder)) else None


def default_agent(model: str) -> str:
    """``hiedit`` where a trained one ships for the model, else ``all-layers``."""
    return "hiedit" if shipped("hiedit", model) else "all-layers"


def is_trained(name: str) -> bool:
    """Whether a name is the folder of an agent that ``hiedit train`` wrote."""
    return kind_of(Path(name)) == LEVELS


def _part(name: str) -> tuple[AgentSpec, Path | None] | None:
    """A named agent, a trained one or a high level, with its arguments; None if it is none."""
    base, _, query = (name, "", "") if is_trained(name) else name.partition("?")
    if base in PRESETS and is_trained(base):
        raise SettingsError(
            f"{base!r} is a named agent, and here it is also the folder of a trained one; write "
            f"'./{base}' for the folder, or go elsewhere for the named agent"
        )
    if base in PRESETS:
        return _with_query(PRESETS[base], query, "low"), None
    if is_trained(base):
        folder = Path(base)
        items = query.split("&") if query else []
        rest = "&".join(item for item in items if item != _ALLOW_CODE)
        spec = AgentSpec.from_json(read_record(folder), allow_code=_ALLOW_CODE in items)
        return _with_query(spec, rest, "low", folder), folder
    if base in HIGH_LEVELS:
        return _with_query(AgentSpec(base, base), query, "high"), None
    return None


def _high_part(name: str) -> tuple[AgentSpec, Path | None] | None:
    base, _, query = (name, "", "") if is_trained(name) else name.partition("?")
    own = ":" in base and base.partition(":")[0] not in LOADERS
    if own and not is_trained(base):
        return _with_query(AgentSpec(base, base), query, "high"), None
    return _part(name)


def _low_part(name: str) -> tuple[AgentSpec, Path | None] | None:
    base, _, query = (name, "", "") if is_trained(name) else name.partition("?")
    if base in HIGH_LEVELS:
        return None
    if base in LOW_LEVELS or (":" in base and not is_trained(base)):
        return _with_query(AgentSpec(base, "all-layers", base), query, "low"), None
    return _part(name)


def _refuse_unused(part: str, used: str) -> None:
    """Refuses arguments of the level that is not taken from a part of ``HIGH+LOW``."""
    base, _, query = part.partition("?")
    if not query or is_trained(part):
        return
    own = used if base in (*HIGH_LEVELS, *LOW_LEVELS) or ":" in base else "low"
    for item in query.split("&"):
        if item == _ALLOW_CODE:
            continue
        key = item.partition("=")[0]
        owner, dot, _ = key.partition(".")
        if (owner if dot else "low" if key == _HORIZON else own) != used:
            raise SettingsError(
                f"{item!r} changes the other level of {part!r}, of which only the {used} level is "
                f"taken; '{used}.name=value' reaches that one"
            )


def _with_query(spec: AgentSpec, query: str, level: str, folder: Path | None = None) -> AgentSpec:
    """The spec with other arguments, given as ``name=value&high.name=value&low.name=value``."""
    if not query:
        return spec
    settings = {"high": dict(spec.high_settings), "low": dict(spec.low_settings)}
    horizon, given = spec.max_steps_per_edit, set(spec.given)
    for item in query.split("&"):
        path, equals, text = item.partition("=")
        if path == _HORIZON:
            horizon = _steps(item, text)
            given.add(_HORIZON)
            continue
        owner, dot, key = path.partition(".")
        owner, key = (owner, key) if dot else (level, path)
        if not (key and equals) or owner not in settings:
            raise SettingsError(
                f"{query!r} must be name=value pairs joined by '&', with names such as 'ridge', "
                "'low.ridge' or 'high.size'"
            )
        if folder is not None and key in _STRUCTURE:
            raise SettingsError(f"{key!r} of {folder} was fixed when it was trained")
        given.add(f"{owner}.{key}")
        try:
            settings[owner][key] = json.loads(text)
        except ValueError:
            settings[owner][key] = text
    return replace(
        spec,
        high_settings=settings["high"],
        low_settings=settings["low"],
        max_steps_per_edit=horizon,
        given=frozenset(given),
    )


def _steps(item: str, text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise SettingsError(f"{item!r}: an option lasts a whole number of steps, at least 1")
    return int(text)


def _import(name: str) -> Callable[..., Any]:
    found: Any = import_named(name, "agent")
    if not callable(found):
        raise SettingsError(f"agent {name!r} is not a class: {type(found).__name__}")
    made: Callable[..., Any] = found
    return made
