"""Episodes that go wrong: unfit updates, collapse, exceptions; nothing half-done stays behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from hiedit_env.envs.accounting import StepError
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import NonFiniteUpdateError, UpdateShapeError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from hiedit_env.rules.closed_form import OuterProductRule
from hiedit_env.testing import assert_no_hooks_left
from tests.support.episodes import (
    IDS,
    KINDS,
    LIFELONG,
    SELECTION,
    L,
    act,
    bits,
    known,
    make,
    roll,
    same_bits,
    shown,
)
from tests.support.models import random_updates

ALL = np.ones(L, bool)


def spoiled(updates: Updates, what: float) -> Updates:
    broken = [u if u is None else LowRankUpdate(u.left, u.right.clone()) for u in updates]
    assert broken[3] is not None
    broken[3].right[0, 0] = what
    return broken


def misshapen(updates: Updates) -> Updates:
    return [*updates[:5], LowRankUpdate(torch.zeros(1, 4), torch.zeros(1, 64))]


def integers(updates: Updates) -> Updates:
    last = updates[5]
    assert last is not None
    return [*updates[:5], LowRankUpdate(last.left.long(), last.right.long())]


@pytest.mark.parametrize("intrinsic", [False, True])
@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda u: spoiled(u, float("nan")), NonFiniteUpdateError, r"2\.mlp\.gate_proj.*finite"),
        (lambda u: spoiled(u, float("inf")), NonFiniteUpdateError, r"2\.mlp\.gate_proj.*finite"),
        (misshapen, UpdateShapeError, r"2\.mlp\.down_proj.*\(1, 4\).*\(r, "),
        (lambda u: u[:5], UpdateShapeError, "5 updates for 6"),
        (lambda u: [1] * 6, UpdateShapeError, r"1\.mlp\.gate_proj.*LowRankUpdate or None, got 1"),
        (lambda u: 7, UpdateShapeError, "list of one LowRankUpdate or None per layer, got 7"),
        (integers, UpdateShapeError, r"2\.mlp\.down_proj.*int64.*same float type"),
    ],
)
def test_unfit_updates_are_refused(
    spoil: Callable[[Updates], Any], error: type[Exception], words: str, intrinsic: bool
) -> None:
    env, twin = (make(LIFELONG, num_edits=1, intrinsic=intrinsic) for _ in range(2))
    env.reset(seed=0)
    twin.reset(seed=0)
    before, broken = bits(env), spoil(random_updates(env.llm))
    for door in (env.apply, env.loss):
        with pytest.raises(error, match=words):
            door(broken)
    assert same_bits(bits(env), before)
    assert_no_hooks_left(env)
    assert roll(env, [act(LIFELONG)]) == roll(twin, [act(LIFELONG)])


# Collapse and exceptions


class SpoilingRule(OuterProductRule):
    """Good for some proposals, then NaN for layer 0, or an exception."""

    def __init__(self, *args: Any, good: int, error: bool = False, **settings: Any) -> None:
        self.good, self.error = good, error
        super().__init__(*args, **settings)

    def reset(self) -> None:
        super().reset()
        self.proposals = 0

    def propose(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        first, *rest = super().propose(capture, layers, multipliers)
        self.proposals += 1
        if self.proposals > self.good:
            if self.error:
                raise RuntimeError("the rule broke")
            first = first and first.scaled(float("nan"))
        return (first, *rest)

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "proposals": self.proposals}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        super().load_statistics(statistics)
        self.proposals = statistics["proposals"]


def spoiling(name: str, good: int, **settings: Any) -> EditingEnv:
    rule_settings = {"good": good, "error": settings.pop("error", False)}
    return make(
        name,
        update_rule="tests.hiedit_env.envs.test_failures:SpoilingRule",
        update_rule_settings=rule_settings,
        **settings,
    )


METRICS = {
    *("efficacy", "generalization", "agreement", "argmax_match", "recent_retention", "answered")
}


def assert_collapsed(result: tuple[Any, ...], error_type: StepError, reward: float = -10.0) -> None:
    _, got, terminated, truncated, info = result
    assert (got, terminated, truncated) == (reward, True, False)
    assert info["error_type"] == error_type
    terms = dict.fromkeys(("edit", "locality", "sparsity", "recent_retention"), 0.0)
    assert info["reward_terms"] == {**terms, "collapse": reward}
    assert info["layers"].tolist() == [0] * L
    assert set(info["metrics"]) == METRICS
    assert known(info["metrics"]) == {"answered": False}
    assert info["edit_over"] is False


@pytest.mark.parametrize("name", IDS)
def test_a_rule_that_gives_nan_ends_the_episode(name: str) -> None:
    # In LayerSelection the third primitive step of the first option, elsewhere the third step.
    env = spoiling(name, good=2)
    env.reset(seed=0)
    if name != SELECTION:
        assert not env.step(act(name))[4]["error_type"]
        env.step(act(name))
    before, state = bits(env), repr(env.episode.rule.statistics())
    result = env.step(act(name))
    assert_collapsed(result, StepError.NON_FINITE_UPDATE)
    assert env.observation_space.contains(result[0])
    assert same_bits(bits(env), before)
    assert repr(env.episode.rule.statistics()) == state
    assert_no_hooks_left(env)
    with pytest.raises(ResetNeeded, match="ended"):
        env.step(act(name))
    env.reset(seed=0)
    if name != SELECTION:
        env.step(act(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", IDS)
def test_a_loss_that_is_not_finite_ends_the_episode(name: str, steps: int, kind: str) -> None:
    # Entries of 1e20 are finite, but gate times up is not. Accuracies of NaN logits are.
    settings: dict[str, Any] = {"max_steps_per_edit": steps, "reward": kind}
    env = make(name, step_size=1e20, reward_weights={"collapse": 3.0}, **settings)
    env.reset(seed=0)
    before = bits(env)
    assert_collapsed(env.step(act(name)), StepError.NUMERICAL_COLLAPSE, -3.0)
    assert same_bits(bits(env), before)


@pytest.mark.parametrize("judge", ["step", "fact", "never"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_collapse_by_applied_updates_ends_the_episode(steps: int, judge: Any) -> None:
    env = make(LIFELONG, max_steps_per_edit=steps)
    env.reset(seed=0)
    before = bits(env)
    updates = random_updates(env.llm, scale=1e12)
    assert_collapsed(env.apply(updates, judge=judge), StepError.NUMERICAL_COLLAPSE)
    assert same_bits(bits(env), before)


def test_a_collapse_can_be_taken_back() -> None:
    env, twin = spoiling(LIFELONG, good=1), make(LIFELONG)
    env.reset(seed=0)
    twin.reset(seed=0)
    assert shown(env.step(act(LIFELONG))) == shown(twin.step(act(LIFELONG)))
    state = env.save_state()
    assert env.step(act(LIFELONG))[2]
    env.restore_state(state)
    good = act(LIFELONG, [0, 1, 1, 1, 1, 1])
    assert shown(env.step(good)) == shown(twin.step(good))


def test_the_intrinsic_reward_counts_a_collapse_avoided() -> None:
    # All layers would collapse (layer 0 is spoiled), the chosen ones do not: minus minus ten.
    env = spoiling(LIFELONG, good=0, intrinsic=True)
    twin = make(LIFELONG)
    env.reset(seed=0)
    twin.reset(seed=0)
    good = act(LIFELONG, [0, 1, 1, 1, 1, 1])
    _, reward, ended, _, info = env.step(good)
    assert not ended
    assert reward == pytest.approx(twin.step(good)[1] + 10.0)
    assert info["reward_terms"]["collapse"] == 10.0
    # Both collapse: no difference, and the episode is over.
    _, reward, ended, _, info = env.step(act(LIFELONG))
    assert (reward, ended, info["error_type"]) == (0.0, True, StepError.NON_FINITE_UPDATE)


@pytest.mark.parametrize("intrinsic", [False, True])
@pytest.mark.parametrize("name", IDS)
def test_an_exception_in_a_rule_leaves_everything_as_it_was(name: str, intrinsic: bool) -> None:
    # In LayerSelection the second primitive step of the first option, elsewhere the first step.
    env = spoiling(name, good=1 if name == SELECTION else 0, error=True, intrinsic=intrinsic)
    twin = make(name, intrinsic=intrinsic)
    env.reset(seed=0)
    twin.reset(seed=0)
    before, state = bits(env), env.episode.save()
    with pytest.raises(RuntimeError, match="the rule broke"):
        env.step(act(name))
    assert same_bits(bits(env), before)
    after = env.episode.save()
    assert (after.steps, after.position, dict(after.counted)) == (0, 0, dict(state.counted))
    assert_no_hooks_left(env)
    env.episode.rule.good = 100  # type: ignore[attr-defined]
    assert roll(env, [act(name)] * 2) == roll(twin, [act(name)] * 2)


def test_no_hooks_stay_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(LIFELONG, num_edits=2, intrinsic=True)
    env.reset(seed=0)
    env.step(act(LIFELONG))
    assert torch.isfinite(env.loss(random_updates(env.llm)))
    assert_no_hooks_left(env)

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    before = bits(env)
    with monkeypatch.context() as patch:
        patch.setattr(env.llm.halves, "suffix", broken)
        for door in (lambda: env.step(act(LIFELONG)), lambda: env.loss(random_updates(env.llm))):
            with pytest.raises(RuntimeError, match="out of memory"):
                door()
    assert_no_hooks_left(env)
    assert same_bits(bits(env), before)
    env.step(act(LIFELONG))
