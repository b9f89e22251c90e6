"""Forms: how standardised keys and value gradients become the factors of an update.

A form keeps the lifelong statistics that it needs. The closed-form rules and the trained
hypernetwork share the forms: the rule decides what goes into a form, the form what comes out.

With ũ and ṽ the keys and value gradients of a layer, standardised by lifelong moments:

* :class:`OuterForm`: Δ = −step ũᵀ ṽ.
* :class:`RidgeForm`: (KᵀK + ridge I) Δ = Kᵀ D with the raw keys K.
* :class:`DecorrelatedForm`: the outer form with ũ damped in the directions that the keys of many
  facts share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hiedit_env.errors import SettingsError
from hiedit_env.resident.low_rank import layer_groups
from hiedit_env.rules.base import positive
from hiedit_env.rules.moments import RunningMoments

Gradients = Literal["standardised", "scaled"]
Keys = Literal["standardised", "raw"]
#: Row weights of the ridge form: ‖ũ‖², or the inner product of the raw key and ũ.
RowSizes = Literal["squared", "with-raw"]


class OuterForm:
    """Outer product: Δ = −step ũᵀ ṽ; base of the other forms.

    Args:
        shapes: ``(d_in, d_out)`` per candidate layer.
        device: Device of the model.
        gradients: What ṽ is. ``"standardised"``: the mean is subtracted from value gradients before
            they are divided by their standard deviation. ``"scaled"``: no mean is subtracted.

    Attributes:
        groups: Indices of the layers of one shape, computed side by side.
        moments: Per group, moments of [u ‖ v].

    Raises:
        SettingsError: unknown ``gradients``.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        gradients: Gradients = "standardised",
    ) -> None:
        _check_choice("gradients", gradients, get_args(Gradients))
        self.shapes, self.device = tuple(shapes), device
        self.groups = layer_groups(self.shapes)
        self.gradients: Gradients = gradients
        self.reset()

    def reset(self) -> None:
        """Forgets all statistics."""
        self.moments = [
            RunningMoments(len(group), sum(self.shapes[group[0]]), self.device)
            for group in self.groups
        ]

    def observe(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds the rows of one capture to the statistics.

        Args:
            rows: Per group keys, G × T × d_in, and value gradients, G × T × d_out.
        """
        for moments, pair in zip(self.moments, rows, strict=True):
            moments.update(torch.cat(pair, 2))

    def statistics(self) -> dict[str, Any]:
        """The lifelong statistics; the tensors are never written in place."""
        return {"moments": [moments.statistics() for moments in self.moments]}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        for moments, saved in zip(self.moments, statistics["moments"], strict=True):
            moments.load_statistics(saved)

    def normalised(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ũ and ṽ of the layers at ``places`` of a group, from G × T × size; float32."""
        d_in = keys.shape[2]
        rows = self.moments[group].normalise(torch.cat((keys, gradients), 2), places)
        left, right = rows[..., :d_in], rows[..., d_in:]
        if self.gradients == "scaled":
            right = self.scaled(group, places, gradients, d_in)
        return left, right

    def scaled(self, group: int, places: list[int], gradients: Tensor, d_in: int) -> Tensor:
        """Value gradients over their standard deviation, mean kept; G × T × d_out float32."""
        return self.moments[group].scale(gradients, places, d_in)

    def left(
        self,
        group: int,
        places: list[int],
        standardised: Tensor,
        keys: Tensor,
        ridges: float | Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """The left factor, G × T × d_in.

        Args:
            group: Index into ``groups``.
            places: The G chosen layers, as indices into that group.
            standardised: ũ, G × T × d_in.
            keys: Raw keys u, G × T × d_in.
            ridges: As for :meth:`factors`.
            added: As for :meth:`factors`.
        """
        return standardised

    def factors(
        self,
        group: int,
        places: list[int],
        keys: Tensor,
        left: Tensor,
        right: Tensor,
        *,
        steps: Tensor | None = None,
        ridges: float | Tensor | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two factors of the updates for a nominal step size of −1.

        Args:
            group: Index into ``groups``.
            places: The G chosen layers, as indices into that group.
            keys: Raw keys u, G × T × d_in.
            left: ũ, G × T × d_in.
            right: ṽ, G × T × d_out.
            steps: Factors on the step size, G × 1 × 1; None for 1.
            ridges: G × 1, in place of the form's own ridge.
            added: Added to the second moment of the keys, G × d_in × d_in.

        Returns:
            G × T × d_in and G × T × d_out float32, differentiable in all tensors given.
        """
        own = self.left(group, places, left, keys, ridges, added)
        return own, right if steps is None else right * steps


class RidgeForm(OuterForm):
    """Ridge regression: (KᵀK + ridge I) Δ = Kᵀ D with the raw keys K.

    D = −step size ⊙ ṽ row by row. Solved in the T × T form Δ = Kᵀ (KKᵀ + ridge I)⁻¹ D, which is the
    same matrix by the push-through identity and keeps the update low-rank.

    Args:
        shapes, device, gradients: As for :class:`OuterForm`.
        ridge: Positive weight of the identity.
        row_sizes: Weight of each row: ‖ũ‖² (``"squared"``, UltraEdit), or the inner product of raw
            key and ũ (``"with-raw"``, MALMEN).
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        gradients: Gradients = "standardised",
        ridge: float = 1.0,
        row_sizes: RowSizes = "squared",
    ) -> None:
        self.ridge = positive(ridge, "ridge")
        self.row_sizes: RowSizes = row_sizes
        super().__init__(shapes, device, gradients=gradients)

    def factors(
        self,
        group: int,
        places: list[int],
        keys: Tensor,
        left: Tensor,
        right: Tensor,
        *,
        steps: Tensor | None = None,
        ridges: float | Tensor | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw keys, and the solution for them; see :meth:`OuterForm.factors`."""
        sizes = left.square() if self.row_sizes == "squared" else keys * left
        wanted = sizes.sum(2, keepdim=True) * right
        if steps is not None:
            wanted = wanted * steps
        ridge = self.ridge if ridges is None else ridges
        if isinstance(ridge, Tensor):
            ridge = ridge[:, :, None]
        eye = torch.eye(keys.shape[1], device=keys.device)
        return keys, torch.linalg.solve(keys @ keys.mT + ridge * eye, wanted)


class DecorrelatedForm(OuterForm):
    """Outer product with decorrelated keys: Δ = −step κ ((C + ridge c̄ I)⁻¹ ûᵀ) ṽ.

    C is the lifelong second moment of the keys û, c̄ the mean of its diagonal, and κ gives the left
    factor the norm of ũ. See :class:`~hiedit_env.rules.closed_form.DecorrelatedRule`.

    Args:
        shapes, device, gradients: As for :class:`OuterForm`.
        ridge: Positive; 0 would whiten the keys, infinity gives a plain outer product.
        keys: Which keys C is the second moment of: ``"standardised"`` (ũ) or ``"raw"`` (u).

    Attributes:
        products: Per group Σ ûᵀ û over all rows seen, G × d_in × d_in.

    Raises:
        SettingsError: unknown ``keys`` or ``gradients``, or a ridge that is not positive.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        gradients: Gradients = "standardised",
        ridge: float = 3.0,
        keys: Keys = "standardised",
    ) -> None:
        self.ridge = positive(ridge, "ridge")
        _check_choice("keys", keys, get_args(Keys))
        self.keys: Keys = keys
        super().__init__(shapes, device, gradients=gradients)

    def reset(self) -> None:
        """Forgets all statistics."""
        super().reset()
        self.products = [
            torch.zeros(len(group), d_in, d_in, device=self.device)
            for group in self.groups
            for d_in in [self.shapes[group[0]][0]]
        ]

    def observe(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds the rows of one capture to the moments and to the products of keys."""
        super().observe(rows)
        for number, (keys, gradients) in enumerate(rows):
            own = keys
            if self.keys == "standardised":
                places = list(range(len(keys)))
                own, _ = self.normalised(number, places, keys, gradients)
            # A new tensor, never in place: saved states hold the old one.
            self.products[number] = torch.baddbmm(self.products[number], own.mT, own)

    def statistics(self) -> dict[str, Any]:
        """Moments and products; the tensors are never written in place."""
        return {**super().statistics(), "products": list(self.products)}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        super().load_statistics(statistics)
        self.products = list(statistics["products"])

    def second_moment(self, group: int, places: list[int], added: Tensor | None = None) -> Tensor:
        """Unnormalised second moments of the keys plus ``added``: new, G × d_in × d_in float32."""
        # Indexing by a list copies.
        own = self.products[group][places]
        return own if added is None else own + added

    def left(
        self,
        group: int,
        places: list[int],
        standardised: Tensor,
        keys: Tensor,
        ridges: float | Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Keys, damped in the directions that the keys seen so far share; G × T × d_in."""
        own = keys if self.keys == "raw" else standardised
        # The number of rows cancels: only the direction of the result counts.
        matrix = self.second_moment(group, places, added)
        mean = matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        ridge = self.ridge if ridges is None else ridges
        matrix.diagonal(dim1=1, dim2=2).add_(ridge * mean + torch.finfo(torch.float32).tiny)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        # NaN, so that the update is refused where it is written; asking here would stall a device.
        factor = factor.masked_fill((failed > 0)[:, None, None], torch.nan)
        damped = torch.cholesky_solve(own.mT, factor).mT
        size = torch.linalg.vector_norm(damped, dim=(1, 2), keepdim=True)
        wanted = torch.linalg.vector_norm(standardised, dim=(1, 2), keepdim=True)
        scale: Tensor = wanted / (size + torch.finfo(torch.float32).tiny)
        return damped * scale


def _check_choice(name: str, given: object, known: Sequence[str]) -> None:
    if given not in known:
        raise SettingsError(f"{name} must be one of {tuple(known)}, got {given!r}")
