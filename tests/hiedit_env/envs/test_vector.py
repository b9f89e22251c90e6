"""Many environments together, against as many environments that are run one after the other."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import hiedit_env
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.accounting import StepError
from hiedit_env.envs.vector import VectorEditing
from hiedit_env.errors import ActionError, PromptError, SettingsError
from hiedit_env.model.loading import load_model
from tests.support.episodes import IDS, KINDS, LIFELONG, SELECTION, SMALL, STEP_SIZE, L

SETTINGS: dict[str, Any] = {"num_edits": 2, "max_steps_per_edit": 3, "step_size": SMALL}
#: What x W + x Δ and x (W + Δ) may differ by after a few edits, in observations and rewards.
TOLERANCE = 1e-3


def together(name: str = SELECTION, count: int = 3, **settings: Any) -> VectorEditing[Any]:
    envs = gym.make_vec(
        name, count, vectorization_mode="vector_entry_point", **(SETTINGS | settings)
    )
    assert isinstance(envs, VectorEditing)
    return envs


def apart(name: str, count: int, mode: str, **settings: Any) -> SyncVectorEnv:
    def one() -> gym.Env[Any, Any]:
        return gym.make(name, **(SETTINGS | settings))

    return SyncVectorEnv([one] * count, autoreset_mode=mode)


def assert_same(one: Any, other: Any) -> None:
    """Equal up to the tolerance, all the way down."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if "fingerprint" not in key:
                assert_same(one[key], other[key])
    elif isinstance(one, tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif one is None or isinstance(one, str):
        assert one == other
    else:
        np.testing.assert_allclose(
            np.asarray(one, float), np.asarray(other, float), atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_equals_single_environments_in_every_autoreset_mode(name: str, mode: str) -> None:
    """Episodes of two facts, some of several steps, so that environments end at different times."""
    ours, theirs = together(name, autoreset_mode=mode), apart(name, 3, mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert_same(ours.reset(seed=5), theirs.reset(seed=5))
    ours.action_space.seed(0)
    ends = 0
    for _ in range(9):
        action = ours.action_space.sample()
        one, other = ours.step(action), theirs.step(action)
        assert_same(one, other)
        assert one[1].dtype == np.float64
        assert one[2].dtype == one[3].dtype == np.bool_
        ends += int(one[2].sum())
        if mode == "Disabled" and one[2].any():
            assert_same(
                ours.reset(options={"reset_mask": one[2]}),
                theirs.reset(options={"reset_mask": one[2].copy()}),
            )
    assert ends >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_equals_single_environments_for_every_reward(kind: str) -> None:
    settings = {"reward": kind, "intrinsic": True, "retention_window": 1}
    ours, theirs = together(SELECTION, 2, **settings), apart(SELECTION, 2, "NextStep", **settings)
    assert_same(ours.reset(seed=[3, 8]), theirs.reset(seed=[3, 8]))
    action = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]], np.int8)
    for _ in range(4):
        assert_same(ours.step(action), theirs.step(action))


@pytest.mark.parametrize("rule", ["outer-product", "ridge", "gradient"])
def test_equals_single_environments_for_every_rule(rule: str) -> None:
    settings = {"update_rule": rule, "step_size": None}
    ours, theirs = together(SELECTION, 2, **settings), apart(SELECTION, 2, "NextStep", **settings)
    assert_same(ours.reset(seed=1), theirs.reset(seed=1))
    for _ in range(2):
        assert_same(ours.step(np.ones((2, L), np.int8)), theirs.step(np.ones((2, L), np.int8)))


def test_small_passes_change_nothing() -> None:
    one, other = together(), together(max_batch_tokens=8)
    assert_same(one.reset(seed=2), other.reset(seed=2))
    for _ in range(3):
        action = np.ones((3, L), np.int8)
        assert_same(one.step(action), other.step(action))


def test_same_seed_same_bits() -> None:
    shown = []
    for _ in range(2):
        envs = together(LIFELONG)
        envs.action_space.seed(4)
        trace = [repr(envs.reset(seed=4))]
        trace += [repr(envs.step(envs.action_space.sample())) for _ in range(5)]
        shown.append(trace)
    assert shown[0] == shown[1]


def test_environments_share_one_model_that_is_never_written() -> None:
    envs = together()
    model = envs.envs[0].llm.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    envs.reset(seed=0)
    info = envs.step(np.ones((3, L), np.int8))[-1]
    assert all(env.llm.model is model for env in envs.envs)
    assert all(env.llm._kept is envs.envs[0].llm._kept for env in envs.envs)
    assert len(set(info["weights_fingerprint"])) == 3
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_environment_costs_no_more_than_its_updates() -> None:
    """Every tensor of one environment has the size of a layer's weight, once per layer."""
    envs = together()
    envs.reset(seed=0)
    envs.step(np.ones((3, L), np.int8))
    for env in envs.envs:
        own = sum(env.llm.change(i).numel() for i in range(L))  # type: ignore[union-attr]
        assert own == sum(d_in * d_out for d_in, d_out in env.llm.shapes)


def test_a_bad_action_of_one_environment_changes_none() -> None:
    envs = together()
    envs.reset(seed=0)
    before = envs.call("save_state"), [env.llm.weights_fingerprint() for env in envs.envs]
    action = np.ones((3, L), np.int8)
    action[2, 0] = 5
    with pytest.raises(ActionError, match=r"environment 2.*0 and 1"):
        envs.step(action)
    assert [env.llm.weights_fingerprint() for env in envs.envs] == before[1]
    assert [env.episode.position for env in envs.envs] == [0, 0, 0]
    envs.step(np.ones((3, L), np.int8))


@pytest.mark.parametrize(
    "action", [np.ones((2, L), np.int8), np.ones(L, np.int8), 3, np.ones((3, L - 1), np.int8)]
)
def test_actions_of_another_shape_are_refused(action: Any) -> None:
    envs = together()
    envs.reset(seed=0)
    with pytest.raises(ActionError, match=r"\(3, 6\)|\(6,\)"):
        envs.step(action)


def test_a_failure_in_the_middle_puts_every_environment_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    envs = together()
    observations, _ = envs.reset(seed=0)
    first = envs.step(np.ones((3, L), np.int8))
    prints = [env.llm.weights_fingerprint() for env in envs.envs]
    spoiled = envs.envs[1].episode.evaluator

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    # The second environment fails after the others have been written and judged.
    monkeypatch.setattr(spoiled, "summarise", fail)
    with pytest.raises(MemoryError):
        envs.step(np.ones((3, L), np.int8))
    monkeypatch.undo()
    assert [env.llm.weights_fingerprint() for env in envs.envs] == prints
    again = together()
    again.reset(seed=0)
    assert repr(again.step(np.ones((3, L), np.int8))) == repr(first)
    assert_same(again.step(np.ones((3, L), np.int8)), envs.step(np.ones((3, L), np.int8)))


def test_a_prompt_that_cannot_be_encoded_leaves_all_environments_as_they_were() -> None:
    envs = together()
    envs.reset(seed=0)
    envs.step(np.ones((3, L), np.int8))
    prints = [env.llm.weights_fingerprint() for env in envs.envs]
    bad = Request("x", "word " * 200, "y")
    with pytest.raises(PromptError):
        envs.reset(options={"requests": [bad]})
    assert [env.llm.weights_fingerprint() for env in envs.envs] == prints
    envs.step(np.ones((3, L), np.int8))


def test_requests_go_to_every_environment() -> None:
    facts = load_requests("tiny-facts")[:2]
    envs = together()
    envs.reset(options={"requests": facts})
    assert all(env.episode.fact.request == facts[0] for env in envs.envs)


def test_environments_can_be_begun_again_one_by_one() -> None:
    envs = together(autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.ones((3, L), np.int8))
    prints = [env.llm.weights_fingerprint() for env in envs.envs]
    mask = np.array([False, True, False])
    observations, info = envs.reset(seed=7, options={"reset_mask": mask})
    now = [env.llm.weights_fingerprint() for env in envs.envs]
    assert [a == b for a, b in zip(now, prints, strict=True)] == [True, False, True]
    assert info["_edit_index"].tolist() == mask.tolist()
    fresh, _ = gym.make(SELECTION, **SETTINGS).reset(seed=8)
    np.testing.assert_allclose(observations[1], fresh, atol=TOLERANCE)
    envs.step(np.ones((3, L), np.int8))
    with pytest.raises(SettingsError, match=r"environments \[0, 2\] have ended.*reset_mask"):
        envs.step(np.ones((3, L), np.int8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "num_envs"),
        ({"autoreset_mode": "later"}, "NextStep"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
    ],
)
def test_rubbish_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        together(**settings)


@pytest.mark.parametrize(
    ("seed", "mask", "message"),
    [
        ([1, 2], None, "3 seeds"),
        (0, np.zeros(3, bool), "reset_mask"),
        (0, np.ones(2, bool), "reset_mask"),
        (0, np.ones(3), "reset_mask"),
    ],
)
def test_rubbish_resets_are_refused(seed: Any, mask: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        together().reset(seed=seed, options=None if mask is None else {"reset_mask": mask})


def test_looks_like_any_vector_environment() -> None:
    envs: VectorEnv[Any, Any, Any] = together()
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.spec is not None
    assert json.loads(envs.spec.to_json())["kwargs"]["num_envs"] == 3
    assert envs.unwrapped.get_attr("num_edits") == (2, 2, 2)  # type: ignore[attr-defined]
    recorded = RecordEpisodeStatistics(envs)
    recorded.reset(seed=0)
    total = np.zeros(3)
    for _ in range(2):
        *_, terminated, _, info = step = recorded.step(np.ones((3, L), np.int8))
        total += step[1]
    assert terminated.all()
    np.testing.assert_allclose(info["episode"]["r"], total, rtol=1e-6)


def test_every_id_has_a_vector_form() -> None:
    names = [name for name in gym.registry if name.startswith("hiedit/")]
    assert hiedit_env.__version__
    for name in (LIFELONG, SELECTION, STEP_SIZE):
        assert name in names
        assert gym.spec(name).vector_entry_point is not None


def test_environments_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def load(*arguments: Any, **named: Any) -> Any:
        loads.append(arguments)
        return load_model(*arguments, **named)

    monkeypatch.setattr("hiedit_env.envs.loading.load_model", load)
    envs = together(count=4)
    assert len(loads) == 1
    assert len({id(env.llm.layers[0].module) for env in envs.envs}) == 1


# -- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"reward": "token_accuracy", "intrinsic": True}])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_tensors_are_the_same_numbers(settings: dict[str, Any], mode: str) -> None:
    settings = {"autoreset_mode": mode, "retention_window": 1, **settings}
    ours, plain = together(tensors=True, **settings), together(**settings)
    one, other = ours.reset(seed=6)[0], plain.reset(seed=6)[0]
    assert isinstance(one, torch.Tensor)
    torch.testing.assert_close(one, torch.from_numpy(other))
    for _ in range(4):
        action = np.array([[1, 0, 0, 1, 0, 0]] * 3, np.int8)
        one, other = ours.step(torch.from_numpy(action)), plain.step(action)
        for tensor, array in zip(one[:4], other[:4], strict=True):
            assert isinstance(tensor, torch.Tensor)
            assert tensor.device == ours.envs[0].llm.device
            assert tensor.dtype == (torch.bool if array.dtype == bool else torch.float32)
            np.testing.assert_allclose(tensor.numpy(), array, atol=1e-4)
        # They may enter a loss.
        weight = torch.ones(3, requires_grad=True)
        torch.autograd.backward((weight * one[1]).sum() + one[0].sum() * weight.sum())


def test_what_was_handed_out_stays_as_it_was() -> None:
    for tensors in (False, True):
        envs = together(tensors=tensors)
        first, _ = envs.reset(seed=0)
        kept = first.copy() if isinstance(first, np.ndarray) else first.clone()
        first[:] = 7
        second = envs.step(np.ones((3, L), np.int8))[0]
        third = envs.step(np.ones((3, L), np.int8))[0]
        assert not np.array_equal(np.asarray(second), np.asarray(third))
        again, _ = envs.reset(seed=0)
        assert np.array_equal(np.asarray(again), np.asarray(kept))


def test_collapse_pays_the_same_in_tensors() -> None:
    settings = {"step_size": 1e30, "num_edits": 2}
    rewards = []
    for tensors in (False, True):
        envs = together(tensors=tensors, **settings)
        envs.reset(seed=0)
        *_, info = result = envs.step(np.ones((3, L), np.int8))
        rewards.append(np.asarray(result[1], np.float64))
        assert np.asarray(result[2]).all()
        assert set(info["error_type"]) == {StepError.NON_FINITE_UPDATE}
    np.testing.assert_allclose(rewards[0], rewards[1])
    assert (rewards[0] == -10).all()
