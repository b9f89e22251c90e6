"""What was measured of one layer: trials, the score, and the choice of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hiedit_env.errors import LayerError
from hiedit_env.model.architectures import CandidateLayer

#: Nats per token that are added to the damage.
FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class Trial:
    """One fact written into one layer.

    Args:
        given: Whether every token of the answer is the argmax under teacher forcing in the end.
        size: ‖change‖ / ‖weight‖ (Frobenius); NaN for a weight of zeros.
        gain: Nats per token gained on the fact.
        paraphrase_gain: The same, mean over the paraphrases; NaN where there are none.
        paraphrases_given: Share of the paraphrases that are given; NaN where there are none.
        unrelated: KL in nats per token on unrelated prompts; NaN where there are none.
        swapped: The same on subject-swapped prompts.
        agreement: Share of the unedited model's answer tokens that are still the argmax, over all
            unrelated and swapped prompts.
        seconds: Time of one update: reading, backward pass from the answer to the layer's block,
            and the rule.
    """

    given: bool
    size: float
    gain: float
    paraphrase_gain: float
    paraphrases_given: float
    unrelated: float
    swapped: float
    agreement: float
    seconds: float

    @property
    def effect(self) -> float:
        """Mean of the gains on the fact and on its paraphrases; 0 if the fact is not given."""
        if not self.given:
            return 0.0
        return float(np.nanmean([self.gain, self.paraphrase_gain]))

    @property
    def damage(self) -> float:
        """Mean of the divergences on unrelated and on swapped prompts."""
        return float(np.nanmean([self.unrelated, self.swapped]))


@dataclass(frozen=True, slots=True)
class LayerScore:
    """What was measured of one layer, means over the facts; see :class:`Trial`."""

    name: str
    block: int
    shape: tuple[int, int]
    given: float
    gain: float
    paraphrase_gain: float
    paraphrases_given: float
    unrelated: float
    swapped: float
    agreement: float
    size: float
    seconds: float
    effect: float
    damage: float
    score: float
    #: Standard error of the score over the facts (jackknife); NaN for a single fact.
    score_error: float

    @classmethod
    def of(cls, layer: CandidateLayer, trials: Sequence[Trial]) -> LayerScore:
        """Summarises one trial per fact; size and seconds are medians."""
        effects, damages = ([getattr(t, n) for t in trials] for n in ("effect", "damage"))
        means = {
            name: mean_known([getattr(t, name) for t in trials])
            for name in (
                "given",
                "gain",
                "paraphrase_gain",
                "paraphrases_given",
                "unrelated",
                "swapped",
                "agreement",
            )
        }
        value, error = score_of(effects, damages)
        return cls(
            name=layer.name,
            block=layer.block,
            shape=(layer.d_in, layer.d_out),
            **means,
            size=float(np.median([t.size for t in trials])),
            seconds=float(np.median([t.seconds for t in trials])),
            effect=mean_known(effects),
            damage=mean_known(damages),
            score=value,
            score_error=error,
        )


def score_of(effects: Sequence[float], damages: Sequence[float]) -> tuple[float, float]:
    """Score of a layer, and its standard error over the facts by the jackknife.

    Args:
        effects: Per fact, nats per token.
        damages: Per fact, nats per token.

    >>> score_of([2.0, 4.0], [0.5, 1.4])
    (3.0, 0.4388714733542318)
    """
    effect, damage = np.array(effects, float), np.array(damages, float)
    count = len(effect)
    value = float(effect.mean() / (damage.mean() + FLOOR))
    if count < 2:
        return value, float("nan")
    others = [
        np.delete(effect, i).mean() / (np.delete(damage, i).mean() + FLOOR) for i in range(count)
    ]
    spread = np.array(others) - np.mean(others)
    return value, float(np.sqrt((count - 1) / count * (spread**2).sum()))


def propose(scores: Sequence[LayerScore], count: int) -> list[str]:
    """The candidates: the ``count`` layers of the highest score above 0, in the order given.

    Raises:
        LayerError: no layer has a score above 0.
    """
    ranked = sorted((s for s in scores if s.score > 0), key=lambda s: -s.score)
    if not ranked:
        raise LayerError(
            "no layer alone gives any of these facts, so none is worth proposing; give other facts "
            "or another update rule"
        )
    chosen = {s.name for s in ranked[:count]}
    return [s.name for s in scores if s.name in chosen]


def mean_known(values: Sequence[float]) -> float:
    """Mean of the numbers that are no NaN; NaN where there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
