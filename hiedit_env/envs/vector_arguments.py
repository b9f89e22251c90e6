"""What ``reset`` and ``step`` of a vector environment are given, one entry per environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_env.errors import ActionError, SettingsError


def action_rows(actions: Any, num_envs: int, space: spaces.Space[Any]) -> list[Any]:
    """One action per environment.

    Args:
        actions: An array or tensor with one row per environment, or a mapping of such.
        num_envs: N.
        space: The vector environment's action space, for the message.

    Raises:
        ActionError: another number of actions.
    """
    if isinstance(actions, Mapping):
        parts = {name: action_rows(part, num_envs, space) for name, part in actions.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(num_envs)]
    try:
        if isinstance(actions, torch.Tensor):
            actions = actions.detach().cpu().numpy()
        count = len(actions)
    except TypeError:
        count = -1
    if count != num_envs:
        got = getattr(actions, "shape", None)
        raise ActionError(
            f"actions must hold one action per environment, {num_envs} of them, as in {space}; got "
            + (f"shape {tuple(got)}" if got is not None else f"{actions!r:.100}")
        )
    return [actions[i] for i in range(num_envs)]


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """One seed per environment: environment i gets seed + i, or entry i of a list.

    Raises:
        SettingsError: another number of seeds.

    >>> seeds_of(3, 2), seeds_of([4, None], 2), seeds_of(None, 2)
    ([3, 4], [4, None], [None, None])
    """
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        return [int(seed) + i for i in range(num_envs)]
    if len(seed) != num_envs:
        raise SettingsError(f"there must be {num_envs} seeds, got {len(seed)}")
    return list(seed)


def check_reset_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    """Which environments are reset, N bool; all where None.

    Raises:
        SettingsError: not N booleans, or none of them True.
    """
    if mask is None:
        return np.ones(num_envs, bool)
    found = np.asarray(mask)
    if found.shape != (num_envs,) or found.dtype != np.bool_ or not found.any():
        raise SettingsError(
            f"reset_mask must be {num_envs} booleans, at least one of them True, got {mask!r:.200}"
        )
    return found
