"""A low level that learns only step sizes: a policy over a closed-form rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import RULES, make_rule


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

    def statistics(self) -> dict[str, Any]:
        """The statistics of the rule inside."""
        return self.rule.statistics()

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self.rule.load_statistics(statistics)

    def clone_for(self, llm: ResidentLLM) -> Self:
        """As in the base class, around a copy of the rule inside; parameters are shared."""
        twin = copy.copy(self)
        twin.rule = self.rule.clone_for(llm)
        return twin

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.rule._factors(group, places, keys, gradients)


#: What the policy sees of a layer, see :meth:`StepSizePolicy.multipliers`.
FEATURES = 5


class StepSizePolicy(RescaledRule):
    """Multiplies a closed-form rule's step, layer by layer, by ``10 ** tanh(network)``.

    So every step lies within a decade around the nominal one, as in ``hiedit/StepSize-v1``. The
    network sees, per layer, the logarithms of the root mean squares of keys and value gradients,
    the layer's share of the gradient norms, the fact's loss and accuracy, and it has a learned
    offset per layer. Its last layer begins at 0: untrained, it *is* the rule.

    Args:
        shapes: ``(d_in, d_out)`` per candidate layer.
        device: Device of the model.
        rule: A closed-form rule by name.
        rule_settings: Its other arguments.
        hidden: Hidden units.
        step_size: The rule's nominal step size.
        seed: Of the random initial values.

    Raises:
        SettingsError: unknown rule.
    """

    name = "step-sizes"
    default_step_size = 1e-4

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        rule: str = "decorrelated",
        rule_settings: Mapping[str, Any] | None = None,
        hidden: int = 32,
        step_size: float | None = None,
        seed: int = 0,
    ) -> None:
        if rule not in RULES:
            raise SettingsError(f"unknown update rule {rule!r}; built in are {', '.join(RULES)}")
        settings = dict(rule_settings or {})
        if step_size is not None:
            settings["step_size"] = step_size
        super().__init__(make_rule(rule, shapes, device, settings))
        generator = torch.Generator().manual_seed(seed)
        first = torch.empty(FEATURES, hidden).uniform_(-1, 1, generator=generator)
        self.net = nn.ParameterDict(
            {
                "first": first / FEATURES**0.5,
                "bias": torch.zeros(hidden),
                "second": torch.zeros(hidden),
                "offset": torch.zeros(len(self.shapes)),
            }
        ).to(device)

    def parameters(self) -> list[nn.Parameter]:
        """What training changes."""
        return list(self.net.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The parameters by name."""
        return dict(self.net.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a saved :meth:`state_dict` back."""
        self.net.load_state_dict(dict(state))

    def multipliers(self, capture: Capture) -> Tensor:
        """L float32 factors on the nominal step size, in (0.1, 10); differentiable."""
        norms = capture.gradient_norms()
        sizes = [
            torch.stack([rows.float().square().mean().sqrt() for rows in side])
            for side in (capture.keys, capture.value_gradients)
        ]
        accuracy = capture.correct.float().mean().expand_as(norms)
        columns = (
            (sizes[0] + 1e-12).log10() / 2,
            (sizes[1] + 1e-12).log10() / 4,
            norms / (norms.sum() + 1e-30) * len(norms),
            torch.full_like(norms, min(capture.loss / 10, 1.0)),
            accuracy,
        )
        hidden = (torch.stack(columns, 1).detach() @ self.net["first"] + self.net["bias"]).tanh()
        exponents: Tensor = (hidden @ self.net["second"] + self.net["offset"]).tanh()
        return torch.pow(10.0, exponents)

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The rule's updates with this policy's step sizes times ``multipliers``."""
        own = self.multipliers(capture)
        if multipliers is not None:
            own = own * torch.as_tensor(multipliers, device=own.device)
        return self.rule.compute(capture, layers, own)
