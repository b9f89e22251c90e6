"""The arguments of training, with their meaning, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from hiedit_env.errors import SettingsError


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How an agent is trained; every field is an option of ``hiedit train``.

    The help texts are in the fields' metadata: :func:`describe` lists them.

    Raises:
        SettingsError: a value out of range.
    """

    trajectories: int = _option(
        20, "episodes to train on; with 0 a low level is calibrated and nothing more"
    )
    edits_per_trajectory: int = _option(30, "facts per episode")
    window: int = _option(
        0, "facts per optimiser step; 0 for one step per trajectory (RLEdit's trajectory level)"
    )
    low_learning_rate: float = _option(
        1e-3, "Adam's, for the low level; ten times as much for step sizes, ridges and the like"
    )
    high_learning_rate: float = _option(3e-3, "Adam's, for the high level")
    train_low: bool = _option(True, "whether the low level is trained")
    train_high: bool = _option(True, "whether the high level is trained")
    max_grad_norm: float = _option(1.0, "norm that gradients are clipped to")
    l2: float = _option(1e-4, "η, weight of the squared norm of the updates")
    edit_weight: float = _option(1.0, "weight of success on the fact and its paraphrases")
    locality_weight: float = _option(1.0, "λ, weight of the KL divergence on unrelated prompts")
    retention_weight: float = _option(1.0, "weight of the remembered edits")
    sparsity_weight: float = _option(0.1, "weight of the share of layers left alone (high level)")
    retention_window: int = _option(10, "k, how many past edits are remembered")
    retention_decay: float = _option(0.95, "μ, weight of a remembered edit per edit of age")
    locality_reference: str = _option(
        "unedited", "what unrelated prompts are compared with: the unedited model, or the previous"
    )
    future_damage: float = _option(
        0.0,
        "weight of the penalty for damage to later facts, as a number of facts (trained low level)",
    )
    future_damage_prompts: int = _option(
        4, "earlier facts of the episode, and unrelated prompts, that this is measured on"
    )
    samples_per_fact: int = _option(2, "options a policy router tries per fact")
    intrinsic: bool = _option(
        False, "compare sampled options with all layers, and not with each other"
    )
    normalize_advantage: bool = _option(
        False, "divide a window's advantages by their root mean square (policy router)"
    )
    entropy_weight: float = _option(
        0.0, "weight of the entropy of a policy router's choice, which keeps it from settling early"
    )
    gamma: float = _option(1.0, "γ, discount per primitive step")
    calibration: int = _option(
        200, "unrelated prompts of training facts whose keys a hypernetwork is shown first"
    )
    held_out: float = _option(0.1, "share of the subjects kept for the evaluation at the end")
    evaluation_edits: int = _option(50, "facts of that evaluation; 0 for none")
    seed: int = _option(0, "seed of everything random")

    def __post_init__(self) -> None:
        for name, least in (
            ("trajectories", 0),
            ("edits_per_trajectory", 1),
            ("samples_per_fact", 1),
            ("window", 0),
            ("retention_window", 0),
            ("future_damage_prompts", 1),
            ("evaluation_edits", 0),
            ("calibration", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be ≥ {least}, got {getattr(self, name)!r}")
        for name in ("low_learning_rate", "high_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise SettingsError(f"{name} must be a positive finite number, got {value!r}")
        for name in (
            *("l2", "entropy_weight", "edit_weight", "locality_weight", "future_damage"),
            *("retention_weight", "sparsity_weight"),
        ):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise SettingsError(f"{name} must be a finite number ≥ 0, got {value!r}")
        for name in ("gamma", "retention_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingsError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")
        if not 0 <= self.held_out < 1:
            raise SettingsError(f"held_out must be at least 0 and below 1, got {self.held_out!r}")

    def reward_weights(self) -> dict[str, float]:
        """The environment's ``reward_weights``."""
        return {
            "edit": self.edit_weight,
            "locality": self.locality_weight,
            "retention": self.retention_weight,
            "sparsity": self.sparsity_weight,
        }


def describe() -> dict[str, tuple[Any, str]]:
    """Every setting's default and meaning, by name.

    >>> describe()["window"][0]
    0
    """
    return {f.name: (f.default, str(f.metadata["help"])) for f in fields(TrainSettings)}
