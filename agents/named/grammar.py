"""How an agent is written: ``LABEL=PART+PART``, settings after commas; and spec files.

A part is a name, a folder or ``module:Class``, followed by its settings: ``policy,size=learned``.
Values are JSON where they can be, whole numbers joined by colons are a list (``47:39:42``), and
everything else is text. Nothing here has to be quoted in a shell. A folder whose name holds a comma
is named in a spec file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hiedit_env.envs.settings import settings
from hiedit_env.errors import SettingsError
from hiedit_env.files import parse_json

#: One setting: ``name``, ``high.name`` or ``low.name``, and its value.
Pair = tuple[str, Any]
SPEC_SUFFIXES = (".yaml", ".yml", ".json")


def split_label(text: str, is_folder: Callable[[str], bool]) -> tuple[str | None, str]:
    """The label before a name, if there is one, and the name.

    >>> split_label("mine=all-layers+ridge,ridge=3", lambda _: False)
    ('mine', 'all-layers+ridge,ridge=3')
    >>> split_label("all-layers+ridge,ridge=3", lambda _: False)
    (None, 'all-layers+ridge,ridge=3')
    """
    label, equals, name = text.partition("=")
    # The "=" of a setting comes after a comma, and a folder may be called anything.
    if not equals or "," in label or is_folder(text) or is_folder(text.partition(",")[0]):
        return None, text
    return label, name


def split_settings(text: str) -> tuple[str, list[Pair]]:
    """What a part is called, and its settings.

    Raises:
        SettingsError: a setting without a name or a value.

    >>> split_settings("hiedit,facts=0,high.history=false")
    ('hiedit', [('facts', 0), ('high.history', False)])
    >>> split_settings("fixed-layers,layers_per_edit=[3,1]")
    ('fixed-layers', [('layers_per_edit', [3, 1])])
    """
    # A comma within brackets belongs to a value.
    base, *items = re.split(r",(?![^\[\]]*\])", text)
    pairs = []
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise SettingsError(
                f"{item!r} of {text!r} must be name=value, such as facts=0; settings are joined by "
                "commas, and a folder whose name holds a comma is named in a spec file"
            )
        pairs.append((name, read_value(value)))
    return base, pairs


def read_value(text: str) -> Any:
    """A value as it was typed.

    >>> [read_value(text) for text in ("1e-3", "false", "47:39", "learned")]
    [0.001, False, [47, 39], 'learned']
    """
    if re.fullmatch(r"\d+(:\d+)+", text):
        return [int(part) for part in text.split(":")]
    try:
        return parse_json(text)
    except ValueError:
        return text


def refuse_old_syntax(text: str) -> None:
    """Refuses settings after ``?`` and ``&``, and says how the name is written now.

    >>> refuse_old_syntax("a?b=[3,1]+ridge?c=2&keys=raw")
    Traceback (most recent call last):
    hiedit_env.errors.SettingsError: settings follow commas now; write a,b=3:1+ridge,c=2,keys=raw
    """
    if "?" not in text:
        return
    lists = re.sub(r"\[([\d,]+)\]", lambda found: found[1].replace(",", ":"), text)
    new = lists.replace("?", ",").replace("&", ",")
    raise SettingsError(f"settings follow commas now; write {new}")


@settings
class Level:
    """A level of a spec file."""

    name: str
    """a level, an agent, a folder or module:Class"""
    settings: dict[str, Any] | None = None
    """its settings by name"""


@settings
class SpecFile:
    """An agent as a YAML or JSON file: a whole ``agent``, or a ``high`` and a ``low`` level."""

    name: str | None = None
    """how the agent is called in tables"""
    agent: str | None = None
    """a named agent, a folder or LIBRARY:DIR, taken as it is written"""
    high: str | dict[str, Any] | None = None
    """the high level: a name, or name and settings"""
    low: str | dict[str, Any] | None = None
    """the low level, likewise"""
    settings: dict[str, Any] | None = None
    """settings of the whole agent, as after its name: facts, high.history, max_steps_per_edit"""
    train: dict[str, Any] | None = None
    """settings of training, as the options of hiedit train"""

    def __post_init__(self) -> None:
        if (self.agent is None) == (self.high is None and self.low is None):
            raise SettingsError("an agent's file needs either 'agent', or 'high' and 'low'")
        if self.agent is None and (self.high is None or self.low is None):
            raise SettingsError("an agent's file with 'high' needs 'low', and the other way round")

    @property
    def pairs(self) -> list[Pair]:
        """Settings of the whole agent."""
        return list((self.settings or {}).items())

    @staticmethod
    def level(given: str | Mapping[str, Any] | None) -> tuple[str, list[Pair]]:
        """What a level is called, and its settings."""
        read = Level(name=given) if isinstance(given, str) else Level(**(given or {}))
        return read.name, list((read.settings or {}).items())


def is_spec_file(name: str) -> bool:
    """Whether a name is that of a spec file."""
    return name.endswith(SPEC_SUFFIXES) and os.path.isfile(name)


def read_spec_file(name: str) -> SpecFile:
    """Reads a spec file.

    Raises:
        SettingsError: it is no YAML or JSON, or holds something that an agent does not have.
    """
    try:
        found = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{name} is no YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SettingsError(f"{name} must hold an agent: name, agent or high and low, settings")
    try:
        return SpecFile(**found)
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from error
