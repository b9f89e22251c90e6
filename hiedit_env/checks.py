"""Checks of settings that more than one part needs. No torch here."""

from __future__ import annotations

import numpy as np

from hiedit_env.errors import SettingsError


def whole_number(value: object, name: str, least: int) -> int:
    """A setting that counts something.

    Raises:
        SettingsError: not a whole number, or below ``least``.

    >>> whole_number(3, "max_steps_per_edit", 1)
    3
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise SettingsError(f"{name} must be ≥ {least} and a whole number, got {value!r}")
    return int(value)
