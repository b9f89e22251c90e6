"""Environments and requests small enough for a test."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import SettingsError, whole_number

_TOY = "hiedit/Toy-v1"


def make_tiny(id: str, **settings: Any) -> gym.Env[Any, Any]:
    """``gym.make`` with settings that take milliseconds: three facts, at most two steps each.

    Args:
        id: One of hiedit's ids. All but ``hiedit/Toy-v1`` run the built-in ``tiny`` model.
        settings: Arguments of the environment; they win over the small ones.

    Raises:
        SettingsError: not an id of hiedit.

    >>> make_tiny("hiedit/LayerSelection-v1").action_space
    MultiBinary(6)
    >>> make_tiny("hiedit/Toy-v1", num_layers=4).action_space
    MultiBinary(4)
    """
    known = sorted(name for name in gym.registry if name.startswith("hiedit/"))
    if id not in known:
        raise SettingsError(f"unknown id {id!r}; hiedit's are {', '.join(known)}")
    small: dict[str, Any] = {"num_edits": 3}
    if id != _TOY:
        small |= {"model": "tiny", "max_steps_per_edit": 2}
    return gym.make(id, **(small | settings))


def tiny_requests(n: int) -> list[Request]:
    """The first ``n`` facts of ``tiny-facts``, which the ``tiny`` model knows otherwise.

    Raises:
        SettingsError: ``n`` is below 1 or more than there are.

    >>> [request.prompt for request in tiny_requests(1)]
    ['Belka lives in']
    """
    requests = load_requests("tiny-facts")
    if whole_number(n, "n", 1) > len(requests):
        raise SettingsError(f"n must be from 1 to {len(requests)}, the facts there are, got {n}")
    return requests[:n]
