"""Trained low levels: what they are untrained, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.hypernetwork import RULE_OF_FORM, Hypernetwork
from agents.step_sizes import StepSizePolicy
from hiedit_env.capture import Capture
from hiedit_env.errors import SettingsError
from hiedit_env.rules import UpdateRule, make_rule
from tests.lives import SELECTION, L, make

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


@pytest.mark.parametrize("form", RULE_OF_FORM)
def test_an_untrained_hypernetwork_is_the_closed_form_rule(
    form: str, captures: list[Capture]
) -> None:
    env = make(SELECTION)
    settings: dict[str, Any] = {"step_size": 0.01}
    rule = make_rule(RULE_OF_FORM[form], env.llm.shapes, env.llm.device, settings)
    low = Hypernetwork(env.llm.shapes, env.llm.device, form=form, rank=4, **settings)  # type: ignore[arg-type]
    if form == "ridge":
        # The rule's ‖ũ‖² has the normalised keys twice, MALMEN's one raw and one pseudo key.
        capture = captures[-1]
        found = seen(low, captures).propose(capture, ALL)[0]
        assert found is not None
        start = capture.prompt.first_position
        u, v = capture.keys[0][start:], capture.value_gradients[0][start:]
        moments = low._moments[0]
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


@pytest.mark.parametrize("form", RULE_OF_FORM)
def test_gradients_of_the_objective_are_its_slopes(form: str) -> None:
    """Every parameter tensor's gradient along a random direction, by central differences."""
    env = make(SELECTION)
    low = Hypernetwork(
        env.llm.shapes,
        env.llm.device,
        form=form,
        rank=4,
        blocks=2,
        step_size=2e-3,  # type: ignore[arg-type]
    )
    shaken(low)
    env.use_low_level(low)
    env.reset(seed=5)
    env.step(np.ones(L, np.int8))
    env.step(np.ones(L, np.int8))
    capture = env.life.observe()

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
    wanted = {"a", "b", "bias", "scale", "shift", "log_step"}
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
    two.load_state(one.state())
    seen(one, captures)
    two.load_state_dict(one.state_dict())
    for a, b in zip(one.propose(captures[0], ALL), two.propose(captures[0], ALL), strict=True):
        assert torch.equal(a.right, b.right)
    one.reset()
    seen(one, captures[:1])
    assert not torch.equal(one.propose(captures[0], ALL)[0].right, b.right)


def test_bad_settings_are_refused() -> None:
    shapes, cpu = [(2, 3)], torch.device("cpu")
    with pytest.raises(SettingsError, match="form must be one of"):
        Hypernetwork(shapes, cpu, form="mend")  # type: ignore[arg-type]
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
    capture = env.life.observe()
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
