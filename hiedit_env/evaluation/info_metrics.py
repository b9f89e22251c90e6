"""The metrics of ``info["metrics"]``: the same keys whatever could be measured. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

#: Token accuracies that every judgement reports; NaN where there is nothing to measure.
METRICS = ("efficacy", "generalization", "agreement", "argmax_match", "recent_retention")


class Missing(np.float64):
    """NaN for a metric that was not measured; unlike other NaN, one equals another.

    So that equal information compares equal: Gymnasium's environment checker asks for it. All else
    is as for any NaN, ``value != value`` too.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        """Whether the other was not measured either."""
        return isinstance(other, Missing)

    __hash__ = np.float64.__hash__

    def __repr__(self) -> str:
        """As a float."""
        return "nan"


class Column(np.ndarray[Any, np.dtype[np.float64]]):
    """Metrics of several facts, some perhaps not measured: what :class:`Missing` is for arrays.

    >>> column_of([1.0, math.nan]) == column_of([1.0, math.nan])
    array([ True,  True])
    """

    def __eq__(self, other: object) -> Any:
        """Number by number; one that was not measured equals another."""
        if not isinstance(other, np.ndarray | Real | Sequence):
            return NotImplemented
        one, two = np.asarray(self), np.asarray(other)
        same = one == two
        # What is computed from a column is one too, whatever its type.
        are_floats = one.dtype.kind == two.dtype.kind == "f"
        return same | (np.isnan(one) & np.isnan(two)) if are_floats else same

    def __ne__(self, other: object) -> Any:
        """The opposite of being equal."""
        same = self.__eq__(other)
        return same if same is NotImplemented else np.logical_not(same)

    __hash__ = None


def column_of(values: Sequence[float]) -> Column:
    """Numbers as a :class:`Column`, float64."""
    return np.array(values, np.float64).view(Column)


#: The metric that was not measured.
MISSING = Missing("nan")


def metrics_of(**known: float) -> dict[str, float | bool]:
    """What is known of :data:`METRICS`, :data:`MISSING` for the rest, and ``answered``.

    Args:
        known: Values by name; NaN for one that could not be measured.

    >>> metrics_of(efficacy=1.0)
    {'efficacy': 1.0, 'generalization': nan, 'agreement': nan, 'argmax_match': nan, \
'recent_retention': nan, 'answered': True}
    >>> metrics_of() == metrics_of()
    True
    """
    found: dict[str, float | bool] = {}
    for name in METRICS:
        value = float(known.get(name, math.nan))
        found[name] = MISSING if math.isnan(value) else value
    return {**found, "answered": found["efficacy"] == 1.0}


def mean_of(several: Sequence[dict[str, float | bool]]) -> dict[str, float | bool]:
    """Means of metrics over those where each is known, and whether all are ``answered``.

    Args:
        several: Of :func:`metrics_of`.

    >>> both = mean_of([metrics_of(efficacy=1.0, agreement=0.5), metrics_of(efficacy=0.0)])
    >>> both["efficacy"], both["agreement"], both["answered"]
    (0.5, 0.5, False)
    """
    means = {}
    for name in METRICS:
        known = [one[name] for one in several if not math.isnan(one[name])]
        means[name] = sum(known) / len(known) if known else math.nan
    return metrics_of(**means)
