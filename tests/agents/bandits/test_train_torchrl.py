"""TorchRL learns offline from a recording; what surrounds it needs no TorchRL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hiedit_agents.bandits.recording import Origin, Recording
from hiedit_agents.bandits.recording_files import write_recording
from hiedit_agents.bandits.train_torchrl import main, scores, split
from hiedit_env.errors import SettingsError

pytest.importorskip("pyarrow")
pytest.importorskip("minari")


def toy(episodes: int, length: int = 20) -> Recording:
    """The kind of a fact, shown in the observation, is its best option."""
    count, generator = episodes * length, np.random.default_rng(0)
    kinds = generator.integers(3, size=count)
    seen = generator.normal(0, 0.1, (count, 4)).astype(np.float32)
    seen[np.arange(count), kinds] += 1
    rewards = generator.normal(0, 0.1, (count, 3))
    rewards[np.arange(count), kinds] += 1
    return Recording(
        origin=Origin("hiedit/LayerSelection-v2", "toy", "0" * 16, ("a", "b", "c"), 4),
        masks=np.eye(3, dtype=bool),
        seeds=np.arange(episodes),
        episodes=np.repeat(np.arange(episodes), length),
        observations=seen,
        last_observations=np.zeros((episodes, 4), np.float32),
        actions=generator.integers(3, size=count),
        rewards=rewards,
        terms={"edit": rewards},
        metrics={},
        facts=[("p", "a")] * count,
    )


def test_a_quarter_of_the_episodes_is_held_out() -> None:
    train, test = split(toy(8))
    assert (len(train), len(test)) == (120, 40)
    assert test.seeds.tolist() == [6, 7]
    assert test.episodes.tolist() == [0] * 20 + [1] * 20
    with pytest.raises(SettingsError, match="at least 2 episodes"):
        split(toy(1))


def test_scores_are_means_of_recorded_rewards() -> None:
    train, test = split(toy(8))
    found = scores(train, test, np.zeros(len(test), int))
    assert found["policy"] == pytest.approx(test.rewards[:, 0].mean())
    assert found["best_per_fact"] == pytest.approx(test.rewards.max(1).mean())
    assert found["fixed"] <= found["best_per_fact"]


@pytest.mark.libraries
def test_it_learns_the_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchrl")
    write_recording(toy(8), tmp_path / "r")
    assert main(["--recording", str(tmp_path / "r"), "--steps", "300"]) == 0
    found = json.loads(capsys.readouterr().out)["rewards"]
    assert found["policy"] > 0.9
    assert found["fixed"] < 0.6
