"""A saved state of an environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.editing import LifeState
from hiedit_env.history import EditRecord


@dataclass(frozen=True, slots=True)
class EnvState:
    """A saved state of an environment; see :meth:`.base.EditingEnv.save_state`.

    Args:
        life: Weights, statistics and position.
        random: State of ``np_random``.
        records: The finished edits, for rendering.
        edit_reward: Reward paid for the present fact so far.
        option: The present fact's layers, L bool, where a high level chose them.
    """

    life: LifeState
    random: Mapping[str, Any]
    records: tuple[EditRecord, ...]
    edit_reward: float
    option: NDArray[np.bool_] | None = None
