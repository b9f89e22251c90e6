"""SequentialSelection: one layer after another, then stop."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import TimeLimit

from hiedit_env.errors import ActionError, SettingsError
from hiedit_env.testing import (
    assert_only_layers_changed,
    assert_restores_bit_exact,
    assert_reward_terms_sum,
    assert_same_episode,
    make_tiny,
)
from hiedit_env.wrappers import FixedStepSize, SequentialSelection
from tests.support.episodes import LIFELONG, SELECTION, L, shown

TOY = "hiedit/Toy-v1"


def toy(max_layers: int | None = None, **settings: Any) -> SequentialSelection:
    return SequentialSelection(gym.make(TOY, num_layers=4, num_edits=3), max_layers, **settings)


def masks(env: SequentialSelection) -> list[int]:
    allowed = env.action_masks()
    assert (allowed.dtype, allowed.shape) == (bool, (5,))
    return allowed.astype(int).tolist()


def test_masks_by_hand() -> None:
    env = toy(max_layers=2)
    env.reset(seed=0)
    assert masks(env) == [1, 1, 1, 1, 0]
    env.step(2)
    assert masks(env) == [1, 1, 0, 1, 1]
    env.step(0)
    assert masks(env) == [0, 0, 0, 0, 1]  # two layers are picked
    env.step(4)
    assert masks(env) == [1, 1, 1, 1, 0]  # the next fact
    env.step(3)
    env.reset(seed=0)
    assert masks(env) == [1, 1, 1, 1, 0]


def test_a_masked_action_may_stop() -> None:
    env = toy(max_layers=2, allow_empty=True, masked="stop")
    env.reset(seed=0)
    assert env.pick(1)[0].tolist() == [0, 1, 0, 0]
    assert masks(env) == [1, 1, 1, 1, 1]  # asked, not picked
    env.step(1)
    assert env.step(1)[4]["layers"].tolist() == [0, 1, 0, 0]  # picked already
    env.step(0)
    env.step(2)
    assert masks(env) == [0, 0, 0, 0, 1]
    assert env.step(3)[4]["layers"].tolist() == [1, 0, 1, 0]  # two layers are picked
    with pytest.raises(SettingsError, match="allow_empty=True"):
        toy(masked="stop")
    with pytest.raises(SettingsError, match="'refuse' or 'stop', got 'go'"):
        toy(allow_empty=True, masked="go")


def test_all_layers_may_be_picked_and_nothing_if_allowed() -> None:
    env = toy(allow_empty=True)
    env.reset(seed=0)
    assert masks(env) == [1, 1, 1, 1, 1]
    assert env.step(4)[4]["layers"].tolist() == [0, 0, 0, 0]
    for layer in (3, 1, 0, 2):
        env.step(layer)
    assert masks(env) == [0, 0, 0, 0, 1]
    assert env.step(4)[4]["layers"].tolist() == [1, 1, 1, 1]


def test_a_fact_by_hand() -> None:
    env, plain = toy(), gym.make(TOY, num_layers=4, num_edits=3)
    observation, info = env.reset(seed=5)
    first, plain_info = plain.reset(seed=5)
    assert observation.tolist() == [*first.tolist(), 0, 0, 0, 0]
    assert info.pop("picked").tolist() == [0, 0, 0, 0]
    assert repr(info) == repr(plain_info)
    assert env.observation_space.contains(observation)
    assert env.observation_space.high.tolist() == [1] * 9
    assert env.observation_space.low.tolist() == [-1] * 5 + [0] * 4
    fingerprint = info["weights_fingerprint"]
    for picks in ([2], [2, 0]):
        observation, reward, terminated, truncated, info = env.step(picks[-1])
        picked = [int(i in picks) for i in range(4)]
        assert observation.tolist() == [*first.tolist(), *picked]
        assert (type(reward), reward, terminated, truncated) == (float, 0.0, False, False)
        assert info["picked"].tolist() == picked
        assert info["layers"].tolist() == [0] * 4
        assert (info["edit_index"], info["edit_steps"], info["edit_over"]) == (0, 0, False)
        assert info["weights_fingerprint"] == fingerprint
    result, wanted = env.step(env.stop), plain.step(np.array([1, 0, 1, 0], np.int8))
    assert result[0].tolist() == [*wanted[0].tolist(), 0, 0, 0, 0]
    assert result[4].pop("picked").tolist() == [1, 0, 1, 0]
    assert repr(result[1:]) == repr(wanted[1:])
    # Picking for the second fact: nothing of the first one's pay is left.
    _, reward, _, _, info = env.step(1)
    assert reward == sum(info["reward_terms"].values()) == 0
    assert set(info) == {*wanted[4], "picked"}
    assert info["metrics"] == wanted[4]["metrics"]
    assert (info["edit_index"], info["edit_steps"], info["edit_over"]) == (1, 0, False)
    assert info["layers"].tolist() == [0] * 4


def test_the_last_pick_may_stop_as_well() -> None:
    env, plain = toy(max_layers=2, stop_at_max=True), gym.make(TOY, num_layers=4, num_edits=3)
    env.reset(seed=0)
    plain.reset(seed=0)
    env.step(3)
    result, wanted = env.step(1), plain.step(np.array([0, 1, 0, 1], np.int8))
    assert repr(result[1:4]) == repr(wanted[1:4])
    assert result[4]["picked"].tolist() == [0, 1, 0, 1]
    # Stopping earlier is still possible.
    env.step(0)
    assert env.step(4)[4]["layers"].tolist() == [1, 0, 0, 0]


def test_masked_actions_say_why_and_change_nothing() -> None:
    env, twin = toy(max_layers=2), toy(max_layers=2)
    for one in (env, twin):
        one.reset(seed=0)
    with pytest.raises(ActionError, match=r"4 \(stop\) is masked: nothing is picked.*allow_empty"):
        env.step(4)
    for one in (env, twin):
        one.step(1)
    with pytest.raises(ActionError, match=r"action 1 is masked: layer 1 is picked already.*\[1\]"):
        env.step(1)
    for one in (env, twin):
        one.step(3)
    with pytest.raises(ActionError, match=r"action 0 is masked: max_layers=2.*\[1, 3\].*stop"):
        env.step(0)
    for action in (5, -1, 1.0, True, [1], None):
        with pytest.raises(ActionError, match=r"from 0 to 4, a layer or 4 to stop|array of num"):
            env.step(action)
    assert shown(env.step(4)) == shown(twin.step(4))


def test_the_end_and_the_beginning() -> None:
    env = toy()
    with pytest.raises(ResetNeeded, match="before anything"):
        SequentialSelection(env.unwrapped).step(0)
    env.reset(seed=0)
    ends = []
    for _ in range(3):
        env.step(0)
        ends.append(env.step(env.stop)[2])
    assert ends == [False, False, True]
    with pytest.raises(ResetNeeded, match="ended"):
        env.step(0)
    env.reset()
    env.step(0)


def test_an_inner_time_limit_counts_inner_steps() -> None:
    env = SequentialSelection(TimeLimit(gym.make(TOY, num_layers=4, num_edits=3), 1))
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(1)[2:4] == (False, False)
    assert env.step(env.stop)[2:4] == (False, True)
    with pytest.raises(ResetNeeded, match="ended"):
        env.step(0)


def test_the_return_is_that_of_the_wrapped_environment() -> None:
    env, plain = SequentialSelection(make_tiny(SELECTION)), make_tiny(SELECTION)
    env.reset(seed=1)
    plain.reset(seed=1)
    for picks in ([4], [0, 5, 2], [1, 0]):
        rewards = []
        for action in [*picks, env.stop]:
            step = assert_only_layers_changed(env, action)
            assert_reward_terms_sum(step)
            rewards.append(step[1])
        mask = np.zeros(L, np.int8)
        mask[picks] = 1
        wanted = plain.step(mask)
        assert sum(rewards) == wanted[1]
        assert step[0][:-L].tobytes() == wanted[0].tobytes()
        assert (step[2], step[4]["weights_fingerprint"]) == (
            wanted[2],
            wanted[4]["weights_fingerprint"],
        )


def test_primitive_steps_of_one_fact_go_on() -> None:
    inner = make_tiny(LIFELONG, stop_when_answered=False)
    env = SequentialSelection(FixedStepSize(inner))
    env.reset(seed=0)
    places = []
    for action in (0, env.stop, 3, env.stop, 2):
        info = env.step(action)[4]
        places.append((info["edit_index"], info["edit_steps"], info["edit_over"]))
    assert places == [(0, 0, False), (0, 1, False), (0, 1, False), (0, 2, True), (1, 0, False)]


@pytest.mark.parametrize("name", [TOY, SELECTION])
def test_picks_are_part_of_the_state(name: str) -> None:
    env = SequentialSelection(make_tiny(name), max_layers=3)
    env.reset(seed=0)
    env.step(4)
    assert_restores_bit_exact(env, [1, env.stop, 2, 3])
    assert env.picked.tolist() == [0, 0, 0, 0, 1, 0]
    state = env.save_state()
    ended = env.step(env.stop)[2]
    while not ended:
        env.step(0)
        ended = env.step(env.stop)[2]
    env.restore_state(state)
    assert env.step(env.stop)[4]["layers"].tolist() == [0, 0, 0, 0, 1, 0]
    assert_same_episode(
        lambda: SequentialSelection(make_tiny(name)), 3, [1, 2, env.stop, 0, env.stop]
    )


def test_what_is_returned_may_be_overwritten() -> None:
    env, twin = toy(), toy()
    results = [env.reset(seed=0)]
    twin.reset(seed=0)
    for action in (1, 2, 4, 0, 4):
        for observation, *_, info in results:
            observation[:] = 0.5
            info["layers"][:] = 7
            info["picked"][:] = 7
            info["metrics"].clear()
            info["reward_terms"].clear()
        results = [env.step(action)]
        assert shown(results[0]) == shown(twin.step(action))
