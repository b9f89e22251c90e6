"""A rule around another one, which changes how far that one steps and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.capture import Capture
from hiedit_env.rules import UpdateRule


class RescaledRule(UpdateRule):
    """Base of low levels that choose step sizes: statistics are those of the rule inside.

    Subclasses write ``compute``.

    Args:
        rule: The rule inside; shapes, device, nominal step size and tokens are its own.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        super().__init__(rule.shapes, rule.device, step_size=rule.step_size, tokens=rule.tokens)

    def reset(self) -> None:
        """Forgets the rule's statistics; parameters stay."""
        self.rule.reset()

    def seed(self, seed: int) -> None:
        """Seeds the rule inside."""
        self.rule.seed(seed)

    def look(self, observe: Callable[[], NDArray[np.float32]]) -> None:
        """Lets the rule inside look."""
        self.rule.look(observe)

    def observe(self, capture: Capture) -> None:
        """Takes one capture into the rule's statistics."""
        self.rule.observe(capture)

    def state_dict(self) -> dict[str, Any]:
        """The rule's statistics, not the parameters."""
        return self.rule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self.rule.load_state_dict(state)

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.rule._factors(group, places, keys, gradients)
