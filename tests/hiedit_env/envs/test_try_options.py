"""``try_options``: many options from one state, against ``step`` one after the other."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from hiedit_env.envs import tried_options
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.tried_options import TriedOptions, memory_of_option
from hiedit_env.envs.vector import VectorEditing
from hiedit_env.errors import ActionError, NotEnoughMemoryError, SettingsError
from tests.support.episodes import LIFELONG, SELECTION, STEP_SIZE, L, act, bits, make, same_bits

#: What "up to rounding" is allowed to be.
CLOSE = 1e-4
MASKS = np.array(
    [[0] * 6, [1] * 6, [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0]], np.int8
)


def edited(name: str = SELECTION, **settings: Any) -> EditingEnv:
    """An environment in mid-episode: one fact was edited, the rule has statistics."""
    env = make(name, num_edits=4, **{"update_rule": "decorrelated", **settings})
    env.reset(seed=1)
    info: dict[str, Any] = {"edit_over": False}
    while not info["edit_over"]:
        info = env.step(act(name, [0, 1, 1, 0, 1, 0]))[4]
    return env


def one_after_the_other(env: EditingEnv, name: str, masks: Any) -> list[tuple[Any, ...]]:
    state, found = env.save_state(), []
    for mask in masks:
        found.append(env.step(act(name, list(mask))))
        env.restore_state(state)
    return found


def assert_same(tried: TriedOptions, steps: list[tuple[Any, ...]]) -> None:
    assert tried.rewards.dtype == np.float64
    assert len(tried) == len(steps)
    for i, (_, reward, _, _, info) in enumerate(steps):
        assert tried.rewards[i] == pytest.approx(reward, abs=CLOSE)
        for name, value in info["reward_terms"].items():
            assert tried.reward_terms[name][i] == pytest.approx(float(value), abs=CLOSE)
        for name, value in info["metrics"].items():
            assert tried.metrics[name][i] == pytest.approx(value, nan_ok=True)
        assert tried.layers[i].tolist() == info["layers"].astype(bool).tolist()
        assert tried.edit_steps[i] == info["edit_steps"]
        assert tried.error_types[i] == info["error_type"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (SELECTION, {}),
        (SELECTION, {"intrinsic": True}),
        (SELECTION, {"update_rule": "gradient", "step_size": 0.01, "max_steps_per_edit": 2}),
        (SELECTION, {"edits_per_step": 2, "locality_reference": "previous"}),
        (SELECTION, {"step_size": 1e35}),
        (SELECTION, {"reward": "generation", "max_steps_per_edit": 1}),
        (LIFELONG, {}),
    ],
    ids=["plain", "intrinsic", "gradient", "two facts", "failing", "generation", "lifelong"],
)
def test_it_equals_one_after_the_other(name: str, settings: dict[str, Any]) -> None:
    env = make(name, num_edits=4, **settings) if settings.get("step_size") == 1e35 else None
    if env is not None:
        env.reset(seed=1)
    else:
        env = edited(name, **settings)
    steps = one_after_the_other(env, name, MASKS)
    assert_same(env.try_options(MASKS), steps)
    assert len({round(step[1], 3) for step in steps}) > 1
    # The same in chunks, and alone.
    assert_same(env.try_options(MASKS, chunk=2), steps)
    assert_same(env.try_options(MASKS[3:4]), steps[3:4])


def test_it_leaves_no_trace() -> None:
    env, untouched = edited(), edited()
    before, weights = env.save_state(), bits(env)
    fingerprint = env.llm.weights_fingerprint()
    random = copy.deepcopy(env.np_random.bit_generator.state)
    env.try_options(MASKS)
    after = env.save_state()
    assert env.llm.weights_fingerprint() == fingerprint
    assert same_bits(bits(env), weights)
    assert env.np_random.bit_generator.state == random
    for name in ("position", "steps", "counted", "ended", "reading", "references", "observed"):
        assert getattr(after.episode, name) == getattr(before.episode, name), name
    assert all(
        after.episode.weights.changes[i] is before.episode.weights.changes[i] for i in range(L)
    )
    sums = [state.episode.rule["products"] for state in (before, after)]
    assert all(np.array_equal(a, b) for a, b in zip(*sums, strict=True))
    # What comes next is what it would have been, bit for bit.
    one, other = (e.step(np.array([1, 0, 1, 0, 0, 1], np.int8)) for e in (env, untouched))
    assert one[0].tobytes() == other[0].tobytes()
    assert repr(one[1:]) == repr(other[1:])


def test_a_fact_that_has_begun_is_tried_from_where_it_is() -> None:
    env = edited(LIFELONG, max_steps_per_edit=3)
    env.step(act(LIFELONG, [0, 0, 1, 0, 0, 0]))
    assert env.episode.steps == 1
    assert_same(env.try_options(MASKS), one_after_the_other(env, LIFELONG, MASKS))


def test_with_step_sizes_an_option_is_one_step_at_the_nominal_size() -> None:
    env = make(STEP_SIZE, num_edits=2, high_level="all-layers")
    env.reset(seed=0)
    steps = one_after_the_other(env, STEP_SIZE, [[1] * L])
    assert_same(env.try_options(np.ones((1, L), np.int8)), steps)


def test_the_vector_environment_tries_in_all_of_its_environments() -> None:
    envs = gym.make_vec(
        SELECTION, 2, vectorization_mode="vector_entry_point", num_edits=3, retention_window=1
    )
    assert isinstance(envs, VectorEditing)
    envs.reset(seed=0)
    envs.step(np.ones((2, L), np.int8))
    own = np.stack((MASKS[1:4], MASKS[2:5]))
    prints = [env.llm.weights_fingerprint() for env in envs.envs]
    tried = envs.try_options(own)
    assert tried.rewards.shape == (2, 3)
    assert tried.metrics["efficacy"].shape == (2, 3)
    assert prints == [env.llm.weights_fingerprint() for env in envs.envs]
    for i in range(3):
        copies = copy.deepcopy(envs)
        assert copies.step(own[:, i])[1] == pytest.approx(tried.rewards[:, i], abs=CLOSE)
    assert envs.try_options(MASKS[:2], chunk=3).rewards.shape == (2, 2)
    with pytest.raises(ActionError, match=r"masks must have shape \(2, M, 6\) or \(M, 6\)"):
        envs.try_options(np.ones((3, 1, L)))


def test_bad_masks_are_refused() -> None:
    env = make(SELECTION)
    with pytest.raises(ResetNeeded):
        env.try_options(MASKS)
    env.reset(seed=0)
    with pytest.raises(ActionError, match=r"masks must have shape \(N, 6\)"):
        env.try_options(np.ones(L))
    with pytest.raises(ActionError, match=r"masks must have shape \(N, 6\)"):
        env.try_options(np.ones((0, L)))
    with pytest.raises(ActionError, match="only 0 and 1"):
        env.try_options(np.full((1, L), 2))
    with pytest.raises(SettingsError, match="chunk"):
        env.try_options(MASKS, chunk=0)


def test_more_options_than_memory_names_the_estimate_and_what_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = edited()
    each = memory_of_option(env)
    monkeypatch.setattr(tried_options, "available_memory", lambda device: int(3.5 * each))
    with pytest.raises(NotEnoughMemoryError, match=rf"5 options .* {5 * each / 1e9:.2g} GB") as it:
        env.try_options(MASKS, chunk=5)
    assert "pass chunk=3" in str(it.value)
    monkeypatch.setattr(tried_options, "available_memory", lambda device: each // 2)
    with pytest.raises(NotEnoughMemoryError, match="free some memory"):
        env.try_options(MASKS)


def test_without_a_chunk_as_many_are_tried_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    env = edited()
    wanted = env.try_options(MASKS)
    each = memory_of_option(env)
    sizes: list[int] = []
    run = tried_options.run_together

    def counted(several: Any) -> Any:
        sizes.append(len(several))
        return run(several)

    monkeypatch.setattr(tried_options, "available_memory", lambda device: int(4.2 * each))
    monkeypatch.setattr(tried_options, "run_together", counted)
    assert env.try_options(MASKS).rewards == pytest.approx(wanted.rewards, abs=CLOSE)
    # Half of the memory is two options.
    assert sizes == [2, 2, 1]


def test_the_estimate_counts_what_an_option_holds() -> None:
    env = edited()
    # Of the tiny model, by hand: two changes of each layer, two sets of statistics.
    changes = sum(2 * 4 * d_in * d_out for d_in, d_out in env.llm.shapes)
    squares = sum(2 * 4 * d_in * d_in for d_in, _ in env.llm.shapes)
    moments = sum(2 * 2 * 4 * (d_in + d_out) for d_in, d_out in env.llm.shapes)
    assert memory_of_option(env) > changes + squares + moments
    assert memory_of_option(env, 1) < memory_of_option(env, 2) < memory_of_option(env)
