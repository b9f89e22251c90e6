"""MLPs all of whose matrices are candidate layers, so that single neurons of them can be rewritten.

A neuron of an MLP is a row of each matrix that reads the residual stream and a column of the one
that writes to it: ``activation(gate · x) (up · x)`` times the column, or ``activation(in · x)``
times it where there is no gate. Which matrix plays which part is found by trying: the parts are
computed by hand on random inputs and compared with what the module gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.structure import text_config

#: Names under which configurations say the activation.
_SETTINGS = ("hidden_act", "hidden_activation", "activation_function", "activation")


@dataclass(frozen=True, slots=True)
class Read:
    """Where a neuron reads the residual stream.

    Args:
        layer: Index of the candidate layer.
        first: Index of the layer's output that belongs to neuron 0; more than 0 for the second
            half of a matrix that holds gate and up projection in one.
    """

    layer: int
    first: int


@dataclass(frozen=True, slots=True)
class CandidateMLP:
    """An MLP all of whose matrices are candidate layers.

    Args:
        block: Index of its block.
        gate: What is put through the activation.
        up: What the activation is multiplied by; None in an MLP without a gate.
        back: Index of the candidate layer that writes to the residual stream.
        neurons: Number of neurons, I.
        hidden: Size of what it reads, d.
        activation: From … float to … float; nearly 0 far below 0 and rising above it.
    """

    block: int
    gate: Read
    up: Read | None
    back: int
    neurons: int
    hidden: int
    activation: Callable[[Tensor], Tensor]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of its candidate layers, each once, in ascending order."""
        reads = (self.gate, self.up) if self.up else (self.gate,)
        return tuple(sorted({*(read.layer for read in reads if read), self.back}))


def candidate_mlps(
    model: PreTrainedModel, layers: Sequence[CandidateLayer]
) -> tuple[CandidateMLP, ...]:
    """The MLPs whose neurons can be rewritten, in forward order.

    Args:
        model: The model.
        layers: Its candidate layers.

    Returns:
        One per MLP that is nothing but its matrices and an activation that switches neurons off far
        below 0 (not of a mixture of experts, nor of an MLP with a norm inside).
    """
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer.name.rpartition(".")[0], []).append(index)
    found = (
        next(_fitting(model, model.get_submodule(parent), layers, group), None)
        for parent, group in groups.items()
        if len(group) > 1
    )
    return tuple(sorted((one for one in found if one is not None), key=lambda mlp: mlp.back))


def bias(layer: CandidateLayer, index: int) -> float:
    """The bias of one output of a layer, 0 where it has none."""
    vector = getattr(layer.module, "bias", None)
    return 0.0 if vector is None else float(vector[index])


def _fitting(
    model: PreTrainedModel, parent: nn.Module, layers: Sequence[CandidateLayer], group: list[int]
) -> Iterator[CandidateMLP]:
    """Ways to read a module as an MLP that give what it gives."""
    for reads, back in _arrangements(layers, group):
        shape = layers[back]
        for activation in _activations(model, parent):
            mlp = CandidateMLP(
                shape.block, reads[0], reads[1], back, shape.d_in, shape.d_out, activation
            )
            if _switches(activation) and _equals(parent, mlp, layers):
                yield mlp


def _arrangements(
    layers: Sequence[CandidateLayer], group: list[int]
) -> Iterator[tuple[tuple[Read, Read | None], int]]:
    for back in group:
        hidden, inner = layers[back].d_out, layers[back].d_in
        rest = [i for i in group if i != back and layers[i].d_in == hidden]
        if len(rest) != len(group) - 1:
            continue
        sizes = [layers[i].d_out for i in rest]
        if sizes == [inner, inner]:
            for one, other in (rest, rest[::-1]):
                yield (Read(one, 0), Read(other, 0)), back
        elif sizes == [2 * inner]:
            for one, other in ((0, inner), (inner, 0)):
                yield (Read(rest[0], one), Read(rest[0], other)), back
        elif sizes == [inner]:
            yield (Read(rest[0], 0), None), back


def _activations(model: PreTrainedModel, parent: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    for child in parent.children():
        if not list(child.parameters()):
            yield child
    config = text_config(model.config)
    for name in _SETTINGS:
        said = getattr(config, name, None)
        if isinstance(said, str) and said in ACT2FN:
            yield cast("Callable[[Tensor], Tensor]", ACT2FN[said])


def _switches(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether it is nearly 0 far below 0 and rises above it."""
    with torch.inference_mode():
        try:
            far, near = activation(torch.tensor([-30.0, -15.0])), activation(torch.arange(1.0, 9.0))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        # A module that is no activation may raise anything else.
        except Exception:
            return False
    rises = near.shape == (8,) and bool((near.diff() > 0).all())
    return rises and bool(far.abs().max() < 1e-3 * near[-1])


def _equals(parent: nn.Module, mlp: CandidateMLP, layers: Sequence[CandidateLayer]) -> bool:
    """Whether the parts, put together by hand, give what the module gives."""
    weight = cast(Tensor, layers[mlp.back].module.weight)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, mlp.hidden, generator=generator).to(weight)
    rows = slice(mlp.gate.first, mlp.gate.first + mlp.neurons)
    with torch.inference_mode():
        inner = mlp.activation(layers[mlp.gate.layer].module(inputs)[..., rows])
        if mlp.up is not None:
            rows = slice(mlp.up.first, mlp.up.first + mlp.neurons)
            inner = inner * layers[mlp.up.layer].module(inputs)[..., rows]
        expected = layers[mlp.back].module(inner).float()
        # A module of another kind may raise anything else on such inputs.
        try:
            given = parent(inputs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return False
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return bool(((given.float() - expected).abs() <= tolerance * scale).all())
