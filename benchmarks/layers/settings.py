"""Settings of ``hiedit layers``; read by the command line without torch."""

from __future__ import annotations

from typing import Annotated

from hiedit_env.envs.settings import (
    AtLeast0,
    AtLeast1,
    Dataset,
    LayerPatterns,
    ModelSettings,
    Must,
    Name,
    settings,
)


@settings
class LayerScanSettings(ModelSettings):
    """Which layers of which model are measured, and on which facts."""

    model: Name = "smollm2-135m"
    """smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a Hugging Face
    id"""
    layers: LayerPatterns = None
    """weight matrices to measure, such as 'model.layers.{4-20}.mlp.down_proj'; by default the MLP's
    matrices and the attention output of every block"""
    facts: Dataset | None = None
    """.json or .jsonl with prompt, answer and subject per row (or zsRE, CounterFact, … rows), or a
    built-in name; by default the facts that belong to the model"""
    num_facts: AtLeast1 = 8
    """facts that are written into every layer; spread over the relations of the data"""
    count: AtLeast1 | None = None
    """layers to propose; by default two for every five blocks, at least 4, at most half of those
    that are measured"""
    update_rule: Annotated[str, Must("a name or 'module:Class'")] | None = None
    """decorrelated, outer-product, ridge, gradient or module:Class; by default the rule that
    belongs to the model"""
    max_steps_per_edit: AtLeast1 = 10
    """maximum number of updates per fact and layer"""
    seed: AtLeast0 = 0
    """draws facts, subjects and prompts"""
