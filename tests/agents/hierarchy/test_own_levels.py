"""Levels of one's own, by ``module:Class``: trained, saved, played, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hiedit_agents.hierarchy.options import Choice
from hiedit_agents.hierarchy.routers import PolicyRouter
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.registry import spec_agent
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_env.errors import SettingsError
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import SELECTION, L, make

SHORT = TrainSettings(episodes=2, edits_per_episode=4, retention_window=2, evaluation_edits=3)


def run_of(agent: str) -> TrainingRun:
    return TrainingRun(agent=agent, model="tiny", max_steps_per_edit=2)


class OwnRouter(PolicyRouter):
    """A learned high level of one's own."""

    name = "own"


class OwnStep(OuterProductRule):
    """A learned low level of one's own: one number."""

    name = "own-step"

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.log_step = torch.nn.Parameter(torch.zeros(1))

    def compute(self, capture: Any, layers: Any, multipliers: Any = None) -> Any:
        step = self.log_step.exp().expand(L)
        return super().compute(capture, layers, step if multipliers is None else step * multipliers)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.log_step]

    def state_dict(self) -> dict[str, Any]:
        return {"log_step": self.log_step.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_step.data.copy_(state["log_step"])


class Silent(OwnRouter):
    """A learned high level that does not say how likely its choice was."""

    def choose(self, observation: Any, capture: Any, generator: Any = None) -> Choice:
        return Choice(super().choose(observation, capture, generator).layers)


class NoLevel:
    """Chooses nothing."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        pass


@pytest.mark.parametrize("high", ["all-layers", f"{__name__}:OwnRouter,layers_per_edit=2"])
@pytest.mark.parametrize("low", ["ridge", f"{__name__}:OwnStep"])
def test_levels_of_ones_own_are_trained_and_played(tmp_path: Path, high: str, low: str) -> None:
    run = run_of(f"{high}+{low}")
    if run.agent == "all-layers+ridge":
        with pytest.raises(SettingsError, match="nothing to train"):
            train(run, SHORT, tmp_path, progress=False)
        return
    train(run, SHORT, tmp_path / "own", progress=False)
    state = load_file(tmp_path / "own" / "agent.safetensors")
    assert any(path.startswith("high.") for path in state) == ("OwnRouter" in high)
    assert ("low.log_step" in state) == ("OwnStep" in low)
    if "OwnStep" in low:
        assert state["low.log_step"].item() != 0
    agent = spec_agent(f"{tmp_path / 'own'},allow_code=true")
    env = make(SELECTION)
    agent.reset(env, 0)
    observation, info = env.reset(seed=0)
    chosen = agent.select_action(observation, info)
    assert chosen.sum() == (2 if "OwnRouter" in high else L)


def test_a_high_level_that_says_no_probability_is_refused(tmp_path: Path) -> None:
    run = run_of(f"{__name__}:Silent+ridge")
    with pytest.raises(SettingsError, match="no log_probability to learn from"):
        train(run, SHORT, tmp_path, progress=False)
    with pytest.raises(SettingsError, match="is no high level"):
        train(run_of(f"{__name__}:NoLevel+hypernetwork"), SHORT, tmp_path / "x")
