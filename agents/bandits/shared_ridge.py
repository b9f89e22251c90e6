"""One linear regression for all options: what an option's own numbers say about its reward."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hiedit_env.errors import SettingsError


class SharedRidge:
    """Predicts the rewards of M options from F numbers of each, with the same weights for all.

    Where :class:`.linear.LinearBandit` has M · D weights, this has F and one constant per option,
    so it learns from few facts. What all options of a fact have in common decides nothing, so
    rewards and numbers count by their difference to the fact's mean. The constants are not shrunk:
    without any signal the choice is that of the best mean. The weight of the ridge is chosen by the
    exact error on facts left out one at a time; infinity, that is the constants alone, is among the
    candidates.

    >>> numbers = np.array([[[0.0], [1.0]], [[1.0], [0.0]]] * 9)
    >>> ridge = SharedRidge()
    >>> ridge.fit(numbers, 2 * numbers[..., 0])
    >>> ridge.choose(np.array([[[0.0], [1.0]], [[1.0], [0.0]]])).tolist()
    [1, 0]
    """

    RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, np.inf)

    def __init__(self) -> None:
        self._fitted = False

    def fit(self, features: NDArray[np.floating], rewards: NDArray[np.floating]) -> None:
        """Learns from facts of which the reward of every option is known.

        Args:
            features: N × M × F.
            rewards: N × M.

        Raises:
            SettingsError: fewer than two facts, or shapes that differ.
        """
        x, y = np.asarray(features, np.float64), np.asarray(rewards, np.float64)
        if x.ndim != 3 or x.shape[:2] != y.shape or len(y) < 2:
            raise SettingsError(
                "there must be at least two facts with numbers and a reward of every option, got "
                f"shapes {x.shape} and {y.shape}"
            )
        self._mean = x.mean((0, 1))
        self._scale = x.std((0, 1))
        self._scale[self._scale < 1e-9] = np.inf
        design = self._design(x)
        options = y.shape[1]
        target = (y - y.mean(1, keepdims=True)).reshape(-1)
        rows = design.reshape(-1, design.shape[-1])
        errors, found = [], []
        for ridge in self.RIDGES:
            used = options if np.isinf(ridge) else rows.shape[1]
            own = rows[:, :used]
            penalty = np.zeros(used)
            penalty[options:] = 0.0 if np.isinf(ridge) else ridge
            inverse = np.linalg.pinv(own.T @ own + np.diag(penalty))
            weights = inverse @ own.T @ target
            left = (target - own @ weights).reshape(y.shape)
            blocks = own.reshape(*y.shape, used)
            hats = np.einsum("nif,fg,njg->nij", blocks, inverse, blocks)
            # A fact left out: (1 − H)⁻¹ times its residual, H its own part of the hat matrix.
            apart = np.linalg.pinv(np.eye(options) - hats, hermitian=True)
            errors.append(float(np.square(np.einsum("nij,nj->ni", apart, left)).mean()))
            found.append(np.concatenate((weights, np.zeros(rows.shape[1] - used))))
        best = int(np.argmin(errors))
        #: Mean squared error on facts left out, per ridge.
        self.errors = tuple(errors)
        self.ridge, self._weights, self._fitted = self.RIDGES[best], found[best], True

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Expected rewards of N × M options over the mean of their fact.

        Raises:
            SettingsError: nothing was learned yet.
        """
        if not self._fitted:
            raise SettingsError("the regression has learned nothing yet; call fit() first")
        found: NDArray[np.float64] = self._design(np.asarray(features, np.float64)) @ self._weights
        return found

    def choose(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """Index of the option for each of N facts."""
        found: NDArray[np.int64] = self.predict(features).argmax(1).astype(np.int64)
        return found

    def _design(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Constants and standardised numbers, both without their fact's mean: N × M × (M + F)."""
        options = features.shape[1]
        constants = np.broadcast_to(np.eye(options), (len(features), options, options))
        known = (features - self._mean) / self._scale
        both = np.concatenate((constants, known), 2)
        found: NDArray[np.float64] = both - both.mean(1, keepdims=True)
        return found
