"""The low-rank changes that write neurons of an MLP anew."""

from __future__ import annotations

import torch
from torch import Tensor

from hiedit_agents.hierarchy.neuron_shape import NeuronShape
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
        self._weights = {layer: llm.weight(layer).clone() for layer in mlp.layers}
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in mlp.layers}
        base = llm.base_norm(mlp.back)
        #: Length of an ordinary column, which keeps what is written fit for coarse number formats.
        self._usual = max(base / mlp.neurons**0.5, 1e-30)

    def gate_lengths(self) -> Tensor:
        """Lengths of the neurons' rows in the gate matrix: I float32."""
        lengths: Tensor = self._rows_of(self._mlp.gate).norm(dim=0)
        return lengths

    def gives(self, neuron: int, reading: Tensor, substitute: Tensor | None = None) -> Tensor:
        """What the MLP loses at a reading when a neuron is written anew: d_out float32.

        Args:
            neuron: The neuron.
            reading: d float32.
            substitute: As for :meth:`write`; what these give in its place is not lost.
        """
        gate, up = self._mlp.gate, self._mlp.up
        fired = self._mlp.activation(reading @ self._rows_of(gate) + self._biases(gate))
        if up is not None:
            fired = fired * (reading @ self._rows_of(up) + self._biases(up))
        strength = fired[neuron] if substitute is None else fired[neuron] - fired @ substitute
        return strength * self._weights[self._mlp.back][neuron]

    def write(
        self, neuron: int, shape: NeuronShape, vector: Tensor, substitute: Tensor | None = None
    ) -> None:
        """Makes a neuron write a vector at the reading of its shape.

        Args:
            neuron: The neuron.
            shape: When it fires.
            vector: d_out float32.
            substitute: I float32, the share of what it wrote that each other neuron writes from now
                on; None for none.
        """
        constant, gate, up = shape.detector.constant, self._mlp.gate, self._mlp.up
        self._read(gate, neuron, shape.gate_row() - self._bias(gate, neuron) * constant)
        strength = shape.full
        if up is not None:
            scale = max(float(vector.detach().norm()) / (shape.full * self._usual), 1e-6)
            self._read(up, neuron, scale * shape.up_row() - self._bias(up, neuron) * constant)
            strength *= scale
        columns = self._weights[self._mlp.back]
        old, new = columns[neuron].clone(), vector / strength
        rows = self._rows[self._mlp.back]
        rows.append((_unit(old.new_zeros(self._mlp.neurons), neuron), new - old))
        # The next neuron of this step loses what it writes then.
        columns[neuron] = new.detach()
        if substitute is not None:
            rows.append((substitute, old))
            columns += torch.outer(substitute, old)

    def updates(self) -> dict[int, LowRankUpdate]:
        """One update per matrix, of a rank or two for each neuron."""
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

    def _rows_of(self, read: Read) -> Tensor:
        """What all neurons read: d × I."""
        return self._weights[read.layer][:, read.first : read.first + self._mlp.neurons]

    def _bias(self, read: Read, neuron: int) -> float:
        return bias(self._llm.layers[read.layer], read.first + neuron)

    def _biases(self, read: Read) -> Tensor | float:
        vector = getattr(self._llm.layers[read.layer].module, "bias", None)
        if vector is None:
            return 0.0
        found: Tensor = vector.detach()[read.first : read.first + self._mlp.neurons].float()
        return found


def _unit(zeros: Tensor, place: int) -> Tensor:
    zeros[place] = 1
    return zeros
