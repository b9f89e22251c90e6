"""Trained low levels: what they are untrained, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hiedit_agents.hierarchy.hypernetwork import RULE_OF_FORM, Hypernetwork
from hiedit_agents.hierarchy.step_sizes import StepSizePolicy
from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.closed_form import Keys
from hiedit_env.rules.names import make_rule
from tests.support.episodes import SELECTION, L, make

ALL = np.ones(L, bool)
SOME = np.array([0, 1, 1, 0, 0, 1], bool)


def shaken(low: Any, size: float = 0.05) -> Any:
    """The low level with random parameters in the place of its beginnings."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return low


def seen(rule: UpdateRule, captures: list[Capture]) -> UpdateRule:
    for capture in captures:
        rule.observe(capture)
    return rule


@pytest.fixture(scope="module")
def captures() -> list[Capture]:
    env = make(SELECTION, num_edits=3)
    env.reset(seed=5)
    found = []
    for _ in range(3):
        found.append(env.capture)
        env.step(np.ones(L, np.int8))
    return found


@pytest.mark.parametrize("network", ["rows", "tokens"])
@pytest.mark.parametrize("form", RULE_OF_FORM)
def test_an_untrained_hypernetwork_is_the_closed_form_rule(
    form: str, network: str, captures: list[Capture]
) -> None:
    env = make(SELECTION)
    settings: dict[str, Any] = {"step_size": 0.01}
    rule = make_rule(RULE_OF_FORM[form], env.llm.shapes, env.llm.device, settings)
    own: Any = {"form": form, "network": network, "rank": 4}
    low = Hypernetwork(env.llm.shapes, env.llm.device, **own, **settings)
    if form == "ridge":
        # The rule's ‖ũ‖² has the normalised keys twice, MALMEN's one raw and one pseudo key.
        capture = captures[-1]
        found = seen(low, captures).propose(capture, ALL)[0]
        assert found is not None
        start = capture.prompt.first_position
        u, v = capture.keys[0][start:], capture.value_gradients[0][start:]
        moments = low.form.moments[0]
        x = moments.normalise(torch.cat((u, v), 1)[None], [0])[0]
        wanted = (u * x[:, : u.shape[1]]).sum(1, keepdim=True) * x[:, u.shape[1] :]
        dense = -0.01 * torch.linalg.solve(u.mT @ u + torch.eye(u.shape[1]), u.mT @ wanted)
        torch.testing.assert_close(found.dense(), dense, rtol=1e-3, atol=1e-6)
        return
    for one, two in zip(
        seen(rule, captures).propose(captures[-1], SOME),
        seen(low, captures).propose(captures[-1], SOME),
        strict=True,
    ):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert torch.equal(one.left, two.left)
            assert torch.equal(one.right, two.right)


@pytest.mark.parametrize("network", ["rows", "tokens"])
@pytest.mark.parametrize("form", RULE_OF_FORM)
def test_gradients_of_the_objective_are_its_slopes(form: str, network: str) -> None:
    """Every parameter tensor's gradient along a random direction, by central differences."""
    env = make(SELECTION)
    settings: Any = {"form": form, "network": network, "blocks": 2 if network == "rows" else 1}
    low = Hypernetwork(env.llm.shapes, env.llm.device, rank=4, step_size=2e-3, **settings)
    shaken(low, 0.05 if network == "rows" else 0.3)
    env.use_low_level(low)
    env.reset(seed=5)
    env.step(np.ones(L, np.int8))
    env.step(np.ones(L, np.int8))
    capture = env.episode.observe()

    def objective() -> torch.Tensor:
        return env.loss(low.compute(capture, SOME), l2=1e-2)

    loss = objective()
    names = [name for name, _ in low.net.named_parameters()]
    gradients = torch.autograd.grad(loss, low.parameters(), allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    checked = set()
    for name, parameter, gradient in zip(names, low.parameters(), gradients, strict=True):
        kind = name.rpartition(".")[2]
        if gradient is None or gradient.norm() < 1e-4:
            continue
        direction = torch.randn(parameter.shape, generator=generator)
        # Up the gradient, and by what the loss's float32 noise allows but its kinks do not show.
        direction = direction / direction.norm() + 2 * gradient / gradient.norm()
        size = min(1e-2, 2e-4 / float(gradient.norm()))
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction * size * sign)
                values.append(float(objective()))
                parameter.add_(direction * size * -sign)
        slope = (values[0] - values[1]) / (2 * size)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.1), name
        checked.add(kind)
    wanted = {"a", "b", "bias", "scale", "shift"} if network == "rows" else {"a", "c"}
    wanted |= {"log_step"}
    assert checked >= (wanted | {"log_ridge"} if form == "ridge" else wanted)


def test_layers_have_scales_shifts_and_steps_of_their_own(captures: list[Capture]) -> None:
    env = make(SELECTION)
    low = Hypernetwork(env.llm.shapes, env.llm.device, rank=4)
    seen(low, captures)
    before = low.propose(captures[-1], ALL)
    group = low.groups[0]
    with torch.no_grad():
        low.net[0].log_step[1] += np.log(2.0)  # type: ignore[index, union-attr, operator]
    after = low.propose(captures[-1], ALL)
    for layer in range(L):
        one, two = before[layer], after[layer]
        assert one is not None
        assert two is not None
        factor = 2.0 if layer == group[1] else 1.0
        torch.testing.assert_close(two.right, one.right * factor)


@pytest.mark.parametrize("kind", [Hypernetwork, StepSizePolicy])
def test_parameters_and_statistics_are_apart(kind: Any, captures: list[Capture]) -> None:
    env = make(SELECTION)
    one = shaken(kind(env.llm.shapes, env.llm.device))
    two = kind(env.llm.shapes, env.llm.device, seed=5)
    two.load_state_dict(one.state_dict())
    seen(one, captures)
    two.load_statistics(one.statistics())
    for a, b in zip(one.propose(captures[0], ALL), two.propose(captures[0], ALL), strict=True):
        assert torch.equal(a.right, b.right)
    one.reset()
    seen(one, captures[:1])
    assert not torch.equal(one.propose(captures[0], ALL)[0].right, b.right)


@torch.no_grad()
def test_a_network_for_tokens_weighs_their_value_gradients(captures: list[Capture]) -> None:
    env = make(SELECTION)
    shapes, device = env.llm.shapes, env.llm.device
    plain = seen(Hypernetwork(shapes, device, step_size=0.01), captures)
    low: Any = Hypernetwork(shapes, device, network="tokens", rank=4, step_size=0.01)
    seen(shaken(low, 1.0), captures)
    ones, twos = (rule.propose(captures[-1], ALL) for rule in (plain, low))
    for number, group in enumerate(low.groups):
        net = low.net[number]
        u, v = captures[-1].stacked(group)
        rows = low.form.moments[number].normalise(torch.cat((u, v), 2), list(range(len(group))))
        for place, layer in enumerate(group):
            step = math.exp(float(net.log_step[place]))
            one, two = ones[layer], twos[layer]
            assert one is not None
            assert two is not None
            assert torch.equal(one.left, two.left)
            for token, row in enumerate(rows[place]):
                inner = [math.tanh(float(row @ column)) for column in net.tokens.a.mT]
                score = sum(h * float(c) for h, c in zip(inner, net.tokens.c[place], strict=True))
                weight = math.exp(2 * math.tanh(score / 2))
                assert math.exp(-2) < weight < math.exp(2)
                wanted = one.right[token] * step * weight
                torch.testing.assert_close(two.right[token], wanted, rtol=1e-4, atol=1e-9)


def test_bad_settings_are_refused() -> None:
    shapes, cpu = [(2, 3)], torch.device("cpu")
    with pytest.raises(SettingsError, match="form must be one of"):
        Hypernetwork(shapes, cpu, form="mend")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="network must be one of"):
        Hypernetwork(shapes, cpu, network="words")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="has no blocks, so blocks=2"):
        Hypernetwork(shapes, cpu, network="tokens", blocks=2)
    with pytest.raises(SettingsError, match="rank must be"):
        Hypernetwork(shapes, cpu, rank=0)
    with pytest.raises(SettingsError, match="unknown update rule"):
        StepSizePolicy(shapes, cpu, rule="none")


# -- step sizes ---------------------------------------------------------------------------------


def test_untrained_step_sizes_are_the_rules_own(captures: list[Capture]) -> None:
    env = make(SELECTION)
    low = StepSizePolicy(env.llm.shapes, env.llm.device, rule="ridge")
    rule = make_rule("ridge", env.llm.shapes, env.llm.device)
    assert low.multipliers(captures[0]).tolist() == [1.0] * L
    for one, two in zip(
        seen(rule, captures).propose(captures[1], SOME),
        seen(low, captures).propose(captures[1], SOME),
        strict=True,
    ):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one.dense(), two.dense())


def test_step_sizes_stay_within_a_decade_and_learn(captures: list[Capture]) -> None:
    env = make(SELECTION, update_rule="outer-product", step_size=1e-3)
    low = StepSizePolicy(env.llm.shapes, env.llm.device, rule="outer-product", step_size=1e-3)
    env.use_low_level(low)
    env.reset(seed=5)
    capture = env.episode.observe()
    optimizer = torch.optim.Adam(low.parameters(), 0.05)
    losses = []
    for _ in range(15):
        loss = env.loss(low.compute(capture, ALL))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        low.net["offset"].fill_(100.0)
    assert low.multipliers(capture).tolist() == pytest.approx([10.0] * L)


# -- calibration --------------------------------------------------------------------------------


def calibrated(env: Any, captures: list[Capture], **settings: Any) -> Hypernetwork:
    low = Hypernetwork(env.llm.shapes, env.llm.device, form="decorrelated", rank=2, **settings)
    low.calibrate(captures)
    return low


@pytest.mark.parametrize("keys", ["standardised", "raw"])
def test_calibration_damps_what_unrelated_prompts_have_in_common(
    captures: list[Capture], keys: Keys
) -> None:
    """C = products of the episode + prior · products of the calibration, by the dense formula."""
    env = make(SELECTION)
    low = calibrated(env, captures[:2], prior=0.5, ridge=0.2, keys=keys)
    low.observe(captures[2])
    (update,) = [u for i, u in enumerate(low.propose(captures[2], ALL)) if i == 0]
    assert update is not None
    group, place = low.groups[0], 0
    rows = [torch.cat((c.keys[group[0]], c.value_gradients[group[0]]), 1) for c in captures]
    d_in = captures[0].keys[group[0]].shape[1]

    def normalised(seen: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        everything = torch.cat(seen).double()
        return (x.double() - everything.mean(0)) / everything.std(0)

    moment = torch.zeros(d_in, d_in, dtype=torch.float64)
    for i, weight in enumerate((0.5, 0.5, 1.0)):
        # Standardised ones enter as they are at the time.
        seen = rows[i].double() if keys == "raw" else normalised(rows[: i + 1], rows[i])
        moment += weight * seen[:, :d_in].mT @ seen[:, :d_in]
    now = normalised(rows, rows[2])[:, :d_in]
    own = rows[2][:, :d_in].double() if keys == "raw" else now
    damped = own @ torch.linalg.inv(moment + 0.2 * moment.diagonal().mean() * torch.eye(d_in))
    wanted = damped * now.norm() / damped.norm()
    assert place == 0
    torch.testing.assert_close(update.left.double(), wanted, rtol=2e-2, atol=2e-3)


def test_a_network_for_rows_moves_raw_keys_by_standard_deviations(
    captures: list[Capture],
) -> None:
    env = make(SELECTION)
    low = shaken(calibrated(env, captures[:2], keys="raw", ridge=0.2))
    low.observe(captures[2])
    (update,) = [u for i, u in enumerate(low.propose(captures[2], ALL)) if i == 0]
    keys, gradients = (rows[:1] for rows in captures[2].stacked(low.groups[0]))
    everything = torch.cat([torch.cat(c.stacked(low.groups[0]), 2)[0] for c in captures]).double()
    both = torch.cat((keys, gradients), 2)[0].double()
    d_in = keys.shape[2]
    with torch.no_grad():
        old = ((both - everything.mean(0)) / everything.std(0))[None]
        new, _ = low.net[0].double()(old[..., :d_in], old[..., d_in:], [0])
        low.net[0].float()
        moved = keys[0].double() + everything.std(0)[:d_in] * (new - old[..., :d_in])[0]
        moment = low.form.second_moment(0, [0], low._added(0, [0]))[0].double()
        ridge = 0.2 * low.net[0].log_ridge[0].exp().double() * moment.diagonal().mean()
        damped = moved @ torch.linalg.inv(moment + ridge * torch.eye(d_in))
        wanted = damped * new.norm() / damped.norm()
    torch.testing.assert_close(update.left.double(), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("keys", ["standardised", "raw"])
def test_a_calibration_is_saved_and_outlives_episodes(captures: list[Capture], keys: Keys) -> None:
    env = make(SELECTION)
    low = calibrated(env, captures[:2], keys=keys)
    assert low.is_calibrated
    shapes = env.llm.shapes
    settings: dict[str, Any] = {"form": "decorrelated", "rank": 2, "keys": keys}
    other = Hypernetwork(shapes, env.llm.device, seed=4, **settings)
    assert not other.is_calibrated
    other.load_state_dict(low.state_dict())
    for rule in (low, other):
        rule.reset()
        rule.observe(captures[2])
    for one, two in zip(
        low.propose(captures[2], ALL), other.propose(captures[2], ALL), strict=True
    ):
        assert one is not None
        assert two is not None
        assert torch.equal(one.left, two.left)
        assert torch.equal(one.right, two.right)
    plain = Hypernetwork(shapes, env.llm.device, **settings)
    plain.observe(captures[2])
    first = plain.propose(captures[2], ALL)[0]
    assert first is not None
    assert not torch.equal(first.left, low.propose(captures[2], ALL)[0].left)  # type: ignore[union-attr]


def test_keys_of_another_kind_than_those_calibrated_are_refused(captures: list[Capture]) -> None:
    env = make(SELECTION)
    kinds: tuple[Keys, ...] = ("standardised", "raw")
    for keys, other in (kinds, kinds[::-1]):
        saved = calibrated(env, captures[:2], keys=keys).state_dict()
        low = calibrated(env, captures[:2], keys=other)
        with pytest.raises(SettingsError, match="is of the other kind of keys"):
            low.load_state_dict(saved)
    for form in ("outer", "ridge"):
        with pytest.raises(SettingsError, match=r"keys='raw' means nothing"):
            Hypernetwork(env.llm.shapes, env.llm.device, form=form, keys="raw")  # type: ignore[arg-type]


def test_layers_that_read_one_input_are_calibrated_alike_and_saved_once() -> None:
    block = ("model.layers.1.mlp.{up,gate}_proj", "model.layers.1.self_attn.{q,o}_proj")
    env = make(SELECTION, layers=block)
    env.reset(seed=0)
    prompts = [env.llm.encode(r.prompt, r.answer) for r in env.requests[:3]]
    found = [env.llm.read(prompt).capture() for prompt in prompts]
    low = calibrated(env, found[:2])
    state = low.state_dict()
    names = [[env.llm.names[i].rpartition(".")[2] for i in group] for group in low.groups]
    assert ["gate_proj", "up_proj"] in [sorted(group) for group in names]
    (mlp,) = (i for i, group in enumerate(names) if "up_proj" in group)
    assert len(state[f"calibration.products.{mlp}"]) == 1
    (attention,) = (i for i, group in enumerate(names) if "q_proj" in group)
    assert len(state[f"calibration.products.{attention}"]) == len(names[attention])
    other = Hypernetwork(env.llm.shapes, env.llm.device, form="decorrelated", rank=2, seed=4)
    other.load_state_dict(state)
    again = other.state_dict()
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert np.array_equal(np.asarray(again[name]), np.asarray(value)), name


def test_ridge_and_prior_have_the_slopes_of_the_objective(captures: list[Capture]) -> None:
    env = make(SELECTION)
    low = calibrated(env, captures, step_size=2e-3)
    env.use_low_level(low)
    env.reset(seed=5)
    env.step(np.ones(L, np.int8))
    capture = env.episode.observe()

    def objective() -> torch.Tensor:
        return env.loss(low.compute(capture, ALL))

    for net in low.net:
        for name in ("log_ridge", "log_prior"):
            parameter = getattr(net, name)
            (gradient,) = torch.autograd.grad(objective(), parameter)
            values = []
            with torch.no_grad():
                for sign in (1, -1):
                    parameter.add_(0.05 * sign)
                    values.append(objective().item())
                    parameter.add_(-0.05 * sign)
            slope = (values[0] - values[1]) / 0.1
            assert slope == pytest.approx(gradient.sum().item(), rel=0.05, abs=1e-4), name
