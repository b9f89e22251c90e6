"""Hyperparameters of the scripts: those that ``--set`` gives in place of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hiedit_env.errors import SettingsError


def replaced(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A script's settings with those of ``--set``.

    Raises:
        SettingsError: a name the script does not have.

    >>> replaced({"lr": 3e-3, "gamma": 0.5}, {"gamma": 0.9})
    {'lr': 0.003, 'gamma': 0.9}
    """
    check_names(given, defaults)
    return {**defaults, **given}


def check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuses hyperparameters of ``--set`` that a script or its library does not have.

    Raises:
        SettingsError: a name that is not among ``known``.
    """
    known = list(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise SettingsError(f"--set has no {', '.join(unknown)}; it has {', '.join(known)}")


def names_of(*functions: Callable[..., Any], taken: Iterable[str] = ()) -> list[str]:
    """Names of the arguments of functions or classes.

    Args:
        functions: What takes the arguments.
        taken: Arguments that are given in another way.

    >>> names_of(replaced, taken=("given",))
    ['defaults']
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = [p for function in functions for p in inspect.signature(function).parameters.values()]
    left = {"self", *taken}
    return list(dict.fromkeys(p.name for p in found if p.kind not in kinds and p.name not in left))
