"""The ids that end in -v2: improvements are paid, steps and layers cost, dying never pays."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.observations import GLOBAL_FEATURES, LAYER_FEATURES
from hiedit_env.envs.reward_weights import default_weights
from hiedit_env.envs.vector import VectorEditing
from hiedit_env.errors import SettingsError
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.testing import assert_reward_terms_sum
from tests.support.episodes import (
    LIFELONG,
    SELECTION,
    L,
    PlainModel,
    act,
    bits,
    make,
    plain_levels,
    same_bits,
    shown,
)

LIFELONG_2, SELECTION_2, STEP_SIZE_2 = (
    f"hiedit/{name}-v2" for name in ("LifelongEdit", "LayerSelection", "StepSize")
)
NONE, ALL = np.zeros(L, np.int8), np.ones(L, np.int8)


def act_2(layers: Any, size: float = 0.0) -> dict[str, Any]:
    found: dict[str, Any] = act(LIFELONG, layers, size)
    return found


@pytest.mark.parametrize("name", [LIFELONG_2, SELECTION_2, STEP_SIZE_2, "hiedit/Planted-v2"])
def test_gymnasiums_checker_passes(name: str) -> None:
    env = gym.make(name, num_edits=2, max_steps_per_edit=2).unwrapped
    check_env(env, skip_render_check=True)


def test_a_fact_is_paid_what_the_agent_changed_less_the_prices() -> None:
    weights = {"edit": 1.5, "locality": 0.5, "recent_retention": 2.0, "sparsity": 0.2, "steps": 0.4}
    env = make(
        LIFELONG_2, num_edits=3, max_steps_per_edit=3, retention_window=2, reward_weights=weights
    )
    env.reset(seed=0)
    unedited, masks = PlainModel(), ([0, 1, 1, 0, 0, 0], [0] * 6, [0, 0, 1, 0, 1, 0])
    requests = [fact.request for fact in env.episode.facts]
    step = 0
    for i, request in enumerate(requests):
        remembered = requests[max(0, i - 2) : i][::-1]
        before = plain_levels(unedited, PlainModel(bits(env)), request, remembered)
        gained, written, writes, over = dict.fromkeys(weights, 0.0), set(), 0, False
        while not over:
            mask = masks[step % 3]
            _, _, _, _, info = env.step(act_2(mask))
            for term in weights:
                gained[term] += info["reward_terms"][term]
            now = set(np.flatnonzero(info["layers"]).tolist())
            written, writes, step = written | now, writes + bool(now), step + 1
            over = info["edit_over"]
        after = plain_levels(unedited, PlainModel(bits(env)), request, remembered)
        for term in ("edit", "locality", "recent_retention"):
            wanted = weights[term] * (after[term] - before[term])
            assert gained[term] == pytest.approx(wanted, rel=1e-3, abs=1e-4), (i, term)
        assert gained["sparsity"] == pytest.approx(-0.2 * len(written))
        assert gained["steps"] == pytest.approx(-0.4 * writes)


@pytest.mark.parametrize("kind", ["loss", "token_accuracy"])
def test_to_leave_every_fact_alone_earns_nothing_whatever_happened_before(kind: str) -> None:
    env = make(SELECTION_2, num_edits=4, step_size=1e-2, reward=kind)
    env.reset(seed=0)
    env.step(ALL)  # does damage
    for _ in range(3):
        step = env.step(NONE)
        assert_reward_terms_sum(step)
        assert step[1] == pytest.approx(0.0, abs=1e-5)


def test_equal_layers_and_an_equal_end_cost_more_in_more_steps() -> None:
    # By hand: no prompt changes, so that two steps instead of one cost one more price.
    rewards = []
    for count in (1, 2):
        env = make(LIFELONG_2, num_edits=1, max_steps_per_edit=2, stop_when_answered=False)
        env.reset(seed=0)
        d_in, d_out = env.llm.shapes[2]
        nothing = [None] * L
        tiny = [*nothing[:2], LowRankUpdate(torch.zeros(1, d_in), torch.zeros(1, d_out)), *nothing]
        rewards.append(sum(env.apply(tiny[:L] if i < count else nothing)[1] for i in range(2)))
    price, layer = default_weights(2)["steps"], default_weights(2)["sparsity"]
    assert rewards == pytest.approx([-price - layer, -2 * price - layer], abs=1e-5)


def test_to_end_the_episode_early_never_pays() -> None:
    total = []
    for first in (NONE, ALL):
        env = make(SELECTION_2, num_edits=5, step_size=1e35, max_steps_per_edit=1)
        env.reset(seed=0)
        env.step(NONE)
        rewards, ended, action = [], False, first
        while not ended:
            step = env.step(action)
            assert_reward_terms_sum(step)
            rewards.append(step[1])
            ended, action = step[2], NONE
        total.append(sum(rewards))
    # Four facts were left: each costs a collapse, and to leave them alone costs nothing.
    assert total == pytest.approx([0.0, -4 * default_weights(2)["collapse"]], abs=1e-4)


def test_with_shares_no_fact_can_lose_more_than_a_collapse_takes() -> None:
    weights = default_weights(2, "generation")
    assert weights["collapse"] >= sum(
        weights[term] for term in ("edit", "locality", "recent_retention")
    )


def test_the_intrinsic_reward_is_that_of_version_1_but_for_the_prices() -> None:
    free = {"sparsity": 0.0}
    old = make(SELECTION, intrinsic=True, reward_weights=free)
    new = make(SELECTION_2, intrinsic=True, reward_weights={**free, "steps": 0.0})
    for env in (old, new):
        env.reset(seed=3)
    for mask in ([1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6):
        one, two = (env.step(np.array(mask, np.int8)) for env in (old, new))
        # The state before the edit is the same for both options, so it cancels.
        assert two[1] == pytest.approx(one[1], abs=1e-5)
    assert same_bits(bits(old), bits(new))


def test_the_observation_begins_with_that_of_version_1_and_holds_what_is_stored() -> None:
    old, new = make(SELECTION), make(SELECTION_2)
    first, _ = old.reset(seed=0)
    second, info = new.reset(seed=0)
    size = L * LAYER_FEATURES + GLOBAL_FEATURES
    assert (len(first), len(second)) == (size, size + L + 2)
    np.testing.assert_array_equal(second[:size], first)
    # Nothing is stored yet, nothing remembered, and the unedited model agrees with itself.
    np.testing.assert_array_equal(second[size:], [0.0] * L + [1.0, 1.0])
    assert info["metrics"]["agreement"] == 1.0
    mask = np.array([0, 1, 0, 0, 1, 0], np.int8)
    seen = new.step(mask)[0][size:]
    assert (seen[:L] > 0).tolist() == mask.astype(bool).tolist()
    # Right after the first edit: what the new fact's keys find, by dense products.
    keys, change = new.capture.keys[1], new.llm.change(1)
    assert change is not None
    wanted = torch.linalg.norm(keys @ change) / (
        torch.linalg.norm(keys) * torch.linalg.norm(change)
    )
    assert seen[1] == pytest.approx(float(wanted), rel=1e-4)
    standing = new.episode.standing
    assert standing is not None
    assert seen[L] == pytest.approx(standing.metrics["recent_retention"])
    assert seen[L + 1] == pytest.approx(standing.metrics["agreement"])
    request = new.episode.facts[0].request
    share = PlainModel(bits(new)).accuracy(request.prompt, request.answer)
    assert seen[L] == pytest.approx(share)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    env = make(LIFELONG_2, num_edits=3, max_steps_per_edit=3)
    env.reset(seed=0)
    env.step(act_2([1, 0, 0, 1, 0, 0]))
    state = env.save_state()
    once = [shown(env.step(act_2([0, 1, 0, 0, 1, 0]))) for _ in range(3)]
    env.restore_state(state)
    assert once == [shown(env.step(act_2([0, 1, 0, 0, 1, 0]))) for _ in range(3)]


def test_options_are_tried_as_they_are_rewarded() -> None:
    env = make(SELECTION_2, num_edits=3)
    env.reset(seed=0)
    env.step(ALL)
    masks = np.array([[0] * 6, [1] * 6, [0, 0, 1, 0, 0, 0]], np.int8)
    tried, state = env.try_options(masks), env.save_state()
    for mask, reward, steps in zip(masks, tried.rewards, tried.reward_terms["steps"], strict=True):
        _, wanted, _, _, info = env.step(mask)
        env.restore_state(state)
        assert reward == pytest.approx(wanted, abs=1e-4)
        assert steps == pytest.approx(info["reward_terms"]["steps"])
    assert tried.rewards[0] == pytest.approx(0.0, abs=1e-5)


def test_the_vector_environment_pays_the_same() -> None:
    envs = gym.make_vec(SELECTION_2, 2, vectorization_mode="vector_entry_point", num_edits=2)
    assert isinstance(envs, VectorEditing)
    seen, _ = envs.reset(seed=0)
    singles: list[EditingEnv] = [gym.make(SELECTION_2, num_edits=2).unwrapped for _ in range(2)]  # type: ignore[misc]
    first = np.stack([env.reset(seed=i)[0] for i, env in enumerate(singles)])
    np.testing.assert_allclose(seen, first, atol=1e-5)
    rewards = envs.step(np.stack((ALL, NONE)))[1]
    alone = [env.step(mask)[1] for env, mask in zip(singles, (ALL, NONE), strict=True)]
    assert rewards == pytest.approx(alone, abs=1e-4)


def test_version_1_knows_no_price_of_a_step() -> None:
    with pytest.raises(SettingsError, match=r"unknown reward term 'steps'.*-v2"):
        make(SELECTION, reward_weights={"steps": 0.1})
    with pytest.raises(SettingsError, match="finite number"):
        make(SELECTION_2, reward_weights={"steps": -0.1})
