"""When a neuron fires, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hiedit_agents.hierarchy.detectors import Detector
from hiedit_env.model.mlps import CandidateMLP

#: The score at which a neuron with a gate fires most, between what a fact's own prompts score (1)
#: and what other words for it score.
PEAK = 0.9

#: Smallest distance of the peak from the threshold. SmolLM2, block 7, θ = 0.75: behind quotation
#: marks, in lists, in chat with other instructions and in later turns, 10 % of the subjects score
#: less than 0.9 and some 1.1; the neurons' strength is above 0.7 for 95.1, 96.7 and 95.9 % of them
#: with 0.25, 0.3 and 0.35 (30 training facts, 13 contexts).
_RISE = 0.3


@dataclass(frozen=True, slots=True)
class NeuronShape:
    """When a neuron fires, and how strongly.

    With a gate, activation(β (s − θ)) (c − s), where c puts the peak at :data:`PEAK`, or further
    right where θ is large; without one, activation(β (s − θ)). Both over their value at the reading
    itself.

    Args:
        mlp: Its MLP.
        detector: Gives the score s.
        reading: d float32, the reading it is made for, where s is 1.
        threshold: θ.
        sharpness: β.
    """

    mlp: CandidateMLP
    detector: Detector
    reading: Tensor
    threshold: float
    sharpness: float

    def _raw(self, readings: Tensor) -> Tensor:
        fires = self.mlp.activation(readings @ self.gate_row())
        return fires if self.mlp.up is None else fires * (readings @ self.up_row())

    @property
    def _ceiling(self) -> float:
        # A neuron that begins to fire later is strongest later, so that it is as broad.
        return 2 * max(PEAK, self.threshold + _RISE) - self.threshold

    @property
    def full(self) -> float:
        """What the two rows give at the reading, before the second is scaled."""
        return float(self._raw(self.reading[None]).clamp_min(1e-6))

    def firing(self, readings: Tensor) -> Tensor:
        """Strength at P × d readings, 1 at the reading itself: P float32."""
        return self._raw(readings) / self.full

    def gate_row(self) -> Tensor:
        """D float32."""
        return self.sharpness * (self.detector.row - self.threshold * self.detector.constant)

    def up_row(self) -> Tensor:
        """As long as :meth:`gate_row`; its scale is free, since the column is divided by it."""
        return self._ceiling * self.detector.constant - self.detector.row
