"""The score of a layer by hand, and which layers are proposed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from hiedit_benchmarks.layers.scores import LayerScore, Trial, propose, score_of
from hiedit_env.errors import LayerError
from hiedit_env.model.architectures import CandidateLayer

LAYER = CandidateLayer("model.layers.3.mlp.up_proj", nn.Linear(2, 5), 3, 2, 5, True)
NAN = float("nan")


def trial(**changes: Any) -> Trial:
    values = {
        "given": True,
        "size": 0.1,
        "gain": 4.0,
        "paraphrase_gain": 2.0,
        "paraphrases_given": 0.5,
        "unrelated": 0.1,
        "swapped": 0.5,
        "agreement": 0.75,
        "seconds": 0.2,
    }
    return Trial(**(values | changes))


def test_effect_and_damage_are_means_of_two() -> None:
    assert trial().effect == 3.0
    assert trial().damage == pytest.approx(0.3)
    # What was not measured does not count.
    assert trial(paraphrase_gain=NAN).effect == 4.0
    assert trial(swapped=NAN).damage == pytest.approx(0.1)
    assert trial(unrelated=NAN).damage == 0.5
    # A fact that is not given is worth nothing, whatever was gained on the way.
    assert trial(given=False).effect == 0.0
    assert trial(given=False).damage == pytest.approx(0.3)


def test_the_score_by_hand() -> None:
    # (3 + 0) / 2 = 1.5 over (0.3 + 0.6) / 2 + 0.05 = 0.5.
    two = [trial(), trial(given=False, unrelated=0.6, swapped=0.6, agreement=NAN, seconds=0.4)]
    score = LayerScore.of(LAYER, two)
    assert score.score == pytest.approx(3.0)
    assert (score.effect, score.given, score.agreement) == (1.5, 0.5, 0.75)
    assert score.damage == pytest.approx(0.45)
    assert score.seconds == pytest.approx(0.3)
    assert (score.name, score.block, score.shape) == (LAYER.name, 3, (2, 5))
    # Without one fact the score is 0 / 0.65, without the other 3 / 0.35.
    high = 3 / 0.35
    assert score.score_error == pytest.approx(math.sqrt(0.5 * 2 * (high / 2) ** 2))


def test_a_layer_that_changes_nothing_scores_nothing() -> None:
    assert score_of([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0)
    value, error = score_of([1.0], [0.45])
    assert value == pytest.approx(2.0)
    assert math.isnan(error), "one fact has no spread"


def scored(name: str, score: float) -> LayerScore:
    made = LayerScore.of(LAYER, [trial()])
    values = {field: getattr(made, field) for field in LayerScore.__dataclass_fields__}
    return LayerScore(**(values | {"name": name, "score": score}))


def test_the_best_are_proposed_in_forward_order() -> None:
    scores = [scored("a", 1.0), scored("b", 0.0), scored("c", 3.0), scored("d", 2.0)]
    assert propose(scores, 2) == ["c", "d"]
    assert propose(scores, 1) == ["c"]
    assert propose(scores, 9) == ["a", "c", "d"], "0 is not worth proposing"
    with pytest.raises(LayerError, match="no layer alone gives any"):
        propose(scores[1:2], 2)
