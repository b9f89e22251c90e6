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

Settings follow the part they belong to, after commas: those of the level itself after a HIGH or a
LOW, of the low level after a named agent or a DIR, where ``high.name=value`` reaches the high one;
after a part of HIGH+LOW only that level's.
``hiedit,facts=0`` does not rehearse facts, ``policy,size=learned+ridge`` learns how many layers,
``hiedit,max_steps_per_edit=1`` has another horizon. ``DIR,allow_code=true`` allows a DIR whose
levels are a ``module:Class`` to import them; without it no folder runs code. A spec file (YAML or
JSON) stands for a name, see :mod:`hiedit_agents.named.grammar`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium as gym
from numpy.typing import NDArray

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
from hiedit_agents.named.fitting import SHIPPED as SHIPPED
from hiedit_agents.named.fitting import find_shipped
from hiedit_agents.named.grammar import (
    Pair,
    is_spec_file,
    read_spec_file,
    refuse_old_syntax,
    split_label,
    split_settings,
)
from hiedit_agents.named.over_low_level import OverLowLevel
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.named.spec import HIGH_LEVELS, LOW_LEVELS, AgentSpec
from hiedit_agents.policies.networks import library_of
from hiedit_agents.protocol import Agent, FixedAgent, Observation, Trainable
from hiedit_env.errors import CheckpointError, SettingsError, import_named
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.layer_choice import CHOICES, SIZELESS

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
_ALLOW_CODE = "allow_code"

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

    def trained_folders(self, model: str) -> dict[Path, str]:
        """Folders of the trained numbers that it uses on a model, each with the reason."""
        found: dict[Path, str] = {}
        for spec, folder in ((self._high, self._high_folder), (self._low, self._low_folder)):
            if folder is not None:
                found[folder] = "it was named"
            elif spec.name in PRESETS and spec.learns:
                fit = find_shipped(spec.name, model)
                if fit is not None:
                    found[fit.folder] = fit.why
        return found

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

    def acting_with(self, layers_per_edit: int | None) -> SpecAgent:
        """The same agent with another K, also of a trained high level; its name goes before it.

        Raises:
            SettingsError: the number of layers follows from what it has learned.
        """
        if layers_per_edit is None or self._high.high in SIZELESS:
            return self
        if "high.layers_per_edit" in self._high.given:
            return self
        if self._high.high_settings.get("size") == "learned":
            raise SettingsError(
                f"agent {self.name!r} has learned how many layers to choose, so layers_per_edit="
                f"{layers_per_edit} would change nothing; leave it out"
            )
        high = self._high.with_layers_per_edit(layers_per_edit)
        low = high if self._low is self._high else self._low
        return SpecAgent(self.name, (high, self._high_folder), (low, self._low_folder))

    def with_low_options(
        self, max_steps_per_edit: int | None, step_size: float | None, update_rule: str | None
    ) -> SpecAgent:
        """The same agent with what is given for all agents; its name goes before it.

        Raises:
            SettingsError: an update rule, where the low level comes with the agent.
        """
        low = self._low
        bundled = self._low_folder is not None or low.name in PRESETS
        if update_rule is not None and low.low is not None and bundled:
            raise SettingsError(
                f"agent {self.name!r} has a low level of its own, so update_rule={update_rule!r} "
                f"would change nothing; leave it out, or name {low.high}+{update_rule}"
            )
        given, settings, horizon = set(low.given), dict(low.low_settings), low.max_steps_per_edit
        if max_steps_per_edit is not None and _HORIZON not in given:
            horizon = max_steps_per_edit
            given.add(_HORIZON)
        if step_size is not None and low.low is not None and "low.step_size" not in given:
            settings["step_size"] = step_size
            given.add("low.step_size")
        spec = replace(
            low, low_settings=settings, max_steps_per_edit=horizon, given=frozenset(given)
        )
        high = spec if self._high is low else self._high
        return SpecAgent(self.name, (high, self._high_folder), (spec, self._low_folder))

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


def make_agent(
    name: str,
    *,
    layers_per_edit: int | None = None,
    max_steps_per_edit: int | None = None,
    step_size: float | None = None,
    update_rule: str | None = None,
) -> Agent:
    """An agent by name, see the table above.

    What is given here goes before what an agent was trained with or has by default; what its name
    says goes before what is given here. Agents over the environment's own update rule leave all but
    ``layers_per_edit`` to the environment.

    Args:
        name: What to make.
        layers_per_edit: Layers per fact, for agents that choose a number of them.
        max_steps_per_edit: Horizon of an option.
        step_size: Nominal step size of the low level.
        update_rule: The environment's; refused by agents with a low level of their own.

    Raises:
        SettingsError: unknown name, a module or class that cannot be imported, a class that is no
            agent, or an argument that would change nothing about the agent.
        CheckpointError: a folder that is no trained agent.

    >>> make_agent("all-layers").name, make_agent("random-layers+ridge").name
    ('all-layers', 'random-layers+ridge')
    """
    low = {
        "max_steps_per_edit": max_steps_per_edit, "step_size": step_size, "update_rule": update_rule
    }  # fmt: skip
    if not is_trained(name):
        refuse_old_syntax(name)
    if name in CHOICES:
        return LayerChoiceAgent(name, layers_per_edit=layers_per_edit)
    if name == OracleAgent.name:
        return OracleAgent()
    base, pairs = (name, []) if is_trained(name) else split_settings(name)
    if is_spec_file(base):
        file = read_spec_file(base)
        if file.agent is not None and _outside(file.agent):
            base, pairs = file.agent, [*file.pairs, *pairs]
    if _outside(base):
        prefix, _, place = base.partition(":")
        if prefix in LOADERS:
            return _policy(prefix, Path(place), dict(pairs), low)
        if "+" not in base:
            return _own(base, dict(pairs), layers_per_edit)
    made = spec_agent(name).acting_with(layers_per_edit)
    return made.with_low_options(max_steps_per_edit, step_size, update_rule)


def takes_layers_per_edit(agent: Agent) -> bool:
    """Whether an agent chooses a number of layers that can be given."""
    if isinstance(agent, SpecAgent):
        return agent.spec.high not in SIZELESS
    if isinstance(agent, LayerChoiceAgent):
        return agent.name not in SIZELESS
    return "layers_per_edit" in _parameters(type(agent))


def refuse_unused_size(agents: Collection[Agent], layers_per_edit: int | None) -> None:
    """Refuses a number of layers that changes nothing about any agent.

    Raises:
        SettingsError: none of the agents chooses a number of layers.
    """
    if layers_per_edit is None or any(takes_layers_per_edit(agent) for agent in agents):
        return
    names = ", ".join(agent.name for agent in agents if agent.name != "no-edit") or "no-edit"
    raise SettingsError(
        f"layers_per_edit={layers_per_edit} changes nothing about {names}: it is for agents that "
        "choose a number of layers, such as random-layers; leave it out"
    )


def labelled(text: str) -> tuple[str, str]:
    """How an agent is called in tables, and its name: from ``LABEL=NAME``, or the name twice.

    An agent of a spec file without a label is called as the file says.
    """
    label, name = split_label(text, is_trained)
    if label is None and is_spec_file(name):
        label = read_spec_file(name).name
    return label or name, name


def spec_agent(name: str, layers_per_edit: int | None = None) -> SpecAgent:
    """An agent that has a spec: a named one, a trained one, ``HIGH+LOW``, or a spec file.

    Raises:
        SettingsError: unknown name, or arguments that are none.
        CheckpointError: a folder that is no trained agent, or that of a library's policy.
    """
    if not is_trained(name):
        refuse_old_syntax(name)
        base, pairs = split_settings(name) if "+" not in name else (name, [])
        if is_spec_file(base):
            return _of_file(base, pairs, layers_per_edit)
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
    """Folder of the trained agent that ships and fits a model; None if there is none."""
    found = find_shipped(name, model)
    return None if found is None else found.folder


def default_agent(model: str) -> str:
    """``hiedit`` where a trained one that fits the model ships, else ``all-layers``."""
    return "hiedit" if shipped("hiedit", model) else "all-layers"


def explain(agent: Agent, model: str) -> str:
    """Which trained numbers an agent uses on a model, and why, in one line.

    Args:
        agent: From :func:`make_agent`.
        model: Name of the model.
    """
    if isinstance(agent, SpecAgent):
        found = agent.trained_folders(model)
        if found:
            return "; ".join(f"trained numbers of {folder}: {why}" for folder, why in found.items())
    if agent.name == "all-layers" and not shipped("hiedit", model):
        return f"no trained agent that fits {model} ships with hiedit, so every layer is edited"
    return "it uses no trained numbers"


def is_trained(name: str) -> bool:
    """Whether a name is the folder of an agent that ``hiedit train`` wrote."""
    return kind_of(Path(name)) == LEVELS


def _split(part: str) -> tuple[str, list[Pair]]:
    """A part's name and settings; a folder may be called anything."""
    return (part, []) if is_trained(part) else split_settings(part)


def _part(name: str, pairs: Sequence[Pair] | None = None) -> tuple[AgentSpec, Path | None] | None:
    """A named agent, a trained one or a high level, with its settings; None if it is none.

    Args:
        name: With settings, or without them where ``pairs`` holds them.
        pairs: Settings.
    """
    base, query = _split(name) if pairs is None else (name, pairs)
    if base in PRESETS and is_trained(base):
        raise SettingsError(
            f"{base!r} is a named agent, and here it is also the folder of a trained one; write "
            f"'./{base}' for the folder, or go elsewhere for the named agent"
        )
    if base in PRESETS:
        return _with_query(PRESETS[base], query, "low"), None
    if is_trained(base):
        folder = Path(base)
        rest = [pair for pair in query if pair[0] != _ALLOW_CODE]
        allowed = (_ALLOW_CODE, True) in query
        spec = AgentSpec.from_json(read_record(folder), allow_code=allowed)
        return _with_query(spec, rest, "low", folder), folder
    if base in HIGH_LEVELS:
        return _with_query(AgentSpec(base, base), query, "high"), None
    return None


def _high_part(
    name: str, pairs: Sequence[Pair] | None = None
) -> tuple[AgentSpec, Path | None] | None:
    base, query = _split(name) if pairs is None else (name, pairs)
    if is_spec_file(base):
        file = _of_file(base, query)
        return file._high, file._high_folder
    own = ":" in base and base.partition(":")[0] not in LOADERS
    if own and not is_trained(base):
        return _with_query(AgentSpec(base, base), query, "high"), None
    return _part(base, query)


def _low_part(
    name: str, pairs: Sequence[Pair] | None = None
) -> tuple[AgentSpec, Path | None] | None:
    base, query = _split(name) if pairs is None else (name, pairs)
    if is_spec_file(base):
        file = _of_file(base, query)
        return file._low, file._low_folder
    if base in HIGH_LEVELS:
        return None
    if base in LOW_LEVELS or (":" in base and not is_trained(base)):
        return _with_query(AgentSpec(base, "all-layers", base), query, "low"), None
    return _part(base, query)


def _refuse_unused(part: str, used: str) -> None:
    """Refuses arguments of the level that is not taken from a part of ``HIGH+LOW``."""
    base, query = _split(part)
    own = used if base in (*HIGH_LEVELS, *LOW_LEVELS) or ":" in base else "low"
    for key, value in query:
        if key == _ALLOW_CODE:
            continue
        owner, dot, _ = key.partition(".")
        if (owner if dot else "low" if key == _HORIZON else own) != used:
            raise SettingsError(
                f"'{key}={value}' changes the other level of {part!r}, of which only the {used} "
                f"level is taken; '{used}.name=value' reaches that one"
            )


def _with_query(
    spec: AgentSpec, query: Sequence[Pair], level: str, folder: Path | None = None
) -> AgentSpec:
    """The spec with other settings: ``name``, ``high.name`` or ``low.name``, and the horizon."""
    if not query:
        return spec
    settings = {"high": dict(spec.high_settings), "low": dict(spec.low_settings)}
    horizon, given = spec.max_steps_per_edit, set(spec.given)
    for path, value in query:
        if path == _HORIZON:
            horizon = _steps(value)
            given.add(_HORIZON)
            continue
        owner, dot, key = path.partition(".")
        owner, key = (owner, key) if dot else (level, path)
        if owner not in settings or not key:
            raise SettingsError(
                f"{path!r} is no name of a setting; it is such as 'ridge', 'low.ridge' or "
                "'high.size'"
            )
        if folder is not None and key in _STRUCTURE:
            raise SettingsError(f"{key!r} of {folder} was fixed when it was trained")
        given.add(f"{owner}.{key}")
        settings[owner][key] = value
    return replace(
        spec,
        high_settings=settings["high"],
        low_settings=settings["low"],
        max_steps_per_edit=horizon,
        given=frozenset(given),
    )


def _steps(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(
            f"{_HORIZON}={value}: an option lasts a whole number of steps, at least 1"
        )
    return value


def _of_file(name: str, pairs: Sequence[Pair], layers_per_edit: int | None = None) -> SpecAgent:
    """The agent of a spec file, with more settings."""
    file = read_spec_file(name)
    if file.agent is not None:
        whole = _part(file.agent, [])
        if whole is None:
            raise SettingsError(
                f"{name}: unknown agent {file.agent!r}; give a named agent or the folder of a "
                "trained one, or 'high' and 'low'"
            )
        high = low = whole
    else:
        one, two = _high_part(*file.level(file.high)), _low_part(*file.level(file.low))
        if one is None or two is None:
            kind, level = ("high", file.high) if one is None else ("low", file.low)
            raise SettingsError(f"{name}: unknown {kind} level {file.level(level)[0]!r}")
        high, low = one, two
    more = [*file.pairs, *pairs]
    train = dict(file.train or {})

    def changed(part: tuple[AgentSpec, Path | None]) -> tuple[AgentSpec, Path | None]:
        spec, folder = part
        default = "low" if file.agent not in HIGH_LEVELS else "high"
        spec = _with_query(spec, more, default, folder)
        return replace(spec, train={**spec.train, **train}), folder

    made = changed(high)
    label = file.name or name
    return SpecAgent(label, made, made if low is high else changed(low), layers_per_edit)


def _outside(name: str) -> bool:
    """Whether an agent is no levels: a library's policy or a class of your own."""
    prefix, colon, _ = name.partition(":")
    if not colon or is_trained(name):
        return False
    return prefix in LOADERS or "+" not in name


def _policy(
    prefix: str, folder: Path, given: Mapping[str, Any], options: Mapping[str, Any]
) -> Agent:
    """A policy that ``LOADERS[prefix]`` trained, with settings of the low level below it."""
    agent: Agent = importlib.import_module(LOADERS[prefix]).load(folder)
    trained_by = agent.name.partition(":")[0]
    if trained_by != prefix:
        raise CheckpointError(
            f"{folder} was trained by {trained_by}, not by {prefix}; name it {agent.name}"
        )
    wanted = {k: v for k, v in options.items() if v is not None}
    record = getattr(agent, "record", None)
    if record is not None and record.task.form == "step-sizes":
        if given or wanted:
            names = ", ".join({**wanted, **given})
            raise SettingsError(
                f"{agent.name} chooses step sizes: it keeps the rule and the horizon it was "
                f"trained with, so {names} would change nothing; leave it out"
            )
        return agent
    # What is given for all agents is the environment's.
    return OverLowLevel(agent, given) if given else agent


def _own(name: str, given: Mapping[str, Any], layers_per_edit: int | None) -> Agent:
    """An agent of the user's own class."""
    found = _import(name)
    arguments = dict(given)
    if "layers_per_edit" in _parameters(found):
        arguments.setdefault("layers_per_edit", layers_per_edit)
    elif layers_per_edit is not None:
        raise SettingsError(
            f"agent {name!r} takes no layers_per_edit, so {layers_per_edit} would change nothing; "
            "leave it out, or let the class take it"
        )
    try:
        made = found(**arguments)
    except TypeError as error:
        raise SettingsError(f"agent {name!r} cannot be made: {error}") from error
    if not isinstance(made, Agent):
        raise SettingsError(f"{name!r} is no agent; it needs name, reset, select_action and update")
    return made


def _parameters(found: Any) -> Collection[str]:
    try:
        return inspect.signature(found).parameters
    except (TypeError, ValueError):
        return ()


def _import(name: str) -> Callable[..., Any]:
    found: Any = import_named(name, "agent")
    if not callable(found):
        raise SettingsError(f"agent {name!r} is not a class: {type(found).__name__}")
    made: Callable[..., Any] = found
    return made
