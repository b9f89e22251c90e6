"""Settings of edits and comparisons; read by the command line without torch."""

from __future__ import annotations

from typing import Annotated

import tyro

from hiedit_agents.command_line import Switch
from hiedit_env.datasets.requests import PromptForm
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
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.names import GENERATED, AskedForm, Metric

#: Updates per fact where neither the user nor the agent says otherwise.
MAX_STEPS = 5
#: n of ``edits_per_step``, as an option.
Batch = Annotated[AtLeast1, tyro.conf.arg(name="batch", aliases=("--edits-per-step",))]
#: Given as one of two flags, see :class:`Ending`.
EndToken = Annotated[bool | None, tyro.conf.Suppress]


@settings
class Ending:
    """Whether answers end in the token that ends the model's turn."""

    end_token: Switch = False
    """put the token that ends the model's turn behind every answer, for every agent and measure
    alike; the default, except for the toy models and where the tokenizer has none"""
    no_end_token: Switch = False
    """put none there"""

    def __post_init__(self) -> None:
        if self.end_token and self.no_end_token:
            raise SettingsError("--end-token and --no-end-token are both given; leave one out")

    @property
    def chosen(self) -> bool | None:
        """The choice; None for none."""
        return True if self.end_token else False if self.no_end_token else None


@settings
class EditSettings(RuleSettings):
    """Which model is edited, and how; what is given here goes before the agent's own settings."""

    model: Name = "smollm2-135m"
    """smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a Hugging Face
    id"""
    layers_per_edit: AtLeast1 | None = None
    """K, for an agent that chooses a number of layers; by default the agent's own, or half of the
    layers"""
    edits_per_step: Batch = 1
    """facts that are written together, with the same layers"""
    prompt_form: PromptForm | None = None
    """the form in which facts are written: plain, chat (through the tokenizer's chat template), or
    both; by default both where the tokenizer has a template, else plain"""
    end_token: EndToken = None
    """see :class:`Ending`"""


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
    edits_per_step: Batch = 1
    """facts that one step edits together, with the same layers"""
    end_token: EndToken = None
    """see :class:`Ending`"""
    ask_in_chat: bool = False
    """ask in chat as well, also where facts are edited as plain prompts"""
    generation: Annotated[tuple[Metric, ...], Must("a tuple of metrics")] = GENERATED
    """metrics for which the evaluation generates answers, which takes most of its time"""

    @property
    def forms(self) -> tuple[AskedForm, ...]:
        """The forms in which the evaluation asks."""
        return ("plain", "chat") if self.ask_in_chat else super().forms
