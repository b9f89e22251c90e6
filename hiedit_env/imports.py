"""Classes by name, for parts of one's own."""

from __future__ import annotations

import importlib
from typing import Any

from hiedit_env.errors import SettingsError


def import_named(name: str, what: str) -> Any:
    """The object called ``"package.module:Name"``.

    Args:
        name: What to import.
        what: How messages call it.

    Raises:
        SettingsError: there is no such module, or nothing of that name in it.

    >>> import_named("fractions:Fraction", "number").__name__
    'Fraction'
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SettingsError(f"{what} {name!r} cannot be imported: {error}") from error
