"""The shared router as an agent in a folder: learned, saved, loaded, played, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hiedit_agents.bandits.shared_agent import SharedAgent, save_shared
from hiedit_agents.bandits.train_shared import Options, main, train
from hiedit_agents.hierarchy.shared_router import (
    FEATURES,
    PER_FACT,
    PER_LAYER,
    SharedRouter,
)
from hiedit_agents.named.checkpoints import JSON_FILE, SHARED, kind_of
from hiedit_agents.protocol import begin_episode
from hiedit_agents.registry import labelled, make_agent, spec_agent
from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_env.datasets.difficulty import WorldName
from hiedit_env.datasets.planted import make_world
from hiedit_env.envs.full_observation import FullObservation
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError
from hiedit_env.wrappers import ObserveEffects

#: Prompts and paraphrases share a key, so writing the home alone is right and nothing else is.
DIFFICULTY = "plain,layers=3,home_layers=3,relations=3,subjects=12,wording=0"
#: Another size of the same; its seed is of the test split.
UNSEEN = "plain,layers=4,home_layers=4,relations=4,subjects=12,wording=0"
TEST = 1_000_000


@pytest.fixture(scope="session")
def _worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "worlds"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, _worlds: Path) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(_worlds))


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, _worlds: Path) -> Path:
    """An agent that learned from four small worlds."""
    out = tmp_path_factory.mktemp("shared") / "agent"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIEDIT_CACHE", str(_worlds))
        arguments = ["--difficulty", DIFFICULTY, "--worlds", "4", "--num-edits", "12"]
        assert main([*arguments, "--steps", "600", "--out", str(out)]) == 0
    return out


def world(difficulty: str, seed: int, version: int = 2, **settings: Any) -> gym.Env[Any, Any]:
    return gym.make(
        f"hiedit/Planted-v{version}",
        disable_env_checker=True,
        **{"world_seed": seed, "difficulty": difficulty, "num_edits": 6, **settings},
    )


def homes_of(env: gym.Env[Any, Any]) -> NDArray[np.int8]:
    """The layer that has a key of its own for the present fact, by how the world was made."""
    inner: Any = env.unwrapped
    made = make_world(WorldName.read(inner.model_name))
    relation = made.topics.index(inner.fact.request.relation)
    mask = np.zeros(len(inner.llm.layers), np.int8)
    mask[list(made.homes[relation])] = 1
    return mask


def played(env: gym.Env[Any, Any], agent: Any, seed: int = 0) -> list[list[int]]:
    """The layers that an agent writes in an episode."""
    observation, info = begin_episode(env, agent, seed)
    found, ended = [], False
    while not ended:
        action = agent.select_action(observation, info)
        found.append(action.tolist())
        observation, _, ended, _, info = env.step(action)
    return found


def change(folder: Path, **fields: Any) -> Path:
    record = json.loads((folder / JSON_FILE).read_text())
    (folder / JSON_FILE).write_text(json.dumps({**record, **fields}))
    return folder


def test_every_feature_has_a_name() -> None:
    assert len(FEATURES) == PER_LAYER + PER_FACT == len(set(FEATURES))


@pytest.mark.parametrize("window", [0, 3, 10])
@pytest.mark.parametrize("version", [1, 2])
def test_any_environment_shows_it_what_it_learned_from(version: int, window: int) -> None:
    env = world(UNSEEN, 3, version, retention_window=window)
    wrapped = ObserveEffects(world(UNSEEN, 3))
    observation, _ = wrapped.reset(seed=1)
    env.reset(seed=1)
    inner: Any = env.unwrapped
    look = FullObservation(inner)
    twin = world(UNSEEN, 3, version, retention_window=window)
    twin.reset(seed=1)
    for step in range(6):
        np.testing.assert_allclose(look.read(), observation, atol=1e-6)
        np.testing.assert_array_equal(look.read(), look.read())
        action = np.eye(4, dtype=np.int8)[step % 4]
        observation, *_ = wrapped.step(action)
        # To look changes nothing.
        assert env.step(action)[1] == twin.step(action)[1]


def test_what_was_saved_chooses_the_same(tmp_path: Path) -> None:
    router = SharedRouter(4, hidden=8, seed=5)
    env = ObserveEffects(world(UNSEEN, TEST))
    seen = [env.reset(seed=2)[0], *(env.step(np.eye(4, dtype=np.int8)[0])[0] for _ in range(5))]
    router.standardise(np.stack(seen))
    with torch.no_grad():
        # It writes about half of the layers.
        router.score.bias -= router.scores(router.features(np.stack(seen))).mean()
    save_shared(tmp_path / "agent", router, {"worlds": []})
    agent = make_agent(str(tmp_path / "agent"))
    assert isinstance(agent, SharedAgent)
    same = SharedRouter(4, hidden=8)
    same.load_state_dict(router.state_dict())
    expected, ended = [], False
    observation, _ = env.reset(seed=2)
    while not ended:
        with torch.no_grad():
            scores = same.scores(same.features(observation[None]))[0]
        expected.append((scores > 0).int().tolist())
        observation, _, ended, *_ = env.step(np.array(expected[-1], np.int8))
    # It does not write the same for every fact.
    assert len({tuple(mask) for mask in expected}) > 1
    for version in (1, 2):
        assert played(world(UNSEEN, TEST, version), agent, 2) == expected
        assert played(world(UNSEEN, TEST, version), agent, 2) == expected


def test_it_learns_to_write_homes_in_worlds_it_has_not_seen(learned: Path) -> None:
    agent = make_agent(str(learned))
    right = 0
    for seed in (TEST, TEST + 1):
        env = world(UNSEEN, seed)
        observation, info = begin_episode(env, agent, 0)
        for _ in range(6):
            action = agent.select_action(observation, info)
            right += np.array_equal(action, homes_of(env))
            observation, *_, info = env.step(action)
    # By chance 1 of 16 sets would be right: less than 1 of 12.
    assert right >= 11


def test_hiedit_compare_plays_it(
    learned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table"
    where = ["--model", f"planted:{UNSEEN}:{TEST}", "--num-edits", "6", "--out", str(out)]
    agents = [f"mine={learned}", "random-layers", "oracle"]
    status = hiedit(["compare", *where, "--no-generation", "--agents", *agents])
    assert status == 0
    assert "was trained on" not in capfd.readouterr().err
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = {row["agent"]: row["metrics"] for row in rows}
    # The homes alone answer every fact and change no other prompt, which is the most there is.
    for agent in ("mine", "oracle"):
        assert found[agent]["efficacy"]["exact_match"] == 100
        assert found[agent]["specificity"]["agreement"] == 100
        assert found[agent]["true_layer_exact_share"] == 100
        assert found[agent]["regret"] == pytest.approx(0.0, abs=1e-3)
    assert found["random-layers"]["regret"] > 1


def test_a_world_that_it_has_seen_is_named(learned: Path) -> None:
    agent = make_agent(str(learned))
    assert isinstance(agent, SharedAgent)
    # Each world has twelve facts, about the same subjects.
    assert len(agent.training_facts(f"planted:{DIFFICULTY}:3")) == 12
    assert agent.training_facts(f"planted:{DIFFICULTY}:4") == frozenset()
    assert agent.training_facts("tiny") == frozenset()


def test_same_seed_same_agent(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        given = Options(out=tmp_path / name, difficulty=DIFFICULTY, worlds=1, num_edits=3)
        train(given)
        weights.append((tmp_path / name / "agent.safetensors").read_bytes())
    assert weights[0] == weights[1]
    with pytest.raises(ResultsExistError, match="is not empty; give another folder"):
        train(given)


def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    save_shared(folder, SharedRouter(3, hidden=8), {"worlds": []})
    assert kind_of(folder) == SHARED
    assert labelled(f"mine={folder}") == ("mine", str(folder))
    record = json.loads((folder / JSON_FILE).read_text())
    for fields, said in (
        ({"features": ["colour", *FEATURES[1:]]}, "does not have: colour; it lacks: key_size"),
        ({"features": list(FEATURES[::-1])}, "the same features in another order"),
        ({"hidden": 9}, "does not fit its own settings"),
        ({"hidden": 0}, "field 'hidden'"),
    ):
        change(folder, **fields)
        with pytest.raises(CheckpointError, match=said) as refused:
            make_agent(str(folder))
        assert "\n" not in str(refused.value)
        assert any(word in str(refused.value) for word in ("earn it again", "into another one"))
        change(folder, **{name: record[name] for name in fields})
    agent = make_agent(str(folder))
    with pytest.raises(SettingsError, match=r"take a world, .*planted:pairs:1000000"):
        agent.reset(gym.make("hiedit/LayerSelection-v2", num_edits=2), 0)
    with pytest.raises(SettingsError, match="must be reset before it can act"):
        agent.select_action(np.zeros(1, np.float32), {})
    with pytest.raises(SettingsError, match="takes no settings"):
        make_agent(f"{folder},steps=3")
    with pytest.raises(CheckpointError, match="give it to hiedit compare --agents"):
        spec_agent(str(folder))
