"""``hiedit agents``: agents and levels with their settings, read from the classes themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hiedit_agents.named.parts import LOADERS
from hiedit_agents.named.presets import PRESETS
from hiedit_agents.named.spec import FINE_TUNING, LEARNED_LOW, ROUTERS, AgentSpec
from hiedit_agents.registry import AGENTS
from hiedit_env.envs.settings import unknown_name
from hiedit_env.errors import SettingsError
from hiedit_env.rules.layer_choice import CHOICES, SIZELESS
from hiedit_env.rules.names import RULES

#: One setting: name, default, meaning.
Setting = tuple[str, str, str]
_SIZE: Setting = (
    "layers_per_edit",
    "half of the layers",
    "K, layers per fact; fixed-layers also takes indices, as in layers_per_edit=47:39:42",
)


def settings_of(kind: type) -> list[Setting]:
    """Keyword-only arguments of a level's constructor, with the docstrings' meanings.

    >>> from hiedit_env.rules.closed_form import RidgeRule
    >>> [name for name, _, _ in settings_of(RidgeRule)][:1]
    ['ridge']
    """
    found: dict[str, Setting] = {}
    for base in kind.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None or base is object:
            continue
        meanings = dict(_meanings(base))
        parameters = inspect.signature(constructor).parameters.values()
        for one in parameters:
            if one.kind is one.KEYWORD_ONLY:
                default = "" if one.default is one.empty else _shown(one.default)
                found.setdefault(one.name, (one.name, default, meanings.get(one.name, "")))
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return list(found.values())


def _shown(default: Any) -> str:
    return {None: "its own", True: "true", False: "false"}.get(default, str(default))


def _meanings(kind: type) -> Iterator[tuple[str, str]]:
    """Names and texts of the section ``Args`` of a class docstring."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.M)
    for names, meaning in re.findall(
        r"^    ([\w, ]+): (.*(?:\n        .*)*)", section[1] if section else "", re.M
    ):
        for name in names.split(", "):
            yield name, " ".join(meaning.split())


def levels() -> Mapping[str, Mapping[str, tuple[str, list[Setting]]]]:
    """High and low levels: name → first line of the docstring, and settings."""
    high = {name: (_choice(name), [] if name in SIZELESS else [_SIZE]) for name in CHOICES} | {
        name: (_first(kind), settings_of(kind)) for name, kind in ROUTERS.items()
    }
    low = {name: (_first(kind), settings_of(kind)) for name, kind in RULES.items()}
    low[FINE_TUNING] = ("The rule gradient under the name of the field.", low["gradient"][1])
    low |= {name: (_first(kind), settings_of(kind)) for name, kind in LEARNED_LOW.items()}
    return {"high level": high, "low level": low}


def _first(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _choice(name: str) -> str:
    texts = {
        "no-edit": "Edits nothing: the model stays as it is.",
        "all-layers": "Every candidate layer.",
        "random-layers": "Layers drawn at random for each fact.",
        "fixed-layers": "The same layers for every fact.",
        "gradient-norm": "The layers with the largest gradient on the fact.",
    }
    return texts[name]


def main(name: str = "", console: Console | None = None) -> None:
    """Prints everything, or one agent or level.

    Raises:
        SettingsError: a name that is none.
    """
    out = console or Console()
    known = levels()
    if name:
        shown = {
            kind: {n: v for n, v in found.items() if n == name} for kind, found in known.items()
        }
        if name in PRESETS:
            _print_agent(out, PRESETS[name])
        elif not any(shown.values()) and name not in AGENTS:
            names = [*AGENTS, *known["high level"], *known["low level"]]
            raise SettingsError(unknown_name(name, list(dict.fromkeys(names)), "agent or level"))
        elif not any(shown.values()):
            out.print(f"{name}: {AGENTS[name]}", highlight=False)
        known = shown
    else:
        table = Table("agent", "what it is", title="Agents", title_justify="left")
        for agent, text in AGENTS.items():
            table.add_row(agent, text)
        out.print(table)
        out.print(
            "Also an agent: HIGH+LOW for any two levels below; the folder of a trained one; "
            f"LIBRARY:DIR ({', '.join(LOADERS)}); module:Class; a spec file (.yaml, .json).\n"
            "Settings follow the part they belong to: rledit,ridge=2; "
            "policy,size=learned+rehearsal,facts=4; after a whole agent they reach its low level, "
            "and high.NAME its high level. max_steps_per_edit=N is the horizon.",
            highlight=False,
        )
    for kind, found in known.items():
        for level, (text, own) in found.items():
            _print_level(out, kind, level, text, own)


def _print_level(out: Console, kind: str, name: str, text: str, own: list[Setting]) -> None:
    out.print(f"\n[bold]{name}[/bold] ({kind}): {text}", highlight=False)
    if own:
        table = Table("setting", "default", "meaning", box=None, pad_edge=False)
        for row in own:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        out.print(table)


def _print_agent(out: Console, spec: AgentSpec) -> None:
    out.print(f"[bold]{spec.name}[/bold]: {spec.source}", highlight=False)
    rows = {
        f"high level {spec.high}": spec.high_settings,
        f"low level {spec.low}": spec.low_settings,
        "option": {"max_steps_per_edit": spec.max_steps_per_edit or 5},
        "training": spec.train,
    }
    table = Table("of", "setting", "value", box=None, pad_edge=False)
    for owner, values in rows.items():
        for name, value in values.items():
            table.add_row(owner, name, _shown(value))
    out.print(table)
    out.print(
        f"All settings and their meanings: 'hiedit agents {spec.high}', "
        f"'hiedit agents {spec.low}', 'hiedit train {spec.name} --help'.",
        highlight=False,
    )
