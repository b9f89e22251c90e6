"""Learned high levels against enumeration and finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy.routers import HISTORY_FEATURES, PolicyRouter, StraightThroughRouter
from hiedit_env.envs.observations import GLOBAL_FEATURES, LAYER_FEATURES
from hiedit_env.errors import SettingsError
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import SELECTION, make

CPU = torch.device("cpu")
#: A policy router looks at the observation only.
NOTHING: Any = None


def observation(layers: int, seed: int = 0) -> np.ndarray:
    size = layers * LAYER_FEATURES + GLOBAL_FEATURES
    return np.random.default_rng(seed).uniform(-1, 1, size).astype(np.float32)


def policy(layers: int, seed: int = 1, **settings: object) -> PolicyRouter:
    """A router whose last layer is not 0, so that its scores depend on what it sees."""
    router = PolicyRouter(layers, CPU, hidden=5, seed=seed, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.score.weight.normal_(generator=generator)
        router.bias.normal_(generator=generator)
    return router


# -- straight-through ---------------------------------------------------------------------------


def test_straight_through_gradient_of_two_layers_by_hand() -> None:
    env = make(SELECTION, layers=[f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")])
    env.reset(seed=0)
    router = StraightThroughRouter(env.llm.shapes, CPU, layers_per_edit=1, hidden=4)
    logits = router.logits(env.capture)
    choice = router.choose(np.zeros(0, np.float32), env.capture)
    assert choice.gates is not None
    best = int(logits.argmax())
    assert choice.gates.tolist() == pytest.approx([float(i == best) for i in range(2)])
    # f(g) = 3 g₀ + 5 g₁²: its slope at the mask, handed on to the logits unchanged.
    loss = 3 * choice.gates[0] + 5 * choice.gates[1] ** 2
    (bias,) = torch.autograd.grad(loss, router.gate.bias)
    assert bias.tolist() == pytest.approx([3.0, 10.0 if best == 1 else 0.0], abs=1e-5)


def test_gates_carry_the_slope_of_the_real_objective() -> None:
    """∂L/∂z_l is what L changes by when layer l is written a little more, chosen or not."""
    env = make(SELECTION, update_rule="outer-product", step_size=1e-3)
    env.reset(seed=0)
    env.step(np.ones(6, np.int8))
    rule = OuterProductRule(env.llm.shapes, CPU, step_size=1e-3)
    rule.load_statistics(env.episode.rule.statistics())
    capture = env.episode.capture
    rule.observe(capture)
    router = StraightThroughRouter(env.llm.shapes, CPU, layers_per_edit=2, hidden=4)
    choice = router.choose(np.zeros(0, np.float32), capture)
    assert choice.gates is not None
    everything = np.ones(6, bool)
    loss = env.loss(rule.compute(capture, everything, choice.gates))
    (found,) = torch.autograd.grad(loss, router.gate.bias)
    mask = torch.from_numpy(choice.layers.astype(np.float32))

    def at(gates: Tensor) -> float:
        with torch.no_grad():
            return float(env.loss(rule.compute(capture, everything, gates)))

    for layer in range(6):
        step = torch.zeros(6)
        step[layer] = 1e-2
        slope = (at(mask + step) - at(mask - step)) / 2e-2
        assert float(found[layer]) == pytest.approx(slope, rel=2e-2, abs=2e-3)
    assert float(found.abs().min()) > 0


def test_router_moments_are_learned_in_training_only() -> None:
    env = make(SELECTION)
    env.reset(seed=0)
    router = StraightThroughRouter(env.llm.shapes, CPU, hidden=4)
    router.choose(np.zeros(0, np.float32), env.capture, torch.Generator())
    count = router.moments[0].count
    before = router.logits(env.capture)
    router.choose(np.zeros(0, np.float32), env.capture)
    assert router.moments[0].count == count == len(env.capture.keys[0])
    other = StraightThroughRouter(env.llm.shapes, CPU, hidden=4, seed=7)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.logits(env.capture), before)


# -- policy -------------------------------------------------------------------------------------


def orders(layers: int, count: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(layers), count))


def test_probabilities_of_draws_without_replacement() -> None:
    router, seen = policy(4, layers_per_edit=2), observation(4)
    scores = router.scores(seen).double().detach().numpy()
    weights = np.exp(scores)
    total = 0.0
    for first, second in orders(4, 2):
        by_hand = (
            weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        )
        found = math.exp(router.log_probability(seen, (first, second)).item())
        assert found == pytest.approx(by_hand, rel=1e-5)
        total += found
    assert total == pytest.approx(1, rel=1e-5)


def test_samples_follow_the_probabilities() -> None:
    router, seen = policy(3, layers_per_edit=2), observation(3)
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(itertools.combinations(range(3), 2), 0)
    draws = 1000
    for _ in range(draws):
        choice = router.choose(seen, None, generator)  # type: ignore[arg-type]
        counts[tuple(np.flatnonzero(choice.layers))] += 1  # type: ignore[index]
    for pair, count in counts.items():
        wanted = sum(
            math.exp(router.log_probability(seen, order).item())
            for order in itertools.permutations(pair)
        )
        assert count / draws == pytest.approx(wanted, abs=4 * math.sqrt(wanted / draws))


@pytest.mark.parametrize("size", ["fixed", "learned"])
def test_entropy_by_enumeration(size: str) -> None:
    router, seen = policy(3, layers_per_edit=1, size=size), observation(3)
    choice = router.choose(seen, None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    sets = (
        orders(3, 1)
        if size == "fixed"
        else [c for n in range(4) for c in itertools.combinations(range(3), n)]
    )
    logarithms = [router.log_probability(seen, drawn).item() for drawn in sets]
    wanted = -sum(math.exp(value) * value for value in logarithms)
    assert choice.entropy is not None
    # Of independent draws entropies add up; the mean over layers is kept.
    assert choice.entropy.item() * (1 if size == "fixed" else 3) == pytest.approx(wanted, rel=1e-4)


def exact_gradient(
    router: PolicyRouter, seen: np.ndarray, outcomes: Sequence[tuple[Sequence[int], float]]
) -> Tensor:
    """Of the expected reward, by enumeration."""
    value = sum(router.log_probability(seen, order).exp() * reward for order, reward in outcomes)
    assert isinstance(value, Tensor)
    return torch.autograd.grad(value, router.bias)[0]


@pytest.mark.parametrize("size", ["fixed", "learned"])
def test_score_function_is_the_gradient_of_the_expected_reward(size: str) -> None:
    """Σ_ω π(ω) ∇log π(ω) (r(ω) − b) = ∇ Σ_ω π(ω) r(ω), whatever the baseline b."""
    router, seen = policy(3, layers_per_edit=2, size=size), observation(3)
    rewards = np.random.default_rng(3)
    draws: list[Sequence[int]] = (
        list(orders(3, 2))
        if size == "fixed"
        else [c for n in range(4) for c in itertools.combinations(range(3), n)]
    )
    outcomes = [(draw, float(rewards.normal())) for draw in draws]
    total = torch.zeros(3)
    for draw, reward in outcomes:
        log_probability = router.log_probability(seen, draw)
        (slope,) = torch.autograd.grad(log_probability, router.bias)
        total += math.exp(log_probability.item()) * slope * (reward - 0.7)
    assert total.tolist() == pytest.approx(
        exact_gradient(router, seen, outcomes).tolist(), abs=1e-5
    )


def test_sampled_log_probability_belongs_to_the_sampled_layers() -> None:
    seen, generator = observation(4), torch.Generator().manual_seed(0)
    for _ in range(5):
        router = policy(4, size="learned")
        choice = router.choose(seen, None, generator)  # type: ignore[arg-type]
        wanted = router.log_probability(seen, np.flatnonzero(choice.layers).tolist())
        assert choice.log_probability is not None
        assert choice.log_probability.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_best_choices() -> None:
    seen = observation(4)
    for size, scores, wanted in (
        ("fixed", [1.0, 3.0, 2.0, 0.0], [0, 1, 1, 0]),
        ("learned", [-1.0, 3.0, 2.0, 0.5], [0, 1, 1, 1]),
        ("learned", [-4.0, -3.0, -1.0, -2.0], [0, 0, 1, 0]),
    ):
        router = PolicyRouter(4, CPU, size=size, layers_per_edit=2)  # type: ignore[arg-type]
        with torch.no_grad():
            router.bias.copy_(torch.tensor(scores))
        choice = router.choose(seen, None)  # type: ignore[arg-type]
        assert choice.layers.astype(int).tolist() == wanted
        assert choice.log_probability is None


@pytest.mark.parametrize("size", ["fixed", "learned"])
def test_a_policy_that_is_not_deterministic_acts_as_it_was_trained(size: str) -> None:
    router = policy(4, size=size, layers_per_edit=2, deterministic=False)
    seen = observation(4)

    def episode(seed: int) -> list[tuple[int, ...]]:
        router.reset(seed)
        chosen = [router.choose(seen, NOTHING).layers for _ in range(1000)]
        return [tuple(np.flatnonzero(layers).tolist()) for layers in chosen]

    first = episode(0)
    assert first == episode(0) != episode(1)
    for subset in set(first):
        orders = itertools.permutations(subset) if size == "fixed" else [subset]
        wanted = sum(math.exp(float(router.log_probability(seen, o).detach())) for o in orders)
        assert first.count(subset) / 1000 == pytest.approx(wanted, abs=0.06)
    best = policy(4, size=size, layers_per_edit=2)
    assert len({tuple(best.choose(seen, NOTHING).layers) for _ in range(20)}) == 1


@pytest.mark.parametrize("size", ["fixed", "learned"])
def test_acting_draws_at_a_temperature_and_training_does_not(size: str) -> None:
    """Scores over T, enumerated: one of three layers, or each on its own with odds exp(score/T)."""
    scores = [2.0, 0.0, -1.0]
    router = PolicyRouter(
        3,
        CPU,
        size=size,  # type: ignore[arg-type]
        layers_per_edit=1,
        deterministic=False,
        temperature=4.0,
    )
    with torch.no_grad():
        router.bias.copy_(torch.tensor(scores))
    router.reset(0)
    seen = observation(3)
    for temperature, generator in ((4.0, None), (1.0, torch.Generator().manual_seed(0))):
        drawn = np.mean([router.choose(seen, NOTHING, generator).layers for _ in range(2000)], 0)
        odds = np.exp(np.array(scores) / temperature)
        wanted = odds / odds.sum() if size == "fixed" else odds / (1 + odds)
        np.testing.assert_allclose(drawn, wanted, atol=0.04)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(SettingsError, match="temperature must be a number > 0"):
        PolicyRouter(4, CPU, temperature=temperature)


def test_a_learned_size_begins_at_the_wanted_one() -> None:
    router = PolicyRouter(8, CPU, size="learned", layers_per_edit=2)
    assert router.scores(observation(8)).sigmoid().sum().item() == pytest.approx(2, rel=1e-5)


def test_history_can_be_hidden() -> None:
    seen = observation(3)
    changed = seen.copy()
    table = changed[:-GLOBAL_FEATURES].reshape(3, LAYER_FEATURES)
    table[:, list(HISTORY_FEATURES)] += 0.5
    blind, sighted = policy(3, history=False), policy(3)
    assert torch.equal(blind.scores(seen), blind.scores(changed))
    assert not torch.allclose(sighted.scores(seen), sighted.scores(changed))


@pytest.mark.parametrize("count", [0, 5])
def test_sizes_out_of_range_are_refused(count: int) -> None:
    with pytest.raises(SettingsError, match="from 1 to the number of candidate layers, 4"):
        PolicyRouter(4, CPU, layers_per_edit=count)
    with pytest.raises(SettingsError, match="size must be one of"):
        PolicyRouter(4, CPU, size="any")  # type: ignore[arg-type]


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    PolicyRouter(4, CPU)
    StraightThroughRouter([(2, 3)], CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 2), (0.01, 1), (1.0, 8), (0.5, 4)])
def test_a_share_of_the_layers_is_picked(share: float, expected: int) -> None:
    assert PolicyRouter(8, CPU, share=share).layers_per_edit == expected
    assert PolicyRouter(8, CPU, share=share, layers_per_edit=3).layers_per_edit == 3


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(SettingsError, match="share"):
        PolicyRouter(8, CPU, share=share)


def test_normalised_features_make_scores_independent_of_their_scale() -> None:
    layers, size = 3, 3 * LAYER_FEATURES + GLOBAL_FEATURES
    seen = np.random.default_rng(0).normal(size=(6, size)).astype(np.float32)
    choices = []
    for factor, offset in ((1.0, 0.0), (0.01, 0.3)):
        router = PolicyRouter(layers, CPU, layers_per_edit=1, hidden=5, normalize=True, seed=1)
        with torch.no_grad():
            router.score.weight.fill_(0.3)
        generator = torch.Generator().manual_seed(0)
        for row in seen[:5] * np.float32(factor) + np.float32(offset):
            router.choose(row, NOTHING, generator)
        last = seen[5] * np.float32(factor) + np.float32(offset)
        before = router.moments.state_dict() if router.moments else {}
        router.choose(last, NOTHING)
        # Only training teaches it.
        assert router.moments is not None
        assert router.moments.count == before["count"] == 5 * layers
        choices.append(router.scores(last))
        again = PolicyRouter(layers, CPU, layers_per_edit=1, hidden=5, normalize=True, seed=7)
        again.load_state_dict(router.state_dict())
        assert torch.equal(again.scores(last), choices[-1])
    torch.testing.assert_close(*choices, rtol=1e-3, atol=1e-4)
    assert choices[0].std() > 0.01


def test_a_feature_far_outside_of_training_counts_as_one_at_its_edge() -> None:
    layers, size = 3, 3 * LAYER_FEATURES + GLOBAL_FEATURES
    seen = np.random.default_rng(0).normal(size=(40, size)).astype(np.float32)
    router = PolicyRouter(layers, CPU, layers_per_edit=1, normalize=True, clip=2.0, seed=1)
    with torch.no_grad():
        router.score.weight.fill_(0.3)
    for row in seen:
        router.choose(row, NOTHING, torch.Generator().manual_seed(0))

    def scores(distance: float) -> Tensor:
        row = seen.mean(0)
        row[0] += np.float32(distance)  # the first feature of the first layer, of deviation 1
        return router.scores(row).detach()

    assert not torch.equal(scores(1.0), scores(1.5))
    assert torch.equal(scores(3.0), scores(30.0))
    assert torch.equal(scores(-3.0), scores(-30.0))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_a_clip_out_of_range_is_refused(clip: float) -> None:
    with pytest.raises(SettingsError, match="clip"):
        PolicyRouter(8, CPU, clip=clip)
