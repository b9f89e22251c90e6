"""Patterns over the names of a model's modules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from hiedit_env.errors import LayerError


def _expand(pattern: str, whole: str) -> Iterator[str]:
    """Replace every ``{...}`` by each of its parts, lazily: a range may be absurdly long."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        if "}" in pattern:
            raise LayerError(f"pattern {whole!r} has a '}}' without '{{'")
        yield pattern
        return
    body, closing, tail = rest.partition("}")
    for part in body.split(","):
        if closing and "}" not in head and re.fullmatch(r"\w*[A-Za-z_]\w*", part):
            yield from _expand(f"{head}{part}{tail}", whole)
            continue
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if ends is None or not closing or "}" in head or int(ends[1]) > int(ends[2] or ends[1]):
            raise LayerError(
                f"pattern {whole!r}: braces hold numbers {{1,3}}, rising ranges {{10-14}} or names "
                "{up,gate}"
            )
        for number in range(int(ends[1]), int(ends[2] or ends[1]) + 1):
            yield from _expand(f"{head}{number}{tail}", whole)


def match(pattern: object, modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules that a pattern matches, see :func:`.architectures.find_candidates`.

    Raises:
        LayerError: the pattern is malformed, or one of its parts matches nothing.
    """
    if not isinstance(pattern, str):
        raise LayerError(f"a layer pattern must be text, got {type(pattern).__name__}")
    matched: list[str] = []
    for single in _expand(pattern, pattern):
        found = [name for name in modules if name and fnmatchcase(name, single)]
        if not found:
            pool = [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)]
            close = difflib.get_close_matches(single, pool, n=3, cutoff=0.3) or pool[:3]
            part = "" if single == pattern else f" (part of {pattern!r})"
            raise LayerError(
                f"pattern {single!r}{part} matches no module; close names: {', '.join(close)}"
            )
        matched.extend(found)
    return matched
