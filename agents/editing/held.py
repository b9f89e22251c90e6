"""A live model whose modes are those of editing for a while, and its owner's own otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Modes:
    """Training mode of every module and ``requires_grad`` of every parameter, as they were found.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training = [(module, module.training) for module in model.modules()]
        self._gradients = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Sets all of them as they were."""
        for module, training in self._training:
            module.training = training
        for parameter, requires in self._gradients:
            parameter.requires_grad_(requires)


@contextmanager
def for_editing(model: nn.Module) -> Iterator[None]:
    """Runs the body with the model in eval mode and without gradients of its parameters."""
    modes = Modes(model)
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        modes.restore()
