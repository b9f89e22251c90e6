"""What a training tells while it runs: the running reward, the bar, TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.hierarchy.training_log import Tally
from hiedit_agents.registry import spec_agent
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_env.resident.low_rank import Updates
from tests.support.episodes import SELECTION, make

SHORT = TrainSettings(episodes=2, edits_per_episode=3, retention_window=2, evaluation_edits=0)
RUN = TrainingRun(agent="rledit", model="tiny")


@pytest.mark.parametrize(
    "agent",
    ["rledit", "hiedit-paper", "random-layers+hiedit", "all-layers+hypernetwork"],
)
def test_the_reward_of_an_unjudged_fact_is_minus_what_its_option_left_behind(
    agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=3)
    # Small steps, so that facts take several where they may.
    built = spec_agent(agent).with_low_settings(step_size=1e-5).build(env.llm, trained=False)
    trainer = Trainer(env, built, env.requests, SHORT)
    own, seen, wanted = trainer._lesson, [0.0], []

    def spied(made: Sequence[Updates]) -> Any:
        found = own(made)
        assert found is not None
        seen.append(found.loss)
        return found

    monkeypatch.setattr(trainer, "_lesson", spied)
    shown: list[float] = []

    def fact(tally: Tally) -> None:
        wanted.append(-seen[-1])
        seen.append(0.0)
        shown.append(tally.rewards[-1])

    row = trainer.episode(0, fact)
    assert len(shown) == 3
    assert all(reward < 0 for reward in shown)
    assert shown == pytest.approx(wanted)
    assert row["reward"] == pytest.approx(sum(wanted) / 3) == pytest.approx(-row["loss"])
    # A loss for every primitive step, of which the last one counts; and a mark between facts.
    assert len(seen) == 1 + 3 + 3 * row["steps"]
    assert (row["steps"] == 1) == (agent in ("rledit", "hiedit-paper"))


def test_a_policy_router_shows_what_the_environment_pays() -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=1)
    built = spec_agent("policy+hypernetwork").build(env.llm)
    trainer = Trainer(env, built, env.requests, SHORT)
    gained: list[float] = []
    own = trainer._run

    def run(*arguments: Any) -> Any:
        outcome = own(*arguments)
        gained.append(outcome.reward)
        return outcome

    trainer._run = run  # type: ignore[method-assign]
    assert trainer.episode(0)["reward"] == pytest.approx(sum(gained) / 3)
    assert any(gained)


def test_a_wrecked_episode_is_paid_for_its_end() -> None:
    env = make(SELECTION, num_edits=None)
    built = spec_agent("all-layers+hypernetwork").with_low_settings(step_size=1e36)
    row = Trainer(env, built.build(env.llm), env.requests, SHORT).episode(0)
    assert row["reward"] == -env.weights_of_terms["collapse"] < 0
    assert row["loss"] == 0


class Bar:
    """What a progress bar was told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.done = 0

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.texts.append(text)

    def update(self, count: int = 1) -> None:
        self.done += count


@pytest.mark.parametrize("agent", ["rledit", "policy"])
def test_the_bar_shows_the_running_reward(
    agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Bar()

    @contextmanager
    def bar(label: str, total: int, shown: bool) -> Iterator[Bar]:
        yield made

    monkeypatch.setattr("hiedit_benchmarks.commands.train.bar", bar)
    train(replace(RUN, agent=agent), SHORT, tmp_path / "out", progress=False)
    assert made.done == 6
    assert len(made.texts) == 6
    for text in made.texts:
        parts = dict(part.split() for part in text.split(", "))
        assert float(parts["reward"]) != 0
        assert ("loss" in parts) == (agent == "rledit")


class Writer:
    """In the place of TensorBoard's ``SummaryWriter``."""

    made: list[Writer]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = 0
        self.closed = False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_number_of_the_log_at_its_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made = []
    out = tmp_path / "out"
    own = Trainer.episode
    rows: list[dict[str, float]] = []

    def stopped(self: Trainer, number: int, on_fact: Any = None) -> Any:
        if number == 2 and len(Writer.made) == 1:
            raise KeyboardInterrupt
        rows.append(own(self, number, on_fact))
        return rows[-1]

    monkeypatch.setattr(Trainer, "episode", stopped)
    settings = replace(SHORT, episodes=4)
    with pytest.raises(KeyboardInterrupt):
        train(RUN, settings, out, progress=False)
    train(RUN, settings, out, resume=True, progress=False)
    first, second = Writer.made
    assert first.folder == second.folder == str(out / "tensorboard")
    # What was written after the checkpoint that is gone on from is to be forgotten.
    assert (first.purge_step, second.purge_step) == (1, 3)
    assert {"reward", "loss"} < set(rows[0])
    for writer, steps in ((first, (1, 2)), (second, (3, 4))):
        wanted = [(f"train/{k}", v, step) for step in steps for k, v in rows[step - 1].items()]
        assert writer.scalars == wanted
        assert writer.flushed == 2
        assert writer.closed
    Writer.made = []
    train(RUN, SHORT, tmp_path / "none", progress=False, tensorboard=False)
    assert not Writer.made
