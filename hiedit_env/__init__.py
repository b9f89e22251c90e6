"""Lifelong language-model editing as Gymnasium environments.

Importing this package registers the environments and imports neither torch nor transformers:

>>> import gymnasium, hiedit_env
>>> for name in sorted(id for id in gymnasium.registry if id.startswith("hiedit/")):
...     print(name)
hiedit/LayerSelection-v1
hiedit/LayerSelection-v2
hiedit/LifelongEdit-v1
hiedit/LifelongEdit-v2
hiedit/Planted-v1
hiedit/Planted-v2
hiedit/PlantedWorlds-v2
hiedit/StepSize-v1
hiedit/StepSize-v2
hiedit/Toy-v1

The names in ``__all__`` are imported when they are first used, and torch with them if they need it:

>>> hiedit_env.load_requests("tiny-facts")[0].answer
'Averlund'

Sub-packages, each of which imports only those above it:

==============  ================================================================================
``datasets``    requests, file formats, splits, streams
``model``       a name → a model; candidate layers, tokens, texts, memory
``resident``    ``ResidentLLM``: exact editable weights, captures, low-rank updates
``rules``       update rules: from a capture to low-rank updates
``evaluation``  reward terms, metrics, when a text counts as the answer
``envs``        the environments
``wrappers``    changes of an environment's actions or observations
``testing``     a toy environment and assertions, for tests of agents
==============  ================================================================================
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register

if TYPE_CHECKING:
    from hiedit_env.datasets.load import load_requests, read_dataset
    from hiedit_env.datasets.report import DatasetReport
    from hiedit_env.datasets.requests import Probe, Request
    from hiedit_env.datasets.streams import fingerprint, split_by_subject, stream
    from hiedit_env.envs.base import EditingEnv
    from hiedit_env.envs.layer_selection import LayerSelection
    from hiedit_env.envs.lifelong_edit import LifelongEdit
    from hiedit_env.envs.planted import Planted
    from hiedit_env.envs.state import EditRecord, EnvState, History
    from hiedit_env.envs.step_size import StepSize
    from hiedit_env.envs.tried_options import TriedOptions
    from hiedit_env.envs.vector import VectorEditing
    from hiedit_env.errors import (
        ActionError,
        CheckpointError,
        DatasetError,
        DeviceError,
        HieditError,
        HieditWarning,
        LayerError,
        LedgerError,
        MissingLibraryError,
        ModelError,
        NonFiniteUpdateError,
        NotEnoughMemoryError,
        PromptError,
        ResultsExistError,
        SettingsError,
        UpdateShapeError,
    )
    from hiedit_env.evaluation.matching import is_match
    from hiedit_env.evaluation.metrics import Evaluation, evaluate
    from hiedit_env.model.architectures import CandidateLayer, find_candidates
    from hiedit_env.model.loading import LoadedModel, load_model
    from hiedit_env.resident.capture import Capture
    from hiedit_env.resident.low_rank import LowRankUpdate
    from hiedit_env.resident.resident import ResidentLLM
    from hiedit_env.rules.base import UpdateRule
    from hiedit_env.rules.names import make_rule

__version__ = "0.1.0"

__all__ = [
    "ActionError",
    "CandidateLayer",
    "Capture",
    "CheckpointError",
    "DatasetError",
    "DatasetReport",
    "DeviceError",
    "EditRecord",
    "EditingEnv",
    "EnvState",
    "Evaluation",
    "HieditError",
    "HieditWarning",
    "History",
    "LayerError",
    "LayerSelection",
    "LedgerError",
    "LifelongEdit",
    "LoadedModel",
    "LowRankUpdate",
    "MissingLibraryError",
    "ModelError",
    "NonFiniteUpdateError",
    "NotEnoughMemoryError",
    "Planted",
    "Probe",
    "PromptError",
    "Request",
    "ResidentLLM",
    "ResultsExistError",
    "SettingsError",
    "StepSize",
    "TriedOptions",
    "UpdateRule",
    "UpdateShapeError",
    "VectorEditing",
    "evaluate",
    "find_candidates",
    "fingerprint",
    "is_match",
    "load_model",
    "load_requests",
    "make_rule",
    "read_dataset",
    "split_by_subject",
    "stream",
]

#: Module → names that it holds; the imports above tell type checkers the same.
_EXPORTS = {
    "hiedit_env.datasets.load": ("load_requests", "read_dataset"),
    "hiedit_env.datasets.report": ("DatasetReport",),
    "hiedit_env.datasets.requests": (
        "Probe",
        "Request",
    ),
    "hiedit_env.datasets.streams": (
        "fingerprint",
        "split_by_subject",
        "stream",
    ),
    "hiedit_env.envs.base": ("EditingEnv",),
    "hiedit_env.envs.layer_selection": ("LayerSelection",),
    "hiedit_env.envs.lifelong_edit": ("LifelongEdit",),
    "hiedit_env.envs.planted": ("Planted",),
    "hiedit_env.envs.state": (
        "EditRecord",
        "EnvState",
        "History",
    ),
    "hiedit_env.envs.step_size": ("StepSize",),
    "hiedit_env.envs.tried_options": ("TriedOptions",),
    "hiedit_env.envs.vector": ("VectorEditing",),
    "hiedit_env.errors": (
        "ActionError",
        "CheckpointError",
        "DatasetError",
        "DeviceError",
        "HieditError",
        "HieditWarning",
        "LayerError",
        "LedgerError",
        "MissingLibraryError",
        "ModelError",
        "NonFiniteUpdateError",
        "NotEnoughMemoryError",
        "PromptError",
        "ResultsExistError",
        "SettingsError",
        "UpdateShapeError",
    ),
    "hiedit_env.evaluation.matching": ("is_match",),
    "hiedit_env.evaluation.metrics": (
        "Evaluation",
        "evaluate",
    ),
    "hiedit_env.model.architectures": (
        "CandidateLayer",
        "find_candidates",
    ),
    "hiedit_env.model.loading": (
        "LoadedModel",
        "load_model",
    ),
    "hiedit_env.resident.capture": ("Capture",),
    "hiedit_env.resident.low_rank": ("LowRankUpdate",),
    "hiedit_env.resident.resident": ("ResidentLLM",),
    "hiedit_env.rules.base": ("UpdateRule",),
    "hiedit_env.rules.names": ("make_rule",),
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


# Trained agents and published tables are of version 1, which stays: nobody needs to leave it.
warnings.filterwarnings(
    "ignore", r".*The environment hiedit/\w+-v1 is out of date", category=DeprecationWarning
)
for _name, _module in (
    ("LifelongEdit", "lifelong_edit"),
    ("LayerSelection", "layer_selection"),
    ("Planted", "planted"),
    ("StepSize", "step_size"),
):
    for _version in (1, 2):
        register(
            f"hiedit/{_name}-v{_version}",
            entry_point=f"hiedit_env.envs.{_module}:{_name}",
            vector_entry_point=f"hiedit_env.envs.vector:Vector{_name}",
            kwargs={} if _version == 1 else {"version": _version},
        )
register("hiedit/PlantedWorlds-v2", entry_point="hiedit_env.testing.planted_worlds:PlantedWorlds")
# The best policy is rewarded 32 (1 + 0.1 · 5/6) = 34.67; nothing of the kind is known elsewhere.
register("hiedit/Toy-v1", entry_point="hiedit_env.testing.toy:ToyEditing", reward_threshold=34.0)
