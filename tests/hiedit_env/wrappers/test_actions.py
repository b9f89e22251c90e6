"""The wrappers of actions: what they stand for, what they refuse, checkers, specs, steps."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import hiedit_env
from hiedit_env.errors import ActionError, SettingsError
from hiedit_env.wrappers import (
    BoxLayers,
    DiscreteSubsets,
    FixedLayers,
    FixedStepSize,
    FlattenAction,
    NormalizeObservation,
    SequentialSelection,
)
from tests.hiedit_env.wrappers.test_fixed import Stub, dict_space
from tests.support.episodes import LIFELONG, SELECTION, SMALL, STEP_SIZE, L, act, shown

TOY = "hiedit/Toy-v1"
Wrap = Callable[[Any], Any]
#: Every wrapper around what it is for, and one around another.
WRAPPED: dict[str, tuple[str, Wrap]] = {
    "flat": (LIFELONG, FlattenAction),
    "fixed layers": (LIFELONG, lambda env: FixedLayers(env, np.array([0, 3]))),
    "fixed step size": (LIFELONG, lambda env: FixedStepSize(env, np.float32(0.5))),
    "box": (SELECTION, BoxLayers),
    "subsets": (SELECTION, lambda env: DiscreteSubsets(env, np.int64(2), limit=20)),
    "sequence": (
        SELECTION,
        lambda env: SequentialSelection(env, np.int64(4)),
    ),
    "sequence that stops": (
        SELECTION,
        lambda env: SequentialSelection(env, allow_empty=True, masked="stop"),
    ),
    "subsets of fixed": (LIFELONG, lambda env: DiscreteSubsets(FixedStepSize(env), 2)),
    "sequence of fixed": (LIFELONG, lambda env: SequentialSelection(FixedStepSize(env), 3)),
    "box of fixed": (LIFELONG, lambda env: BoxLayers(FixedStepSize(env, [0.0] * L))),
    "frozen statistics": (
        SELECTION,
        lambda env: frozen(NormalizeObservation(env, epsilon=1e-6, clip=5.0)),
    ),
}


class Allowed(gym.ActionWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Takes the next action that is not masked: checkers know no masks."""

    def __init__(self, env: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)

    def action(self, action: Any) -> Any:
        return next(
            i for i in np.roll(np.arange(L + 1), -int(action)) if self.env.action_masks()[i]
        )


def allowed(env: Any) -> Any:
    return Allowed(env) if getattr(env, "masked", None) == "refuse" else env


def frozen(env: NormalizeObservation) -> NormalizeObservation:
    env.update_running_mean = False
    return env


def wrapped(name: str) -> Any:
    id, wrap = WRAPPED[name]
    return wrap(gym.make(id, num_edits=2, step_size=SMALL, max_steps_per_edit=2))


@pytest.mark.parametrize("name", WRAPPED)
def test_the_checkers_have_nothing_to_say(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Version 1 stays beside version 2.
        warnings.filterwarnings("ignore", message=".*-v1 is out of date.*")
        # Gymnasium says of every wrapper that it is one.
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        gymnasium_check(allowed(wrapped(name)), skip_render_check=True)
        sb3_check(allowed(wrapped(name)))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_spec_makes_it_again(name: str) -> None:
    env = wrapped(name)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert (again.action_space, again.observation_space) == (
        env.action_space,
        env.observation_space,
    )
    layers = []
    for one in (env, again):
        assert type(one) is type(env)
        layers.append([])
        while one is not one.unwrapped:
            layers[-1].append((type(one), getattr(one, "_saved_kwargs", None)))
            one = one.env
    assert layers[0] == layers[1]
    if name == "frozen statistics":
        again.update_running_mean = False  # An attribute, as in Gymnasium, not an argument.
    env.action_space.seed(1)
    for seed in (3, 4):
        assert shown(env.reset(seed=seed)) == shown(again.reset(seed=seed))
        action = env.action_space.sample() if not name.startswith("sequence") else 3
        assert shown(env.step(action)) == shown(again.step(action))


def test_importing_the_wrappers_imports_no_framework() -> None:
    code = (
        "import sys, gymnasium, hiedit_env.wrappers, hiedit_env.testing as t\n"
        "env = hiedit_env.wrappers.SequentialSelection(t.make_tiny('hiedit/Toy-v1'))\n"
        "env.reset(seed=0)\n"
        "t.assert_reward_terms_sum(t.assert_only_layers_changed(env, 1))\n"
        "t.assert_no_hooks_left(env)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    root = hiedit_env.__path__[0] + "/.."
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr


# What an action stands for


def test_numbers_above_zero_choose() -> None:
    env = BoxLayers(Stub(spaces.MultiBinary(3)))
    assert env.action_space == spaces.Box(-1.0, 1.0, (3,), np.float32)
    mask = env.action(np.array([1e-6, 0.0, -1.0], np.float32))
    assert (mask.tolist(), mask.dtype) == ([1, 0, 0], np.int8)
    back = env.reverse_action([0, 1, 1])
    assert (back.tolist(), back.dtype) == ([-1.0, 1.0, 1.0], np.float32)


def test_subsets_in_lexicographic_order_by_hand() -> None:
    env = DiscreteSubsets(Stub(spaces.MultiBinary(4)), 3)
    assert env.action_space == spaces.Discrete(4)
    assert env.subsets == ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3))
    masks = [env.action(i).tolist() for i in range(4)]
    assert masks == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    assert [env.reverse_action(mask) for mask in masks] == [0, 1, 2, 3]
    assert env.action(np.array(2)).dtype == np.int8


def test_subsets_are_all_and_each_once() -> None:
    env = DiscreteSubsets(Stub(spaces.MultiBinary(7)), 3)
    masks = {tuple(env.action(i).tolist()) for i in range(35)}  # 7 · 6 · 5 / 6
    assert len(masks) == env.action_space.n == 35
    assert {sum(mask) for mask in masks} == {3}


def test_too_many_subsets_are_refused() -> None:
    # 15 over 6 is 5005, 15 over 5 is 3003.
    with pytest.raises(SettingsError, match=r"5005 .*6 out of 15.*limit=4096; SequentialSelection"):
        DiscreteSubsets(Stub(spaces.MultiBinary(15)), 6)
    assert DiscreteSubsets(Stub(spaces.MultiBinary(15)), 5).action_space.n == 3003
    assert DiscreteSubsets(Stub(spaces.MultiBinary(15)), 6, limit=5005).action_space.n == 5005


def test_fixed_layers_leave_step_sizes() -> None:
    env = FixedLayers(Stub(dict_space(3, 3)), [2, 0])
    assert env.action_space == spaces.Box(-1.0, 1.0, (3,), np.float32)
    action = env.action([0.5, 0, -1])
    assert action["layers"].tolist() == [1, 0, 1]
    assert action["step_size"].tolist() == [0.5, 0.0, -1.0]
    assert env.env.action_space.contains(action)
    action["layers"][:] = 0
    assert env.action([0, 0, 0])["layers"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("given", "sizes"),
    [(0.0, [0.0] * 3), (-0.5, [-0.5] * 3), (1, [1.0] * 3), ([0.5, 0, -1], [0.5, 0.0, -1.0])],
)
def test_fixed_step_sizes_leave_layers(given: Any, sizes: list[float]) -> None:
    env = FixedStepSize(Stub(dict_space(3, 3)), given)
    assert env.action_space == spaces.MultiBinary(3)
    action = env.action([1, 0, 1])
    assert (action["layers"].tolist(), action["step_size"].tolist()) == ([1, 0, 1], sizes)
    assert env.env.action_space.contains(action)


def test_a_wrapped_step_is_the_step() -> None:
    settings: dict[str, Any] = {"num_edits": 2, "step_size": SMALL, "max_steps_per_edit": 2}
    mask = [1, 0, 0, 1, 0, 0]
    both = {"layers": np.array(mask, np.int8), "step_size": np.full(L, 0.5, np.float32)}
    cases: list[tuple[str, Wrap, Any, Any]] = [
        (SELECTION, BoxLayers, [1, -1, 0, 0.1, -1, 0], act(SELECTION, mask)),
        # (0, 1), (0, 2), (0, 3): the third.
        (SELECTION, lambda env: DiscreteSubsets(env, 2), 2, act(SELECTION, mask)),
        (LIFELONG, lambda env: FixedLayers(env, (0, 3)), [0.5] * L, both),
        (LIFELONG, lambda env: FixedStepSize(env, 0.5), mask, both),
    ]
    for id, wrap, action, plain_action in cases:
        plain, env = gym.make(id, **settings), wrap(gym.make(id, **settings))
        assert shown(plain.reset(seed=3)) == shown(env.reset(seed=3))
        assert shown(plain.step(plain_action)) == shown(env.step(action))


# What is refused


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (np.zeros(2), r"\(3,\).*\(2,\)"),
        ([0, 0, np.nan], "finite numbers from -1 to 1.*nan"),
        ([0, 0, 1.5], r"finite numbers from -1 to 1.*1\.5"),
        ([True] * 3, "finite numbers from -1 to 1.*bool"),
        (None, "array of numbers.*None"),
    ],
)
def test_refused_numbers(action: Any, words: str) -> None:
    with pytest.raises(ActionError, match=words):
        BoxLayers(Stub(spaces.MultiBinary(3))).action(action)


@pytest.mark.parametrize("action", [3, -1, 1.0, True, [1], np.zeros((1, 1), int), None, "1"])
def test_refused_indices(action: Any) -> None:
    env = DiscreteSubsets(Stub(spaces.MultiBinary(3)), 2)
    with pytest.raises(ActionError, match=r"whole number from 0 to 2, the index|array of numbers"):
        env.action(action)


def test_a_mask_of_another_size_has_no_index() -> None:
    env = DiscreteSubsets(Stub(spaces.MultiBinary(3)), 2)
    with pytest.raises(ActionError, match=r"2 layers, got 1: \(1,\)"):
        env.reverse_action([0, 1, 0])


BAD_ARGUMENTS: list[tuple[Wrap, str]] = [
    (lambda e: DiscreteSubsets(e, 0), "size.*≥ 1.*0"),
    (lambda e: DiscreteSubsets(e, 7), "size.*from 1 to 6.*7"),
    (lambda e: DiscreteSubsets(e, 2, limit=0), "limit.*≥ 1.*0"),
    (lambda e: SequentialSelection(e, 0), "max_layers.*≥ 1.*0"),
    (lambda e: SequentialSelection(e, 7), "max_layers.*from 1 to 6.*7"),
]
BAD_FIXED: list[tuple[Wrap, str]] = [
    (lambda e: FixedLayers(e, []), r"indices from 0 to 5, at least one.*\[\]"),
    (lambda e: FixedLayers(e, [6]), r"indices from 0 to 5.*\[6\]"),
    (lambda e: FixedLayers(e, [-1]), r"indices from 0 to 5.*\[-1\]"),
    (lambda e: FixedLayers(e, [True, False]), r"indices.*True"),
    (lambda e: FixedLayers(e, [1.0]), r"indices.*1\.0"),
    (lambda e: FixedLayers(e, [[1], [1, 2]]), "indices"),  # type: ignore[list-item]
    (lambda e: FixedLayers(e, 3), "indices.*3"),
    (lambda e: FixedLayers(e, [1, 1]), r"different.*\[1, 1\]"),
    (lambda e: FixedStepSize(e, 2.0), "from -1 to 1.*one number stands for all"),
    (lambda e: FixedStepSize(e, [0.0] * 5), r"\(6,\).*\(5,\)"),
    (lambda e: FixedStepSize(e, float("nan")), "from -1 to 1.*nan"),
    (lambda e: FixedStepSize(e, "0"), "array of numbers"),
]


@pytest.mark.parametrize(("wrap", "words"), BAD_ARGUMENTS)
def test_refused_arguments(wrap: Wrap, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        wrap(gym.make(TOY))


@pytest.mark.parametrize(("wrap", "words"), BAD_FIXED)
def test_refused_fixed_parts(wrap: Wrap, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        wrap(Stub(dict_space(6, 6)))


MULTI, SIZES, BOTH = (
    spaces.MultiBinary(6),
    spaces.Box(-1.0, 1.0, (6,), np.float32),
    dict_space(6, 6),
)
ON_LAYERS: list[Wrap] = [BoxLayers, lambda e: DiscreteSubsets(e, 2), SequentialSelection]
ON_BOTH: list[Wrap] = [FlattenAction, lambda e: FixedLayers(e, [0]), FixedStepSize]


@pytest.mark.parametrize("wrap", ON_LAYERS)
def test_wrappers_of_layers_name_both_spaces_and_the_remedy(wrap: Wrap) -> None:
    with pytest.raises(SettingsError, match=r"MultiBinary\(L\).*got Dict.*FixedStepSize"):
        wrap(Stub(BOTH))
    with pytest.raises(SettingsError, match=r"MultiBinary\(L\).*got Box.*LayerSelection"):
        wrap(Stub(SIZES))
    with pytest.raises(SettingsError, match=r"MultiBinary\(L\).*got Discrete\(3\)$"):
        wrap(Stub(spaces.Discrete(3)))
    with pytest.raises(SettingsError, match=r"MultiBinary\(L\).*got MultiBinary\(.2, 3.\)"):
        wrap(Stub(spaces.MultiBinary([2, 3])))


@pytest.mark.parametrize("wrap", ON_BOTH)
def test_wrappers_of_both_name_both_spaces(wrap: Wrap) -> None:
    for space, got in ((MULTI, r"MultiBinary\(6\)"), (SIZES, "Box")):
        with pytest.raises(SettingsError, match=rf"Dict\(layers=.*LifelongEdit.*got {got}.*: "):
            wrap(Stub(space))


def test_the_remedies_work() -> None:
    with pytest.raises(SettingsError, match="BoxLayers makes one Box"):
        FlattenAction(Stub(MULTI))
    assert isinstance(BoxLayers(Stub(MULTI)).action_space, spaces.Box)
    for wrap in ON_LAYERS[:2]:
        wrap(FixedStepSize(Stub(BOTH)))
    with pytest.raises(SettingsError, match="fixed-layers"):
        FixedLayers(gym.make(STEP_SIZE, num_edits=1), [0])
    gym.make(STEP_SIZE, num_edits=1, high_level="fixed-layers")


def test_a_sequence_needs_a_flat_observation() -> None:
    env = Stub(spaces.MultiBinary(3))
    with pytest.raises(SettingsError, match=r"one-dimensional Box.*3 numbers.*Discrete\(1\)"):
        SequentialSelection(env)
