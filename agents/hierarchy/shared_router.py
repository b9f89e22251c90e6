"""A router that knows no layer by name: one network scores every layer by what is seen of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiedit_agents.hierarchy.options import Choice
from hiedit_agents.hierarchy.routers import seeded_linear
from hiedit_agents.protocol import Observation
from hiedit_env.envs.effects import EFFECTS
from hiedit_env.envs.observations import (
    GLOBAL_FEATURES,
    LAYER_FEATURES,
    STANDING_FEATURES,
    size_of,
)
from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture

#: Features of a layer that mean the same in all layers and worlds: all but the projections.
COMMON_FEATURES = 6
#: Numbers per layer and about fact and stream that are read.
PER_LAYER = COMMON_FEATURES + 1 + EFFECTS
PER_FACT = GLOBAL_FEATURES + STANDING_FEATURES
#: Names of what is read: about a layer, then about fact and stream.
FEATURES = (
    *("key_size", "gradient_size", "gradient_share", "change", "gradient_cosine", "written_share"),
    *("overlap", "effect", "spill", "largest_spill", "interference", "largest_interference"),
    *("loss", "token_accuracy", "answered", "steps_share", "stream_share"),
    *("recent_retention", "agreement"),
)
#: What standardised features are clipped to.
_MOST = 5.0


class SharedScores(nn.Module, ABC):
    """Scores each of L layers, or options, by the same network, whatever it is called.

    They see each other through the mean and the maximum of what the first map makes of them (Zaheer
    et al. 2017, *Deep Sets*), so their order changes nothing but the order of the scores.

    A set of them m is drawn with probability softmax(Σ_l m_l score_l) among the sets that can be
    chosen; among all subsets every one is then drawn on its own.

    A subclass says what is read of an observation.

    Args:
        count: L.
        inputs: Number of features of each.
        hidden: Hidden units.
        seed: Of the random initial values.
    """

    def __init__(self, count: int, inputs: int, *, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.count, self.hidden = count, hidden
        generator = torch.Generator().manual_seed(seed)
        self.first = seeded_linear(inputs, hidden, generator)
        self.second = seeded_linear(3 * hidden, hidden, generator)
        self.score = seeded_linear(hidden, 1, generator)
        #: Mean and standard deviation of the features in training.
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    @abstractmethod
    def features(self, observations: NDArray[np.float32]) -> Tensor:
        """N × L × features float32 of N × D observations."""

    def standardise(self, observations: NDArray[np.float32]) -> None:
        """Takes mean and standard deviation of the features from training observations, N × D."""
        rows = self.features(observations).flatten(0, 1)
        self.mean.copy_(rows.mean(0))
        deviation = rows.std(0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def scores(self, features: Tensor) -> Tensor:
        """N × L from N × L × features."""
        known = ((features - self.mean) / self.scale).clamp(-_MOST, _MOST)
        hidden = self.first(known).tanh()
        shared = torch.cat((hidden.mean(1), hidden.max(1).values), 1)
        every = torch.cat((hidden, shared[:, None].expand(-1, self.count, -1)), 2)
        found: Tensor = self.score(self.second(every).tanh())[..., 0]
        return found

    def log_probabilities(self, features: Tensor, masks: Tensor) -> Tensor:
        """N × M, of each of M sets among them.

        Args:
            features: N × L × features.
            masks: M × L zeros and ones.
        """
        return (self.scores(features) @ masks.float().T).log_softmax(1)


class SharedRouter(SharedScores):
    """Scores each layer by the same network, so that what it learns holds in worlds never seen.

    It reads observations of version 2 behind
    :class:`~hiedit_env.wrappers.observe_effects.ObserveEffects`. Of a layer it sees the six numbers
    before the projections, the overlap with what the layer has stored, and the five effects; not
    which layer it is, nor the projections, whose meaning differs from world to world.

    The best choice is every layer whose score is above 0, which may be none.

    Args:
        num_layers: L.
        hidden: Hidden units.
        seed: Of the random initial values.
    """

    name = "shared"

    def __init__(self, num_layers: int, *, hidden: int = 64, seed: int = 0) -> None:
        super().__init__(num_layers, PER_LAYER + PER_FACT, hidden=hidden, seed=seed)
        self.num_layers = num_layers

    def reset(self, seed: int) -> None:
        """Nothing here is random."""

    def features(self, observations: NDArray[np.float32]) -> Tensor:
        """N × L × (features of the layer, then those of fact and stream) float32.

        Args:
            observations: N × D.

        Raises:
            SettingsError: observations of another length.
        """
        count = self.num_layers
        standing = size_of(count, 2)
        if observations.shape[1] != standing + EFFECTS * count:
            raise SettingsError(
                f"the router reads observations of {standing + EFFECTS * count} numbers, version 2 "
                f"of an id behind ObserveEffects; got {observations.shape[1]}"
            )
        table = torch.from_numpy(np.ascontiguousarray(observations, np.float32))
        own = table[:, : LAYER_FEATURES * count].view(-1, count, LAYER_FEATURES)
        first = LAYER_FEATURES * count + GLOBAL_FEATURES
        overlap = table[:, first : first + count, None]
        effects = table[:, standing:].view(-1, count, EFFECTS)
        facts = torch.cat(
            (table[:, first - GLOBAL_FEATURES : first], table[:, first + count : standing]), 1
        )
        return torch.cat(
            (own[..., :COMMON_FEATURES], overlap, effects, facts[:, None].expand(-1, count, -1)), 2
        )

    def choose(
        self, observation: Observation, capture: Capture, generator: torch.Generator | None = None
    ) -> Choice:
        """The best choice; with ``generator`` one that is drawn, each layer on its own."""
        scores = self.scores(self.features(np.asarray(observation)[None]))[0]
        if generator is None:
            return Choice((scores > 0).numpy())
        drawn = torch.rand(len(scores), generator=generator) < scores.sigmoid()
        signs = torch.where(drawn, scores, -scores)
        return Choice(drawn.numpy(), nn.functional.logsigmoid(signs).sum())
