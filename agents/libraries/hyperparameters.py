"""Hyperparameters of the scripts whose library takes them in several places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hiedit_env.errors import SettingsError


def replaced(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A script's settings with those of ``--set``.

    Raises:
        SettingsError: a name the script does not have.

    >>> replaced({"lr": 3e-3, "gamma": 0.5}, {"gamma": 0.9})
    {'lr': 0.003, 'gamma': 0.9}
    """
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise SettingsError(f"--set has no {', '.join(unknown)}; it has {', '.join(defaults)}")
    return {**defaults, **given}
