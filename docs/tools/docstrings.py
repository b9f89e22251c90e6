"""Turns the docstrings of this project into Markdown before mkdocstrings renders them.

The docstrings name objects by roles such as ``:class:`Task```, which editors show well. Here a role
becomes a link to the object's place in the reference. Examples (``>>>``) and tables of docstrings
are fenced, so that Markdown leaves them alone, and parameters that share a description get one
each. A role that names nothing is a warning, and so an
error of ``make docs``.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator

import griffe

_LOG = logging.getLogger("mkdocs.plugins.hiedit_docstrings")
ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc|obj):`(?P<target>[^`]+)`")
EXAMPLE = re.compile(r"^(?P<indent> *)(?P<text>>>> .*?)(?=\n\s*\n(?! *>>> )|\Z)", re.M | re.S)
#: Parameters that share a description, ``high, low: Which levels.``, with its further lines.
SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)", re.M
)
TABLE = re.compile(r"^(={3,}(?: +={3,})+)\n.*?\n\1$(?!\n(?!\n|\Z))", re.M | re.S)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Rewrites all docstrings of ``pkg``."""
        objects = list(_objects(pkg))
        paths = {item.path for item in objects}
        for item in objects:
            if item.docstring is not None:
                item.docstring.value = markdown(item.docstring.value, item, paths)


def markdown(text: str, owner: griffe.Object, paths: set[str]) -> str:
    """The docstring ``text`` of ``owner`` as Markdown.

    Args:
        text: A docstring without its indentation.
        owner: The object it describes.
        paths: Dotted paths of all objects of the package.
    """
    text = ROLE.sub(lambda match: _link(match["target"], owner, paths), text)
    text = re.sub(r"(?<=\w)::\n\n(?= )", ":\n\n", text)
    text = TABLE.sub(lambda match: f"```text\n{match[0]}\n```", text)
    head, args, rest = text.partition("\nArgs:\n")
    body, gap, rest = rest.partition("\n\n")
    text = head + args + SHARED.sub(_shared, body) + gap + rest
    return EXAMPLE.sub(_fenced, text)


def _shared(match: re.Match[str]) -> str:
    names = match["names"].split(", ")
    return "\n".join(f"{match['indent']}{name}: {match['text']}" for name in names)


def _fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    return f"{indent}```pycon\n{indent}{match['text']}\n{indent}```"


def _link(target: str, owner: griffe.Object, paths: set[str]) -> str:
    name = target.lstrip("~.")
    shown = name.split(".")[-1] if target.startswith(("~", ".")) else name
    if shown.startswith("hiedit_"):
        shown = shown.split(".")[-1]
    path = _resolve(target, owner, paths)
    if path is None and _is_of_another_library(name):
        return f"<code>{shown}</code>"
    if path is None:
        _LOG.warning("%s names %r, which does not exist", owner.path, target)
        return f"<code>{shown}</code>"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _is_of_another_library(name: str) -> bool:
    first, dot, _ = name.partition(".")
    return bool(dot) and first.islower() and importlib.util.find_spec(first) is not None


def _resolve(target: str, owner: griffe.Object, paths: set[str]) -> str | None:
    """The dotted path of an object that a docstring names, None if there is none."""
    name = target.lstrip("~")
    package = owner.path.split(".")[0]
    if name.startswith("."):
        found = [path for path in paths if path.endswith(name)]
        return found[0] if len(found) == 1 else None
    if f"{name}.".startswith(f"{package}."):
        return _canonical(name, owner)
    if name.startswith("hiedit_"):
        return name  # another package, which is loaded apart
    scope: griffe.Object | None = owner
    first, *rest = name.split(".")
    while scope is not None:
        members = scope.all_members if scope.is_class else scope.members
        if first in members:
            return _canonical(".".join([scope.path, first, *rest]), owner)
        scope = scope.parent
    # A name that is defined once in the package needs no address.
    found = [path for path in paths if path.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _canonical(path: str, owner: griffe.Object) -> str | None:
    """The path at which an object is defined, following imports and base classes."""
    item: griffe.Object | griffe.Alias = owner.package
    for name in path.split(".")[1:]:
        members = item.all_members if item.is_class else item.members
        if name not in members:
            return None
        item = members[name]
        if item.is_alias:
            try:
                item = item.final_target  # type: ignore[union-attr]
            except griffe.AliasResolutionError:
                return str(item.target_path)  # type: ignore[union-attr]
    return item.canonical_path


def _objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from _objects(member)  # type: ignore[arg-type]
