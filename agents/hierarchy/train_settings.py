"""The arguments of training, with their meaning, in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field

from hiedit_env.envs.settings import (
    AtLeast0,
    AtLeast1,
    Discount,
    Must,
    Positive,
    Weight,
    settings,
)
from hiedit_env.evaluation.names import LocalityReference

Share = Annotated[float, Field(ge=0, lt=1), Must("at least 0 and below 1")]


@settings
class TrainSettings:
    """How an agent is trained; agents have defaults of their own for some of these."""

    episodes: AtLeast0 = 20
    """episodes to train on; with 0 a low level is calibrated and nothing more"""
    edits_per_episode: AtLeast1 = 30
    """facts per episode"""
    window: AtLeast0 = 0
    """facts per optimiser step; 0 for one step per episode (as RLEdit does)"""
    low_learning_rate: Positive = 1e-3
    """Adam's, for the low level; ten times as much for step sizes, ridges and the like"""
    high_learning_rate: Positive = 3e-3
    """Adam's, for the high level"""
    anneal: bool = False
    """whether the learning rates fall to 0 over the episodes, in a straight line"""
    train_low: bool = True
    """whether the low level is trained"""
    train_high: bool = True
    """whether the high level is trained"""
    max_grad_norm: Positive = 1.0
    """norm that gradients are clipped to"""
    l2: Weight = 1e-4
    """η, weight of the squared norm of the updates"""
    edit_weight: Weight = 1.0
    """weight of success on the fact and its paraphrases"""
    locality_weight: Weight = 1.0
    """λ, weight of the KL divergence on unrelated prompts"""
    retention_weight: Weight = 1.0
    """weight of the remembered edits"""
    sparsity_weight: Weight = 0.1
    """weight of the share of layers left alone (high level)"""
    retention_window: AtLeast0 = 10
    """k, how many past edits are remembered"""
    retention_decay: Discount = 0.95
    """μ, weight of a remembered edit per edit of age"""
    locality_reference: LocalityReference = "unedited"
    """what unrelated prompts are compared with: the unedited model, or the previous"""
    future_damage: Weight = 0.0
    """weight of the penalty for damage to later facts, as a number of facts (trained low level)"""
    future_damage_prompts: AtLeast1 = 4
    """earlier facts of the episode, and unrelated prompts, that this is measured on"""
    samples_per_fact: AtLeast1 = 2
    """options a policy router tries per fact"""
    intrinsic: bool = False
    """compare sampled options with all layers, and not with each other"""
    normalize_advantage: bool = False
    """divide a window's advantages by their root mean square (policy router)"""
    entropy_weight: Weight = 0.0
    """weight of the entropy of a policy router's choice, which keeps it from settling early"""
    gamma: Discount = 1.0
    """γ, discount per primitive step"""
    calibration: AtLeast0 = 200
    """unrelated prompts of training facts whose keys a hypernetwork is shown first"""
    own_texts: AtLeast0 = 0
    """texts that the model writes itself at first, which the low level 'neuron' is shown as well;
    768 keep other texts as they are and take 14 minutes for 135M parameters on a core"""
    held_out: Share = 0.1
    """share of the subjects kept for the evaluation at the end"""
    evaluation_edits: AtLeast0 = 50
    """facts of that evaluation; 0 for none"""
    seed: AtLeast0 = 0
    """seed of everything random"""

    def reward_weights(self) -> dict[str, float]:
        """The environment's ``reward_weights``."""
        return {
            "edit": self.edit_weight,
            "locality": self.locality_weight,
            "recent_retention": self.retention_weight,
            "sparsity": self.sparsity_weight,
        }


def defaults() -> dict[str, Any]:
    """Every setting's default, by name.

    >>> defaults()["window"]
    0
    """
    return {field.name: field.default for field in fields(TrainSettings)}
