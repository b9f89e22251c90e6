"""A contextual bandit: Bayesian linear regression of every option's reward on the observation."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hiedit_env.errors import SettingsError

Exploration = Literal["greedy", "epsilon", "thompson"]


class LinearBandit:
    """Predicts the reward of M options from an observation, and chooses one.

    One ridge regression per option on standardised features and a constant. The constant is not
    shrunk, so that without any signal the choice is that of the best mean. The weight of the
    ridge is chosen by leave-one-out error, which regression gives in closed form (the PRESS
    statistic); a weight of infinity, that is the means alone, is among the candidates.

    Args:
        exploration: ``"greedy"`` takes the best prediction; ``"epsilon"`` a random option with
            probability ``epsilon``; ``"thompson"`` the best of one draw of all coefficients from
            their posterior (Gaussian noise of the residuals' variance).
        epsilon: Share of random choices.
        seed: Of the draws.

    Raises:
        SettingsError: unknown exploration, or ``epsilon`` outside [0, 1].
    """

    RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, np.inf)

    def __init__(
        self, exploration: Exploration = "greedy", *, epsilon: float = 0.1, seed: int = 0
    ) -> None:
        if exploration not in get_args(Exploration):
            raise SettingsError(
                f"exploration must be one of {get_args(Exploration)}, got {exploration!r}"
            )
        if not 0 <= epsilon <= 1:
            raise SettingsError(f"epsilon must be in [0, 1], got {epsilon!r}")
        self.exploration: Exploration = exploration
        self.epsilon = epsilon
        self._generator = np.random.default_rng([seed, 7])
        self._fitted = False

    def fit(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> None:
        """Learns from facts of which the reward of every option is known.

        Args:
            observations: N × D.
            rewards: N × M.

        Raises:
            SettingsError: fewer than two facts, or numbers of facts that differ.
        """
        if len(observations) != len(rewards) or len(rewards) < 2:
            raise SettingsError(
                f"there must be at least two facts with a reward of every option, got "
                f"{len(observations)} observations and {len(rewards)} rows of rewards"
            )
        x = np.asarray(observations, np.float64)
        self._mean, self._scale = x.mean(0), x.std(0)
        self._scale[self._scale < 1e-9] = np.inf
        z = (x - self._mean) / self._scale
        y = np.asarray(rewards, np.float64)
        self._means = y.mean(0)
        # Centred, so that the constant is free.
        u, s, vt = np.linalg.svd(z, full_matrices=False)
        target = u.T @ (y - self._means)
        errors = []
        for ridge in self.RIDGES:
            share = s**2 / (s**2 + ridge)
            fitted = u @ (share[:, None] * target)
            leverage = (u**2 * share).sum(1) + 1 / len(z)
            left_out = (y - self._means - fitted) / (1 - leverage).clip(1e-6)[:, None]
            errors.append(float((left_out**2).mean()))
        self.ridge = self.RIDGES[int(np.argmin(errors))]
        self._weights = vt.T @ ((s / (s**2 + self.ridge))[:, None] * target)
        share = s**2 / (s**2 + self.ridge)
        freedom = max(1.0, len(z) - 1 - share.sum())
        residuals = y - self._means - z @ self._weights
        self._noise = np.sqrt((residuals**2).sum(0) / freedom)
        # A square root of the posterior covariance, up to the noise; directions never seen are 0.
        self._root = vt.T * np.sqrt(np.where(np.isinf(self.ridge), 0.0, 1 / (s**2 + self.ridge)))
        self._count = len(z)
        self._fitted = True

    def predict(self, observations: NDArray[np.floating]) -> NDArray[np.float64]:
        """The expected reward of every option, N × M.

        Raises:
            SettingsError: nothing was learned yet.
        """
        features = self._features(observations)
        found: NDArray[np.float64] = self._means + features @ self._weights
        return found

    def choose(self, observations: NDArray[np.floating]) -> NDArray[np.int64]:
        """Index of the option for each of N observations."""
        scores = self.predict(observations)
        if self.exploration == "thompson":
            shape = (len(scores), self._root.shape[1], scores.shape[1])
            drawn = np.einsum(
                "nk,nkm->nm",
                self._features(observations) @ self._root,
                self._generator.standard_normal(shape),
            )
            means = self._generator.standard_normal(scores.shape) / np.sqrt(self._count)
            scores = scores + self._noise * (drawn + means)
        best = scores.argmax(1)
        if self.exploration == "epsilon":
            random = self._generator.integers(scores.shape[1], size=len(best))
            best = np.where(self._generator.random(len(best)) < self.epsilon, random, best)
        found: NDArray[np.int64] = best.astype(np.int64)
        return found

    def _features(self, observations: NDArray[np.floating]) -> NDArray[np.float64]:
        if not self._fitted:
            raise SettingsError("the bandit has learned nothing yet; call fit() first")
        found: NDArray[np.float64] = (
            np.asarray(observations, np.float64) - self._mean
        ) / self._scale
        return found
