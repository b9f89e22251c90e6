"""The parts of an agent's name: levels, named agents and folders, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hiedit_agents.named.checkpoints import (
    LEVELS,
    kind_of,
    read_record,
)
from hiedit_agents.named.grammar import (
    Pair,
    is_spec_file,
    read_spec_file,
    split_settings,
)
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.named.spec import HIGH_LEVELS, LOW_LEVELS, AgentSpec
from hiedit_agents.named.spec_agent import HORIZON, STRUCTURE, SpecAgent
from hiedit_env.errors import SettingsError

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

#: Argument of a folder: levels that its record gives as ``module:Class`` may be imported.
ALLOW_CODE = "allow_code"


def is_trained(name: str) -> bool:
    """Whether a name is the folder of an agent that ``hiedit train`` wrote."""
    return kind_of(Path(name)) == LEVELS


def _split(part: str) -> tuple[str, list[Pair]]:
    """A part's name and settings; a folder may be called anything."""
    return (part, []) if is_trained(part) else split_settings(part)


def named_part(
    name: str, pairs: Sequence[Pair] | None = None
) -> tuple[AgentSpec, Path | None] | None:
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
        rest = [pair for pair in query if pair[0] != ALLOW_CODE]
        allowed = (ALLOW_CODE, True) in query
        spec = AgentSpec.from_json(read_record(folder), allow_code=allowed)
        return _with_query(spec, rest, "low", folder), folder
    if base in HIGH_LEVELS:
        return _with_query(AgentSpec(base, base), query, "high"), None
    return None


def high_part(
    name: str, pairs: Sequence[Pair] | None = None
) -> tuple[AgentSpec, Path | None] | None:
    """What the high level is taken from; arguments and result as for :func:`named_part`."""
    base, query = _split(name) if pairs is None else (name, pairs)
    if is_spec_file(base):
        return of_file(base, query).high_part
    own = ":" in base and base.partition(":")[0] not in LOADERS
    if own and not is_trained(base):
        return _with_query(AgentSpec(base, base), query, "high"), None
    return named_part(base, query)


def low_part(
    name: str, pairs: Sequence[Pair] | None = None
) -> tuple[AgentSpec, Path | None] | None:
    """What the low level is taken from; arguments and result as for :func:`named_part`."""
    base, query = _split(name) if pairs is None else (name, pairs)
    if is_spec_file(base):
        return of_file(base, query).low_part
    if base in HIGH_LEVELS:
        return None
    if base in LOW_LEVELS or (":" in base and not is_trained(base)):
        return _with_query(AgentSpec(base, "all-layers", base), query, "low"), None
    return named_part(base, query)


def refuse_unused(part: str, used: str) -> None:
    """Refuses arguments of the level that is not taken from a part of ``HIGH+LOW``."""
    base, query = _split(part)
    own = used if base in (*HIGH_LEVELS, *LOW_LEVELS) or ":" in base else "low"
    for key, value in query:
        if key == ALLOW_CODE:
            continue
        owner, dot, _ = key.partition(".")
        if (owner if dot else "low" if key == HORIZON else own) != used:
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
        if path == HORIZON:
            horizon = _steps(value)
            given.add(HORIZON)
            continue
        owner, dot, key = path.partition(".")
        owner, key = (owner, key) if dot else (level, path)
        if owner not in settings or not key:
            raise SettingsError(
                f"{path!r} is no name of a setting; it is such as 'ridge', 'low.ridge' or "
                "'high.size'"
            )
        if folder is not None and key in STRUCTURE:
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
            f"{HORIZON}={value}: an option lasts a whole number of steps, at least 1"
        )
    return value


def of_file(name: str, pairs: Sequence[Pair], layers_per_edit: int | None = None) -> SpecAgent:
    """The agent of a spec file, with more settings."""
    file = read_spec_file(name)
    if file.agent is not None:
        whole = named_part(file.agent, [])
        if whole is None:
            raise SettingsError(
                f"{name}: unknown agent {file.agent!r}; give a named agent or the folder of a "
                "trained one, or 'high' and 'low'"
            )
        high = low = whole
    else:
        one, two = high_part(*file.level(file.high)), low_part(*file.level(file.low))
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
