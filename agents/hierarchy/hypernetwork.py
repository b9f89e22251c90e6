"""The trained low level: a hypernetwork from keys and value gradients to low-rank updates.

One network per layer shape, shared by the layers of that shape up to scales, shifts and step sizes.
With x = [u ‖ v] normalised by lifelong moments, ``network="rows"`` (MEND, MALMEN) makes new rows
[ũ ‖ ṽ] in blocks

    x ← x + scale_l ⊙ max(x A B + b, 0) + shift_l,        A: S × rank, B: rank × S, S = d_in + d_out

and ``network="tokens"`` (ours) leaves ũ = u and weighs the value gradients token by token:

    ṽ = v exp(2 tanh(g / 2)),        g = tanh(x A) c_l,        A: S × rank, c_l: rank

so that an update stays in the span of the request's own keys. The decorrelated form needs that: its
inverse enlarges what a network adds to the keys and no prompt has in it.

The update then has one of three forms:

* ``"outer"`` (MEND, arXiv 2110.11309; HiEdit): Δ_l = −step_l ũᵀ ṽ.
* ``"ridge"`` (MALMEN, arXiv 2311.04661; RLEdit): (KᵀK + λ_l I) Δ_l = Kᵀ D with the raw keys K and
  D = −step_l (K ⊙ ũ) 1 ⊙ ṽ row by row.
* ``"decorrelated"`` (ours): the outer form with ũ multiplied by the damped inverse of the lifelong
  second moment C_l of the keys, see :class:`hiedit_env.rules.closed_form.DecorrelatedRule`. Here
  C_l = (edits of this episode) + prior_l (unrelated prompts), the second collected once in training
  by :meth:`Hypernetwork.calibrate`, so that directions common to unrelated prompts are damped from
  the first edit on. The ridge and prior_l are learned.

B, b, shift and c begin at 0, so an untrained hypernetwork *is* the closed-form rule of its form;
only the ridge form differs from the ridge rule, which has ‖ũ‖² in the place of (K ⊙ ũ) 1.
The architecture of the rows is that of the released code of RLEdit and HiEdit (``nets.py``), except
that step_l and λ_l are learned as logarithms, so that they stay positive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.rules.base import Tokens, positive
from hiedit_env.rules.closed_form import LifelongRule
from hiedit_env.rules.forms import DecorrelatedForm, Gradients, Keys, OuterForm, RidgeForm

FormName = Literal["outer", "ridge", "decorrelated"]
Network = Literal["rows", "tokens"]

#: The closed-form rule that an untrained hypernetwork of a form is, and for ridge is nearest to.
RULE_OF_FORM: Mapping[str, str] = {
    "outer": "outer-product",
    "ridge": "ridge",
    "decorrelated": "decorrelated",
}
#: The tokens a form uses by default.
_DEFAULT_TOKENS: Mapping[str, Tokens] = {"outer": "all", "ridge": "answer", "decorrelated": "all"}

_TINY = torch.finfo(torch.float32).eps
_CALIBRATION = "calibration."


class Block(nn.Module):
    """One residual low-rank block for G layers of one shape.

    Args:
        layers: G.
        size: S, columns of its input.
        rank: Columns of A.
        generator: Draws A, standard normal over √S.
    """

    def __init__(self, layers: int, size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(size, rank, generator=generator) / size**0.5)
        self.b = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(1, size))
        self.scale = nn.Parameter(torch.ones(layers, 1, size))
        self.shift = nn.Parameter(torch.zeros(layers, 1, size))

    def forward(self, rows: Tensor, places: list[int]) -> Tensor:
        """Rows of the layers at ``places``: len(places) × T × S in and out, float32."""
        # As relu, but with slope 1 at 0, where everything begins: relu's is 0, and nothing would
        # ever be learned.
        inner = (rows @ self.a @ self.b + self.bias).clamp_min(0)
        return rows + self.scale[places] * inner + self.shift[places]


class TokenWeights(nn.Module):
    """One positive number per token, for G layers of one shape; 1 before training.

    Args:
        layers, size, rank, generator: As for :class:`Block`.
    """

    def __init__(self, layers: int, size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(size, rank, generator=generator) / size**0.5)
        self.c = nn.Parameter(torch.zeros(layers, rank, 1))

    def forward(self, rows: Tensor, places: list[int]) -> Tensor:
        """len(places) × T × S in, len(places) × T × 1 out, between e⁻² and e², float32."""
        scores: Tensor = (rows @ self.a).tanh() @ self.c[places]
        return (2 * (scores / 2).tanh()).exp()


class GroupNet(nn.Module):
    """The network, step sizes and ridges of the G layers of one shape."""

    def __init__(
        self,
        layers: int,
        size: int,
        rank: int,
        blocks: int,
        network: Network,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        count = blocks if network == "rows" else 0
        self.blocks = nn.ModuleList(Block(layers, size, rank, generator) for _ in range(count))
        self.tokens = TokenWeights(layers, size, rank, generator) if network == "tokens" else None
        #: Logarithms of step size, ridge and weight of the prior, relative to the nominal ones.
        self.log_step = nn.Parameter(torch.zeros(layers))
        self.log_ridge = nn.Parameter(torch.zeros(layers))
        self.log_prior = nn.Parameter(torch.zeros(layers))

    def forward(self, keys: Tensor, gradients: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
        """ũ and ṽ from the normalised u and v, len(places) × T × size."""
        rows = torch.cat((keys, gradients), 2)
        if self.tokens is not None:
            return keys, gradients * self.tokens(rows, places)
        for block in self.blocks:
            rows = block(rows, places)
        return rows[..., : keys.shape[2]], rows[..., keys.shape[2] :]


class Hypernetwork(LifelongRule):
    """A low level with trained parameters; an untrained one is a closed-form rule.

    It is an update rule, so it can be given wherever one can: to
    :meth:`~hiedit_env.envs.base.EditingEnv.use_low_level`, or by a trained agent's folder. Its form
    (:mod:`hiedit_env.rules.forms`) turns what the network makes into updates.

    Args:
        shapes: ``(d_in, d_out)`` per candidate layer.
        device: Device of the model.
        form: How [ũ ‖ ṽ] become an update.
        network: What it makes: new ``"rows"`` for all tokens, or a weight for each of the
            ``"tokens"``.
        rank: Of its matrices.
        blocks: How many blocks make the rows.
        step_size: Nominal step size; ``exp(log_step)`` multiplies it layer by layer.
        tokens: As for :class:`~hiedit_env.rules.base.UpdateRule`; None for all tokens in the outer
            forms and the answer's in the ridge form, as in the released configurations.
        ridge: Initial ridge of the ridge form and the decorrelated form; None for 1 and 3.
        prior: Nominal weight of the unrelated prompts in C_l.
        keys: Of the decorrelated form, which keys C_l is the second moment of: standardised as the
            network's input, or ``"raw"``, as a changed layer receives them; a network for rows then
            changes them by as many standard deviations.
        gradients: Whether the mean is subtracted from value gradients before they are divided by
            their standard deviation (``"standardised"``) or not (``"scaled"``).
        seed: Of the random initial values.

    Raises:
        SettingsError: unknown form, network, keys or gradients, a size below 1, or raw keys for a
            form that has no second moment of keys.
    """

    name = "hypernetwork"
    default_step_size: ClassVar[float] = 1e-4

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        form: FormName = "outer",
        network: Network = "rows",
        rank: int = 64,
        blocks: int = 1,
        step_size: float | None = None,
        tokens: Tokens | None = None,
        ridge: float | None = None,
        prior: float = 1.0,
        keys: Keys = "standardised",
        gradients: Gradients = "standardised",
        seed: int = 0,
    ) -> None:
        if form not in get_args(FormName):
            raise SettingsError(f"form must be one of {get_args(FormName)}, got {form!r}")
        if rank < 1 or blocks < 0:
            raise SettingsError(f"rank must be ≥ 1 and blocks ≥ 0, got {rank!r} and {blocks!r}")
        if network not in get_args(Network):
            raise SettingsError(f"network must be one of {get_args(Network)}, got {network!r}")
        if network == "tokens" and blocks != 1:
            raise SettingsError(
                f"network='tokens' has no blocks, so blocks={blocks!r} means nothing"
            )
        if keys == "raw" and form != "decorrelated":
            raise SettingsError(
                f"form={form!r} has no second moment of keys, so keys={keys!r} means nothing"
            )
        self.form_name: FormName = form
        self.keys: Keys = keys
        self.ridge = positive(
            (3.0 if form == "decorrelated" else 1.0) if ridge is None else ridge, "ridge"
        )
        self.prior = prior
        #: Statistics of unrelated prompts by dotted path; None before calibration.
        self._calibration: dict[str, Any] | None = None
        self._calibrated_products: list[Tensor] = []
        super().__init__(
            shapes,
            device,
            step_size=step_size,
            tokens=tokens or _DEFAULT_TOKENS[form],
            form=_make_form(form, shapes, device, keys, gradients),
        )
        generator = torch.Generator().manual_seed(seed)
        self.net = nn.ModuleList(
            GroupNet(len(group), sum(self.shapes[group[0]]), rank, blocks, network, generator)
            for group in self.groups
        ).to(device)

    # -- trained numbers --------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """What training changes."""
        return list(self.net.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The parameters, and the calibration if there is one, by dotted path."""
        calibration = self._calibration or {}
        return {
            **self.net.state_dict(),
            **{f"{_CALIBRATION}{name}": value for name, value in calibration.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a saved :meth:`state_dict` back.

        Raises:
            SettingsError: a calibration for other ``keys``; nothing has changed.
            RuntimeError: parameters that do not fit the network.
        """
        own = {k: v for k, v in state.items() if not k.startswith(_CALIBRATION)}
        found = {k.removeprefix(_CALIBRATION): v for k, v in state.items() if k not in own}
        if found and ("sizes.0" in found) != (self.keys == "raw"):
            raise SettingsError(
                f"keys={self.keys!r}, but the calibration that was saved is of the other kind of "
                "keys"
            )
        self.net.load_state_dict(own)
        self._set_calibration(found or None)

    # -- calibration ------------------------------------------------------------------------------

    @property
    def is_calibrated(self) -> bool:
        """Whether :meth:`calibrate` was called, now or before the parameters were saved."""
        return self._calibration is not None

    @property
    def wants_calibration(self) -> bool:
        """Whether its form uses a calibration that it does not have yet."""
        return self.form_name == "decorrelated" and not self.is_calibrated

    def calibrate(self, captures: Iterable[Capture]) -> None:
        """Collects the statistics of unrelated prompts; every episode begins with them.

        Args:
            captures: Of unrelated prompts at the unedited weights.
        """
        before = self._calibration
        self._calibration = None
        self.reset()
        try:
            for capture in captures:
                self.observe(capture)
        except BaseException:
            self._calibration = before
            self.reset()
            raise
        found = self.statistics()
        calibration: dict[str, Any] = {}
        for i, moments in enumerate(found["moments"]):
            calibration |= {f"moments.{i}.{name}": value for name, value in moments.items()}
        for i, products in enumerate(found.get("products", ())):
            mean = products / max(found["moments"][i]["count"], 1)
            if self.keys == "raw":
                sizes = mean.diagonal(dim1=1, dim2=2).sqrt().clamp_min(_TINY)
                calibration[f"sizes.{i}"] = sizes
                mean = mean / (sizes[:, :, None] * sizes[:, None])
            # Mean products of keys of about unit size: symmetric, about 1, so half precision and
            # one triangle are enough. Rounded here, so that saving changes nothing.
            row, column = torch.triu_indices(*mean.shape[1:], device=mean.device)
            packed = mean[:, row, column].half()
            calibration |= _each_once(f"products.{i}", f"places.{i}", packed)
        self._set_calibration(calibration)

    def _set_calibration(self, calibration: dict[str, Any] | None) -> None:
        self._calibration = calibration
        self._calibrated_products = []
        for i, group in enumerate(self.groups):
            packed = None if calibration is None else calibration.get(f"products.{i}")
            if calibration is None or packed is None:
                continue
            d_in = self.shapes[group[0]][0]
            row, column = torch.triu_indices(d_in, d_in, device=packed.device)
            whole = torch.zeros(len(group), d_in, d_in, device=packed.device)
            rows = packed[calibration[f"places.{i}"]].float()
            whole[:, row, column] = whole[:, column, row] = rows
            if self.keys == "raw":
                sizes = calibration[f"sizes.{i}"]
                whole *= sizes[:, :, None] * sizes[:, None]
            self._calibrated_products.append(whole * calibration[f"moments.{i}.count"])
        self.reset()

    def reset(self) -> None:
        """Forgets the lifelong statistics; parameters and calibration stay."""
        super().reset()
        if self._calibration is not None:
            # The products of keys are added when they are used, with their learned weight.
            for i, moments in enumerate(self.form.moments):
                names = ("count", "mean", "squares")
                saved = {name: self._calibration[f"moments.{i}.{name}"] for name in names}
                moments.load_statistics(saved)

    # -- the update -------------------------------------------------------------------------------

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        own, right = self._normalised(group, places, keys, gradients)
        left, right = self._net(group)(own, right, places)
        if self.keys == "raw" and left is not own:
            keys = keys + self.form.moments[group].unscale(left - own, places)
        return self.form.factors(
            group,
            places,
            keys,
            left,
            right,
            steps=self._steps(group, places),
            ridges=self._ridges(group, places),
            added=self._added(group, places),
        )

    def _left(self, group: int, places: list[int], standardised: Tensor, keys: Tensor) -> Tensor:
        ridges, added = self._ridges(group, places), self._added(group, places)
        return self.form.left(group, places, standardised, keys, ridges, added)

    def _steps(self, group: int, places: list[int]) -> Tensor:
        return self._net(group).log_step[places].exp()[:, None, None]

    def _ridges(self, group: int, places: list[int]) -> Tensor:
        """The learned ridge of every layer, G × 1."""
        return self.ridge * self._net(group).log_ridge[places].exp()[:, None]

    def _added(self, group: int, places: list[int]) -> Tensor | None:
        """What the calibration adds to the second moment of the keys, G × d_in × d_in."""
        if not self._calibrated_products:
            return None
        weight = self.prior * self._net(group).log_prior[places].exp()
        return weight[:, None, None] * self._calibrated_products[group][places]

    def _net(self, group: int) -> GroupNet:
        net = self.net[group]
        assert isinstance(net, GroupNet)
        return net


def _make_form(
    name: FormName,
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    keys: Keys,
    gradients: Gradients,
) -> OuterForm:
    """A form by name; its ridge is given with every update, since it is learned."""
    if name == "outer":
        return OuterForm(shapes, device, gradients=gradients)
    if name == "ridge":
        return RidgeForm(shapes, device, gradients=gradients, row_sizes="with-raw")
    return DecorrelatedForm(shapes, device, gradients=gradients, keys=keys)


def _each_once(rows_name: str, places_name: str, rows: Tensor) -> dict[str, Tensor]:
    """Different rows, and where each row is among them: layers that read one input share theirs."""
    first: list[int] = []
    places: list[int] = []
    for row in rows:
        same = (place for place, index in enumerate(first) if torch.equal(rows[index], row))
        place = next(same, len(first))
        if place == len(first):
            first.append(len(places))
        places.append(place)
    return {rows_name: rows[first], places_name: torch.tensor(places, device=rows.device)}
