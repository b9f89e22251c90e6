"""What a step does and which reward it gives, against a plain model and other ways to go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from hiedit_env.datasets.requests import Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.step_size import StepSize
from hiedit_env.testing import assert_only_layers_changed, assert_reward_terms_sum
from tests.support.episodes import (
    IDS,
    KINDS,
    LIFELONG,
    SELECTION,
    SMALL,
    STEP_SIZE,
    L,
    PlainModel,
    act,
    actions,
    bits,
    known,
    make,
    plain_levels,
    same_bits,
    shown,
)

ALL = np.ones(L, bool)


# Rewards


@pytest.mark.parametrize("intrinsic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IDS)
def test_the_reward_is_the_sum_of_its_terms(name: str, kind: str, intrinsic: bool) -> None:
    settings: dict[str, Any] = {"num_edits": 2, "max_steps_per_edit": 2}
    if name == STEP_SIZE:
        settings["high_level"] = "random-layers"
    env = make(name, reward=kind, intrinsic=intrinsic, **settings)
    env.reset(seed=0)
    rewards = []
    for action in actions(env, 4, 0):
        step = env.step(action)
        assert_reward_terms_sum(step)
        _, reward, ended, _, _ = step
        rewards.append(reward)
        if ended:
            break
    # Bookkeeping agrees, and something was gained.
    assert sum(record.reward for record in env.history.records) == pytest.approx(sum(rewards))
    assert any(rewards)


def requests_of(env: EditingEnv) -> list[Request]:
    return [fact.request for fact in env.episode.facts]


@pytest.mark.parametrize("reference", ["unedited", "previous"])
def test_a_fact_is_paid_its_final_levels(reference: str) -> None:
    weights = {"edit": 1.5, "locality": 0.5, "sparsity": 0.3, "recent_retention": 2.0}
    env = make(
        LIFELONG,
        num_edits=4,
        max_steps_per_edit=3,
        retention_window=2,
        retention_decay=0.8,
        reward_weights=weights,
        locality_reference=reference,
    )
    env.reset(seed=0)
    requests, before = requests_of(env), PlainModel()
    gained, written, steps = dict.fromkeys(weights, 0.0), np.zeros(L, bool), []
    for action in actions(env, 12, 1):
        _, _, ended, _, info = env.step(action)
        for term in weights:
            gained[term] += info["reward_terms"][term]
        written |= info["layers"].astype(bool)
        if not info["edit_over"]:
            continue
        i = info["edit_index"]
        remembered = requests[max(0, i - 2) : i][::-1]
        now = PlainModel(bits(env))
        levels = plain_levels(before, now, requests[i], remembered, decay=0.8)
        levels["sparsity"] = 1 - written.sum() / L
        for term, weight in weights.items():
            wanted = pytest.approx(weight * levels[term], rel=1e-4, abs=1e-5)
            assert gained[term] == wanted, (i, term)
        shares = plain_levels(before, now, requests[i], remembered, "token_accuracy", decay=0.8)
        assert info["metrics"]["efficacy"] == now.accuracy(requests[i].prompt, requests[i].answer)
        assert info["metrics"]["argmax_match"] == pytest.approx(shares["locality"])
        if remembered:
            wanted = pytest.approx(shares["recent_retention"])
            assert info["metrics"]["recent_retention"] == wanted
        steps.append(info["edit_steps"])
        if reference == "previous":
            before = now
        gained, written = dict.fromkeys(weights, 0.0), np.zeros(L, bool)
        if ended:
            break
    assert len(steps) == 4
    assert max(steps) > 1


def test_weights_age_as_in_the_papers() -> None:
    # Window 10, μ = 0.95, three remembered facts of ages 1, 2, 3: by hand.
    env = make(LIFELONG, num_edits=4, max_steps_per_edit=1)
    env.reset(seed=2)
    for _ in range(4):
        _, _, _, _, info = env.step(act(LIFELONG))
    now = PlainModel(bits(env))
    third, second, first = requests_of(env)[2::-1]
    ages = {1: third, 2: second, 3: first}
    top = sum(0.95**a * -now.nats(old.prompt, old.answer) for a, old in ages.items())
    wanted = top / (0.95 + 0.95**2 + 0.95**3)
    assert info["reward_terms"]["recent_retention"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", IDS)
def test_the_intrinsic_reward_is_the_advantage_over_all_layers(name: str) -> None:
    settings: dict[str, Any] = {"max_steps_per_edit": 2}
    if name == STEP_SIZE:
        settings |= {"high_level": "random-layers", "layers_per_edit": 2}
    env, twin = make(name, intrinsic=True, **settings), make(name, **settings)
    assert shown(env.reset(seed=0)) == shown(twin.reset(seed=0))
    differences = []
    for action in actions(env, 6, 0):
        state = twin.save_state()
        if isinstance(twin, StepSize):
            twin.option = ALL
        every = ALL if name == SELECTION else action
        _, r_all, *_, info_all = twin.step({**action, "layers": ALL} if name == LIFELONG else every)
        twin.restore_state(state)
        observation, r, ended, _, info = twin.step(action)
        got = env.step(action)
        assert got[1] == pytest.approx(r - r_all, abs=1e-9)
        for term, value in got[4]["reward_terms"].items():
            wanted = info["reward_terms"][term] - info_all["reward_terms"][term]
            assert value == pytest.approx(wanted, abs=1e-9)
        # Trying all layers has left no trace.
        assert got[0].tobytes() == observation.tobytes()
        for key in ("metrics", "weights_fingerprint", "edit_index", "edit_steps", "edit_over"):
            assert got[4][key] == info[key]
        assert same_bits(bits(env), bits(twin))
        differences.append(got[1])
        if ended:
            break
    assert any(differences)


# Steps


@pytest.mark.parametrize("stop", [True, False])
def test_an_option_is_its_primitive_steps(stop: bool) -> None:
    settings: dict[str, Any] = {"max_steps_per_edit": 4, "stop_when_answered": stop}
    selection, lifelong = make(SELECTION, **settings), make(LIFELONG, **settings)
    selection.reset(seed=0)
    lifelong.reset(seed=0)
    lengths = []
    for mask in ([1] * L, [1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]):
        observation, reward, ended, _, info = selection.step(act(SELECTION, mask))
        total, over = 0.0, False
        while not over:
            parts = lifelong.step(act(LIFELONG, mask, size=0.0))
            total += parts[1]
            over = parts[4]["edit_over"]
        assert observation.tobytes() == parts[0].tobytes()
        assert same_bits(bits(selection), bits(lifelong))
        assert reward == pytest.approx(total, abs=1e-9)
        assert ended == parts[2]
        for key in ("metrics", "edit_steps", "edit_index", "weights_fingerprint"):
            assert info[key] == parts[4][key]
        lengths.append(info["edit_steps"])
    assert ended
    assert max(lengths) > 1
    if not stop:
        assert lengths == [4, 4, 4]


def test_an_option_goes_on_after_a_primitive_step_by_hand() -> None:
    env, twin = make(SELECTION, num_edits=1), make(SELECTION, num_edits=1)
    env.reset(seed=0)
    twin.reset(seed=0)
    mask = act(SELECTION, [1, 0, 1, 0, 1, 0])
    _, first, ended, _, info = env.apply(env.episode.propose(mask.astype(bool)))
    assert not ended
    assert (info["edit_over"], info["edit_steps"]) == (False, 1)
    observation, rest, _, _, info = env.step(mask)
    wanted = twin.step(mask)
    assert observation.tobytes() == wanted[0].tobytes()
    assert first + rest == pytest.approx(wanted[1], abs=1e-9)
    assert info["edit_steps"] == wanted[4]["edit_steps"] > 1


@pytest.mark.parametrize("mask", [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1] * L])
@pytest.mark.parametrize("name", [LIFELONG, SELECTION])
def test_only_chosen_layers_change(name: str, mask: list[int]) -> None:
    env = make(name)
    env.reset(seed=0)
    info = assert_only_layers_changed(env, act(name, mask))[4]
    assert info["layers"].tolist() == mask


@pytest.mark.parametrize("name", [LIFELONG, SELECTION])
def test_an_empty_mask_changes_nothing(name: str) -> None:
    env = make(name, num_edits=1, max_steps_per_edit=3)
    _, start = env.reset(seed=0)
    before = bits(env)
    rewards, ended, steps = [], False, 0
    while not ended:
        _, reward, ended, _, info = env.step(act(name, 0))
        rewards.append(reward)
        steps += 1
        assert info["layers"].tolist() == [0] * L
        assert info["weights_fingerprint"] == start["weights_fingerprint"]
    assert same_bits(bits(env), before)
    assert steps == (3 if name == LIFELONG else 1)
    assert info["edit_steps"] == 3
    # The unedited model's own levels, and no layer written.
    levels = plain_levels(PlainModel(), PlainModel(), requests_of(env)[0], [])
    assert rewards[0] == pytest.approx(levels["edit"] + 0.1, abs=1e-5)
    assert rewards[1:] == pytest.approx([0.0] * (steps - 1), abs=1e-5)


@pytest.mark.parametrize("name", IDS)
def test_an_answered_fact_is_left_alone(name: str) -> None:
    env = make(name)
    fact = env.requests[0]
    old = fact.old_answer or ""
    stream = [Request(fact.prompt, old, fact.subject), fact]
    _, info = env.reset(seed=0, options={"requests": stream})
    assert known(info["metrics"]) == {"efficacy": 1.0, "answered": True}
    before = bits(env)
    _, _, _, _, info = env.step(act(name))
    assert same_bits(bits(env), before)
    assert info["edit_over"]
    assert info["layers"].tolist() == [0] * L
    assert info["reward_terms"]["sparsity"] == pytest.approx(0.1)
    _, _, _, _, info = env.step(act(name))
    assert info["edit_index"] == 1
    assert info["layers"].tolist() == [1] * L


@pytest.mark.parametrize("name", IDS)
def test_one_step_per_edit_is_exactly_one(name: str) -> None:
    env = make(name, max_steps_per_edit=1)
    env.reset(seed=0)
    for i in range(3):
        _, _, ended, truncated, info = env.step(act(name))
        assert (info["edit_index"], info["edit_steps"], info["edit_over"]) == (i, 1, True)
        assert (ended, truncated) == (i == 2, False)
    assert [record.steps for record in env.history.records] == [1, 1, 1]


@pytest.mark.parametrize("step_size", [SMALL, 3e-3])
def test_without_stopping_every_fact_takes_all_steps(step_size: float) -> None:
    env = make(LIFELONG, step_size=step_size, max_steps_per_edit=3, stop_when_answered=False)
    env.reset(seed=0)
    indices, answered, ended = [], [], False
    while not ended:
        _, _, ended, _, info = assert_only_layers_changed(env, act(LIFELONG))
        assert info["layers"].tolist() == [1] * L
        indices.append(info["edit_index"])
        answered.append(info["metrics"]["answered"])
        assert info["edit_over"] == (info["edit_steps"] == 3)
    assert indices == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    if step_size > SMALL:
        assert answered[0]  # Would have stopped.


# High levels


def masks_of(high_level: str, seed: int = 0, **settings: Any) -> list[list[int]]:
    env = make(STEP_SIZE, num_edits=6, max_steps_per_edit=1, high_level=high_level, **settings)
    env.reset(seed=seed)
    masks = []
    for _ in range(6):
        assert isinstance(env, StepSize)
        masks.append(env.option.astype(int).tolist())
        info = assert_only_layers_changed(env, act(STEP_SIZE))[4]
        assert info["layers"].tolist() == masks[-1]
    return masks


def test_high_levels_choose_the_layers() -> None:
    assert masks_of("all-layers") == [[1] * L] * 6
    assert masks_of("no-edit") == [[0] * L] * 6
    assert masks_of("fixed-layers", layers_per_edit=2) == [[1, 1, 0, 0, 0, 0]] * 6
    assert [sum(mask) for mask in masks_of("gradient-norm")] == [3] * 6
    random = masks_of("random-layers", layers_per_edit=4)
    assert [sum(mask) for mask in random] == [4] * 6
    assert len({tuple(mask) for mask in random}) > 1
    assert masks_of("random-layers", layers_per_edit=4) == random
    assert masks_of("random-layers", seed=1, layers_per_edit=4) != random


def test_the_gradient_norm_is_that_of_the_dense_gradient() -> None:
    env = make(STEP_SIZE, high_level="gradient-norm", layers_per_edit=2)
    env.reset(seed=0)
    assert isinstance(env, StepSize)
    request, plain = requests_of(env)[0], PlainModel()
    prompt_ids, answer_ids = plain.ids(request.prompt, request.answer)
    weights = [plain.model.get_submodule(name).weight for name in env.llm.names]
    logits = plain.model(torch.tensor([prompt_ids + answer_ids])).logits[
        0, len(prompt_ids) - 1 : -1
    ]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer_ids))
    norms = [float(g.norm()) for g in torch.autograd.grad(loss, weights)]
    assert np.flatnonzero(env.option).tolist() == sorted(np.argsort(norms)[-2:].tolist())


def test_step_sizes_are_decades() -> None:
    def change(size: float) -> Mapping[int, torch.Tensor]:
        env = make(STEP_SIZE)
        env.reset(seed=0)
        before = bits(env)
        env.step(act(STEP_SIZE, size=size))
        after = bits(env)
        return {i: after[k] - before[k] for i, k in enumerate(before) if "mlp" in k}

    one, ten = change(0.0), change(1.0)
    assert any(float(value.abs().max()) > 1e-4 for value in one.values())
    for i, value in one.items():
        torch.testing.assert_close(ten[i], 10 * value, rtol=1e-3, atol=1e-6)
