"""One coin per layer: what a policy over MultiBinary(L) draws from, in two libraries' terms."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import TransformAction
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli, Independent


class LayerCoins(Independent):  # type: ignore[type-arg]  # not generic in older versions
    """Every layer is written or not by a coin of its own, as one distribution over L bits.

    Torch's Bernoulli with the actions of the environments: int8, and a mode that is never NaN.

    Args:
        logits: … × L, log-odds of writing each layer.

    >>> coins = LayerCoins(torch.tensor([[3.0, 0.0, -3.0]]))
    >>> coins.mode, coins.log_prob(coins.mode).shape
    (tensor([[1, 0, 0]], dtype=torch.int8), torch.Size([1]))
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(Bernoulli(logits=logits), 1)

    @property
    def mode(self) -> Tensor:
        """… × L int8, the more probable side of every coin; 0 at even odds."""
        return (self.logits > 0).to(torch.int8)

    @property
    def deterministic_sample(self) -> Tensor:
        """The mode, by the name that TorchRL knows it by."""
        return self.mode

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own
        """``sample_shape`` × … × L int8."""
        return super().sample(sample_shape).to(torch.int8)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of … × L zeros and ones of any dtype: …."""
        base: Any = super()
        found: Tensor = base.log_prob(value.to(self.logits.dtype))
        return found


def as_multi_discrete(envs: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """Environments with actions ``MultiDiscrete([2] * L)``, for libraries without ``MultiBinary``.

    Args:
        envs: Environments with the actions MultiBinary(L).
    """
    layers = envs.single_action_space
    assert isinstance(layers, gym.spaces.MultiBinary)

    def bits(actions: Any) -> NDArray[np.int8]:
        return np.asarray(actions).astype(np.int8)

    pairs = gym.spaces.MultiDiscrete(np.full(layers.n, 2))
    return TransformAction(envs, bits, single_action_space=pairs)
