"""A router learns from recorded options: the exact gradient, a toy with skill, a toy without."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from hiedit_agents.bandits.full_information import LearnSettings, Pool, learn, pooled
from hiedit_agents.bandits.recorded_env import RecordedFacts
from hiedit_agents.bandits.recording import any_option, mostly_best, record
from hiedit_agents.bandits.worlds import masks_of
from hiedit_agents.hierarchy.options import HierarchicalAgent, HighLevel
from hiedit_agents.hierarchy.shared_router import SharedRouter
from hiedit_agents.protocol import begin_episode
from hiedit_env.envs.effects import EFFECTS
from hiedit_env.envs.observations import LAYER_FEATURES, size_of
from hiedit_env.envs.tried_options import TriedOptions
from hiedit_env.errors import SettingsError
from hiedit_env.wrappers import ObserveEffects

LAYERS = 4
MASKS = masks_of(LAYERS).astype(bool)
SIZE = size_of(LAYERS, 2) + EFFECTS * LAYERS


def toy(facts: int, seed: int, *, skill: bool = True) -> Pool:
    """Facts of which one layer is right, two are wrong and one is idle; which, the spill tells.

    The right layer earns 3 and a wrong one −2, each layer costs 0.1. Which is which differs from
    fact to fact. Without ``skill`` rewards belong to other facts than observations.
    """
    generator = np.random.default_rng(seed)
    observations = generator.uniform(-1, 1, (facts, SIZE)).astype(np.float32)
    kinds = generator.permuted(np.tile([0, 1, 1, 2], (facts, 1)), axis=1)
    low = np.array([-1.0, 0.4, -0.3])[kinds]
    spill = (low + 0.6 * generator.random((facts, LAYERS))).astype(np.float32)
    observations[:, size_of(LAYERS, 2) + 1 :: EFFECTS] = spill
    worth = np.array([3.0, -2.0, 0.0])[kinds]
    if not skill:
        worth = worth[generator.permutation(facts)]
    return Pool(MASKS, observations, (worth - 0.1) @ MASKS.T.astype(float))


def earned(router: SharedRouter, pool: Pool) -> float:
    """Mean reward of a router's best choices."""
    with torch.no_grad():
        chosen = (router.scores(router.features(pool.observations)) > 0).numpy()
    places = [int(np.flatnonzero((mask == MASKS).all(1))[0]) for mask in chosen]
    return float(pool.rewards[np.arange(len(places)), places].mean())


def learned(pool: Pool, seed: int = 0, steps: int = 400) -> SharedRouter:
    router = SharedRouter(LAYERS, seed=seed)
    learn(router, pool, torch.Generator().manual_seed(seed), LearnSettings(steps=steps))
    return router


def test_it_learns_a_toy_whose_best_layer_depends_on_the_fact() -> None:
    router, held_out = learned(toy(400, 0)), toy(400, 1)
    # The best set earns 2.9 for every fact, the best fixed one 0: each layer is worth −0.35.
    assert held_out.rewards.max(1).mean() == pytest.approx(2.9)
    assert held_out.rewards.mean(0).max() == 0.0
    assert earned(router, held_out) > 0.9 * 2.9


def test_it_invents_no_skill_where_there_is_none() -> None:
    router, held_out = learned(toy(400, 0, skill=False)), toy(400, 1, skill=False)
    # More than the best fixed set, that is nothing, would be luck.
    assert earned(router, held_out) <= 0.15


def test_same_seed_same_router() -> None:
    one, two = learned(toy(50, 0), 3, 20), learned(toy(50, 0), 3, 20)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_the_layers_have_no_names() -> None:
    pool, router = toy(5, 0), SharedRouter(LAYERS, seed=1)
    order = [2, 0, 3, 1]
    table = pool.observations.copy()
    first, middle = LAYER_FEATURES * LAYERS, size_of(LAYERS, 2)
    for start, width in ((0, LAYER_FEATURES), (first + 5, 1), (middle, EFFECTS)):
        own = pool.observations[:, start : start + width * LAYERS].reshape(5, LAYERS, width)
        table[:, start : start + width * LAYERS] = own[:, order].reshape(5, -1)
    with torch.no_grad():
        plain, moved = (router.scores(router.features(t)) for t in (pool.observations, table))
    np.testing.assert_allclose(plain[:, order], moved, atol=1e-6)


def test_all_subsets_are_layers_drawn_one_by_one() -> None:
    pool, router = toy(6, 0), SharedRouter(LAYERS, seed=1)
    features = router.features(pool.observations)
    with torch.no_grad():
        scores = router.scores(features)
        found = router.log_probabilities(features, torch.from_numpy(MASKS))
    signs = torch.from_numpy(np.where(MASKS, 1.0, -1.0)).float()
    expected = torch.nn.functional.logsigmoid(signs[None] * scores[:, None]).sum(2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_drawn_has_the_log_probability_that_it_says() -> None:
    pool, router = toy(1, 0), SharedRouter(LAYERS, seed=1)
    assert isinstance(router, HighLevel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        known = router.log_probabilities(
            router.features(pool.observations), torch.from_numpy(MASKS)
        )[0]
        for _ in range(10):
            choice = router.choose(pool.observations[0], None, generator)  # type: ignore[arg-type]
            place = int(np.flatnonzero((choice.layers == MASKS).all(1))[0])
            assert choice.log_probability is not None
            assert float(choice.log_probability) == pytest.approx(float(known[place]), abs=1e-5)


def test_recorded_facts_are_a_bandit() -> None:
    pool = toy(30, 0)
    env = RecordedFacts(pool)
    check_env(env, skip_render_check=True)
    seen, _ = env.reset(seed=0)
    rows = np.flatnonzero([np.allclose(env.seen(o), seen) for o in pool.observations])
    for place, mask in enumerate(MASKS):
        env.reset(seed=0)
        assert env.step(mask.astype(np.int8))[1:3] == (pool.rewards[rows[0], place], True)
    with pytest.raises(SettingsError, match="all 16 sets of 4 layers must have been recorded"):
        RecordedFacts(Pool(MASKS[1:], pool.observations, pool.rewards[:, 1:]))


def test_the_behaviour_decides_what_is_carried_out() -> None:
    rewards = np.array([0.0, 5.0, 1.0, 2.0])
    tried = TriedOptions(np.eye(4, dtype=bool), rewards, {}, {}, *[np.zeros(4)] * 3)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    shares = np.bincount([mostly_best(tried, generator) for _ in range(4000)], minlength=4) / 4000
    assert shares == pytest.approx([0.0375, 0.8875, 0.0375, 0.0375], abs=0.015)
    shares = np.bincount([any_option(tried, generator) for _ in range(4000)], minlength=4) / 4000
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


def test_from_worlds_to_an_agent(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "worlds"))
    difficulty = "plain,layers=3,home_layers=3,relations=2,subjects=10"
    envs = [
        ObserveEffects(
            gym.make(
                "hiedit/Planted-v2",
                disable_env_checker=True,
                world_seed=seed,
                difficulty=difficulty,
                num_edits=3,
            )
        )
        for seed in (0, 1)
    ]
    found = [record(env, masks_of(3), [0], behaviour=mostly_best) for env in envs]
    assert found[0].origin.observation_size == size_of(3, 2) + EFFECTS * 3
    router = SharedRouter(3)
    learn(router, pooled(found), torch.Generator().manual_seed(0), LearnSettings(steps=3))
    agent = HierarchicalAgent("hiedit", router)
    action = agent.select_action(*begin_episode(envs[0], agent, 0))
    assert action.shape == (3,)
    with pytest.raises(SettingsError, match="there must be at least one recording"):
        pooled([])
    with pytest.raises(SettingsError, match="got model 'planted:plain,layers=3"):
        pooled([found[0], record(envs[1], masks_of(3)[:4], [0])])
    with pytest.raises(SettingsError, match="behind ObserveEffects; got 76"):
        router.features(np.zeros((1, 76), np.float32))
