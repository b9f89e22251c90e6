"""The shared router as an agent in a folder: it plays planted worlds that it has never seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from hiedit_agents.hierarchy.options import layer_selection
from hiedit_agents.hierarchy.shared_router import FEATURES, SharedRouter
from hiedit_agents.named.checkpoints import (
    SHARED,
    read_record,
    read_tensors,
    trained_facts,
    weights_of,
    write_agent,
)
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_env.datasets.difficulty import WorldName, is_world
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.full_observation import FullObservation
from hiedit_env.errors import CheckpointError, SettingsError

#: How such a folder is made.
LEARN = "python -m hiedit_agents.bandits.train_shared --out FOLDER"


def save_shared(folder: Path, router: SharedRouter, training: Mapping[str, Any]) -> None:
    """Writes a router as an agent.

    Args:
        folder: Made if need be; holds ``agent.json`` and ``agent.safetensors`` then.
        router: It learned something.
        training: From what and how, plain JSON.

    Raises:
        CheckpointError: the folder cannot be written, or a number is not finite.
    """
    record = {"features": list(FEATURES), "hidden": router.hidden, "training": dict(training)}
    write_agent(folder, SHARED, record, router.state_dict())


class SharedAgent(FixedAgent):
    """A :class:`~hiedit_agents.hierarchy.shared_router.SharedRouter` in worlds of any size.

    It reads what decides from the environment itself, so it plays both versions of the ids. The low
    level is the environment's own update rule.

    Args:
        folder: What :func:`save_shared` wrote.

    Raises:
        CheckpointError: no such folder, damaged files, or a router that reads other features.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder
        self._record = read_record(folder, SHARED)
        _check_features(folder, self._record["features"])
        self._state = read_tensors(folder, self._record)
        self._router = self._made_for(1)
        self._seen: tuple[EditingEnv, FullObservation] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """By which a comparison that is resumed knows the agent."""
        return {"weights": weights_of(self._record)}

    def training_facts(self, model: str) -> frozenset[str]:
        """Hashes of the facts that it learned from, if the model is one of its training worlds.

        Other worlds ask the same of the same subjects, but know other answers elsewhere.
        """
        seen = is_world(model) and str(WorldName.read(model)) in self._record["training"]["worlds"]
        return trained_facts(self._record) if seen else frozenset()

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes the router for the environment's layers.

        Raises:
            SettingsError: not a LayerSelection environment of one fact per step, or one without
                prompts that no fact asks.
        """
        inner = layer_selection(env, self.name)
        if not getattr(inner, "controls", ()):
            raise SettingsError(
                f"agent {self.name!r} looks at prompts that no fact asks, which planted worlds "
                f"have and {inner.model_name!r} has not; take a world, such as --model "
                "planted:pairs:1000000"
            )
        inner.use_low_level(None)
        if self._seen is None or self._seen[0] is not inner:
            self._seen = inner, FullObservation(inner)
            self._router = self._made_for(len(inner.llm.layers))

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8, every layer whose score is above 0."""
        if self._seen is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        env, look = self._seen
        with torch.no_grad():
            choice = self._router.choose(look.read(), env.capture)
        return choice.layers.astype(np.int8)

    def _made_for(self, num_layers: int) -> SharedRouter:
        """The router for L layers; its numbers are the same for any L."""
        router = SharedRouter(num_layers, hidden=self._record["hidden"])
        try:
            router.load_state_dict(self._state)
        except RuntimeError as error:
            raise CheckpointError(
                f"the router in {self.folder} does not fit its own settings: "
                f"{' '.join(str(error).split())}; learn it again with {LEARN}"
            ) from error
        return router


def _check_features(folder: Path, found: list[str]) -> None:
    if tuple(found) == FEATURES:
        return
    differing = {
        "it reads features that this version does not have": set(found) - set(FEATURES),
        "it lacks": set(FEATURES) - set(found),
    }
    said = [f"{what}: {', '.join(sorted(names))}" for what, names in differing.items() if names]
    raise CheckpointError(
        f"the router in {folder} does not fit this version of hiedit: "
        f"{'; '.join(said) or 'it reads the same features in another order'}. Learn it again with "
        f"{LEARN}"
    )
