"""Every error a user of hiedit can cause, one class each, and the checks that many parts share.

All derive from :class:`HieditError`, and also from the closest built-in class, so that both
``except HieditError`` and ``except ValueError`` do what a reader expects. A message names the value
that was wrong and what would be right, and is raised before anything has changed.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np


class HieditError(Exception):
    """Base class of every error raised on purpose by hiedit."""


class HieditWarning(UserWarning):
    """Something to know that stops nothing, such as a field of a file that is not read."""


class ModelError(HieditError, ValueError):
    """A model that cannot be found, loaded or edited."""


class LayerError(HieditError, ValueError):
    """A layer pattern that matches nothing, or modules that are not weight matrices."""


class DeviceError(HieditError, ValueError):
    """A device that does not exist on this machine, or cannot be used in this process."""


class NotEnoughMemoryError(HieditError, MemoryError):
    """The model would not fit; the message carries the estimate."""


class DatasetError(HieditError, ValueError):
    """A data set that cannot be found or a malformed row; names file, row and field."""


class PromptError(HieditError, ValueError):
    """A prompt or answer that cannot be tokenised: empty, or longer than the context."""


class ActionError(HieditError, ValueError):
    """An action of the wrong shape, type or range."""


class NonFiniteUpdateError(HieditError, ValueError):
    """An update holding NaN or infinity; nothing was written."""


class UpdateShapeError(HieditError, ValueError):
    """An update whose shapes do not fit the layer it is meant for; nothing was written."""


class SettingsError(HieditError, ValueError):
    """An argument outside its range or an unknown name among a fixed set."""


class MissingLibraryError(SettingsError, ImportError):
    """An optional library that is not installed; the message names the extra that brings it.

    Args:
        library: Name of the library, or several names joined by "and".
        extra: Name of the extra in ``pyproject.toml``.
    """

    def __init__(self, library: str, extra: str) -> None:
        verb = "are" if " and " in library else "is"
        super().__init__(
            f"{library} {verb} not installed; "
            f"in the checkout of hiedit run: pip install '.[{extra}]'"
        )


def require_libraries(extra: str, *modules: str) -> None:
    """Checks that optional libraries are installed, without importing them.

    Args:
        extra: The extra of ``pyproject.toml`` that brings them.
        modules: Their import names, at the top level.

    Raises:
        MissingLibraryError: at least one is missing; all missing ones are named.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise MissingLibraryError(" and ".join(missing), extra)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # an entry of sys.modules that holds no module
        return False


class OutputError(HieditError, OSError):
    """A file or folder that cannot be written: a full disk, no permission, or another process."""


class ResultsExistError(HieditError, FileExistsError):
    """The output folder already holds results, which are never overwritten silently."""


class CheckpointError(HieditError, ValueError):
    """A trained agent or kept statistics that cannot be read, or made for another model."""


class LedgerError(HieditError, ValueError):
    """A ledger of edits that cannot be read, belongs to another model, or lacks what is asked."""


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
