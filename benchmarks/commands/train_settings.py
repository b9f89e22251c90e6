"""Where and on what an agent is trained; read by the command line without torch."""

from __future__ import annotations

from typing import Annotated

import tyro

from hiedit_env.envs.settings import AskingSettings, AtLeast1, Dataset, Name, StepLength, settings


@settings
class TrainingRun(AskingSettings):
    """Where and on what to train."""

    agent: tyro.conf.Suppress[str]
    """name for :func:`hiedit_agents.registry.spec_agent`"""
    model: Name = "smollm2-135m"
    """smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a Hugging Face
    id"""
    name: str | None = None
    """name of the trained agent; by default AGENT"""
    dataset: Dataset | None = None
    """training facts: a built-in name, or a .json or .jsonl file; by default the facts that belong
    to the model"""
    exclude: Dataset | None = None
    """data set kept for an evaluation: its subjects and unrelated prompts are left out"""
    layers_per_edit: AtLeast1 | None = None
    """K of the high level that is trained; by default its own"""
    max_steps_per_edit: AtLeast1 | None = None
    """horizon of the options; by default the agent's own, or 5"""
    step_size: StepLength | None = None
    """nominal step size of the low level; by default its own"""
    end_token: Annotated[bool | None, tyro.conf.Suppress] = None
    """whether answers end in the token that ends the model's turn"""
