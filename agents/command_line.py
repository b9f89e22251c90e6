"""Command lines made of data classes by tyro: options, help and one-line errors.

A field is an option, its type says which values there are, and the docstring below it is the help.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from hiedit_env.errors import HieditError, SettingsError

#: The exit status of shells for it.
_NOBODY_READS = 141

T = TypeVar("T")
#: A flag without a value; ``--no-NAME`` only where the default is true.
Switch = tyro.conf.FlagCreatePairsOff[bool]

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
#: Lines that tyro draws around and between the parts of its errors.
_RULE = re.compile(r"[─╰╯]+|-{3,}")
#: A line between two parts of a complaint.
_SECTIONS = re.compile(r"^[│| ] [─-]{5,} ?[│| ]?$", re.MULTILINE)
#: An option as it is typed.
_OPTION = re.compile(r"(?<!\S)--?[a-zA-Z][\w-]*")
#: Why printing may fail, beside a reader that has gone.
_CANNOT_PRINT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF})
#: A line of its list of what is missing that holds a name, and not the name's meaning.
_NAME = re.compile(r"^[│| ] {4,6}(--[\w-]+|[A-Z]+\b)", re.MULTILINE)


def parse(
    kind: type[T],
    arguments: Sequence[str] | None,
    *,
    program: str,
    description: str | None = None,
    default: T | None = None,
) -> T:
    """Reads a command line.

    Args:
        kind: Data class whose fields are the options; nested ones are groups of options.
        arguments: The words; None for those of the process.
        program: How it is called.
        description: What it does; None for the class docstring.
        default: Where the defaults are taken from, in the place of the class.

    Raises:
        SettingsError: an option or value that is none; one line with the nearest right option.
        SystemExit: (status 0) after ``--help``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    given: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            read: T = tyro.cli(
                kind,
                prog=program,
                description=description,
                args=words,
                config=_CONFIG,
                registry=_quiet_defaults(),
                **given,
            )
            return read
    except SystemExit as stopped:
        if not stopped.code:
            raise
        reason: BaseException | None = stopped
        while reason is not None:
            # Raised by a data class, and caught by tyro.
            if isinstance(reason, HieditError):
                raise SettingsError(str(reason)) from None
            reason = reason.__context__
        raise SettingsError(_in_one_line(complaint.getvalue(), program)) from None


def run_script(main: Callable[[], int | None], program: str = "") -> int:
    """Runs a script's ``main``; errors of the user's end in one line and not in a traceback.

    Args:
        main: What to run.
        program: What the line begins with.

    Returns:
        Exit status: what ``main`` returns (0 for None), 2 for an error of the user's, 130 when
        interrupted, 141 when nobody reads what is printed.
    """
    prefix = f"{program}: " if program else ""
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except HieditError as error:
        print(f"{prefix}error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Errors of files are told apart where these are opened; what is left is what is printed to.
        if error.errno not in {*_CANNOT_PRINT, errno.EPIPE}:
            raise
        with contextlib.suppress(OSError, ValueError):
            # So that Python does not try to print it once more when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return _NOBODY_READS
        print(f"{prefix}error: cannot write: {error.strerror}; free some space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}interrupted", file=sys.stderr)
        return 130
    return status or 0


def _quiet_defaults() -> ConstructorRegistry:
    """Leaves "(default: None)" out of the help, whose text says what is done by default."""
    registry = ConstructorRegistry()
    asked = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asked
        if asked or not is_dataclass(info.type):
            return None
        # Tyro's own rule, which comes after this one.
        asked = True
        found = ConstructorRegistry.get_struct_spec(info)
        asked = False
        if not isinstance(found, StructConstructorSpec):
            return None
        return replace(found, fields=tuple(map(_quiet, found.fields)))

    return registry


def _quiet(field: StructFieldSpec) -> StructFieldSpec:
    if field.default not in (None, "", ()):
        return field
    hint = tyro.conf.arg(help_behavior_hint="")
    quiet: Any = Annotated[field.type, hint]
    return replace(field, type=quiet)


def _in_one_line(text: str, program: str) -> str:
    """Tyro's framed complaint as a sentence: its first section, and the nearest option."""
    # The first line is a title, and rules are between the sections.
    lines = [_RULE.sub("", line).strip(" │|") for line in text.splitlines()[1:]]
    while lines and not lines[0]:
        lines.pop(0)
    section = list(itertools.takewhile(bool, lines)) or ["wrong options"]
    message = " ".join(section)
    more = f"see {program} --help"
    if message.startswith("Missing from"):
        # Names are indented by four, their meanings by eight.
        wanted = _NAME.findall(_SECTIONS.split(text)[0])
        rest = text.partition("Unrecognized options:")[2]
        unknown = _OPTION.findall(rest.partition("For full")[0])
        if unknown:
            like = difflib.get_close_matches(unknown[0], wanted, 1)
            remedy = f"did you mean {like[0]}?" if like else more
            return f"there is no option {unknown[0]}; {remedy}"
        return f"{', '.join(wanted) or 'an argument'} must be given; {more}"
    if message.startswith("Unrecognized options"):
        names = _OPTION.findall(message.partition(":")[2])
        if not names:
            word = message.partition(":")[2].strip().partition(",")[0]
            return f"{word!r} belongs to no option; {more}"
        near = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(lines))
        remedy = f"did you mean {near[1]}?" if near else more
        return f"there is no option {names[0]}; {remedy}"
    if found := re.match(r"Missing value for argument '([^']+)'", message):
        return f"{found[1]} must be followed by a value; {more}"
    if found := re.match(r"Error parsing (--[\w-]+):", message):
        kind = next((line for line in lines if line.startswith(f"{found[1]} ")), "")
        numbers = {"INT": "a whole number", "FLOAT": "a number"}
        right = next((words for name, words in numbers.items() if name in kind), "")
        values = re.findall(r"'([^']*)'", message)
        if right and values:
            return f"{found[1]} must be {right}, got {', '.join(map(repr, values))}; {more}"
    if found := re.match(r"[Ii]nvalid choice (.+) for argument '([^']+)'.*\((.+)\)", message):
        return f"{found[2]} must be one of {found[3].removesuffix(',')}, got {found[1]}; {more}"
    if found := re.search(r"invalid literal for int\(\) with base 10: (.+)$", message):
        return f"a whole number is wanted, got {found[1]}; {more}"
    message = re.sub(r"^Error parsing (?=[^-])\S+: ", "", message)
    return message[0].lower() + message[1:]
