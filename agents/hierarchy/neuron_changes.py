"""The low-rank changes that write neurons of an MLP anew."""

from __future__ import annotations

import torch
from torch import Tensor

from hiedit_agents.hierarchy.neuron_plan import NeuronShape
from hiedit_env.model.mlps import CandidateMLP, Read, bias
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM


class NeuronChanges:
    """Changes of an MLP's neurons, gathered into one low-rank update per matrix.

    Args:
        llm: The model at its present weights.
        mlp: The MLP.
    """

    def __init__(self, llm: ResidentLLM, mlp: CandidateMLP) -> None:
        self._llm, self._mlp = llm, mlp
        self._weights = {layer: llm.weight(layer) for layer in mlp.layers}
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in mlp.layers}
        base = llm.base_norm(mlp.back)
        #: Length of an ordinary column, which keeps what is written fit for coarse number formats.
        self._usual = max(base / mlp.neurons**0.5, 1e-30)

    def gate_length(self, neuron: int) -> float:
        """Length of the neuron's row in the gate matrix."""
        return float(self._row(self._mlp.gate, neuron).norm())

    def gives(self, neuron: int, reading: Tensor) -> Tensor:
        """What the neuron, as it is, writes at a reading: d_out float32."""
        gate, up = self._mlp.gate, self._mlp.up
        fires = self._row(gate, neuron) @ reading + self._bias(gate, neuron)
        strength = self._mlp.activation(fires[None])[0]
        if up is not None:
            strength = strength * (self._row(up, neuron) @ reading + self._bias(up, neuron))
        return strength * self._weights[self._mlp.back][neuron]

    def write(self, neuron: int, shape: NeuronShape, vector: Tensor) -> None:
        """Makes a neuron write a vector, d_out float32, at the reading of its shape."""
        constant, gate, up = shape.detector.constant, self._mlp.gate, self._mlp.up
        self._read(gate, neuron, shape.gate_row() - self._bias(gate, neuron) * constant)
        strength = shape.full
        if up is not None:
            scale = max(float(vector.detach().norm()) / (shape.full * self._usual), 1e-6)
            self._read(up, neuron, scale * shape.up_row() - self._bias(up, neuron) * constant)
            strength *= scale
        old = self._weights[self._mlp.back][neuron]
        self._rows[self._mlp.back].append(
            (_unit(old.new_zeros(self._mlp.neurons), neuron), vector / strength - old)
        )

    def updates(self) -> dict[int, LowRankUpdate]:
        """One update per matrix, of one rank for each neuron (two where it holds gate and up)."""
        return {
            layer: LowRankUpdate(*map(torch.stack, zip(*rows, strict=True)))
            for layer, rows in self._rows.items()
            if rows
        }

    def _read(self, read: Read, neuron: int, row: Tensor) -> None:
        weight = self._weights[read.layer]
        column = read.first + neuron
        one = _unit(row.new_zeros(weight.shape[1]), column)
        self._rows[read.layer].append((row - weight[:, column], one))

    def _row(self, read: Read, neuron: int) -> Tensor:
        return self._weights[read.layer][:, read.first + neuron]

    def _bias(self, read: Read, neuron: int) -> float:
        return bias(self._llm.layers[read.layer], read.first + neuron)


def _unit(zeros: Tensor, place: int) -> Tensor:
    zeros[place] = 1
    return zeros
