"""NormalizeObservation: statistics by hand, frozen, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from safetensors.numpy import load_file, save_file

from hiedit_env.errors import CheckpointError, SettingsError
from hiedit_env.testing import assert_restores_bit_exact
from hiedit_env.wrappers import FlattenAction, NormalizeObservation, SequentialSelection
from tests.support.episodes import LIFELONG, shown

TOY = "hiedit/Toy-v1"


class Given(gym.Env[Any, Any]):
    """Shows the given observations, one a reset."""

    action_space = spaces.Discrete(1)

    def __init__(self, *rows: list[float]) -> None:
        self.rows = iter(rows)
        self.observation_space = spaces.Box(-10.0, 10.0, (len(rows[0]),), np.float32)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.array(next(self.rows), np.float32), {}


def toy(**settings: Any) -> NormalizeObservation:
    return NormalizeObservation(gym.make(TOY, num_layers=3, noise=0.5), **settings)


def trained(folder: Path) -> tuple[NormalizeObservation, Path]:
    env, file = toy(), folder / "statistics.safetensors"
    for seed in range(10):
        env.reset(seed=seed)
        env.step(env.action_space.sample())
    env.save(file)
    return env, file


def test_statistics_by_hand() -> None:
    env = NormalizeObservation(Given([1, 5], [2, 5], [6, 5]), clip=100.0)
    shown = [env.reset()[0] for _ in range(3)]
    # Mean 3 and variance 14/3, up to Gymnasium's prior: weight 1e-4, mean 0, variance 1.
    assert env.obs_rms.mean == pytest.approx([3, 5], rel=1e-3)
    assert env.obs_rms.var[0] == pytest.approx(14 / 3, rel=1e-3)
    assert shown[2][0] == pytest.approx((6 - 3) / np.sqrt(14 / 3), rel=1e-3)
    assert shown[2].dtype == np.float32
    assert env.obs_rms.mean.dtype == env.obs_rms.var.dtype == np.float64


def test_frozen_statistics_stand_still_and_thaw() -> None:
    env = NormalizeObservation(Given([1], [3], [9], [9]), clip=100.0)
    env.reset()
    env.reset()
    env.update_running_mean = False
    # Mean 2, variance 1.
    assert env.reset()[0][0] == pytest.approx(7, rel=1e-2)
    assert env.obs_rms.mean[0] == pytest.approx(2, rel=1e-3)
    env.update_running_mean = True
    env.reset()
    assert env.obs_rms.mean[0] == pytest.approx(13 / 3, rel=1e-3)


def test_a_feature_that_never_varied_does_not_explode() -> None:
    env = NormalizeObservation(Given(*[[0.5]] * 50, [0.6], [0.4]), clip=4.0)
    for _ in range(50):
        env.reset()
    env.update_running_mean = False
    assert [env.reset()[0].tolist() for _ in range(2)] == [[4.0], [-4.0]]
    assert env.observation_space == spaces.Box(-4.0, 4.0, (1,), np.float32)


def test_saved_statistics_give_the_same_observations(tmp_path: Path) -> None:
    env, file = trained(tmp_path)
    again = toy(statistics=file)
    assert not again.update_running_mean
    env.update_running_mean = False
    before = again.obs_rms.mean.copy()
    for seed in range(5):
        assert shown(env.reset(seed=seed)) == shown(again.reset(seed=seed))
        assert shown(env.step([1, 0, 0])) == shown(again.step([1, 0, 0]))
    assert before.tobytes() == again.obs_rms.mean.tobytes() == env.obs_rms.mean.tobytes()
    assert env.obs_rms.count == again.obs_rms.count == 20 + 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    found = load_file(file)
    assert {name: (value.dtype, value.size) for name, value in found.items()} == {
        "mean": (np.float64, 4),
        "var": (np.float64, 4),
        "count": (np.float64, 1),
    }


def test_loading_freezes_and_training_can_go_on(tmp_path: Path) -> None:
    env, file = trained(tmp_path)
    again = toy()
    again.load(str(file))
    assert not again.update_running_mean
    again.update_running_mean = True
    assert shown(env.reset(seed=3)) == shown(again.reset(seed=3))
    assert env.obs_rms.var.tobytes() == again.obs_rms.var.tobytes()
    assert again.obs_rms.count == 21 + 1e-4


def test_the_spec_names_the_file(tmp_path: Path) -> None:
    env = toy(statistics=trained(tmp_path)[1])
    again = gym.make(env.spec)
    assert not again.update_running_mean
    assert shown(env.reset(seed=3)) == shown(again.reset(seed=3))


def test_statistics_of_another_size_are_refused(tmp_path: Path) -> None:
    file = trained(tmp_path)[1]
    other = NormalizeObservation(gym.make(TOY, num_layers=5))
    with pytest.raises(CheckpointError, match=r"shape \(4,\), these have shape \(6,\)"):
        other.load(file)
    assert other.update_running_mean
    assert other.obs_rms.mean.tolist() == [0.0] * 6
    with pytest.raises(CheckpointError, match=r"shape \(4,\), these have shape \(6,\)"):
        NormalizeObservation(gym.make(TOY, num_layers=5), statistics=file)


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    env, file = toy(), tmp_path / "file"
    with pytest.raises(CheckpointError, match="cannot be read"):
        env.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        env.load(file)
    good = {"mean": np.zeros(4), "var": np.ones(4), "count": np.ones(1)}
    for bad in (
        {"mean": np.array([0, np.nan, 0, 0])},
        {"var": np.array([1.0, -1, 1, 1])},
        {"count": np.zeros(1)},
        {"count": np.ones(2)},
        {"more": np.zeros(1)},
    ):
        save_file(good | bad, file)
        with pytest.raises(CheckpointError, match=r"no statistics|holds \['count', 'mean', 'more'"):
            env.load(file)
    save_file(good, file)
    env.load(file)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    env, file = trained(tmp_path)
    before = file.read_bytes()
    env.obs_rms.var[1] = np.inf
    with pytest.raises(CheckpointError, match=r"var .* not finite.*inf"):
        env.save(file)
    assert file.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        toy().save(tmp_path / "no" / "folder")


def test_statistics_are_part_of_the_state() -> None:
    env = SequentialSelection(toy())
    env.reset(seed=0)
    assert_restores_bit_exact(env, [1, env.stop, 0, 2, env.stop])
    # The other way round, too.
    outer = NormalizeObservation(SequentialSelection(gym.make(TOY, num_layers=3)))
    outer.reset(seed=0)
    before = outer.obs_rms.mean.copy()
    assert_restores_bit_exact(outer, [1, 3, 0])
    assert outer.obs_rms.mean.tobytes() == before.tobytes()
    state = outer.save_state()
    for _ in range(2):  # A state stays good whatever is done with what was restored.
        outer.restore_state(state)
        assert outer.obs_rms.mean.tobytes() == before.tobytes()
        outer.obs_rms.mean[:] = 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilon": 0.0}, r"epsilon.*0\.0"),
        ({"clip": 10**400}, "clip must be a finite number above 0, got 1000"),
        ({"clip": float("inf")}, "clip.*inf"),
        ({"clip": -1.0}, "clip"),
    ],
)
def test_refused_arguments(settings: dict[str, float], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        toy(**settings)


def test_another_observation_space_is_refused() -> None:
    env = Given([0.0])
    env.observation_space = spaces.Discrete(2)  # type: ignore[assignment]
    with pytest.raises(SettingsError, match=r"Box as observation space, got Discrete\(2\)"):
        NormalizeObservation(env)


def test_it_wraps_an_editing_environment() -> None:
    env = NormalizeObservation(FlattenAction(gym.make(LIFELONG, num_edits=2)))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])
