"""Closed-form update rules, untrained; some keep lifelong statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.resident.capture import Capture, GradientRows
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import Tokens, UpdateRule, positive
from hiedit_env.rules.forms import DecorrelatedForm, Gradients, Keys, OuterForm, RidgeForm


class GradientRule(UpdateRule):
    """Plain gradient descent on the request: Δ_l = −step u_lᵀ v_l.

    Args:
        shapes, device, step_size, tokens: As for :class:`UpdateRule`.
        max_grad_norm: Frobenius norm that the gradient of each layer is clipped to; None for none.
    """

    name = "gradient"
    default_step_size = 0.1
    default_tokens: ClassVar[Tokens] = "all"

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        step_size: float | None = None,
        tokens: Tokens | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(shapes, device, step_size=step_size, tokens=tokens)
        self.max_grad_norm = (
            None if max_grad_norm is None else positive(max_grad_norm, "max_grad_norm")
        )

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.max_grad_norm is None:
            return keys, gradients
        # ‖uᵀ v‖²_F, without the product.
        squares = ((keys @ keys.mT) * (gradients @ gradients.mT)).sum((1, 2), keepdim=True)
        norms = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return keys, gradients * (self.max_grad_norm / norms).clamp_max(1.0)


class LifelongRule(UpdateRule):
    """A rule with a form that keeps lifelong statistics of [u_l ‖ v_l] per layer.

    Subclasses hand a form to the constructor. The running moments are the lifelong normalisation
    of UltraEdit (arXiv 2505.14679).

    Args:
        shapes, device, step_size, tokens: As for :class:`UpdateRule`.
        form: Makes the factors of the updates and keeps the statistics; None for a new
            :class:`~hiedit_env.rules.forms.OuterForm`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        step_size: float | None = None,
        tokens: Tokens | None = None,
        form: OuterForm | None = None,
    ) -> None:
        self.form = OuterForm(shapes, device) if form is None else form
        super().__init__(shapes, device, step_size=step_size, tokens=tokens)

    def reset(self) -> None:
        """Forgets all statistics."""
        self.form.reset()

    def observe(self, capture: Capture) -> None:
        """Adds one capture to the statistics of the form."""
        with torch.no_grad():
            self.form.observe([self._rows(capture, group) for group in self.groups])

    def statistics(self) -> dict[str, Any]:
        """The statistics of the form; the tensors are never written in place."""
        return self.form.statistics()

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self.form.load_statistics(statistics)

    def clone_for(self, llm: ResidentLLM) -> Self:
        """As in the base class; parameters, which proposing never writes, are shared."""
        twin = copy.copy(self)
        twin.form = copy.copy(self.form)
        # Makes new containers, in the form too.
        twin.reset()
        twin.load_statistics(self.statistics())
        return twin

    def _normalised(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Standardised keys and value gradients, G × T × size float32."""
        return self.form.normalised(group, places, keys, gradients)

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = self._normalised(group, places, keys, gradients)
        return self.form.factors(group, places, keys, *own)

    def _left(self, group: int, places: list[int], standardised: Tensor, keys: Tensor) -> Tensor:
        """Left factors, G × T × d_in, from standardised and raw keys."""
        return self.form.left(group, places, standardised, keys)

    def _steps(self, group: int, places: list[int]) -> Tensor | None:
        """Factors on the nominal step size, G × 1 × 1; None for 1."""
        return None

    def correct(
        self,
        rows: GradientRows,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """Updates that lower another loss than the present fact's: Δ_l = −step ũ_lᵀ (v_l / σ_l).

        Keys are treated like the fact's. Value gradients are scaled like the fact's, but no mean is
        subtracted: a token without loss changes nothing.

        Args:
            rows: Keys and value gradients of that loss.
            layers: L bool.
            multipliers: As for :meth:`compute`.

        Returns:
            L entries, None for a layer not chosen; differentiable in the rule's parameters.
        """
        updates: list[LowRankUpdate | None] = [None] * len(self.shapes)
        for number, group in enumerate(self.groups):
            places = [place for place, layer in enumerate(group) if layers[layer]]
            if not places:
                continue
            keys = torch.stack([rows.keys[group[place]] for place in places])
            gradients = torch.stack([rows.value_gradients[group[place]] for place in places])
            standardised, _ = self._normalised(number, places, keys, gradients)
            left = self._left(number, places, standardised, keys)
            right = self.form.scaled(number, places, gradients, keys.shape[2])
            steps = self._steps(number, places)
            right = right if steps is None else right * steps
            self._enter(updates, [group[place] for place in places], left, right, multipliers)
        return tuple(updates)


class OuterProductRule(LifelongRule):
    """Normalised outer product: Δ_l = −step ũ_lᵀ ṽ_l.

    ũ and ṽ are keys and value gradients standardised by lifelong running moments. This is the
    RLEdit / MEND update with an untrained (identity) hypernetwork (arXiv 2502.05759, section 3).

    The arguments are those of :class:`UpdateRule`.
    """

    name = "outer-product"
    default_step_size = 1e-4
    default_tokens: ClassVar[Tokens] = "all"


class DecorrelatedRule(LifelongRule):
    """Outer product with decorrelated keys: Δ_l = −step κ ((C + ridge c̄ I)⁻¹ ûᵀ) ṽ.

    C is the lifelong second moment of the keys û, c̄ the mean of its diagonal, and κ gives the left
    factor the norm of ũ, the standardised keys. Directions that the keys of many facts share
    (question words, punctuation) are damped, so that edits of different facts interfere less; what
    sets a fact's keys apart is kept. It costs one Cholesky factorisation of d_in × d_in per layer
    and step. Our own; MEMIT (arXiv 2210.07229) weighs keys by the inverse covariance of a corpus,
    and recursive least squares by that of the past.

    With ``keys="standardised"`` û is ũ. With ``"raw"`` it is u itself: at inference a layer
    receives raw keys, so only with raw keys does the inverse minimise Σ (kᵀ left)² over the keys k
    seen so far.

    With ``gradients="standardised"`` the mean is subtracted from the value gradients before they
    are divided by their standard deviation, as in MEND and its successors. With ``"scaled"`` it is
    not: the mean would be written again with every edit, also at tokens without loss.

    Args:
        ridge: Positive; 0 would whiten the keys, infinity gives a plain outer product.
        keys: Which keys C is the second moment of.
        gradients: What ṽ is.
        **settings: As for :class:`UpdateRule`.

    Raises:
        SettingsError: unknown ``keys`` or ``gradients``, a ridge that is not positive, or what
            :class:`UpdateRule` refuses.
    """

    name = "decorrelated"
    default_step_size = 1e-4
    default_tokens: ClassVar[Tokens] = "all"
    form: DecorrelatedForm

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        ridge: float = 3.0,
        keys: Keys = "standardised",
        gradients: Gradients = "standardised",
        **settings: Any,
    ) -> None:
        form = DecorrelatedForm(shapes, device, gradients=gradients, ridge=ridge, keys=keys)
        super().__init__(shapes, device, form=form, **settings)

    @property
    def ridge(self) -> float:
        """Weight of the mean diagonal that is added to C."""
        return self.form.ridge


class RidgeRule(LifelongRule):
    """Ridge form of UltraEdit and MALMEN: (KᵀK + ridge I) Δ_l = Kᵀ D.

    D = −step ‖ũ‖² ṽ row by row; K are the raw keys. Source: UltraEdit, ``editor/ultraedit.py`` of
    its released code (ridge 1).

    Args:
        ridge: Positive weight of the identity.
        **settings: As for :class:`UpdateRule`.
    """

    name = "ridge"
    default_step_size = 1e-4
    form: RidgeForm

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        ridge: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(shapes, device, form=RidgeForm(shapes, device, ridge=ridge), **settings)

    @property
    def ridge(self) -> float:
        """Weight of the identity."""
        return self.form.ridge
