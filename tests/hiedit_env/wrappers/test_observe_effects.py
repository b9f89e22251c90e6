"""``VectorObserveEffects`` against single environments behind ``ObserveEffects``, one by one."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

import hiedit_env  # noqa: F401
from hiedit_env.envs.effects import EFFECTS
from hiedit_env.errors import ActionError, SettingsError
from hiedit_env.wrappers import ObserveEffects, VectorObserveEffects

L = 4
#: A world in which relations share layers, so that earlier facts interfere.
WORLD = {"world_seed": 3, "difficulty": "crowded,layers=4,subjects=12", "num_edits": 3}
#: What x W + x Δ and x (W + Δ) may differ by after a few edits.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "worlds"))


def together(count: int = 3, **arguments: Any) -> VectorObserveEffects:
    return VectorObserveEffects(
        gym.make_vec(
            "hiedit/Planted-v2", count, vectorization_mode="vector_entry_point",
            **{**WORLD, **arguments},
        )
    )  # fmt: skip


def apart(count: int = 3, mode: str = "NextStep", **arguments: Any) -> SyncVectorEnv:
    def one() -> gym.Env[Any, Any]:
        made = gym.make("hiedit/Planted-v2", disable_env_checker=True, **{**WORLD, **arguments})
        return ObserveEffects(made)

    return SyncVectorEnv([one] * count, autoreset_mode=mode)


def actions(step: int) -> np.ndarray[Any, Any]:
    """Others for every environment and step; never none, so that each step writes."""
    masks = np.random.default_rng(step).integers(0, 2, (3, L)).astype(np.int8)
    masks[:, step % L] = 1
    return masks


def effects_of(observations: Any) -> Any:
    return np.asarray(observations)[..., -EFFECTS * L :].reshape(-1, L, EFFECTS)


def assert_same(one: Any, other: Any) -> None:
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_every_environment_sees_what_it_would_see_alone(mode: str) -> None:
    ours, theirs = together(autoreset_mode=mode), apart(mode=mode)
    assert ours.observation_space.shape == theirs.observation_space.shape
    seen, alone = ours.reset(seed=5)[0], theirs.reset(seed=5)[0]
    interfered, finals = 0.0, []
    for step in range(8):
        assert_same(seen, alone)
        assert ours.single_observation_space.contains(seen[0])
        interfered = max(interfered, float(effects_of(seen)[..., 4].max()))
        seen, reward, ended, _, info = ours.step(actions(step))
        alone, same, over, _, known = theirs.step(actions(step))
        assert_same(reward, same)
        assert (ended == over).all()
        for i in np.flatnonzero(ended) if mode == "SameStep" else ():
            finals.append(info["final_obs"][i])
            assert_same(finals[-1], known["final_obs"][i])
            # The new episode has no facts behind it, the one that ended has.
            assert effects_of(finals[-1])[0, :, 3:].any()
            assert not effects_of(seen[i])[0, :, 3:].any()
    # Otherwise equality would say nothing about earlier facts and about ends.
    assert interfered > 0.1
    assert len(finals) == (6 if mode == "SameStep" else 0)


def test_some_environments_begin_again_and_the_others_keep_what_they_saw() -> None:
    ours = together(autoreset_mode="Disabled")
    ours.reset(seed=5)
    before, *_ = ours.step(actions(0))
    mask = np.array([False, True, False])
    after, _ = ours.reset(seed=[0, 9, 0], options={"reset_mask": mask})
    np.testing.assert_array_equal(after[~mask], before[~mask])
    alone = apart(1)
    assert_same(after[1], alone.reset(seed=9)[0][0])
    # And they go on with it.
    seen, *_ = ours.step(actions(1))
    going = apart()
    going.reset(seed=5)
    going.step(actions(0))
    expected, *_ = going.step(actions(1))
    assert_same(seen[~mask], expected[~mask])
    assert_same(seen[1], alone.step(actions(1)[1:2])[0][0])


def test_a_step_that_is_refused_changes_nothing() -> None:
    ours, theirs = together(), apart()
    ours.reset(seed=5)
    theirs.reset(seed=5)
    with pytest.raises(ActionError, match="action of environment 1"):
        ours.step(np.array([[1, 1, 1, 1], [7, 0, 0, 0], [1, 0, 0, 0]]))
    for step in range(2):
        assert_same(ours.step(actions(step))[0], theirs.step(actions(step))[0])


def test_tensors_are_the_same_numbers() -> None:
    ours = together(tensors=True, autoreset_mode="SameStep")
    plain = together(autoreset_mode="SameStep")
    one, other = ours.reset(seed=1)[0], plain.reset(seed=1)[0]
    for step in range(4):
        assert isinstance(one, torch.Tensor)
        assert one.dtype == torch.float32
        assert_same(one, other)
        one, *_, info = ours.step(torch.from_numpy(actions(step)))
        other, *_, known = plain.step(actions(step))
        for i in range(3) if step == 2 else ():
            assert isinstance(info["final_obs"][i], torch.Tensor)
            assert_same(info["final_obs"][i], known["final_obs"][i])


def test_a_copy_goes_on_by_itself() -> None:
    ours = together()
    ours.reset(seed=5)
    ours.step(actions(0))
    twin = copy.deepcopy(ours)
    first, *_ = ours.step(actions(1))
    ours.step(actions(2))
    again, *_ = twin.step(actions(1))
    np.testing.assert_array_equal(again, first)


def test_a_restored_state_has_the_effects_of_its_own_past() -> None:
    env = ObserveEffects(
        gym.make("hiedit/Planted-v2", disable_env_checker=True, **{**WORLD, "num_edits": 4})
    )
    inner: Any = env.unwrapped
    env.reset(seed=5)
    env.step(actions(0)[0])
    state = inner.save_state()
    expected, *_ = env.step(actions(1)[0])
    env.step(actions(2)[0])
    inner.restore_state(state)
    again, *_ = env.step(actions(1)[0])
    np.testing.assert_array_equal(again, expected)


def test_controls_can_be_given_and_are_read_from_the_unedited_model() -> None:
    envs: Any = gym.make_vec(
        "hiedit/Planted-v2", 2, vectorization_mode="vector_entry_point", **WORLD
    )
    controls = envs.envs[0].controls[:3]
    envs.reset(seed=5)
    envs.step(actions(0)[:2])
    late = VectorObserveEffects(envs, controls, step_size=0.5)
    single = ObserveEffects(
        gym.make("hiedit/Planted-v2", disable_env_checker=True, **WORLD), controls, step_size=0.5
    )
    assert_same(late.reset(seed=6)[0][1], single.reset(seed=7)[0])


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    with pytest.raises(SettingsError, match="around a single one take ObserveEffects"):
        VectorObserveEffects(gym.make_vec("hiedit/Toy-v1", 2, vectorization_mode="sync"))
    with pytest.raises(
        SettingsError, match="VectorObserveEffects needs prompts that must not change"
    ):
        VectorObserveEffects(
            gym.make_vec(
                "hiedit/Planted-v2", 2, vectorization_mode="vector_entry_point", num_edits=2
            )
        )
    with pytest.raises(SettingsError, match="one fact per step, got edits_per_step=2"):
        together(edits_per_step=2)
