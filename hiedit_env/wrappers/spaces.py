"""Which action space a wrapper needs, and what to do about another one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from hiedit_env.errors import SettingsError

_BOTH = "Dict(layers=MultiBinary(L), step_size=Box(-1, 1, (L,)))"
_UNDER = "put FixedStepSize under it, which leaves MultiBinary(L)"
_NO_LAYERS = "hiedit/LayerSelection-v1 is the id whose actions are layers alone"
_NO_DICT_NEEDED = "no wrapper is needed to leave out step sizes there"
#: wrapper → kind of the space it was given → what to do.
_REMEDIES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "BoxLayers": {"both": _UNDER, "sizes": _NO_LAYERS},
        "DiscreteSubsets": {"both": _UNDER, "sizes": _NO_LAYERS},
        "SequentialSelection": {"both": _UNDER, "sizes": _NO_LAYERS},
        "FlattenAction": {
            "layers": "BoxLayers makes one Box of MultiBinary(L)",
            "sizes": "that is one Box already and needs no wrapper",
        },
        "FixedLayers": {
            "layers": "fixing the layers would leave nothing to choose",
            "sizes": "hiedit/StepSize-v1 has high_level='fixed-layers' for that",
        },
        "FixedStepSize": {"layers": _NO_DICT_NEEDED, "sizes": _NO_LAYERS},
    }
)


def chosen_layers(env: gym.Env[Any, Any], wrapper: str) -> int:
    """L of an environment whose actions are ``MultiBinary(L)``.

    Args:
        env: The environment to wrap.
        wrapper: Name of the wrapper, for the message.

    Raises:
        SettingsError: another action space; names both and the remedy.
    """
    space = env.action_space
    if isinstance(space, spaces.MultiBinary) and isinstance(space.n, int):
        return space.n
    raise _refusal(wrapper, "MultiBinary(L), that is hiedit/LayerSelection-v1", space)


def layers_and_sizes(env: gym.Env[Any, Any], wrapper: str) -> int:
    """L of an environment whose actions are a dict of layers and step sizes.

    Args:
        env: The environment to wrap.
        wrapper: Name of the wrapper, for the message.

    Raises:
        SettingsError: another action space; names both and the remedy.
    """
    space = env.action_space
    if isinstance(space, spaces.Dict) and set(space) == {"layers", "step_size"}:
        layers, sizes = space["layers"], space["step_size"]
        if (
            isinstance(layers, spaces.MultiBinary)
            and isinstance(layers.n, int)
            and sizes == spaces.Box(-1.0, 1.0, (layers.n,), np.float32)
        ):
            return layers.n
    raise _refusal(wrapper, f"{_BOTH}, that is hiedit/LifelongEdit-v1", space)


def _refusal(wrapper: str, needed: str, space: spaces.Space[Any]) -> SettingsError:
    kind = ""
    if isinstance(space, spaces.MultiBinary):
        kind = "layers"
    elif isinstance(space, spaces.Dict):
        kind = "both" if set(space) == {"layers", "step_size"} else ""
    elif isinstance(space, spaces.Box) and len(space.shape) == 1:
        kind = "sizes"
    remedy = _REMEDIES[wrapper].get(kind)
    return SettingsError(
        f"{wrapper} needs the action space {needed}; got {space}"
        + (f": {remedy}" if remedy else "")
    )
