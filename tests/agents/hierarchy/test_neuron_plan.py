"""Which neurons are planned: when they fire, and where nothing is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.hierarchy.detectors import Detector
from hiedit_agents.hierarchy.neuron_plan import NeuronShape, Planner, ShapeForm, _end_of
from hiedit_env.errors import HieditWarning
from hiedit_env.model.tokenization import EncodedPrompt
from tests.agents.hierarchy.test_neuron import ALL, FACTS, FIRST, elsewhere, model, neuron, unit


def test_the_shape_by_hand() -> None:
    llm = model()
    low = neuron(llm)
    reading = llm.read(*elsewhere(llm, 1)).capture().keys[low.mlps[0].gate.layer][2]
    shape = NeuronShape(
        low.mlps[0], low._readings[0].detector(reading[None], reading[None][:0]), reading, 0.4, 20.0
    )
    s, c = shape.detector.scores(reading), reading @ shape.detector.constant

    def raw(score: float, constant: float) -> float:
        gate = torch.tensor(20.0 * (score - 0.4 * constant))
        return float(F.silu(gate)) * (1.4 * constant - score)  # peak at (0.4 + 1.4) / 2

    assert shape.full == pytest.approx(raw(float(s), float(c)), rel=1e-3)
    assert float(shape.firing(reading[None])) == pytest.approx(1, rel=1e-4)
    other = llm.read(*elsewhere(llm, 1)).capture().keys[low.mlps[0].gate.layer][5]
    low_score, constant = shape.detector.scores(other), other @ shape.detector.constant
    expected = raw(float(low_score), float(constant)) / shape.full
    assert float(shape.firing(other[None])) == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert raw(0.9, 1.0) == pytest.approx(20 * 0.5 * 0.5, rel=1e-3)
    assert abs(raw(0.1, 1.0)) < 0.02 * raw(1.0, 1.0)


@pytest.mark.parametrize(("score", "threshold"), [(1.0, 0.55), (0.72, 0.44), (0.1, 0.3)])
def test_the_threshold_falls_with_what_the_facts_own_prompts_score(
    score: float, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = model()
    low = neuron(llm)
    capture = unit(llm, FACTS[0])
    own = low._readings[0].detector

    def weaker(readings: Tensor, others: Tensor) -> Detector:
        return replace(found := own(readings, others), row=score * found.row)

    monkeypatch.setattr(low._readings[0], "detector", weaker)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.55, 20.0, 0, 1.8))
    shape = planner._shape(capture, 0, [capture.prompt], {capture.prompt: 0})
    assert shape.threshold == pytest.approx(threshold, abs=1e-3)


def test_a_warning_shows_where_a_long_prompt_ends() -> None:
    short, long = (EncodedPrompt(text, "a", (1, 2), (3,)) for text in ("who", "b" * 70 + "e" * 60))
    assert _end_of(short) == "who"
    assert _end_of(long) == "…" + "b" * 40 + "e" * 60


def test_a_name_like_others_with_its_last_token_is_told_from_the_rest_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    low = neuron(llm, swaps=2, search_steps=1)
    read: list[int] = []
    own = Planner._swapped

    def noted(self: Planner, prompt: EncodedPrompt, at_end: bool) -> list[EncodedPrompt]:
        found = own(self, prompt, at_end) or [elsewhere(llm, 1)[0]]
        read.append(len(found))
        return found

    monkeypatch.setattr(Planner, "_swapped", noted)
    found = iter([False, True])
    monkeypatch.setattr(Planner, "_is_apart", lambda *_: next(found))
    assert any(low.propose(unit(llm, FACTS[0]), FIRST))
    assert len(read) == 2


def test_nothing_fires_at_the_first_token_of_a_text() -> None:
    llm = model()
    low = neuron(llm)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.4, 30.0, 0, 1.8))
    capture = unit(llm, FACTS[0])
    (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
    first = capture.keys[low.mlps[0].gate.layer][0]
    assert abs(float(target.shape.detector.scores(first))) < 0.1
    assert abs(float(target.shape.firing(first[None]))) < 0.01


def test_what_reads_like_much_else_is_not_written_and_said() -> None:
    llm = model()
    low = neuron(llm, widest=1e-9)
    with pytest.warns(HieditWarning, match="'w5 w9 w4': what the model reads .* no neuron"):
        assert low.propose(unit(llm, FACTS[0]), ALL) == (None,) * 6
    assert low.statistics()["held"] == {}


def test_a_subject_that_begins_the_text_is_read_at_the_end_of_the_prompt() -> None:
    llm = model()
    low = neuron(llm)
    capture = unit(llm, ("w9 w4 w8", "w13", "w9"))
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.4, 30.0, 8, 1.8))
    (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
    assert [list(prompt.positions("subject")) for prompt in target.prompts] == [[2]]
    reading = capture.keys[low.mlps[0].gate.layer][2]
    torch.testing.assert_close(target.shape.reading, reading)
    # Other names in the subject's place give readings at which it does not fire.
    others = planner._swapped(capture.prompt, at_end=True)
    assert others
    assert all(other.prompt_ids[1:] == capture.prompt.prompt_ids[1:] for other in others)
