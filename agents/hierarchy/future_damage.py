"""A penalty for the damage that an update does to later facts of the episode.

An update made for one fact stays in the weights while all later facts are edited and asked. The
objective of the present fact counts its damage once, but the episode suffers it again and again.
This term of the objective stands for the later facts: it is the loss of the edited model on a
random sample, multiplied by a fixed number of later facts (the setting ``future_damage``, 0 for no
penalty):

    future_damage × ( retention weight × mean over n earlier facts of
                          (−log p(y | x) + mean over paraphrases) / 2
                      + λ × mean over n unrelated prompts of KL[p_unedited ‖ p] )

Both samples are drawn anew for every fact: the facts from all earlier ones of this episode, the
prompts from all training facts. The number of later facts is a constant, so that the learned policy
does not depend on the length of an episode. (Ours; the memory of HiEdit and RLEdit holds the last k
edits, and each counts once.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.evaluation.scores import scores_together
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.low_rank import Updates


class FutureDamage:
    """Measures the damage of the present weights to the rest of an episode, on a random sample.

    Args:
        env: The environment that is trained in; its ``reward_weights`` weigh the two sums.
        requests: Training facts, whose unrelated prompts are drawn from.
        settings: Of the training: ``future_damage`` and ``future_damage_prompts``, n.
        cache_bytes: Bound of the memory for the unedited model's log-probabilities.
    """

    def __init__(
        self,
        env: EditingEnv,
        requests: Sequence[Request],
        settings: TrainSettings,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self.env, self.settings = env, settings
        self._probes = list(dict.fromkeys(p for request in requests for p in request.locality))
        self._unedited = UneditedModel(env.llm, cache_bytes=cache_bytes)
        self._facts: list[EncodedFact] = []
        self._references: dict[EncodedPrompt, Tensor] = {}

    def draw(self, rng: np.random.Generator) -> None:
        """Draws the sample for the present fact's updates; the fact itself is not in it.

        Raises:
            PromptError: a drawn unrelated prompt that cannot be tokenised.
        """
        weights, count = self._weights, self.settings.future_damage_prompts
        own = [probe for fact in self.env.unit for probe in fact.request.locality]
        earlier = self.env.past_facts
        # Nothing that weighs nothing: 0 times a loss that is not finite would be no number.
        facts = _some(len(earlier), count if weights["recent_retention"] else 0, rng)
        # As many more as the present fact has, which are left out.
        places = _some(len(self._probes), count + len(own) if weights["locality"] else 0, rng)
        probes = [p for p in (self._probes[i] for i in places) if p not in own][:count]
        encoded = [self.env.llm.encode(probe.prompt, probe.answer) for probe in probes]
        self._facts = [earlier[i] for i in facts]
        self._references = {p: self._unedited.log_probs((p,))[p] for p in encoded}

    def loss(self, updates: Updates | None = None) -> Tensor:
        """The penalty at the present weights, with updates as an overlay.

        Args:
            updates: As for :meth:`~hiedit_env.envs.base.EditingEnv.loss`; None for none.

        Returns:
            Scalar tensor, differentiable in the factors of ``updates``.

        Raises:
            UpdateShapeError, NonFiniteUpdateError: updates that do not fit or are not finite.
        """
        prompts: list[EncodedPrompt] = list(self._references)
        weights = [self._weights["locality"] / max(len(prompts), 1)] * len(prompts)
        for fact in self._facts:
            share = self._weights["recent_retention"] / len(self._facts)
            own = share / 2 if fact.paraphrases else share
            prompts += (*fact.prompts, *fact.paraphrases)
            weights += [own / len(fact.prompts)] * len(fact.prompts)
            weights += [(share - own) / len(fact.paraphrases) for _ in fact.paraphrases]
        llm = self.env.llm
        losses, _, kl, _ = scores_together([(llm, prompts, self._references)], updates)[0].unbind(1)
        values = torch.cat((kl[: len(self._references)], -losses[len(self._references) :]))
        return self.settings.future_damage * (values @ values.new_tensor(weights))

    @property
    def _weights(self) -> dict[str, float]:
        return self.env.weights_of_terms


def _some(number: int, count: int, rng: np.random.Generator) -> list[int]:
    """At most ``count`` different indices below ``number``."""
    return [int(i) for i in rng.choice(number, min(count, number), replace=False)]
