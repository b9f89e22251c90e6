"""Every error a user of hiedit can cause, one class each, and the checks that many parts share.

All derive from :class:`HieditError`, and also from the closest built-in class, so that both
``except HieditError`` and ``except ValueError`` do what a reader expects. A message names the value
that was wrong and what would be right, and is raised before anything has changed.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import unicodedata
from collections.abc import Iterable
from numbers import Real
from typing import Any, get_type_hints

import numpy as np


class _InOneLine:
    """An exception whose text is one line, whatever the names and values in it hold."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(one_line(a) if isinstance(a, str) else a for a in arguments))


class HieditError(_InOneLine, Exception):
    """Base class of every error raised on purpose by hiedit."""


class HieditWarning(_InOneLine, UserWarning):
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


def one_line(text: str) -> str:
    r"""A text with escapes for what breaks a line of a terminal, or turns its direction.

    Line breaks and other control characters, halves of surrogate pairs, and bidirectional controls.

    >>> one_line("a\nb\u202e") == r"a\nb\u202e", one_line("東京 👩\u200d👧") == "東京 👩\u200d👧"
    (True, True)
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _breaks(c) else c for c in text)


_TURNS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def _breaks(sign: str) -> bool:
    controls = unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")
    return controls or unicodedata.bidirectional(sign) in _TURNS


def shown(value: object, most: int = 60) -> str:
    """A value for a message: as Python writes it, and no longer than a line.

    >>> shown("a"), shown(10**400)
    ("'a'", '10000000000000000000… (401 digits)')
    >>> shown([0] * 99, most=9)
    '[0, 0, 0…'
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**most:
        # Python refuses to write numbers of more than 4300 digits.
        digits = int(math.log10(2) * (abs(value).bit_length() - 1)) + 1
        digits += abs(value) >= 10**digits
        first = abs(value) // 10 ** (digits - 20)
        return f"{'-' if value < 0 else ''}{first}… ({digits} digits)"
    try:
        text = repr(value)
    except ValueError:  # a container of such numbers
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def whole_number(value: object, name: str, least: int) -> int:
    """A setting that counts something.

    Raises:
        SettingsError: not a whole number, or below ``least``.

    >>> whole_number(3, "max_steps_per_edit", 1)
    3
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise SettingsError(f"{name} must be ≥ {least} and a whole number, got {shown(value)}")
    return int(value)


def as_float(value: object) -> float:
    """A number as ``float``, for a check of its range.

    Returns:
        NaN where it is no real number; an infinity where it is too large for ``float``.

    >>> as_float(3), as_float(10**400), as_float("3"), as_float(True)
    (3.0, inf, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def arguments_of(kind: type) -> dict[str, Any]:
    """Settings of a class, the keyword-only arguments of its constructor: name → type.

    A constructor with ``**settings`` passes those on to the next class.
    """
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


def require_known(name: str, known: Iterable[str], owner: str) -> None:
    """Refuses the name of a setting that there is not.

    Raises:
        SettingsError: with all names, and the nearest one.

    >>> require_known("rigde", ["ridge", "step_size"], "update rule 'ridge'")
    Traceback (most recent call last):
    hiedit_env.errors.SettingsError: update rule 'ridge' has no argument 'rigde'; it has ridge, \
step_size; did you mean 'ridge'?
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SettingsError(
        f"{owner} has no argument {name!r}; it has {', '.join(known) or 'none'}{hint}"
    )


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
