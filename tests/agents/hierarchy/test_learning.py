"""Toys that a high level has to solve, and ``hiedit`` as a whole: cut off, it ends the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_agents.hierarchy.lesson import _with_earlier
from hiedit_agents.hierarchy.options import HierarchicalAgent, UntrainedChoice
from hiedit_agents.hierarchy.policy_gradient import Tried
from hiedit_agents.hierarchy.routers import PolicyRouter, StraightThroughRouter
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.named.checkpoints import TENSOR_FILE
from hiedit_agents.registry import spec_agent
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_env.errors import SettingsError
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from tests.agents.hierarchy.test_trainer import OnlyOneHelps, files
from tests.support.episodes import SELECTION, L, make


@pytest.mark.parametrize("useful", [0, 5])
def test_a_straight_through_router_finds_the_only_layer_that_helps(useful: int) -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=1, retention_window=0)
    low = OnlyOneHelps(env.llm.shapes, env.llm.device, step_size=2e-3)
    low.useful = useful
    router = StraightThroughRouter(env.llm.shapes, env.llm.device, layers_per_edit=1, hidden=16)

    def chosen() -> list[list[int]]:
        found = []
        for seed in range(99, 104):
            observation, _ = env.reset(seed=seed)
            found.append(np.flatnonzero(router.choose(observation, env.capture).layers).tolist())
        return found

    assert [useful] not in chosen()
    settings = TrainSettings(edits_per_episode=12, window=4, high_learning_rate=0.01)
    trainer = Trainer(env, HierarchicalAgent("toy", router, low), env.requests, settings)
    for number in range(5):
        trainer.episode(number)
    assert chosen() == [[useful]] * 5


def test_a_router_that_is_compared_with_all_layers_finds_the_only_one_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=1, retention_window=0)
    low = OnlyOneHelps(env.llm.shapes, env.llm.device, step_size=2e-3)
    router = PolicyRouter(L, env.llm.device, layers_per_edit=1, hidden=8)
    settings = TrainSettings(
        edits_per_episode=12,
        window=4,
        samples_per_fact=2,
        intrinsic=True,
        high_learning_rate=0.1,
    )
    trainer = Trainer(env, HierarchicalAgent("toy", router, low), env.requests, settings)
    seen: list[Tried] = []
    own = trainer._reinforce

    def reinforce(tried: Sequence[Sequence[Tried]]) -> None:
        seen.extend(option for options in tried for option in options)
        own(tried)

    monkeypatch.setattr(trainer, "_reinforce", reinforce)
    for number in range(5):
        trainer.episode(number)
    right = [t.advantage for t in seen if t.choice.layers[OnlyOneHelps.useful]]
    wrong = [t.advantage for t in seen if not t.choice.layers[OnlyOneHelps.useful]]
    # The right layer does what all layers do and leaves five alone; a wrong one does nothing.
    bonus = env.weights_of_terms["sparsity"] * 5 / 6
    assert right == pytest.approx([bonus] * len(right), abs=1e-4)
    assert max(wrong) < 0
    observation, _ = env.reset(seed=99)
    assert np.flatnonzero(router.choose(observation, env.capture).layers).tolist() == [3]
    assert router.scores(observation).softmax(0)[3].item() > 0.6


def test_an_option_teaches_by_what_it_leaves_behind() -> None:
    """Slopes of the loss at the last weights, in the step sizes of all of its steps."""
    env = make(SELECTION, num_edits=None, max_steps_per_edit=3, retention_window=2)
    low = Hypernetwork(env.llm.shapes, env.llm.device, step_size=1e-4)
    agent = HierarchicalAgent("toy", UntrainedChoice("all-layers", L), low, 3)
    trainer = Trainer(env, agent, env.requests, TrainSettings(l2=3e-2))
    env.reset(seed=3)
    env.step(np.ones(L, np.int8))
    begun = env.save_state()
    everything = np.ones(L, bool)
    made: list[Updates] = []
    for number in range(3):
        made.append(low.compute(env.episode.observe(), everything))
        lesson = trainer._lesson(made)
        if number < 2:
            env.apply([u.detach() for u in made[-1] if u is not None], judge="never")
            assert not env.episode.edit_over
    assert lesson is not None
    lesson.learn()
    parameter = next(p for name, p in low.net.named_parameters() if name.endswith("log_step"))
    assert parameter.grad is not None
    env.restore_state(begun)

    def objective(change: float, first: int = 0) -> float:
        # All updates, scaled from the first of some on, added to the weights the option began at.
        changed = np.zeros((3, L))
        changed[first:, low.groups[0]] = change
        total, penalty = [], 0.0
        for layer in range(L):
            steps = [(made[i][layer], changed[i, layer]) for i in range(3)]
            parts = [u.detach().scaled(math.exp(c)) for u, c in steps if u is not None]
            penalty += sum(float(part.squared_norm()) for part in parts)
            left, right = (
                torch.cat([getattr(p, side) for p in parts]) for side in ("left", "right")
            )
            total.append(LowRankUpdate(left, right))
        return float(env.loss(total)) + 3e-2 * penalty

    assert lesson.loss == pytest.approx(objective(0.0), rel=1e-4)
    slope = (objective(0.02) - objective(-0.02)) / 0.04
    assert abs(slope) > 0.01
    assert float(parameter.grad.sum()) == pytest.approx(slope, rel=0.02)
    # The last step's own share is another number.
    own = (objective(0.02, 2) - objective(-0.02, 2)) / 0.04
    assert own != pytest.approx(slope, rel=0.1)


def test_an_option_whose_second_step_wrecks_the_model_teaches_nothing() -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=3)
    low = WreckedLater(env.llm.shapes, env.llm.device, step_size=1e-6)
    agent = HierarchicalAgent("toy", UntrainedChoice("all-layers", L), low, 3)
    settings = TrainSettings(edits_per_episode=2, window=1)
    trainer = Trainer(env, agent, env.requests, settings)
    before = [parameter.clone() for parameter in low.parameters()]
    row = trainer.episode(0)
    assert low.asked == 2
    assert row["loss"] == 0
    assert row["reward"] < -5
    assert all(map(torch.equal, before, low.parameters()))


class WreckedLater(Hypernetwork):
    """A low level whose second update is not finite."""

    asked = 0

    def compute(self, *arguments: Any) -> Any:
        found = super().compute(*arguments)
        self.asked += 1
        return found if self.asked < 2 else tuple(u and u.scaled(math.inf) for u in found)


def test_a_layer_left_out_of_a_later_step_still_learns_from_earlier_ones() -> None:
    left, right = torch.ones(2, 3), torch.ones(2, 4, requires_grad=True)
    update = LowRankUpdate(left, right)
    assert _with_earlier([None, None]) is None
    for last in (None, LowRankUpdate(torch.ones(1, 3), torch.ones(1, 4))):
        whole = _with_earlier([update, None, last])
        assert whole is not None
        assert torch.equal(whole.dense(), torch.full((3, 4), 0.0 if last is None else 1.0))
        (gradient,) = torch.autograd.grad(whole.dense().sum(), right)
        assert torch.equal(gradient, torch.full((2, 4), 3.0))


def short(**changes: Any) -> TrainSettings:
    """The settings of ``hiedit``, with two windows an episode and little of everything else."""
    little = {"episodes": 3, "edits_per_episode": 3, "window": 2, "calibration": 12}
    return TrainSettings(**{**spec_agent("hiedit").spec.train, **little, **changes})


def test_hiedit_is_calibrated_below_and_trained_above(tmp_path: Path) -> None:
    """In one training, or in two of which the first takes no episodes: the same agent."""
    one, low, two = (tmp_path / name for name in ("one", "low", "two"))
    settings = short(evaluation_edits=0, episodes=2)
    train(TrainingRun(agent="hiedit", model="tiny"), settings, one, progress=False)
    calibrated = TrainingRun(agent="random-layers+hiedit", model="tiny")
    train(calibrated, replace(settings, episodes=0), low, progress=False)
    train(TrainingRun(agent=f"hiedit+{low}", model="tiny"), settings, two, progress=False)
    found = load_file(one / TENSOR_FILE)
    again = load_file(two / TENSOR_FILE)
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)
    calibration = load_file(low / TENSOR_FILE)
    assert any("calibration.products" in name for name in calibration)
    assert all(torch.equal(found[name], value) for name, value in calibration.items())
    assert not any(value.any() for name, value in found.items() if name.endswith(".log_step"))
    assert found["high.bias"].any()
    with pytest.raises(SettingsError, match=r"--train-low.*--episodes 0"):
        train(calibrated, settings, tmp_path / "none", progress=False)


@pytest.mark.parametrize("train_low", [False, True])
def test_hiedit_resumed_equals_hiedit_uninterrupted(
    train_low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun(agent="hiedit", model="tiny")
    settings = short(evaluation_edits=2, train_low=train_low)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(run, settings, whole, progress=False)
    own = Trainer.episode
    for stop in (1, 2):

        def stopped(self: Trainer, number: int, on_fact: Any = None, stop: int = stop) -> Any:
            if number == stop:
                raise KeyboardInterrupt
            return own(self, number, on_fact)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "episode", stopped)
            with pytest.raises(KeyboardInterrupt):
                train(run, settings, parted, resume=stop > 1, progress=False)
        assert [f.name for f in parted.glob("checkpoint-*")] == [f"checkpoint-{stop:06d}"]
        # What other work on the machine draws from torch's own generator changes nothing.
        torch.rand(7)
    train(run, settings, parted, resume=True, progress=False)
    assert files(parted) == files(whole)
