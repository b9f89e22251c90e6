"""FlattenAction: one flat vector stands for the dict of layers and step sizes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from hiedit_env.errors import ActionError, SettingsError
from hiedit_env.wrappers import FlattenAction
from tests.support.episodes import LIFELONG, SELECTION, SMALL, STEP_SIZE, L, shown


class Stub(gym.Env):  # type: ignore[type-arg]
    """Has spaces and nothing else."""

    def __init__(self, action_space: spaces.Space) -> None:  # type: ignore[type-arg]
        self.action_space = action_space
        self.observation_space = spaces.Discrete(1)


def dict_space(layers: int, sizes: int, low: float = -1.0) -> spaces.Dict:
    return spaces.Dict(
        layers=spaces.MultiBinary(layers), step_size=spaces.Box(low, 1.0, (sizes,), np.float32)
    )


@pytest.fixture
def wrapper() -> FlattenAction:
    return FlattenAction(Stub(dict_space(3, 3)))


def test_the_space_has_two_numbers_per_layer(wrapper: FlattenAction) -> None:
    assert wrapper.action_space == spaces.Box(-1.0, 1.0, (6,), np.float32)


def test_positive_numbers_choose_and_the_rest_are_step_sizes(wrapper: FlattenAction) -> None:
    action = wrapper.action(np.array([1e-6, 0.0, -1.0, 0.25, -1.0, 1.0], np.float32))
    assert action["layers"].tolist() == [1, 0, 0]  # zero does not choose
    assert action["step_size"].tolist() == [0.25, -1.0, 1.0]
    assert action["layers"].dtype == np.int8
    assert action["step_size"].dtype == np.float32


def test_every_flat_action_gives_an_action_of_the_environment(wrapper: FlattenAction) -> None:
    wrapper.action_space.seed(0)
    for _ in range(50):
        assert wrapper.env.action_space.contains(wrapper.action(wrapper.action_space.sample()))


def test_reverse_then_forward_is_the_same_action(wrapper: FlattenAction) -> None:
    wrapper.env.action_space.seed(0)
    for _ in range(50):
        action = wrapper.env.action_space.sample()
        flat = wrapper.reverse_action(action)
        assert wrapper.action_space.contains(flat)
        back = wrapper.action(flat)
        assert back["layers"].tolist() == action["layers"].tolist()
        assert back["step_size"].tolist() == action["step_size"].tolist()


def test_reverse_by_hand(wrapper: FlattenAction) -> None:
    flat = wrapper.reverse_action({"layers": [1, 0, 1], "step_size": [0.5, 0, -0.5]})
    assert flat.tolist() == [1, -1, 1, 0.5, 0, -0.5]
    assert flat.dtype == np.float32


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (np.zeros(5), r"\(6,\).*\(5,\)"),
        (np.zeros((6, 1)), r"\(6,\).*\(6, 1\)"),
        ([0, 0, 0, 0, 0, np.nan], "finite numbers from -1 to 1.*nan"),
        ([np.inf, 0, 0, 0, 0, 0], "finite numbers from -1 to 1.*inf"),
        ([0, 0, 0, 0, 1.01, 0], r"finite numbers from -1 to 1.*1\.01"),
        ([True] * 6, "finite numbers from -1 to 1.*bool"),
        ([[0], [0, 0]], "not an array of numbers"),
        ("layers", "array of numbers.*layers"),
        ({"layers": [1, 1, 1], "step_size": [0, 0, 0]}, "array of numbers.*step_size"),
    ],
)
def test_refused_flat_actions(wrapper: FlattenAction, action: object, words: str) -> None:
    with pytest.raises(ActionError, match=words):
        wrapper.action(action)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ({"layers": [1, 1, 1]}, "'layers' and 'step_size'.*'layers'"),
        ([1, 1, 1], "'layers' and 'step_size'.*list"),
        ({"layers": [1, 2, 1], "step_size": [0, 0, 0]}, "0 and 1"),
        ({"layers": [1, 1], "step_size": [0, 0, 0]}, r"\(3,\).*\(2,\)"),
        ({"layers": [1, 1, 1], "step_size": [0, 0, 3]}, "from -1 to 1"),
    ],
)
def test_refused_dicts(wrapper: FlattenAction, action: object, words: str) -> None:
    with pytest.raises(ActionError, match=words):
        wrapper.reverse_action(action)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiBinary(3),
        spaces.Box(-1.0, 1.0, (3,), np.float32),
        spaces.Dict(layers=spaces.MultiBinary(3)),
        dict_space(3, 4),
        dict_space(3, 3, low=0.0),
        spaces.Dict(layers=spaces.MultiBinary([3, 1]), step_size=spaces.Discrete(2)),
    ],
)
def test_another_action_space_is_refused(space: spaces.Space) -> None:  # type: ignore[type-arg]
    with pytest.raises(SettingsError, match="LifelongEdit"):
        FlattenAction(Stub(space))


@pytest.mark.parametrize("name", [SELECTION, STEP_SIZE])
def test_the_other_environments_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="LifelongEdit"):
        FlattenAction(gym.make(name, num_edits=1))


def test_a_wrapped_step_is_the_step() -> None:
    plain = gym.make(LIFELONG, num_edits=2, step_size=SMALL)
    wrapped = FlattenAction(gym.make(LIFELONG, num_edits=2, step_size=SMALL))
    assert shown(plain.reset(seed=3)) == shown(wrapped.reset(seed=3))
    action = {"layers": np.array([1, 0] * 3, np.int8), "step_size": np.full(L, 0.5, np.float32)}
    flat = np.array([1, -1] * 3 + [0.5] * L, np.float32)
    assert shown(plain.step(action)) == shown(wrapped.step(flat))


def test_the_spec_names_the_wrapper() -> None:
    wrapped = FlattenAction(gym.make(LIFELONG, num_edits=1))
    assert wrapped.spec is not None
    again = gym.make(EnvSpec.from_json(wrapped.spec.to_json()))
    assert again.action_space == wrapped.action_space
    assert isinstance(again, FlattenAction)
