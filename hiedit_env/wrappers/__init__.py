"""Wrappers around the environments, one thing each. No torch here.

===================== =========================== =============================================
wrapper               from                        to
===================== =========================== =============================================
FlattenAction         ``LifelongEdit-v1``         ``Box(2 L)``: layers, then step sizes
FixedLayers           ``LifelongEdit-v1``         ``Box(L)``: step sizes of given layers
FixedStepSize         ``LifelongEdit-v1``         ``MultiBinary(L)``: layers, nominal step size
BoxLayers             ``MultiBinary(L)``          ``Box(L)``, a layer is written above 0
DiscreteSubsets       ``MultiBinary(L)``          ``Discrete(L over K)``: a subset of K layers
SequentialSelection   ``MultiBinary(L)``          ``Discrete(L + 1)``: one layer or stop; has
                                                  ``action_masks()``
NormalizeObservation  any Box observation         mean 0, variance 1; statistics in a file
ObserveEffects        any id with a model         five more numbers per layer: what a write to it
                                                  does to the fact, controls and earlier facts
VectorObserveEffects  the same, many of them      the same for each environment
===================== =========================== =============================================

``MultiBinary(L)`` are the actions of ``hiedit/LayerSelection-v1``, of ``hiedit/Toy-v1`` and of
``FixedStepSize`` around ``hiedit/LifelongEdit-v1``. All but the last are recorded in ``env.spec``.
"""

from __future__ import annotations

from hiedit_env.wrappers.box_layers import BoxLayers
from hiedit_env.wrappers.discrete_subsets import DiscreteSubsets
from hiedit_env.wrappers.fixed import FixedLayers, FixedStepSize
from hiedit_env.wrappers.flatten_action import FlattenAction
from hiedit_env.wrappers.normalize_observation import NormalizeObservation
from hiedit_env.wrappers.observe_effects import ObserveEffects
from hiedit_env.wrappers.sequential_selection import SequentialSelection
from hiedit_env.wrappers.vector_observe_effects import VectorObserveEffects

__all__ = [
    "BoxLayers",
    "DiscreteSubsets",
    "FixedLayers",
    "FixedStepSize",
    "FlattenAction",
    "NormalizeObservation",
    "ObserveEffects",
    "SequentialSelection",
    "VectorObserveEffects",
]
