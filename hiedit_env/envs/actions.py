"""Checks of actions, before anything happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.errors import ActionError


@dataclass(frozen=True, slots=True)
class Choice:
    """A checked action.

    Args:
        layers: L bool, the layers to write.
        multipliers: L float32, factors on the rule's nominal step size; 1 where None.
    """

    layers: NDArray[np.bool_]
    multipliers: NDArray[np.float32] | None = None


def split_dict(action: Any, num_layers: int) -> tuple[Any, Any]:
    """The parts of an action of ``hiedit/LifelongEdit-v1``: layers and step sizes, unchecked.

    Raises:
        ActionError: not a mapping with exactly these keys; names the wrapper that would take it.
    """
    if not isinstance(action, Mapping) or set(action) != {"layers", "step_size"}:
        got = sorted(map(str, action)) if isinstance(action, Mapping) else type(action).__name__
        remedy = {
            "mask": "hiedit_env.wrappers.FixedStepSize takes the layers alone",
            "floats": "hiedit_env.wrappers.FixedLayers takes the step sizes alone",
            "index": "hiedit_env.wrappers.FixedStepSize, and then DiscreteSubsets or "
            "SequentialSelection around it, takes one whole number",
        }.get(_kind(action, num_layers), "hiedit_env.wrappers.FlattenAction takes one flat array")
        raise ActionError(
            f"the action must be a dict with 'layers' and 'step_size', got {got}; {remedy}"
        )
    return action["layers"], action["step_size"]


def check_selection(action: Any, num_layers: int) -> NDArray[np.bool_]:
    """A layer mask from a whole action of ``hiedit/LayerSelection-v1``.

    Raises:
        ActionError: not L zeros and ones; names the wrapper that would take it.
    """
    remedies = {
        "dict": "hiedit/LifelongEdit-v1 takes layers and step sizes",
        "flat": "hiedit/LifelongEdit-v1 under hiedit_env.wrappers.FlattenAction takes 2 L numbers",
        "floats": "hiedit_env.wrappers.BoxLayers takes L numbers from -1 to 1",
        "index": "hiedit_env.wrappers.DiscreteSubsets and SequentialSelection take one whole "
        "number",
    }
    with _advice(remedies, action, num_layers):
        return check_layers(action, num_layers)


def check_only_step_sizes(action: Any, num_layers: int) -> NDArray[np.float32]:
    """Factors on the nominal step size from a whole action of ``hiedit/StepSize-v1``.

    Raises:
        ActionError: not L finite numbers in [−1, 1]; names the id that would take it.
    """
    remedies = {
        "dict": "hiedit/LifelongEdit-v1 takes layers and step sizes",
        "flat": "hiedit/LifelongEdit-v1 under hiedit_env.wrappers.FlattenAction takes 2 L numbers",
        "mask": "hiedit/LayerSelection-v1 takes layers",
    }
    with _advice(remedies, action, num_layers):
        return check_step_sizes(action, num_layers)


def check_layers(action: Any, num_layers: int) -> NDArray[np.bool_]:
    """A layer mask from an action.

    Raises:
        ActionError: not L zeros and ones.
    """
    mask = as_array(action, "layers")
    if mask.shape != (num_layers,):
        raise ActionError(
            f"layers must have shape ({num_layers},), one entry per candidate layer, "
            f"got shape {mask.shape}"
        )
    # Floats that are exactly 0 and 1 too: Stable-Baselines3 draws a MultiBinary like that.
    if not np.isin(mask, (0, 1)).all():
        raise ActionError(f"layers must hold only 0 and 1, got {mask.dtype} {mask}")
    return mask.astype(bool)


def check_step_sizes(action: Any, num_layers: int) -> NDArray[np.float32]:
    """Factors on the nominal step size, 10 ** action.

    Raises:
        ActionError: not L finite numbers in [−1, 1].
    """
    sizes = as_array(action, "step_size")
    if sizes.shape != (num_layers,):
        raise ActionError(
            f"step_size must have shape ({num_layers},), one entry per candidate layer, "
            f"got shape {sizes.shape}"
        )
    if sizes.dtype.kind not in "fiu" or not np.isfinite(sizes).all() or np.abs(sizes).max() > 1:
        raise ActionError(
            f"step_size must hold finite numbers from -1 to 1 (decades around the nominal step "
            f"size), got {sizes.dtype} {sizes}"
        )
    return np.power(np.float32(10), sizes.astype(np.float32))


def as_array(action: Any, name: str) -> NDArray[Any]:
    """The action as an array of booleans, integers or floats.

    Raises:
        ActionError: it is something else.
    """
    try:
        array = np.asarray(action)
    except (RuntimeError, TypeError, ValueError) as error:  # the first: a tensor with a graph
        raise ActionError(f"{name} is not an array of numbers: {action!r}") from error
    if array.dtype.kind not in "biuf":
        raise ActionError(f"{name} must be an array of numbers, got {action!r}")
    return array


def check_index(action: Any, count: int, meaning: str) -> int:
    """One whole number from 0 to ``count`` − 1.

    Args:
        action: The action.
        count: How many there are.
        meaning: What the number stands for, for the message.

    Raises:
        ActionError: something else.

    >>> check_index(np.int64(2), 3, "a layer")
    2
    """
    array = as_array(action, "the action")
    if array.shape != () or array.dtype.kind not in "iu" or not 0 <= array < count:
        raise ActionError(
            f"the action must be one whole number from 0 to {count - 1}, {meaning}; "
            f"got {array.dtype} {array} of shape {array.shape}"
        )
    return int(array)


@contextmanager
def _advice(remedies: Mapping[str, str], action: Any, num_layers: int) -> Iterator[None]:
    """Adds what would take such an action to the message of an ActionError of the body."""
    try:
        yield
    except ActionError as error:
        remedy = remedies.get(_kind(action, num_layers))
        if remedy is None:
            raise
        raise ActionError(f"{error}; {remedy}") from error


def _kind(action: Any, num_layers: int) -> str:
    """What an action of the wrong kind looks like; empty if like nothing known."""
    if isinstance(action, Mapping):
        return "dict" if set(action) == {"layers", "step_size"} else ""
    try:
        array = as_array(action, "the action")
    except ActionError:
        return ""
    floats = array.dtype.kind == "f"
    if array.shape == ():
        return "index" if array.dtype.kind in "iu" else ""
    if array.shape == (num_layers,):
        return "floats" if floats else "mask"
    return "flat" if floats and array.shape == (2 * num_layers,) else ""
