"""Recordings: what is in them, the way through Parquet and Minari and back, and who learns."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("minari")

from hiedit_agents.bandits.recording import Recording, record
from hiedit_agents.bandits.recording_files import load_minari, read_recording, write_recording
from hiedit_agents.protocol import begin_episode
from hiedit_agents.registry import make_agent
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.record import options
from hiedit_env.errors import DatasetError, SettingsError
from tests.support.episodes import LIFELONG, make

ID = "hiedit/LayerSelection-v2"
MASKS = options("singles", 6)


@pytest.fixture(scope="module")
def recording() -> Recording:
    env = gym.make(ID, num_edits=3, max_steps_per_edit=2)
    return record(env, MASKS, [4, 5])


def test_it_holds_what_every_option_would_give(recording: Recording) -> None:
    env = gym.make(ID, num_edits=3, max_steps_per_edit=2).unwrapped
    assert recording.rewards.shape == (6, 8)
    assert recording.episodes.tolist() == [0, 0, 0, 1, 1, 1]
    row = 0
    for seed in (4, 5):
        seen, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            np.testing.assert_array_equal(recording.observations[row], seen)
            tried = env.try_options(MASKS)  # type: ignore[attr-defined]
            assert recording.rewards[row] == pytest.approx(tried.rewards, abs=1e-5)
            assert sum(t[row] for t in recording.terms.values()) == pytest.approx(tried.rewards)
            seen, reward, ended, _, _ = env.step(MASKS[recording.actions[row]])
            assert recording.rewards[row, recording.actions[row]] == pytest.approx(reward, abs=1e-4)
            row += 1
        np.testing.assert_array_equal(recording.last_observations[seed - 4], seen)
    assert len(set(recording.actions.tolist())) > 1


def test_it_comes_back_from_parquet_as_it_was(recording: Recording, tmp_path: Path) -> None:
    write_recording(recording, tmp_path / "r")
    back = read_recording(tmp_path / "r")
    assert back.origin == recording.origin
    for name in ("masks", "seeds", "episodes", "observations", "last_observations", "actions"):
        np.testing.assert_array_equal(getattr(back, name), getattr(recording, name))
        assert getattr(back, name).dtype == getattr(recording, name).dtype
    np.testing.assert_array_equal(back.rewards, recording.rewards)
    for group in ("terms", "metrics"):
        one, two = getattr(back, group), getattr(recording, group)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert back.facts == recording.facts


def test_it_comes_back_from_minari(recording: Recording, tmp_path: Path) -> None:
    write_recording(recording, tmp_path / "r")
    data = load_minari(tmp_path / "r")
    assert data.total_episodes == 2
    assert data.action_space == gym.spaces.MultiBinary(6)
    episodes = list(data.iterate_episodes())
    assert [len(episode) for episode in episodes] == [3, 3]
    for place, episode in enumerate(episodes):
        rows = recording.episodes == place
        np.testing.assert_array_equal(episode.observations[:-1], recording.observations[rows])
        np.testing.assert_array_equal(episode.observations[-1], recording.last_observations[place])
        np.testing.assert_array_equal(episode.actions, MASKS[recording.actions[rows]])
        np.testing.assert_allclose(episode.infos["option_rewards"][:-1], recording.rewards[rows])
        assert episode.terminations.tolist() == [False, False, True]
    # The environment can be made again from the data set.
    again = data.recover_environment()
    recording.check_fits(again)
    assert again.unwrapped.settings.max_steps_per_edit == 2
    about = json.loads(data.storage.metadata["hiedit"])
    assert about["fingerprint"] == recording.origin.fingerprint


def test_another_model_or_space_is_refused_by_both_names(recording: Recording) -> None:
    for other in (
        gym.make("hiedit/Planted-v2", num_edits=2),
        gym.make("hiedit/LayerSelection-v1", num_edits=2),
    ):
        with pytest.raises(SettingsError) as found:
            recording.check_fits(other)
        for text in ("the recording is of model 'tiny'", "the environment of model", "145 numbers"):
            assert text in str(found.value)
    with pytest.raises(SettingsError, match="MultiBinary"):
        record(make(LIFELONG), MASKS, [0])


def test_the_command_records_and_agents_learn_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    words = ["record", "--out", str(out), "--options", "singles", "--episodes", "1"]
    assert main([*words, "--num-edits", "3", "--max-steps-per-edit", "1"]) == 0
    assert "headroom" in capsys.readouterr().out
    found = read_recording(out)
    env = gym.make(ID, num_edits=2, max_steps_per_edit=1)
    best = make_agent(f"fixed-best,recording={out}")
    means = found.rewards.mean(0)
    for name in (f"fixed-best,recording={out}", f"linear-bandit,recording={out}"):
        agent = make_agent(name)
        observation, info = begin_episode(env, agent, 0)
        action = agent.select_action(observation, info)
        assert action.tolist() in found.masks.astype(int).tolist()
    # Found again from what was recorded: all singles and no layer are neighbours of no layer.
    chosen = best.select_action(observation, info).tolist()
    near = [i for i, mask in enumerate(found.masks) if mask.sum() <= 1]
    assert chosen == found.masks[max(near, key=lambda i: means[i])].astype(int).tolist()
    assert main([*words]) == 2  # the folder is not empty
    with pytest.raises(SettingsError, match="hiedit record"):
        begin_episode(env, make_agent("fixed-best"), 0)
    # Fixed layers need no observation, so the version of the id does not matter to them.
    begin_episode(gym.make("hiedit/LayerSelection-v1", num_edits=1), best, 0)
    with pytest.raises(DatasetError, match="holds no recording"):
        make_agent(f"linear-bandit,recording={tmp_path}")
    with pytest.raises(SettingsError, match="the recording is of model 'tiny'"):
        begin_episode(gym.make("hiedit/Planted-v2", num_edits=1), best, 0)
