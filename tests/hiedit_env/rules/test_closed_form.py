"""Update rules, against dense formulas in float64 and examples worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.closed_form import (
    DecorrelatedRule,
    GradientRule,
    Keys,
    OuterProductRule,
    RidgeRule,
)
from hiedit_env.rules.forms import DecorrelatedForm
from hiedit_env.rules.moments import RunningMoments
from hiedit_env.rules.names import RULES, make_rule
from tests.support.models import PROMPTS, fake_capture, normal, prompt

# Equal shapes apart from each other, and one shape the reverse of another.
SHAPES = ((5, 3), (3, 5), (5, 3), (4, 4))
CPU = torch.device("cpu")
ALL = np.ones(len(SHAPES), bool)
# Different numbers of tokens: 5 and 8 read, 2 and 3 of them predict the answer.
REQUESTS = (PROMPTS[0], PROMPTS[2])
EPS = float(np.finfo(np.float32).eps)

Matrix = NDArray[np.float64]


def by_name(name: str, **settings: Any) -> UpdateRule:
    return make_rule(name, SHAPES, CPU, settings)


def rows(capture: Capture, layer: int, tokens: str) -> tuple[Matrix, Matrix]:
    """Keys and value gradients of the tokens that count, float64."""
    start = len(capture.prompt.prompt_ids) - 1 if tokens == "answer" else 0
    keys, gradients = capture.keys[layer], capture.value_gradients[layer]
    return keys.double().numpy()[start:], gradients.double().numpy()[start:]


def standardised(
    captures: list[Capture], layer: int, tokens: str
) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Raw and standardised keys and value gradients of the last capture."""
    seen = [np.concatenate(rows(c, layer, tokens), 1) for c in captures]
    everything = np.concatenate(seen)
    deviation = everything.std(0, ddof=1)
    normalised = (seen[-1] - everything.mean(0)) / (deviation + EPS)
    d_in = SHAPES[layer][0]
    keys, gradients = rows(captures[-1], layer, tokens)
    return keys, gradients, normalised[:, :d_in], normalised[:, d_in:]


def dense(update: LowRankUpdate | None) -> Matrix:
    assert update is not None
    return update.left.double().numpy().T @ update.right.double().numpy()


def captures(count: int) -> list[Capture]:
    return [fake_capture(SHAPES, REQUESTS[i % 2], seed=i) for i in range(count)]


def capture_of(keys: list[list[float]], gradients: list[list[float]]) -> Capture:
    """One layer, two tokens, the first of which is not the answer's."""
    request = prompt([1, 2], [3])
    one, no = torch.zeros(1, dtype=torch.int64), torch.tensor([False])
    return Capture((request,), (torch.tensor(keys),), (torch.tensor(gradients),), 1.0, one, no)


# -- running moments ----------------------------------------------------------------------------


def test_moments_equal_those_of_all_rows_seen() -> None:
    moments = RunningMoments(2, 3, CPU)
    offsets = torch.tensor([0.0, 100.0, -5.0])  # far from zero, compared with the spread
    parts = [normal(i, 2, n, 3) + offsets for i, n in enumerate((4, 1, 7, 2))]
    for part in parts:
        moments.update(part)
    everything = torch.cat(parts, 1).double().numpy()
    assert moments.count == 14
    probe = normal(9, 2, 5, 3) + offsets
    mean, deviation = everything.mean(1), everything.std(1, ddof=1)
    expected = (probe.double().numpy() - mean[:, None]) / deviation[:, None]
    found = moments.normalise(probe, [0, 1]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # Some of the layers alone, in any order.
    alone = moments.normalise(probe[[1]], [1]).numpy()
    np.testing.assert_allclose(alone, found[[1]], rtol=1e-6)


def test_moments_by_hand() -> None:
    moments = RunningMoments(1, 1, CPU)
    moments.update(torch.tensor([[[1.0], [2.0]]]))
    moments.update(torch.tensor([[[6.0]]]))
    # Mean 3; deviations -2, -1, 3; variance 14 / 2.
    (found,) = moments.normalise(torch.tensor([[[3.0], [10.0]]]), [0]).flatten(1).tolist()
    assert found == pytest.approx([0, math.sqrt(7)], rel=1e-6)


def test_moments_are_finite_before_there_is_a_spread() -> None:
    moments = RunningMoments(1, 2, CPU)
    row = torch.tensor([[[3.0, -4.0]]])
    moments.update(row)
    # After one row there is only its size to go by.
    assert moments.normalise(row, [0]).flatten().tolist() == pytest.approx([1, -1])
    for _ in range(2):
        moments.update(row)
        assert moments.normalise(row, [0]).tolist() == [[[0, 0]]]


@pytest.mark.parametrize("count", [math.nan, -5, "x", 10**400, 2.0, True])
def test_a_number_of_rows_that_is_none_is_refused(count: Any) -> None:
    moments = RunningMoments(1, 2, CPU)
    moments.update(torch.tensor([[[1.0, 2.0]]]))
    before = moments.statistics()
    with pytest.raises(SettingsError, match="the number of rows seen must be"):
        moments.load_statistics({**before, "count": count})
    assert moments.statistics() == before


def test_moments_of_half_precision_rows_are_kept_in_float32() -> None:
    moments = RunningMoments(1, 1, CPU)
    for _ in range(1000):
        moments.update(torch.tensor([[[1.0], [1.5]]], dtype=torch.bfloat16))
    found = moments.normalise(torch.tensor([[[2.25]]], dtype=torch.bfloat16), [0])
    assert found.dtype == torch.float32
    # Mean 1.25, every deviation a quarter: four deviations away.
    assert float(found) == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_a_first_fact_of_one_answer_token_is_written(name: str) -> None:
    rule = make_rule(name, ((2, 3),), CPU, {"tokens": "answer"})
    capture = capture_of([[9.0, 9.0], [1.0, -2.0]], [[9.0, 9.0, 9.0], [0.5, 0.0, -1.0]])
    rule.observe(capture)
    (update,) = rule.propose(capture, np.array([True]))
    change = dense(update)
    # Downhill on the fact's own loss, whose gradient at the weight is uᵀ v.
    assert float((change * np.outer([1.0, -2.0], [0.5, 0.0, -1.0])).sum()) < 0


# -- by hand ------------------------------------------------------------------------------------


def propose_one(rule: UpdateRule, capture: Capture) -> Matrix:
    rule.observe(capture)
    (update,) = rule.propose(capture, np.array([True]))
    return dense(update)


def test_gradient_rule_by_hand() -> None:
    rule = GradientRule([(2, 2)], CPU, step_size=0.1, tokens="all")
    capture = capture_of([[1, 0], [1, 1]], [[1, 2], [3, 4]])
    # uᵀv = [1 0]ᵀ[1 2] + [1 1]ᵀ[3 4].
    np.testing.assert_allclose(propose_one(rule, capture), [[-0.4, -0.6], [-0.3, -0.4]], rtol=1e-6)
    answer = GradientRule([(2, 2)], CPU, step_size=0.1, tokens="answer")
    np.testing.assert_allclose(propose_one(answer, capture), [[-0.3, -0.4]] * 2, rtol=1e-6)


def test_a_clipped_gradient_keeps_its_direction() -> None:
    capture = capture_of([[1, 0], [1, 1]], [[1, 2], [3, 4]])
    # uᵀv = [4 6; 3 4], whose squared Frobenius norm is 77.
    for limit, share in ((10.0, 1.0), (math.sqrt(77) / 2, 0.5)):
        rule = GradientRule([(2, 2)], CPU, step_size=0.1, max_grad_norm=limit)
        wanted = -0.1 * share * np.array([[4, 6], [3, 4]])
        np.testing.assert_allclose(propose_one(rule, capture), wanted, rtol=1e-6)
    with pytest.raises(SettingsError, match="max_grad_norm"):
        GradientRule([(2, 2)], CPU, max_grad_norm=0.0)


def test_outer_product_rule_by_hand() -> None:
    rule = OuterProductRule([(2, 2)], CPU, step_size=0.5, tokens="all")
    capture = capture_of([[1, 0], [3, 4]], [[2, 1], [6, -1]])
    # Two values each: standardised they are ∓√½, the first below its mean where it is the smaller.
    # ũ = √½ [[-1 -1] [1 1]], ṽ = √½ [[-1 1] [1 -1]], ũᵀṽ = [[1 -1] [1 -1]].
    np.testing.assert_allclose(propose_one(rule, capture), [[-0.5, 0.5]] * 2, rtol=1e-5)


def test_ridge_rule_by_hand() -> None:
    rule = RidgeRule([(2, 2)], CPU, step_size=0.5, tokens="all", ridge=3.0)
    capture = capture_of([[1, 0], [0, 1]], [[2, 0], [6, 2]])
    # KᵀK + 3 I = 4 I; ‖ũ‖² = ½ + ½ for both rows; ṽ = √½ [[-1 -1] [1 1]].
    a = 0.5 / 4 * math.sqrt(0.5)
    np.testing.assert_allclose(propose_one(rule, capture), [[a, a], [-a, -a]], rtol=1e-5)


# -- dense formulas -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_rules_equal_their_dense_formulas(tokens: Any, count: int) -> None:
    seen = captures(count)
    outer = by_name("outer-product", tokens=tokens, step_size=0.2)
    ridge = by_name("ridge", tokens=tokens, step_size=0.2, ridge=0.7)
    plain = by_name("gradient", tokens=tokens, step_size=0.2)
    for capture in seen:
        for rule in (outer, ridge, plain):
            rule.observe(capture)
    proposals = [rule.propose(seen[-1], ALL) for rule in (outer, ridge, plain)]
    for layer, (d_in, d_out) in enumerate(SHAPES):
        u, v, u_hat, v_hat = standardised(seen, layer, tokens)
        scaled = -0.2 * (u_hat**2).sum(1, keepdims=True) * v_hat
        expected = (
            -0.2 * u_hat.T @ v_hat,
            # The d_in × d_in system, as UltraEdit's code writes it.
            np.linalg.solve(u.T @ u + 0.7 * np.eye(d_in), u.T @ scaled),
            -0.2 * u.T @ v,
        )
        for proposal, wanted in zip(proposals, expected, strict=True):
            found = dense(proposal[layer])
            assert found.shape == (d_in, d_out)
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("ridge", [0.3, 3.0])
@pytest.mark.parametrize("keys", ["standardised", "raw"])
@pytest.mark.parametrize("gradients", ["standardised", "scaled"])
def test_decorrelated_rule_equals_its_dense_formula(
    keys: str, gradients: str, ridge: float
) -> None:
    seen = captures(4)
    settings = {"ridge": ridge, "keys": keys, "gradients": gradients}
    rule = by_name("decorrelated", tokens="all", step_size=0.2, **settings)
    for capture in seen:
        rule.observe(capture)
    for layer, update in enumerate(rule.propose(seen[-1], ALL)):
        # Each capture's keys count as they were standardised when they were seen.
        which = 2 if keys == "standardised" else 0
        past = [standardised(seen[: i + 1], layer, "all")[which] for i in range(4)]
        raw, v, u_hat, v_hat = standardised(seen, layer, "all")
        if gradients == "scaled":
            everything = np.concatenate(
                [standardised(seen[: i + 1], layer, "all")[1] for i in range(4)]
            )
            v_hat = v / everything.std(0, ddof=1)
        moment = sum(u.T @ u for u in past) / sum(len(u) for u in past)
        size = moment.trace() / len(moment)
        own = u_hat if keys == "standardised" else raw
        damped = np.linalg.solve(moment + ridge * size * np.eye(len(moment)), own.T).T
        damped *= np.linalg.norm(u_hat) / np.linalg.norm(damped)
        wanted = -0.2 * damped.T @ v_hat
        plain = -0.2 * u_hat.T @ v_hat
        assert np.abs(wanted - plain).max() > 0.01 * np.abs(plain).max()
        np.testing.assert_allclose(
            dense(update), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max()
        )


def test_raw_keys_answer_the_seen_ones_least() -> None:
    """Σ (kᵀ left)² over the keys seen, where the own key's answer is 1: R⁻¹ k has the least."""
    rng = np.random.default_rng(3)
    rows = np.array([3.0, -2.0, 0.0, 1.0]) + rng.normal(size=(40, 4)) * [1.0, 0.1, 2.0, 0.5]
    answers = {}
    kinds: tuple[Keys, ...] = ("standardised", "raw")
    for keys in kinds:
        rule = DecorrelatedRule([(4, 2)], CPU, ridge=1e-4, keys=keys, tokens="all")
        for row in rows:
            capture = capture_of([list(row)], [list(rng.normal(size=2))])
            rule.observe(capture)
        update = rule.propose(capture, np.ones(1, bool))[0]
        assert update is not None
        left = update.left[0].double().numpy()
        answers[keys] = ((rows @ left / (rows[-1] @ left)) ** 2).sum()
    # The least there is, with a Lagrange multiplier: 1 / (kᵀ R⁻¹ k).
    least = 1 / (rows[-1] @ np.linalg.solve(rows.T @ rows, rows[-1]))
    assert answers["raw"] == pytest.approx(least, rel=0.02)
    assert answers["standardised"] > 1.5 * least


def test_tokens_without_a_gradient_write_nothing_where_gradients_are_scaled() -> None:
    capture = capture_of([[1, 0], [3, 4], [2, 2]], [[2, 1], [0, 0], [6, -1]])
    for gradients, nothing in (("standardised", False), ("scaled", True)):
        rule = by_name_of([(2, 2)], gradients=gradients)
        rule.observe(capture)
        update = rule.propose(capture, np.ones(1, bool))[0]
        assert update is not None
        assert bool((update.right[1] == 0).all()) is nothing


def test_after_one_row_scaled_gradients_are_their_signs() -> None:
    """There is no deviation yet: as standardised ones, they are over the row's own size."""
    capture = capture_of([[1, 3]], [[2, -0.5]])
    for gradients in ("standardised", "scaled"):
        rule = by_name_of([(2, 2)], gradients=gradients, step_size=0.5)
        rule.observe(capture)
        update = rule.propose(capture, np.ones(1, bool))[0]
        assert update is not None
        np.testing.assert_allclose(update.right, [[-0.5, 0.5]], rtol=1e-5)


def test_unknown_keys_and_gradients_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"keys must be one of.*'standardised', 'raw'.*'x'"):
        by_name_of([(2, 2)], keys="x")
    with pytest.raises(SettingsError, match=r"gradients must be one of.*'scaled'.*1"):
        by_name_of([(2, 2)], gradients=1)


def by_name_of(shapes: list[tuple[int, int]], **settings: Any) -> UpdateRule:
    return make_rule("decorrelated", shapes, CPU, {"tokens": "all", **settings})


def test_decorrelated_rule_with_a_large_ridge_is_the_outer_product() -> None:
    rules = [by_name("decorrelated", ridge=1e5), by_name("outer-product")]
    (capture,) = captures(1)
    for rule in rules:
        rule.observe(capture)
    damped, plain = ([dense(u) for u in rule.propose(capture, ALL)] for rule in rules)
    for a, b in zip(damped, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("name", RULES)
def test_a_first_fact_of_one_token_gives_finite_updates(name: str) -> None:
    capture = fake_capture(SHAPES, prompt([1], [2]))
    rule = by_name(name)
    for _ in range(2):
        rule.observe(capture)
        assert all(np.isfinite(dense(update)).all() for update in rule.propose(capture, ALL))


@pytest.mark.parametrize("name", RULES)
def test_tokens_decide_which_rows_count(name: str) -> None:
    capture = captures(1)[0]
    start = capture.prompt.first_position
    assert start > 0
    keys = tuple(torch.cat((u[:start] * 7, u[start:])) for u in capture.keys)
    other = Capture(
        capture.prompts, keys, capture.value_gradients, 1.0, capture.predictions, capture.correct
    )
    for tokens, same in (("answer", True), ("all", False)):
        found = []
        for c in (capture, other):
            rule = by_name(name, tokens=tokens)
            rule.observe(c)
            found.append(dense(rule.propose(c, ALL)[0]))
        assert np.array_equal(*found) is same


# -- what every rule keeps to -------------------------------------------------------------------


def test_a_capture_keeps_one_stack_per_shape_whatever_is_chosen() -> None:
    rule, capture = by_name("gradient"), captures(1)[0]
    for number in range(1, 2 ** len(SHAPES)):
        rule.propose(capture, np.array([number >> i & 1 for i in range(len(SHAPES))], bool))
    assert len(capture._stacked) == len(rule.groups)


@pytest.mark.parametrize("name", RULES)
def test_layers_that_are_not_chosen_get_none(name: str) -> None:
    rule = by_name(name)
    (capture,) = captures(1)
    rule.observe(capture)
    full = rule.propose(capture, ALL)
    for chosen in ([0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]):
        updates = rule.propose(capture, np.array(chosen, bool))
        assert [update is not None for update in updates] == [bool(c) for c in chosen]
        for layer in np.flatnonzero(chosen):
            # What a layer gets does not depend on the others.
            np.testing.assert_allclose(dense(updates[layer]), dense(full[layer]), rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_multipliers_and_step_size_scale_linearly(name: str) -> None:
    (capture,) = captures(1)
    rule, double = by_name(name, step_size=0.01), by_name(name, step_size=0.02)
    for r in (rule, double):
        r.observe(capture)
    multipliers = np.array([1.0, 0.5, 3.0, 0.25], np.float32)
    base = rule.propose(capture, ALL)
    for layer, (plain, scaled, doubled) in enumerate(
        zip(
            base, rule.propose(capture, ALL, multipliers), double.propose(capture, ALL), strict=True
        )
    ):
        wanted = dense(plain)
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(dense(scaled), multipliers[layer] * wanted, rtol=1e-5)
        np.testing.assert_allclose(dense(doubled), 2 * wanted, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_float32_detached_and_fit(name: str, dtype: torch.dtype) -> None:
    rule = by_name(name)
    capture = fake_capture(SHAPES, PROMPTS[2], dtype=dtype)
    rule.observe(capture)
    for update, (d_in, d_out) in zip(rule.propose(capture, ALL), SHAPES, strict=True):
        assert update is not None
        assert (update.left.dtype, update.right.dtype) == (torch.float32, torch.float32)
        assert (update.left.shape[1], update.right.shape[1]) == (d_in, d_out)
        assert not update.left.requires_grad
        assert not update.right.requires_grad


def flat(state: Any) -> list[Any]:
    """Everything in a state, tensors as copies of their numbers."""
    if isinstance(state, Tensor):
        return [state.numpy().tobytes()]
    if isinstance(state, dict):
        return [x for key in sorted(state) for x in flat(state[key])]
    if isinstance(state, list | tuple):
        return [x for part in state for x in flat(part)]
    return [state]


def proposed(rule: UpdateRule, capture: Capture) -> list[Any]:
    updates = rule.propose(capture, ALL)
    return [flat([u.left.contiguous(), u.right.contiguous()]) for u in updates if u is not None]


@pytest.mark.parametrize("name", RULES)
def test_state_round_trip_is_bit_exact(name: str) -> None:
    first, second, third = captures(3)
    rule = by_name(name)
    rule.observe(first)
    rule.observe(second)
    state, wanted = rule.statistics(), proposed(rule, second)
    copied = flat(state)
    rule.observe(third)
    later = proposed(rule, second)
    assert (later == wanted) is (name == "gradient")  # which keeps no statistics
    assert flat(state) == copied  # a saved state does not move on
    rule.load_statistics(state)
    assert proposed(rule, second) == wanted
    rule.observe(third)
    assert proposed(rule, second) == later
    assert flat(state) == copied
    other = by_name(name)
    other.load_statistics(state)
    assert proposed(other, second) == wanted


@pytest.mark.parametrize("name", RULES)
def test_proposing_observes_nothing_and_reset_forgets(name: str) -> None:
    first, second = captures(2)
    rule, fresh = by_name(name), by_name(name)
    rule.observe(first)
    state = flat(rule.statistics())
    wanted = proposed(rule, first)
    assert proposed(rule, first) == wanted
    assert flat(rule.statistics()) == state
    rule.observe(second)
    rule.reset()
    assert flat(rule.statistics()) == flat(fresh.statistics())
    rule.observe(first)
    assert proposed(rule, first) == wanted


def test_a_moment_that_has_no_square_root_makes_an_update_that_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def indefinite(
        self: DecorrelatedForm, group: int, places: list[int], added: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])

    monkeypatch.setattr(DecorrelatedForm, "second_moment", indefinite)
    rule = DecorrelatedRule([(2, 1)], torch.device("cpu"), ridge=0.1)
    left = rule._left(0, [0], torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    assert left.isnan().all()
