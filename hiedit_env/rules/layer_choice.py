"""Untrained ways of choosing layers for a fact: the high levels every learned one must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture

#: ``(capture, generator) -> L bool``.
LayerChoice = Callable[[Capture, np.random.Generator], NDArray[np.bool_]]


def no_layers(num_layers: int) -> LayerChoice:
    """Edits nothing: the model stays as it is."""
    return lambda capture, generator: np.zeros(num_layers, bool)


def all_layers(num_layers: int) -> LayerChoice:
    """Every candidate layer, as RLEdit does (arXiv 2502.05759)."""
    return lambda capture, generator: np.ones(num_layers, bool)


def random_layers(num_layers: int, size: int) -> LayerChoice:
    """``size`` layers drawn uniformly without replacement for each fact."""
    _check_size(size, num_layers)

    def choose(capture: Capture, generator: np.random.Generator) -> NDArray[np.bool_]:
        return _mask(num_layers, generator.choice(num_layers, size, replace=False))

    return choose


def fixed_layers(num_layers: int, layers: int | Sequence[int]) -> LayerChoice:
    """The same layers for every fact: given by index, or the first ``layers`` ones.

    >>> fixed_layers(4, 2)(None, None).tolist()
    [True, True, False, False]
    >>> fixed_layers(4, [3, 1])(None, None).tolist()
    [False, True, False, True]
    """
    indices = list(range(layers)) if isinstance(layers, int) else list(layers)
    _check_size(len(indices), num_layers)
    if any(not 0 <= i < num_layers for i in indices) or len(set(indices)) < len(indices):
        raise SettingsError(
            f"fixed layers {indices} must be different indices from 0 to {num_layers - 1}"
        )
    return lambda capture, generator: _mask(num_layers, indices)


def gradient_norm(num_layers: int, size: int) -> LayerChoice:
    """The ``size`` layers with the largest gradient norm ‖u_lᵀ v_l‖_F on the fact."""
    _check_size(size, num_layers)

    def choose(capture: Capture, generator: np.random.Generator) -> NDArray[np.bool_]:
        order = np.argsort(-capture.gradient_norms().cpu().numpy(), kind="stable")
        return _mask(num_layers, order[:size])

    return choose


#: Names of the choices, as used by the simple agents and by ``high_level``.
CHOICES = ("no-edit", "all-layers", "random-layers", "fixed-layers", "gradient-norm")
#: Those that have no number of layers per fact to set.
SIZELESS = CHOICES[:2]


def make_choice(name: str, num_layers: int, layers_per_edit: int | None = None) -> LayerChoice:
    """A choice by name.

    Args:
        name: One of :data:`CHOICES`.
        num_layers: L.
        layers_per_edit: K for the choices that have a size; half of the layers where None.

    Raises:
        SettingsError: unknown name, or K outside 1 … L.
    """
    size = max(1, num_layers // 2) if layers_per_edit is None else layers_per_edit
    if name == "no-edit":
        return no_layers(num_layers)
    if name == "all-layers":
        return all_layers(num_layers)
    if name == "random-layers":
        return random_layers(num_layers, size)
    if name == "fixed-layers":
        return fixed_layers(num_layers, size)
    if name == "gradient-norm":
        return gradient_norm(num_layers, size)
    raise SettingsError(f"unknown layer choice {name!r}; choose one of {', '.join(CHOICES)}")


def _mask(num_layers: int, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(num_layers, bool)
    mask[np.asarray(indices, dtype=np.int64)] = True
    return mask


def _check_size(size: int, num_layers: int) -> None:
    if not 1 <= size <= num_layers:
        raise SettingsError(
            f"layers_per_edit must be from 1 to {num_layers}, the number of candidate layers, "
            f"got {size!r}"
        )
