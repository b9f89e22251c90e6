"""What every term of the reward counts, by version of the ids. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from hiedit_env.errors import SettingsError, as_float
from hiedit_env.evaluation.names import RewardKind

#: Version of the ids: what a reward pays for, and what an observation holds.
Version = Literal[1, 2]

#: Weight of every term of the reward; a mapping given by the user overrides single entries.
DEFAULT_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"edit": 1.0, "locality": 1.0, "sparsity": 0.1, "recent_retention": 1.0, "collapse": 10.0}
)
_IN_NATS = MappingProxyType({**DEFAULT_WEIGHTS, "sparsity": 0.1, "steps": 0.3})
# Three shares of at most 1 each: nothing that a fact can lose is more than collapse takes for it.
_IN_SHARES = MappingProxyType({**DEFAULT_WEIGHTS, "sparsity": 5e-3, "steps": 0.02, "collapse": 3.0})
#: Weights of version 2: prices of a layer and of a step are in the unit of the terms.
WEIGHTS_2: Mapping[RewardKind, Mapping[str, float]] = MappingProxyType(
    {"loss": _IN_NATS, "token_accuracy": _IN_SHARES, "generation": _IN_SHARES}
)


def default_weights(version: Version = 1, reward: RewardKind = "loss") -> Mapping[str, float]:
    """The weights where none are given.

    Args:
        version: Of the ids.
        reward: Unit of the terms.

    >>> default_weights(2)["steps"], default_weights(2, "generation")["steps"]
    (0.3, 0.02)
    """
    return DEFAULT_WEIGHTS if version == 1 else WEIGHTS_2[reward]


def reward_weights(
    given: Mapping[str, float] | None, version: Version = 1, reward: RewardKind = "loss"
) -> dict[str, float]:
    """Default weights with the given ones in place.

    Args:
        given: Weights that differ.
        version: Of the ids.
        reward: Unit of the terms.

    Raises:
        SettingsError: unknown term or a weight that is not a finite number ≥ 0.

    >>> reward_weights({"sparsity": 0.0})["sparsity"], reward_weights(None)["edit"]
    (0.0, 1.0)
    """
    if not (given is None or isinstance(given, Mapping)):
        raise SettingsError(
            f"reward_weights must be a dict such as {{'sparsity': 0}}, got {given!r}"
        )
    weights = dict(default_weights(version, reward))
    for term, weight in (given or {}).items():
        if term not in weights:
            raise SettingsError(
                f"unknown reward term {term!r}; the terms are {', '.join(weights)}"
                + "; take an id that ends in -v2" * (term in WEIGHTS_2["loss"])
            )
        weights[term] = as_float(weight)
        if not 0 <= weights[term] < math.inf:
            raise SettingsError(
                f"reward weight of {term!r} must be a finite number ≥ 0, got {weight!r:.200}"
            )
    return weights


def checked_weights(given: object) -> object:
    """What is given, with its numbers checked; which terms there are depends on the version.

    Raises:
        SettingsError: as :func:`reward_weights` for the version that has most terms.
    """
    if given is None:
        return None
    terms = reward_weights(given if isinstance(given, Mapping) else {}, 2) if given else {}
    if not isinstance(given, Mapping):
        reward_weights(given)  # type: ignore[arg-type]
        return given
    return {term: terms[term] for term in given}
