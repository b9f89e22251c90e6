"""The study of drift: nothing drifts, and it would be noticed."""

from __future__ import annotations

import pytest
import torch

from hiedit_benchmarks.studies.drift import watch_memory, watch_weights
from hiedit_env.resident.weights import EditableWeights, WeightSnapshot


def test_edits_and_ways_back_leave_the_same_bits() -> None:
    found = watch_weights(20, 0)
    assert (found["edits"], found["differences"], found["same_bits"]) == (20, 0, True)


def test_undo_by_subtraction_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As other tools do it: the way back leaves the last bit of some weights changed."""
    restore = EditableWeights.restore

    def inexact(self: EditableWeights, snapshot: WeightSnapshot) -> None:
        restore(self, snapshot)
        weight = self.layers[0].module.weight
        assert isinstance(weight, torch.Tensor)
        with torch.no_grad():
            weight.add_(0.1).sub_(0.1)

    monkeypatch.setattr(EditableWeights, "restore", inexact)
    found = watch_weights(3, 0)
    assert found["differences"] > 0
    assert not found["same_bits"]


def test_memory_is_read_ten_times() -> None:
    found = watch_memory(10, 0)
    assert len(found["memory_mb"]) == 10
    assert found["growth_mb"] == pytest.approx(
        found["memory_mb"][-1] - found["memory_mb"][1], abs=0.01
    )
