"""Which neurons are planned: when they fire, and where nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.hierarchy.detectors import Detector
from hiedit_agents.hierarchy.neuron_plan import (
    _ALIKE,
    _NAME_WEIGHTS,
    _WEIGHTS,
    NeuronShape,
    Planner,
    ShapeForm,
    _end_of,
    _Rows,
)
from hiedit_agents.hierarchy.other_names import with_other_names
from hiedit_agents.hierarchy.reading_places import beginnings, behind, where_met
from hiedit_agents.hierarchy.reading_places import elsewhere as not_to_fire_at
from hiedit_env.errors import HieditWarning
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM
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
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.825, 20.0, 0, 2.7))
    rows = planner._rows(capture, 0, [capture.prompt], {capture.prompt: 0})
    shape = planner._shape(0, rows, 0.0)
    assert shape.threshold == pytest.approx(threshold, abs=1e-3)


def test_places_behind_the_subject_by_hand() -> None:
    def places(length: int, *spans: tuple[int, int], missing: bool = False) -> list[int]:
        prompt = EncodedPrompt("p", "a", tuple(range(1, length + 1)), (99,))
        return behind(replace(prompt, subject_spans=spans, subject_missing=missing))

    assert places(4, (0, 1)) == [1, 2, 3]
    # Not too many of a long prompt, but its end.
    assert places(20, (0, 1)) == [*range(1, 9), 19]
    assert places(20, (0, 1), (15, 17)) == [17, 18, 19]
    # Where the subject ends the prompt or is not known, the end; never the first token of a text.
    assert places(4, (2, 4)) == [3]
    assert places(4, missing=True) == [3]
    assert places(1, (0, 1)) == places(1, missing=True) == []


def test_a_fact_scores_alike_in_all_of_its_prompts() -> None:
    llm = model()
    low = neuron(llm)
    texts = ("w5 w9 w4", "w3 w30 w9 w6 w4", "w11 w12 w7 w9 w4")
    prompts = [llm.encoder.with_subject(llm.encode(text, "w7"), text, "w9") for text in texts]
    capture = llm.read(*prompts).capture()
    starts = dict(zip(prompts, (0, 3, 8), strict=True))
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 30.0, 0, 2.7))
    rows = planner._rows(capture, 0, prompts, starts)
    # Of least variance with 1 at the mean alone, they would differ.
    free = low._readings[0].detector(rows.own, rows.others).scores(rows.own)
    assert float(free.max() - free.min()) > 0.05
    shape = planner._shape(0, rows, 0.0)
    scores = shape.detector.scores(rows.own)
    torch.testing.assert_close(scores, torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(shape.firing(rows.own), torch.ones(3), atol=0.05, rtol=0)


def test_a_name_may_hold_its_last_token_twice() -> None:
    def places(ids: tuple[int, ...], *spans: tuple[int, int]) -> list[int]:
        return not_to_fire_at(EncodedPrompt("P", "A", ids, (50, 51), subject_spans=spans), None)

    # "By 1, Joyce 7, Baroness 7 is", and the answer's first token.
    assert places((1, 6, 7, 3, 8, 7, 9), (1, 6)) == [0, 1, 3, 4, 6, 7]
    # The same token outside of the name is another one.
    assert places((7, 6, 7, 3, 8, 7, 9), (4, 6)) == [0, 1, 2, 3, 4, 6, 7]
    # Of several mentions the last one is read, and none of them is elsewhere.
    assert places((1, 7, 3, 6, 7, 9), (1, 2), (3, 5)) == [0, 2, 3, 5, 6]
    # But a text's first token is, whatever it is.
    assert places((7, 3, 6, 7, 9), (0, 1), (2, 4)) == [0, 1, 2, 4, 5]
    # Where one place is read, all others are elsewhere.
    assert not_to_fire_at(EncodedPrompt("P", "A", (7, 7, 7), (1,)), 1) == [0, 2]


def test_a_warning_shows_where_a_long_prompt_ends() -> None:
    short, long = (EncodedPrompt(text, "a", (1, 2), (3,)) for text in ("who", "b" * 70 + "e" * 60))
    assert _end_of(short) == "who"
    assert _end_of(long) == "…" + "b" * 40 + "e" * 60


def test_other_names_count_as_much_as_the_spread_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    low = neuron(llm, swaps=2, search_steps=1)
    tried: list[float] = []
    own = Planner._shape

    def noted(
        self: Planner, home: int, rows: _Rows, names: float, weight: float = 0.0
    ) -> NeuronShape:
        # This tokenizer knows none of the names, so all are one.
        assert len(rows.named) == 1
        tried.append(names)
        return own(self, home, rows, names, weight)

    monkeypatch.setattr(Planner, "_shape", noted)
    for allowed in (_NAME_WEIGHTS[0], _NAME_WEIGHTS[2], 0.0):
        del tried[:]
        monkeypatch.setattr(Planner, "_is_apart", lambda *_, most=allowed: tried[-1] <= most)
        assert any(low.propose(unit(llm, LATER), FIRST))
        assert tried == [weight for weight in _NAME_WEIGHTS if weight >= allowed]
        low.reset()


def test_a_neuron_is_kept_from_other_names_that_end_alike() -> None:
    llm = model()
    low, capture, earlier = neuron(llm), unit(llm, LATER), unit(llm, EARLIER)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 60.0, 0, 6.0))
    rows = planner._rows(capture, 0, [capture.prompt], {capture.prompt: 0})
    assert len(rows.named) == 0
    # As if the earlier subject's name were another name with this one's last token.
    key = capture.keys[low.mlps[0].gate.layer]
    place = earlier.prompt.positions("subject")[0]
    named = earlier.keys[low.mlps[0].gate.layer][place][None].float()
    scores, thresholds = [], []
    for weight in (0.0, 0.1, 0.7):
        shape = planner._shape(0, replace(rows, named=named), weight)
        scores.append(float(shape.detector.scores(named)))
        thresholds.append(shape.threshold)
        at = key[capture.prompt.positions("subject")[0]][None].float()
        torch.testing.assert_close(shape.detector.scores(at), torch.ones(1), rtol=1e-4, atol=0)
    assert scores[0] > 0.5 > scores[2]
    assert scores == sorted(scores, reverse=True)
    # The threshold stands above what the name scores still, as above an earlier fact's token.
    assert thresholds[0] == 0.5
    assert thresholds[1] == pytest.approx(max(0.5, min(scores[1] + 0.05, 0.75)), abs=1e-4)


def test_nothing_fires_at_the_first_token_of_a_text() -> None:
    llm = model()
    low = neuron(llm)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.6, 30.0, 0, 2.7))
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


@pytest.mark.parametrize("prompt", ["w9 w4 w8", "w9 w4 w8 w6 w10 w3", "w9 w8"])
def test_a_subject_that_begins_the_text_is_read_at_the_best_place_behind_it(prompt: str) -> None:
    llm = model()
    low = neuron(llm)
    capture = unit(llm, (prompt, "w13", "w9"))
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.6, 30.0, 8, 6))
    (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
    keys = capture.keys[low.mlps[0].gate.layer]
    spreads = {}
    for place in range(1, len(prompt.split())):
        # Other names in the subject's place, up to the token that is read.
        others = with_other_names(llm.tokenizer, capture.prompt, place, 8)
        assert len(others) == 1
        after = capture.prompt.prompt_ids[1 : place + 1]
        assert all(other.prompt_ids[1:] == after for other in others)
        rest = [i for i in range(capture.prompt.length) if i != place]
        elsewhere = torch.cat((keys[rest], planner._ends(low.mlps[0], others)))
        spreads[place] = low._readings[0].detector(keys[[place]], elsewhere).spread
    best = min(spreads, key=lambda place: spreads[place])
    assert [list(prompt.positions("subject")) for prompt in target.prompts] == [[best]]
    torch.testing.assert_close(target.shape.reading, keys[best])
    assert target.shape.detector.spread == pytest.approx(spreads[best], rel=1e-4)
    # Its own score is 1 in the only prompt it is for, so it can begin to fire late.
    assert target.shape.threshold == 0.7
    # At the text's first token, to which all others attend, it does not fire.
    assert abs(float(target.shape.firing(keys[:1])[0])) < 0.05


# -- earlier facts --------------------------------------------------------------------------------

#: Two names that end in the same token.
EARLIER = ("w5 w10 w9 w4", "w7", "w10 w9")
LATER = ("w6 w11 w9 w8", "w13", "w11 w9")


def planned(llm: ResidentLLM, past: Sequence[Capture], widest: float = 4.0) -> NeuronShape:
    """The shape for the later fact, behind some earlier ones."""
    low, capture = neuron(llm, widest=widest), unit(llm, LATER)
    planner = Planner(
        llm, low.mlps, low._readings, ShapeForm(0.75, 60.0, 0, widest, reworded=False)
    )
    known = [one.prompts for one in past]
    (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, known, 0)
    return target.shape


def at_subject(llm: ResidentLLM, shape: NeuronShape, capture: Capture) -> Tensor:
    """The score at the last token of a fact's subject: 1 float32."""
    reading = capture.keys[shape.mlp.gate.layer][capture.prompt.positions("subject")[0]]
    return shape.detector.scores(reading[None].float())


def test_a_neuron_is_kept_from_an_earlier_fact_whose_name_ends_alike() -> None:
    llm = model()
    earlier, later = unit(llm, EARLIER), unit(llm, LATER)
    freely, kept = planned(llm, []), planned(llm, [earlier])
    assert float(at_subject(llm, freely, earlier)) > 0.5
    assert float(at_subject(llm, kept, earlier)) < 0.45
    reading = earlier.keys[kept.mlp.gate.layer][earlier.prompt.positions("subject")[0]]
    assert abs(float(kept.firing(reading[None]))) < 0.05 < float(freely.firing(reading[None]))
    torch.testing.assert_close(at_subject(llm, kept, later), torch.ones(1), rtol=1e-4, atol=0)


def test_facts_of_one_batch_are_kept_apart_as_one_after_another() -> None:
    llm = model()
    low, both = neuron(llm), unit(llm, EARLIER, LATER)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 60.0, 0, 6, reworded=False))
    first, second = planner.targets(both, [(p,) for p in both.prompts], lambda _: 0, [], 0)
    after = planned(llm, [unit(llm, EARLIER)])
    torch.testing.assert_close(second.shape.detector.row, after.detector.row, rtol=1e-3, atol=1e-4)
    freely = planned(llm, [])
    assert not torch.allclose(after.detector.row, freely.detector.row, rtol=1e-2)
    assert first.prompts == both.prompts[:1]


@pytest.mark.parametrize(("score", "threshold"), [(0.3, 0.5), (0.6, 0.65), (0.9, 0.75)])
def test_the_threshold_stands_above_what_an_earlier_subject_scores(
    score: float, threshold: float
) -> None:
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 60.0, 0, 2.7))
    rows = planner._rows(capture, 0, [capture.prompt], {capture.prompt: 0})
    # A reading between the mean, where the score is 0, and the own one, where it is 1.
    mean = low._readings[0].mean
    found = replace(rows, alike=mean + score * (rows.own - mean))
    # With a weight that is all but none, what is alike does not move the detector.
    shape = planner._shape(0, found, 0.0, 1e-9)
    assert shape.threshold == pytest.approx(threshold, abs=2e-3)
    assert planner._shape(0, found, 0.0).threshold == 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75])
def test_a_neuron_is_as_broad_wherever_it_begins_to_fire(threshold: float) -> None:
    """The product of gate and up row over its peak, by hand: (s − θ)(c − s) for large β."""
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 1e4, 0, 2.7))
    rows = planner._rows(capture, 0, [capture.prompt], {capture.prompt: 0})
    shape = replace(planner._shape(0, rows, 0.0), threshold=threshold)
    mean = low._readings[0].mean
    peak = max(0.9, threshold + 0.3)
    for score in (threshold + 0.05, 0.85, 1.0, peak, 1.1):
        reading = mean + score * (rows.own - mean)
        wanted = (score - threshold) * (2 * peak - threshold - score)
        full = (1 - threshold) * (2 * peak - threshold - 1)
        assert float(shape.firing(reading)) == pytest.approx(wanted / full, rel=0.02, abs=0.01)
        assert wanted > 0


def test_a_name_that_cannot_be_told_from_an_earlier_one_takes_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    earlier, tried = unit(llm, EARLIER), list[float]()
    own = Planner._shape

    def noted(
        self: Planner, home: int, rows: _Rows, names: float, weight: float = 0.0
    ) -> NeuronShape:
        tried.append(weight)
        return own(self, home, rows, names, weight)

    freely = planned(llm, [])
    monkeypatch.setattr(Planner, "_shape", noted)
    monkeypatch.setattr(Planner, "_is_apart", lambda *_: tried[-1] == 0)
    shape = planned(llm, [earlier])
    assert torch.equal(shape.detector.row, freely.detector.row)
    assert tried == [*_WEIGHTS, 0.0]


def test_a_neuron_is_kept_from_the_answer_of_an_earlier_fact() -> None:
    """The subject's last token stands in the answer; what follows it would be put out."""
    llm = model()
    earlier = unit(llm, ("w6 w11 w8", "w10 w9 w7", "w11"))
    freely, kept = planned(llm, []), planned(llm, [earlier])
    # w9 is the fifth token that is read: three of the prompt, then the answer's first.
    at_answer = earlier.keys[kept.mlp.gate.layer][4][None].float()
    assert float(freely.detector.scores(at_answer)) > 0.5
    assert float(kept.detector.scores(at_answer)) < 0.45
    assert abs(float(kept.firing(at_answer))) < 0.05 < float(freely.firing(at_answer))
    later = unit(llm, LATER)
    torch.testing.assert_close(at_subject(llm, kept, later), torch.ones(1), rtol=1e-4, atol=0)


def test_where_a_subjects_last_token_is_met_by_hand() -> None:
    def fact(ids: Sequence[int], answer: Sequence[int]) -> tuple[EncodedPrompt, ...]:
        return (EncodedPrompt("p", "a", tuple(ids), tuple(answer)),)

    # Not at a text's first token, and not at an answer's last one, which is never read.
    facts = [fact((9, 5, 9, 4), (9, 7)), fact((1, 2), (9,)), fact((1, 2, 9), (3,))]
    found = [p.prompt_ids for p in where_met((9,), facts, 64)]
    assert found == [(9, 5, 9, 4, 9), (9, 5, 9), (1, 2, 9)]
    assert [p.length for p in where_met((9,), facts, 64)] == [5, 3, 3]
    # What two facts begin with is read once; the latest facts are taken where there are too many.
    assert [p.prompt_ids for p in where_met((9,), [*facts, *facts], 64)] == found
    assert [p.prompt_ids for p in where_met((9,), facts, 1)] == [(1, 2, 9)]
    assert where_met((), facts, 64) == ()


def test_sentences_that_begin_alike_are_read_once() -> None:
    def one(*ids: int, subject: int) -> EncodedPrompt:
        return EncodedPrompt("p", "a", ids, (7,), subject_spans=((subject, subject + 1),))

    prompt = one(1, 9, 4, subject=1)
    sentences = [one(9, 2, 4, subject=0), one(1, 9, 5, 6, subject=1), one(9, 3, subject=0)]
    assert [p.prompt_ids for p in beginnings(sentences, [prompt])] == [(9,)]
    assert [p.prompt_ids for p in beginnings(sentences, [])] == [(9,), (1, 9)]
    # A prompt whose subject is not known is no sentence to compare with.
    assert beginnings([], [replace(prompt, subject_spans=())]) == []


def test_a_sentence_that_begins_alike_raises_the_threshold_and_moves_no_detector() -> None:
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 60.0, 0, 6.0))
    other = replace(capture.prompt, prompt_ids=(*capture.prompt.prompt_ids, 4))
    rows = [
        planner._rows(capture, 0, [capture.prompt], {capture.prompt: 0}, sentences=sentences)
        for sentences in ([], [other])
    ]
    shapes = [planner._shape(0, one, 0.0) for one in rows]
    assert torch.equal(shapes[0].detector.row, shapes[1].detector.row)
    assert [shape.threshold for shape in shapes] == [0.5, 0.75]


def test_the_latest_earlier_facts_are_looked_at() -> None:
    llm = model()
    many = [unit(llm, (f"w5 w{12 + i % 18} w{12 + i // 18} w9 w4", "w7", "w9")) for i in range(80)]
    alone, crowd = planned(llm, many[-_ALIKE:]), planned(llm, many)
    assert torch.equal(alone.detector.row, crowd.detector.row)
