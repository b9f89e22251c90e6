"""What RL libraries need of ``info`` and of a vector environment: shapes that never vary."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList

from hiedit_env.envs.accounting import StepError, fingerprint_number
from tests.support.episodes import IDS, SELECTION, SMALL, make

TOY, PLANTED = "hiedit/Toy-v1", "hiedit/Planted-v1"
#: Two facts, of which the first has nothing remembered; some steps are in the middle of a fact.
SETTINGS: dict[str, Any] = {"num_edits": 2, "max_steps_per_edit": 2, "step_size": SMALL}


def form(value: Any) -> Any:
    """Keys, types and shapes, all the way down."""
    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    array = np.asarray(value)
    assert array.dtype.kind in "biuf", f"{value!r} is no number"
    return array.dtype.kind, array.shape


def as_tensors(value: Any) -> Any:
    """Every array as a tensor."""
    if isinstance(value, dict):
        return {name: as_tensors(part) for name, part in value.items()}
    return torch.from_numpy(value)


def true_layers(env: Any, info: dict[str, Any]) -> tuple[str, ...]:
    """Names of the true layers in ``info``."""
    pairs = zip(env.llm.names, info["true_layers"], strict=True)
    return tuple(name for name, is_true in pairs if is_true)


@pytest.mark.parametrize("name", [*IDS, PLANTED, TOY])
def test_the_form_of_info_never_varies(name: str) -> None:
    settings: dict[str, Any] = {"num_edits": 2} if name == TOY else dict(SETTINGS)
    if name == PLANTED:
        del settings["step_size"]
    env = gym.make(name, **settings)
    _, info = env.reset(seed=0)
    forms = [form(info)]
    for episode in range(2):
        ended = False
        env.action_space.seed(episode)
        while not ended:
            _, _, ended, _, info = env.step(env.action_space.sample())
            forms.append(form(info))
        forms.append(form(env.reset()[1]))
    assert len(forms) > 5
    assert all(found == forms[0] for found in forms)


@pytest.mark.parametrize("judge", ["step", "fact", "never"])
def test_collapse_and_missing_judgements_have_the_same_form(judge: Any) -> None:
    env = make(SELECTION, **(SETTINGS | {"step_size": 1e30}))
    _, info = env.reset(seed=0)
    wanted = form(info)
    _, _, ended, _, info = env.step(np.ones(6, np.int8))
    assert (ended, info["error_type"]) == (True, StepError.NON_FINITE_UPDATE)
    assert form(info) == wanted
    env = make(SELECTION, **SETTINGS)
    env.reset(seed=0)
    info = env.apply(env.episode.propose(np.ones(6, bool)), judge=judge)[4]
    assert form(info) == wanted
    assert np.isnan(info["metrics"]["agreement"]) == (judge != "step")


def test_a_fingerprint_is_the_same_number_everywhere() -> None:
    # By hand: 0xffff…fe is −2 in two's complement.
    assert fingerprint_number("fffffffffffffffe") == -2
    assert fingerprint_number("7fffffffffffffff") == 2**63 - 1


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
def test_vector_wrappers_take_the_information(mode: str) -> None:
    envs = gym.make_vec(SELECTION, 2, vectorization_mode=mode, **SETTINGS)
    _, info = envs.reset(seed=0)
    for _ in range(4):
        # What gymnasium's NumpyToTorch does; it refuses arrays of objects.
        assert as_tensors(info)["weights_fingerprint"].dtype == torch.int64
        *_, info = envs.step(np.ones((2, 6), np.int8))
        assert as_tensors(info)["metrics"]["agreement"].shape == (2,)
    listed = DictInfoToList(gym.make_vec(SELECTION, 2, vectorization_mode=mode, **SETTINGS))
    _, infos = listed.reset(seed=0)
    assert [info["edit_index"] for info in infos] == [0, 0]


def test_seeds_are_told_as_by_other_vector_environments() -> None:
    ours = gym.make_vec(SELECTION, 3, **SETTINGS)
    theirs = SyncVectorEnv([lambda: gym.make(SELECTION, **SETTINGS)] * 3)
    for envs in (ours, theirs):
        envs.reset(seed=5)
    assert ours.np_random_seed == theirs.np_random_seed == (5, 6, 7)
    drawn = [[g.random() for g in envs.np_random] for envs in (ours, theirs)]  # type: ignore[attr-defined]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_episodes_are_truncated_as_by_other_vector_environments(mode: str) -> None:
    settings = {"num_edits": 3, "max_steps_per_edit": 1}
    ours = gym.make_vec(SELECTION, 2, max_episode_steps=2, autoreset_mode=mode, **settings)
    theirs = SyncVectorEnv(
        [lambda: gym.make(SELECTION, max_episode_steps=2, **settings)] * 2, autoreset_mode=mode
    )
    for envs in (ours, theirs):
        envs.reset(seed=1)
    ends = []
    for _ in range(6):
        action = np.ones((2, 6), np.int8)
        one, other = ours.step(action), theirs.step(action)
        for a, b in zip(one[:4], other[:4], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
        ends.append(one[3].tolist())
        if mode == "Disabled" and one[3].any():
            for envs in (ours, theirs):
                envs.reset(options={"reset_mask": one[3].copy()})
    wanted = {"NextStep": [0, 1, 0, 0, 1, 0]}.get(mode, [0, 1, 0, 1, 0, 1])
    assert ends == [[bool(end)] * 2 for end in wanted]


def test_true_layers_are_those_of_the_fact_that_is_shown() -> None:
    env: Any = gym.make(PLANTED, num_edits=4).unwrapped
    _, info = env.reset(seed=0)
    names = [request.true_layers for request in env.stream]
    assert len(set(names)) > 1
    for i in range(4):
        assert true_layers(env, info) == names[i]
        info = env.step(info["true_layers"])[4]
    # After the last fact the observation shows it again.
    assert true_layers(env, info) == names[3]
