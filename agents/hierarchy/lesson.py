"""The gradient that an option gives a low level: from the weights that it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hiedit_agents.hierarchy.future_damage import FutureDamage
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import NonFiniteUpdateError
from hiedit_env.resident.low_rank import LowRankUpdate, Updates


@dataclass(frozen=True, slots=True)
class Lesson:
    """Gradients of the objective in the factors of an option's updates.

    Args:
        loss: The objective at the weights after the option, without the penalty for future damage.
        factors: Of its updates, attached to the parameters they come from.
        gradients: Of ``loss`` and the penalty, in each of them.
    """

    loss: float
    factors: Sequence[Tensor]
    gradients: Sequence[Tensor]

    def learn(self) -> None:
        """Adds the gradient to that of the parameters."""
        # A choice without anything to learn (no layer, or an answered fact) has no factors.
        if self.factors:
            torch.autograd.backward(list(self.factors), list(self.gradients))


def make_lesson(
    env: EditingEnv, made: Sequence[Updates], l2: float, future_damage: FutureDamage | None
) -> Lesson | None:
    """The objective at the weights after an option's updates, and the gradient in all of them.

    Args:
        env: The environment, whose present fact the option works on.
        made: Updates of the primitive steps so far, attached to the parameters they come from;
            all but the last are written already.
        l2: Weight of the squared norm of the updates.
        future_damage: The penalty; None for none.

    Returns:
        None after updates that wreck the model: they teach nothing, the environment ends the
        episode.
    """
    factors = [f for step in made for u in step if u is not None for f in (u.left, u.right)]
    leaves = [factor.detach().requires_grad_(factor.requires_grad) for factor in factors]
    pairs = iter(zip(leaves[::2], leaves[1::2], strict=True))
    own = [[None if u is None else LowRankUpdate(*next(pairs)) for u in step] for step in made]
    try:
        written = [_with_earlier(layer) for layer in zip(*own, strict=True)]
        loss = env.loss(written)
        damage = None if future_damage is None else future_damage.loss(written)
    except NonFiniteUpdateError:
        return None
    if l2:
        loss = loss + l2 * sum(u.squared_norm() for step in own for u in step if u is not None)
    total = loss if damage is None else loss + damage
    if not torch.isfinite(total):
        return None
    places = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    gradients = torch.autograd.grad(total, [leaves[i] for i in places]) if places else ()
    return Lesson(float(loss.detach()), [factors[i] for i in places], gradients)


def _with_earlier(steps: Sequence[LowRankUpdate | None]) -> LowRankUpdate | None:
    """A layer's last update, plus 0 through which a gradient flows into the ones before it."""
    *earlier, last = steps
    parts = [] if last is None else [last]
    for update in earlier:
        if update is not None:
            parts += (update, update.detach().scaled(-1.0))
    if not parts:
        return None
    return LowRankUpdate(torch.cat([p.left for p in parts]), torch.cat([p.right for p in parts]))
