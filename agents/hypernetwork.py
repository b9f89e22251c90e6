"""The trained low level: a hypernetwork from keys and value gradients to low-rank updates.

One network per layer shape, shared by the layers of that shape up to scales, shifts and step sizes.
With x = [u ‖ v] normalised by lifelong moments, each block adds

    x ← x + scale_l ⊙ ReLU(x A B + b) + shift_l,        A: S × rank, B: rank × S, S = d_in + d_out

and the result [ũ ‖ ṽ] gives the update in one of three forms:

* ``"outer"`` (MEND, arXiv 2110.11309; HiEdit): Δ_l = −step_l ũᵀ ṽ.
* ``"ridge"`` (MALMEN, arXiv 2311.04661; RLEdit): (KᵀK + λ_l I) Δ_l = Kᵀ D with the raw keys K and
  D = −step_l (K ⊙ ũ) 1 ⊙ ṽ row by row.
* ``"decorrelated"`` (ours): the outer form with ũ multiplied by the damped inverse of the lifelong
  second moment of the normalised keys, see :class:`hiedit_env.rules.DecorrelatedRule`.

B, b and shift begin at 0, so an untrained hypernetwork *is* the closed-form rule of its form. The
architecture is that of the released code of RLEdit and HiEdit (``nets.py``), except that step_l and
λ_l are learned as logarithms, so that they stay positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from hiedit_env.capture import Capture
from hiedit_env.errors import SettingsError
from hiedit_env.rules import DecorrelatedRule, LifelongRule, Tokens

Form = Literal["outer", "ridge", "decorrelated"]

#: The closed-form rule that an untrained hypernetwork of a form is.
RULE_OF_FORM: Mapping[str, str] = {
    "outer": "outer-product",
    "ridge": "ridge",
    "decorrelated": "decorrelated",
}
#: The tokens a form uses by default.
_DEFAULT_TOKENS: Mapping[str, Tokens] = {"outer": "all", "ridge": "answer", "decorrelated": "all"}


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
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(layers, 1, size))
        self.shift = nn.Parameter(torch.zeros(layers, 1, size))

    def forward(self, rows: Tensor, places: list[int]) -> Tensor:
        """Rows of the layers at ``places``: len(places) × T × S in and out, float32."""
        inner = (rows @ self.a @ self.b + self.bias).relu()
        return rows + self.scale[places] * inner + self.shift[places]


class GroupNet(nn.Module):
    """The blocks, step sizes and ridges of the G layers of one shape."""

    def __init__(
        self, layers: int, size: int, rank: int, blocks: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layers, size, rank, generator) for _ in range(blocks))
        #: log of the step size relative to the nominal one.
        self.log_step = nn.Parameter(torch.zeros(layers))
        self.log_ridge = nn.Parameter(torch.zeros(layers))

    def forward(self, rows: Tensor, places: list[int]) -> Tensor:
        """[ũ ‖ ṽ] from the normalised [u ‖ v], len(places) × T × S."""
        for block in self.blocks:
            rows = block(rows, places)
        return rows


class Hypernetwork(DecorrelatedRule):
    """A low level with trained parameters; an untrained one is a closed-form rule.

    It is an update rule, so it can be given wherever one can: to
    :meth:`~hiedit_env.envs.base.EditingEnv.use_low_level`, or by a trained agent's folder.

    Args:
        shapes: ``(d_in, d_out)`` per candidate layer.
        device: Device of the model.
        form: How [ũ ‖ ṽ] become an update.
        rank: Of the blocks.
        blocks: How many.
        step_size: Nominal step size; ``exp(log_step)`` multiplies it layer by layer.
        tokens: As for :class:`~hiedit_env.rules.UpdateRule`; None for all tokens in the outer
            forms and the answer's in the ridge form, as in the released configurations.
        ridge: Of the decorrelated form, and the λ the ridge form begins at.
        seed: Of the random initial values.

    Raises:
        SettingsError: unknown form, or a size below 1.
    """

    name = "hypernetwork"
    default_step_size: ClassVar[float] = 1e-4

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        form: Form = "outer",
        rank: int = 64,
        blocks: int = 1,
        step_size: float | None = None,
        tokens: Tokens | None = None,
        ridge: float | None = None,
        seed: int = 0,
    ) -> None:
        if form not in get_args(Form):
            raise SettingsError(f"form must be one of {get_args(Form)}, got {form!r}")
        if rank < 1 or blocks < 0:
            raise SettingsError(f"rank must be ≥ 1 and blocks ≥ 0, got {rank!r} and {blocks!r}")
        self.form: Form = form
        super().__init__(
            shapes,
            device,
            step_size=step_size,
            tokens=tokens or _DEFAULT_TOKENS[form],
            ridge=(3.0 if form == "decorrelated" else 1.0) if ridge is None else ridge,
        )
        generator = torch.Generator().manual_seed(seed)
        self.net = nn.ModuleList(
            GroupNet(len(group), sum(self.shapes[group[0]]), rank, blocks, generator)
            for group in self.groups
        ).to(device)

    def parameters(self) -> list[nn.Parameter]:
        """What training changes."""
        return list(self.net.parameters())

    def state(self) -> dict[str, Any]:
        """The parameters by dotted path."""
        return dict(self.net.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts a saved :meth:`state` back."""
        self.net.load_state_dict(dict(state))

    def reset(self) -> None:
        """Forgets the lifelong statistics; the parameters stay."""
        if self.form == "decorrelated":
            super().reset()
        else:
            LifelongRule.reset(self)

    def observe(self, capture: Capture) -> None:
        """Takes one capture into the statistics the form needs."""
        if self.form == "decorrelated":
            super().observe(capture)
        else:
            LifelongRule.observe(self, capture)

    def state_dict(self) -> dict[str, Any]:
        """The lifelong statistics, not the parameters."""
        rule = DecorrelatedRule if self.form == "decorrelated" else LifelongRule
        return rule.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        rule = DecorrelatedRule if self.form == "decorrelated" else LifelongRule
        rule.load_state_dict(self, state)

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        net = self.net[group]
        assert isinstance(net, GroupNet)
        rows = net(torch.cat(self._normalised(group, places, keys, gradients), 2), places)
        left, right = rows.split((keys.shape[2], gradients.shape[2]), 2)
        step = net.log_step[places].exp()[:, None, None]
        if self.form == "outer":
            return left, right * step
        if self.form == "decorrelated":
            return self._decorrelate(group, places, left), right * step
        # (K ⊙ ũ) 1: as UltraEdit's ‖ũ‖² once K is normalised too.
        wanted = (keys * left).sum(2, keepdim=True) * right * step
        ridge = self.ridge * net.log_ridge[places].exp()
        eye = torch.eye(keys.shape[1], device=keys.device)
        gram = keys @ keys.mT + ridge[:, None, None] * eye
        return keys, torch.linalg.solve(gram, wanted)
