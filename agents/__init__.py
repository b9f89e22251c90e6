"""Agents for the hiedit environments, most of them options-style.

The names in ``__all__`` are imported when they are first used:

>>> import hiedit_agents
>>> hiedit_agents.make_agent("random-layers").name
'random-layers'

==============  ================================================================================
``protocol``    what an agent is, and what a level with parameters is
``registry``    from a name on the command line to an agent
``hierarchy``   high levels that pick layers, low levels that compute updates, their training
``named``       agents as data: presets, and trained ones on disk
``editing``     the editor of a live model, its ledger, undo, what is exported
``serving``     an edited model behind an OpenAI-compatible server, and a page
``policies``    policies that an RL library trained, as agents
``rl``          training scripts: PPO in one file, one script per RL library
``trained``     the agents that ship with hiedit
==============  ================================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiedit_agents.editing.checks import Checks
    from hiedit_agents.editing.delta import apply_delta
    from hiedit_agents.editing.editor import Editor
    from hiedit_agents.editing.gguf_file import write_gguf
    from hiedit_agents.editing.ledger import Ledger
    from hiedit_agents.editing.results import EditResult
    from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
    from hiedit_agents.hierarchy.options import Choice, HierarchicalAgent, HighLevel, Option
    from hiedit_agents.hierarchy.rehearsal import Rehearsal
    from hiedit_agents.hierarchy.routers import PolicyRouter, StraightThroughRouter
    from hiedit_agents.hierarchy.simple import LayerChoiceAgent, OracleAgent
    from hiedit_agents.hierarchy.train_settings import TrainSettings
    from hiedit_agents.hierarchy.trainer import Trainer
    from hiedit_agents.named.spec import AgentSpec
    from hiedit_agents.policies.agent import PolicyAgent
    from hiedit_agents.policies.task import Task
    from hiedit_agents.protocol import Agent, Trainable
    from hiedit_agents.registry import make_agent

__all__ = [
    "Agent",
    "AgentSpec",
    "Checks",
    "Choice",
    "EditResult",
    "Editor",
    "HierarchicalAgent",
    "HighLevel",
    "Hypernetwork",
    "LayerChoiceAgent",
    "Ledger",
    "Option",
    "OracleAgent",
    "PolicyAgent",
    "PolicyRouter",
    "Rehearsal",
    "StraightThroughRouter",
    "Task",
    "TrainSettings",
    "Trainable",
    "Trainer",
    "apply_delta",
    "make_agent",
    "write_gguf",
]

#: Module → names that it holds; the imports above tell type checkers the same.
_EXPORTS = {
    "hiedit_agents.editing.checks": ("Checks",),
    "hiedit_agents.editing.delta": ("apply_delta",),
    "hiedit_agents.editing.editor": ("Editor",),
    "hiedit_agents.editing.gguf_file": ("write_gguf",),
    "hiedit_agents.editing.ledger": ("Ledger",),
    "hiedit_agents.editing.results": ("EditResult",),
    "hiedit_agents.hierarchy.hypernetwork": ("Hypernetwork",),
    "hiedit_agents.hierarchy.options": (
        "Choice",
        "HierarchicalAgent",
        "HighLevel",
        "Option",
    ),
    "hiedit_agents.hierarchy.rehearsal": ("Rehearsal",),
    "hiedit_agents.hierarchy.routers": (
        "PolicyRouter",
        "StraightThroughRouter",
    ),
    "hiedit_agents.hierarchy.simple": (
        "LayerChoiceAgent",
        "OracleAgent",
    ),
    "hiedit_agents.hierarchy.train_settings": ("TrainSettings",),
    "hiedit_agents.hierarchy.trainer": ("Trainer",),
    "hiedit_agents.named.spec": ("AgentSpec",),
    "hiedit_agents.policies.agent": ("PolicyAgent",),
    "hiedit_agents.policies.task": ("Task",),
    "hiedit_agents.protocol": (
        "Agent",
        "Trainable",
    ),
    "hiedit_agents.registry": ("make_agent",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

if not TYPE_CHECKING:  # or every name, mistyped ones too, would pass as Any

    def __getattr__(name: str) -> Any:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
