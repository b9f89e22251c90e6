"""From a name on the command line to an agent.

========================  =====================================================================
``all-layers``, …         a simple choice of layers over the environment's update rule
``hiedit``, ``rledit``, … a named agent with the weights that ship with it
``oracle``                the best choice, on ``hiedit/Planted-v1`` only
``DIR``                   a trained agent: a folder that ``hiedit train`` wrote, or
                          :mod:`hiedit_agents.bandits.train_shared`
``HIGH+LOW``              any high level over any low level; either may also be a DIR, of which
                          that level is taken, or a ``module:Class`` of your own
``ppo:DIR``               a policy that ``python -m hiedit_agents.rl.ppo`` trained; so do
                          ``sb3:DIR`` and the prefixes of the other libraries
``module:Class``          an agent of your own
========================  =====================================================================

Settings follow the part they belong to, after commas: those of the level itself after a HIGH or a
LOW, of the low level after a named agent or a DIR, where ``high.name=value`` reaches the high one;
after a part of HIGH+LOW only that level's.
``rledit,ridge=2`` has another ridge, ``policy,size=learned+ridge`` learns how many layers,
``hiedit,max_steps_per_edit=1`` has another horizon. ``DIR,allow_code=true`` allows a DIR whose
levels are a ``module:Class`` to import them; without it no folder runs code. A spec file (YAML or
JSON) stands for a name, see :mod:`hiedit_agents.named.grammar`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hiedit_agents.bandits.agent import FixedBest, LinearBanditAgent, RecordedAgent
from hiedit_agents.bandits.shared_agent import SharedAgent
from hiedit_agents.hierarchy.simple import LayerChoiceAgent, OracleAgent
from hiedit_agents.named.checkpoints import (
    LEVELS,
    POLICY,
    SHARED,
    kind_of,
    refuse_folder,
)
from hiedit_agents.named.fitting import SHIPPED as SHIPPED
from hiedit_agents.named.grammar import (
    is_spec_file,
    read_spec_file,
    refuse_old_syntax,
    split_label,
    split_settings,
)
from hiedit_agents.named.over_low_level import OverLowLevel
from hiedit_agents.named.parts import (
    LOADERS,
    high_part,
    is_trained,
    low_part,
    named_part,
    of_file,
    refuse_unused,
)
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.named.spec import HIGH_LEVELS, LOW_LEVELS, check_arguments
from hiedit_agents.named.spec_agent import SpecAgent, shipped
from hiedit_agents.policies.networks import library_of
from hiedit_agents.protocol import Agent
from hiedit_agents.rivals.alphaedit import AlphaEdit
from hiedit_agents.rivals.fine_tuning import BreadthFirst, PenalisedFineTuning
from hiedit_agents.rivals.in_context import InContext
from hiedit_agents.rivals.memit import Memit
from hiedit_env.errors import CheckpointError, SettingsError, import_named
from hiedit_env.rules.layer_choice import CHOICES, SIZELESS

#: Agents without levels that comparisons need: what else one could do with the same facts, and
#: what one could learn from recorded options.
RIVALS: Mapping[str, type] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            *(BreadthFirst, PenalisedFineTuning, Memit, AlphaEdit, InContext),
            *(FixedBest, LinearBanditAgent),
        )
    }
)
#: Those that use neither the environment's update rule nor options of several steps.
_OWN_WAY = tuple(kind for kind in RIVALS.values() if not issubclass(kind, RecordedAgent))
#: Names of the agents that come with hiedit, in the order they are listed.
AGENTS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(CHOICES, "a simple choice of layers"),
        **{n: s.source for n, s in PRESETS.items()},
        **{n: str(inspect.getdoc(kind)).partition("\n")[0] for n, kind in RIVALS.items()},
        OracleAgent.name: "the best layers, found by trying all; on hiedit/Planted-v1 only",
    }
)


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
    if kind_of(Path(name)) == SHARED:
        return SharedAgent(Path(name))
    if not is_trained(name):
        refuse_old_syntax(name)
    if name in CHOICES:
        return LayerChoiceAgent(name, layers_per_edit=layers_per_edit)
    if name == OracleAgent.name:
        return OracleAgent()
    base, pairs = (name, []) if is_trained(name) else split_settings(name)
    if kind_of(Path(base)) == SHARED:
        raise SettingsError(f"{base} holds a shared router, which takes no settings: name it alone")
    if base in RIVALS:
        return _rival(base, dict(pairs))
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


def refuse_unused_options(
    agents: Collection[Agent],
    *,
    max_steps_per_edit: int | None = None,
    step_size: float | None = None,
    update_rule: str | None = None,
) -> None:
    """Refuses what is given for all agents where each of them writes in its own way.

    Args:
        agents: From :func:`make_agent`.
        max_steps_per_edit: As there; so are the others.
        step_size: None where it was not given.
        update_rule: None where it was not given.

    Raises:
        SettingsError: one of these was given, and would change nothing about any agent.
    """
    options = {
        "max_steps_per_edit": max_steps_per_edit, "step_size": step_size, "update_rule": update_rule
    }  # fmt: skip
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    editing = [agent for agent in agents if agent.name != "no-edit"]
    if not given or not editing or not all(isinstance(one, _OWN_WAY) for one in editing):
        return
    names = ", ".join(agent.name for agent in editing)
    raise SettingsError(
        f"{', '.join(given)} would change nothing about {names}: settings of such an agent follow "
        "its name, as 'hiedit agents' lists them; leave it out"
    )


def labelled(text: str) -> tuple[str, str]:
    """How an agent is called in tables, and its name: from ``LABEL=NAME``, or the name twice.

    An agent of a spec file without a label is called as the file says.

    Raises:
        SettingsError: settings after ``?``, as they were written in earlier versions.
    """
    label, name = split_label(text, lambda part: kind_of(Path(part)) in (LEVELS, SHARED))
    if label is not None and "?" in label:
        # The "=" was that of the first setting.
        refuse_old_syntax(text)
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
            return of_file(base, pairs, layers_per_edit)
    # A folder or a number may have a "+" in it: the first one between two known parts counts.
    pluses = [] if is_trained(name) else [i for i, sign in enumerate(name) if sign == "+"]
    for place in pluses:
        high, low = high_part(name[:place]), low_part(name[place + 1 :])
        if high is not None and low is not None:
            refuse_unused(name[:place], "high")
            refuse_unused(name[place + 1 :], "low")
            return SpecAgent(name, high, low, layers_per_edit)
    whole = named_part(name)
    if whole is not None:
        values = [*whole[0].high_settings.values(), *whole[0].low_settings.values()]
        if not any(isinstance(value, str) and "+" in value for value in values):
            return SpecAgent(name, whole, whole, layers_per_edit)
    if kind_of(Path(name)) == POLICY:
        library = library_of(Path(name))
        raise CheckpointError(f"{name} holds a policy of {library}; name it {library}:{name}")
    if kind_of(Path(name)) == SHARED:
        raise CheckpointError(
            f"{name} holds a shared router, which has no levels and plays planted worlds only: "
            "give it to hiedit compare --agents"
        )
    if name == OracleAgent.name or split_settings(name)[0] in RIVALS:
        raise SettingsError(f"agent {name!r} has no levels, so nothing to train")
    refuse_folder(Path(name))
    if not pluses:
        raise SettingsError(
            f"unknown agent {name!r}; choose one of {', '.join(AGENTS)}, give the folder of a "
            "trained agent, HIGH+LOW for any two levels, or 'module:Class'"
        )
    place = next((i for i in pluses if high_part(name[:i]) is not None), pluses[0])
    first, second = name[:place], name[place + 1 :]
    if high_part(first) is None:
        raise SettingsError(
            f"unknown high level {first!r}; choose one of {', '.join(HIGH_LEVELS)}, a named agent, "
            "the folder of a trained one, or 'module:Class'"
        )
    raise SettingsError(
        f"unknown low level {second!r}; choose one of {', '.join(LOW_LEVELS)}, a named agent, the "
        "folder of a trained one, or 'module:Class'"
    )


def default_agent(
    model: str, layers: Collection[str] | None = None, update_rule: str | None = None
) -> str:
    """Who edits where nobody is named.

    Args:
        model: Name of the model.
        layers: Candidate layers that were asked for.
        update_rule: Update rule that was asked for.

    Returns:
        ``hiedit`` where a trained one that fits the model ships, else ``all-layers``; this one also
        where layers or a rule were asked for, since a trained agent has its own.
    """
    free = layers is None and update_rule is None
    return "hiedit" if free and shipped("hiedit", model) else "all-layers"


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


def _rival(name: str, given: Mapping[str, Any]) -> Agent:
    """One of :data:`RIVALS`.

    What is given for all agents does not reach it: it has no options, rule or number of layers.
    """
    check_arguments(RIVALS[name], given, f"agent {name!r}")
    made: Agent = RIVALS[name](**given)
    return made


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
