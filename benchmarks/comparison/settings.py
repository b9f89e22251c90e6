"""Settings of edits and comparisons; read by the command line without torch."""

from __future__ import annotations

from typing import Annotated

from hiedit_env.envs.settings import (
    AtLeast0,
    AtLeast1,
    EditingSettings,
    Must,
    Name,
    NumEdits,
    RuleSettings,
    settings,
)
from hiedit_env.evaluation.names import METRICS, Metric

#: Updates per fact where neither the user nor the agent says otherwise.
MAX_STEPS = 5


@settings
class EditSettings(RuleSettings):
    """Which model is edited, and how; what is given here goes before the agent's own settings."""

    model: Name = "smollm2-135m"
    """smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a Hugging Face
    id"""
    layers_per_edit: AtLeast1 | None = None
    """K, for an agent that chooses a number of layers; by default the agent's own, or half of the
    layers"""


@settings
class CompareSettings(EditingSettings):
    """What is the same for every agent and seed of a comparison.

    Settings of agents that are given here go before the agents' own; settings within an agent's
    name go before these.
    """

    model: Name = "smollm2-135m"
    """smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a Hugging Face
    id"""
    num_edits: NumEdits | None = 100
    """facts per stream"""
    retention_window: AtLeast0 = 0
    """k, how many past edits are remembered in the reward; no built-in agent reads the reward, and
    remembering takes most of a step's time"""
    layers_per_edit: AtLeast1 | None = None
    """K, for agents that choose a number of layers; by default the agent's own, or half of the
    layers"""
    generation: Annotated[tuple[Metric, ...], Must("a tuple of metrics")] = METRICS
    """metrics for which the evaluation generates answers, which takes most of its time"""
