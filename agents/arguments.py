"""Checks arguments that were given as text, before anything is built with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from hiedit_env.errors import SettingsError


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
    known = _settings(kind)
    for name, value in arguments.items():
        if name not in known:
            raise SettingsError(f"{owner} has no argument {name!r}; it has {', '.join(known)}")
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(one["msg"] for one in error.errors()))
            raise SettingsError(f"{owner}: {name}={value!r}: {said}") from error


def _settings(kind: type) -> dict[str, Any]:
    """Types of the keyword-only arguments, by name."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        constructor = vars(base).get("__init__")
        if constructor is None:
            continue
        hints = get_type_hints(constructor)
        parameters = inspect.signature(constructor).parameters.values()
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found
