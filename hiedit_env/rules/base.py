"""Update rules: what to write into the chosen layers, given one capture.

The rules here are closed-form and untrained; some keep lifelong statistics. Trained low levels, in
``agents``, are rules with parameters. Every rule returns one low-rank update per chosen layer, with
the sign and the step size inside ``right``.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.errors import SettingsError, as_float, shown
from hiedit_env.model.asking import Tokens as Tokens
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate, layer_groups
from hiedit_env.resident.resident import ResidentLLM


class UpdateRule(ABC):
    """From a capture to updates: base of the built-in rules and of trained low levels.

    Args:
        shapes: ``(d_in, d_out)`` per candidate layer.
        device: Device of the model.
        step_size: Nominal step size; an agent's step sizes multiply it.
        tokens: Which tokens of every prompt count: those that predict its ``"answer"``, ``"all"``
            that are read, the prompt's ``"last"`` one, or the last one of its ``"subject"`` (the
            prompt's last one where it names no subject).

    Raises:
        SettingsError: unknown ``tokens`` or a step size that is not positive.
    """

    name: ClassVar[str]
    default_step_size: ClassVar[float]
    default_tokens: ClassVar[Tokens] = "answer"
    #: Whether it uses the value gradients of captures; where not, an editor does not compute them.
    uses_gradients: ClassVar[bool] = True

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        step_size: float | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        #: Indices of the layers of one shape, computed side by side.
        self.groups = layer_groups(self.shapes)
        self.device = device
        self.step_size = positive(
            self.default_step_size if step_size is None else step_size, "step_size"
        )
        self.tokens = self.default_tokens if tokens is None else tokens
        if self.tokens not in get_args(Tokens):
            raise SettingsError(f"tokens must be one of {get_args(Tokens)}, got {self.tokens!r}")
        self.reset()

    def reset(self) -> None:  # noqa: B027 - a rule need not keep statistics
        """Forgets all statistics: a new episode begins."""

    def seed(self, seed: int) -> None:  # noqa: B027 - a rule need not draw anything
        """Seeds what the rule draws in later episodes; called before an episode."""

    def require_ready(self) -> None:  # noqa: B027 - most rules need nothing
        """Called before anything is run: raises SettingsError where something is missing."""

    def observe(self, capture: Capture) -> None:  # noqa: B027
        """Takes one capture into the lifelong statistics; called once before :meth:`propose`."""

    def look(self, observe: Callable[[], NDArray[np.float32]]) -> None:  # noqa: B027
        """Called by an environment before every :meth:`propose` of its own.

        Args:
            observe: Gives the environment's present observation; rules that do not need it cost
                nothing.
        """

    @abstractmethod
    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Factors for step size −1 of layers of one shape.

        Args:
            group: Index into ``self.groups``.
            places: The G chosen layers, as indices into that group.
            keys: G × T × d_in float32.
            gradients: G × T × d_out float32.

        Returns:
            ``left`` G × r × d_in and ``right`` G × r × d_out; the update is −step leftᵀ right.
        """

    def propose(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """Updates for the chosen layers, without gradients; see :meth:`compute`."""
        with torch.no_grad():
            return self.compute(capture, layers, multipliers)

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """Updates for the chosen layers; differentiable in the rule's parameters, if it has any.

        Args:
            capture: The request's keys and value gradients at the present weights.
            layers: L bool, the layers to update.
            multipliers: L factors on the nominal step size (1 where None); gradients flow into a
                tensor.

        Returns:
            L entries, None for a layer not chosen. Float32.
        """
        updates: list[LowRankUpdate | None] = [None] * len(self.shapes)
        for number, group in enumerate(self.groups):
            places = [place for place, layer in enumerate(group) if layers[layer]]
            if not places:
                continue
            factors = self._factors(number, places, *self._rows(capture, group, places))
            self._enter(updates, [group[place] for place in places], *factors, multipliers)
        return tuple(updates)

    def _enter(
        self,
        updates: list[LowRankUpdate | None],
        chosen: list[int],
        left: Tensor,
        right: Tensor,
        multipliers: NDArray[np.float32] | Tensor | None,
    ) -> None:
        """Puts the updates of layers of one shape, from factors for step size −1, in their places.

        Args:
            updates: L entries.
            chosen: Indices of the G layers.
            left: G × r × d_in.
            right: G × r × d_out.
            multipliers: As for :meth:`compute`.
        """
        steps: float | Tensor = -self.step_size
        if multipliers is not None:
            factors = torch.as_tensor(multipliers[chosen], dtype=right.dtype, device=right.device)
            steps = factors[:, None, None] * steps
        pairs = zip(left.unbind(), (right * steps).unbind(), strict=True)
        for layer, pair in zip(chosen, pairs, strict=True):
            updates[layer] = LowRankUpdate(*pair)

    def statistics(self) -> dict[str, Any]:
        """The lifelong statistics: tensors that are never written in place, and plain numbers.

        Trained parameters do not belong to them: a learned rule has ``state_dict()`` for those.
        """
        return {}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:  # noqa: B027
        """Puts saved statistics back, bit for bit."""

    def clone_for(self, llm: ResidentLLM) -> Self:
        """The same rule, with the same statistics, for another view of the same model.

        What the copy observes and draws later does not reach this rule. A rule that runs the model
        itself must write its own version, whose copy runs ``llm``.

        Args:
            llm: A fork of the model that this rule is used on.

        Raises:
            SettingsError: the rule holds a model and has no version of its own.
        """
        held = sorted(k for k, v in vars(self).items() if isinstance(v, ResidentLLM))
        if held:
            raise SettingsError(
                f"update rule {self.name!r} holds a model in {held[0]!r}, so it has to define "
                "clone_for(llm), which returns a copy that runs llm"
            )
        return copy.deepcopy(self)

    def _rows(
        self, capture: Capture, group: list[int], places: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        # Always whole groups: a capture keeps what it stacks, and there are 2^L choices of layers.
        keys, gradients = capture.stacked(group)
        if places is not None and len(places) < len(group):
            keys, gradients = keys[places], gradients[places]
        rows = capture.rows(self.tokens)
        return keys[:, rows], gradients[:, rows]


class WholeRule(UpdateRule):
    """Base of rules that compute all updates of a capture at once, not factors of one shape."""

    @abstractmethod
    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """See :meth:`UpdateRule.compute`."""

    def _factors(
        self, group: int, places: list[int], keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"the updates of {self.name!r} are computed as a whole")


def positive(value: object, name: str) -> float:
    """A positive finite number, or a ``SettingsError`` that names it."""
    number = as_float(value)
    if not 0 < number < math.inf:
        raise SettingsError(
            f"{name} must be a positive number, got {shown(value)}; give a finite one"
        )
    return number
