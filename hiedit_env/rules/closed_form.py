"""Closed-form update rules, untrained; some keep lifelong statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture, GradientRows
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.rules.base import Tokens, UpdateRule, positive
from hiedit_env.rules.moments import RunningMoments

Keys = Literal["standardised", "raw"]


Gradients = Literal["standardised", "scaled"]


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
    """Keeps running moments of [u_l ‖ v_l] per layer: the lifelong normalisation of UltraEdit.

    The arguments are those of :class:`UpdateRule`.
    """

    def reset(self) -> None:
        """Forgets all statistics."""
        self._moments = [
            RunningMoments(len(group), sum(self.shapes[group[0]]), self.device)
            for group in self.groups
        ]

    def observe(self, capture: Capture) -> None:
        """Takes one capture into the moments."""
        with torch.no_grad():
            for moments, group in zip(self._moments, self.groups, strict=True):
                moments.update(torch.cat(self._rows(capture, group), 2))

    def state_dict(self) -> dict[str, Any]:
        """The moments; the tensors are never written in place."""
        return {"moments": [moments.state_dict() for moments in self._moments]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts saved moments back, bit for bit."""
        for moments, saved in zip(self._moments, state["moments"], strict=True):
            moments.load_state_dict(saved)

    def _normalised(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = self._moments[group].normalise(torch.cat((keys, gradients), 2), places)
        return rows[..., : keys.shape[2]], rows[..., keys.shape[2] :]

    def _left(self, group: int, places: list[int], standardised: Tensor, keys: Tensor) -> Tensor:
        """Left factors, G × T × d_in, from keys as they are standardised and as they are."""
        return standardised

    def _steps(self, group: int, places: list[int]) -> float | Tensor:
        """Factors on the nominal step size, G × 1 × 1, or one number."""
        return 1.0

    def correct(
        self,
        rows: GradientRows,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """Updates down another loss than the present fact's: Δ_l = −step ũ_lᵀ (v_l / σ_l).

        Keys are treated like the fact's. Value gradients are scaled like the fact's, but no mean is
        taken away: what costs nothing changes nothing.

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
            d_in = keys.shape[2]
            moments = self._moments[number]
            normalised = moments.normalise(torch.cat((keys, gradients), 2), places)
            left = self._left(number, places, normalised[..., :d_in], keys)
            right = moments.scale(gradients, places, d_in) * self._steps(number, places)
            self._enter(updates, [group[place] for place in places], left, right, multipliers)
        return tuple(updates)


class OuterProductRule(LifelongRule):
    """Normalised outer product: Δ_l = −step ũ_lᵀ ṽ_l.

    ũ and ṽ are keys and value gradients standardised by lifelong running moments. This is the
    RLEdit / MEND update with an untrained (identity) hypernetwork (arXiv 2502.05759, section 3).
    """

    name = "outer-product"
    default_step_size = 1e-4
    default_tokens: ClassVar[Tokens] = "all"

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._normalised(group, places, keys, gradients)


class DecorrelatedRule(LifelongRule):
    """Outer product with decorrelated keys: Δ_l = −step κ ((C + ridge c̄ I)⁻¹ ûᵀ) ṽ.

    C is the lifelong second moment of the keys û, c̄ the mean of its diagonal, and κ gives the left
    factor the norm of ũ, the standardised keys. Directions that the keys of many facts share
    (question words, punctuation) are damped, so that edits of different facts interfere less; what
    sets a fact's keys apart is kept. It costs one Cholesky factorisation of d_in × d_in per layer
    and step. Our own; MEMIT (arXiv 2210.07229) weighs keys by the inverse covariance of a corpus,
    and recursive least squares by that of the past.

    With ``keys="standardised"`` û is ũ. With ``"raw"`` it is u itself: a changed layer answers the
    keys that come, mean included and not divided by anything, so that only then Σ (kᵀ left)² over
    the keys k seen so far is what the inverse makes small.

    With ``gradients="standardised"`` ṽ are value gradients with their mean taken away, over their
    standard deviation, as in MEND and what followed it. With ``"scaled"`` no mean is taken away: it
    would be written with every edit again, at all its tokens, those too that cost nothing.

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
        self.ridge = positive(ridge, "ridge")
        for name, given, known in (
            ("keys", keys, get_args(Keys)),
            ("gradients", gradients, get_args(Gradients)),
        ):
            if given not in known:
                raise SettingsError(f"{name} must be one of {known}, got {given!r}")
        self.keys: Keys = keys
        self.gradients: Gradients = gradients
        super().__init__(shapes, device, **settings)

    def reset(self) -> None:
        """Forgets all statistics."""
        super().reset()
        self._products = [
            torch.zeros(len(group), d_in, d_in, device=self.device)
            for group in self.groups
            for d_in in [self.shapes[group[0]][0]]
        ]

    def observe(self, capture: Capture) -> None:
        """Takes one capture into the moments and the products of keys."""
        super().observe(capture)
        with torch.no_grad():
            for number, group in enumerate(self.groups):
                keys, gradients = self._rows(capture, group)
                if self.keys == "standardised":
                    places = list(range(len(group)))
                    keys, _ = self._normalised(number, places, keys, gradients)
                # A new tensor, never in place: saved states hold the old one.
                self._products[number] = torch.baddbmm(self._products[number], keys.mT, keys)

    def _normalised(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        left, right = super()._normalised(group, places, keys, gradients)
        if self.gradients == "scaled":
            right = self._moments[group].scale(gradients, places, keys.shape[2])
        return left, right

    def _second_moment(self, group: int, places: list[int]) -> Tensor:
        """Unnormalised second moments of the keys, G × d_in × d_in, the caller's to change."""
        return self._products[group][places]

    def _ridges(self, group: int, places: list[int]) -> float | Tensor:
        """Ridge of every layer, G × 1, or one number."""
        return self.ridge

    def state_dict(self) -> dict[str, Any]:
        """Moments and products; the tensors are never written in place."""
        return {**super().state_dict(), "products": list(self._products)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        super().load_state_dict(state)
        self._products = list(state["products"])

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        left, right = self._normalised(group, places, keys, gradients)
        return self._left(group, places, left, keys), right

    def _left(self, group: int, places: list[int], standardised: Tensor, keys: Tensor) -> Tensor:
        """Keys, G × r × d_in, damped in the directions shared by the keys seen so far."""
        own = keys if self.keys == "raw" else standardised
        # The number of rows cancels: only the direction of the result counts.
        matrix = self._second_moment(group, places)
        mean = matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        added = self._ridges(group, places) * mean + torch.finfo(torch.float32).tiny
        matrix.diagonal(dim1=1, dim2=2).add_(added)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        # No number, so that the update is refused where it is written; asking would stall a device.
        factor = factor.masked_fill((failed > 0)[:, None, None], torch.nan)
        damped = torch.cholesky_solve(own.mT, factor).mT
        size = torch.linalg.vector_norm(damped, dim=(1, 2), keepdim=True)
        wanted = torch.linalg.vector_norm(standardised, dim=(1, 2), keepdim=True)
        scale: Tensor = wanted / (size + torch.finfo(torch.float32).tiny)
        return damped * scale


class RidgeRule(LifelongRule):
    """Ridge form of UltraEdit and MALMEN: (KᵀK + ridge I) Δ_l = Kᵀ D.

    D = −step ‖ũ‖² ṽ row by row; K are the raw keys. Solved in the T × T form
    Δ = Kᵀ (KKᵀ + ridge I)⁻¹ D, which is the same matrix by the push-through identity and keeps the
    update low-rank. Source: UltraEdit, ``editor/ultraedit.py`` of its released code (ridge 1).

    Args:
        ridge: Positive weight of the identity.
        **settings: As for :class:`UpdateRule`.
    """

    name = "ridge"
    default_step_size = 1e-4

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        ridge: float = 1.0,
        **settings: Any,
    ) -> None:
        self.ridge = positive(ridge, "ridge")
        super().__init__(shapes, device, **settings)

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        left, right = self._normalised(group, places, keys, gradients)
        wanted = left.square().sum(2, keepdim=True) * right
        gram = keys @ keys.mT
        gram.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return keys, torch.linalg.solve(gram, wanted)
