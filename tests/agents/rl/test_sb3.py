"""Stable-Baselines3 and sb3-contrib: the vector environment, files, refusals, the margin."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from hiedit_agents.policies import Task
from hiedit_agents.registry import make_agent
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.episode import play
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError
from tests.support.policies import TRAIN, TRAIN_STEP_SIZES, held_out, needed_share

pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")

from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecNormalize

from hiedit_agents.rl import train_sb3 as sb3
from hiedit_agents.rl import train_sb3_contrib as sb3_contrib
from hiedit_agents.rl.sb3_vec_env import EditingVecEnv

TINY = {"model": "tiny", "num_edits": 2, "max_steps_per_edit": 1}
TOY = {"id": "hiedit/Toy-v1", "num_layers": 4, "num_edits": 8}
MODULES = {"sb3": sb3, "sb3-contrib": sb3_contrib}
ALL = [(library, name) for library, module in MODULES.items() for name in module.ALGORITHMS]
#: Enough to go once through every part of the training.
SHORT: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 4, "batch_size": 8},
    "maskable-ppo": {"n_steps": 4, "batch_size": 8},
    "recurrent-ppo": {"n_steps": 4, "batch_size": 8},
    "a2c": {},
}
OFF_POLICY = {"learning_starts": 4, "gradient_steps": 1}


def run(library: str, algorithm: str, out: Path, env: Any, *words: str) -> None:
    settings = SHORT.get(algorithm, OFF_POLICY)
    pairs = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    MODULES[library].main(
        ["--algorithm", algorithm, "--out", str(out), "--steps", "8", "--num-envs", "2"]
        + ["--evaluations", "1", "--set", *pairs, *words, "--env"]
        + [f"{name}={json.dumps(value)}" for name, value in env.items()]
    )


# Environments


def test_environments_are_the_vector_environment() -> None:
    task = Task("layers", TINY)
    vector_env, envs = EditingVecEnv(task.make_vec(2)), task.make_vec(2)
    vector_env.seed(3)
    np.testing.assert_array_equal(vector_env.reset(), envs.reset(seed=[3, 4])[0])
    action = np.array([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]])
    # Stable-Baselines3 draws float masks.
    first, wanted = vector_env.step(action.astype(np.float32)), envs.step(action)
    np.testing.assert_array_equal(first[0], wanted[0])
    np.testing.assert_allclose(first[1], wanted[1], rtol=1e-6)
    assert [info["layers"].tolist() for info in first[3]] == action.tolist()
    assert first[3][1]["reward_terms"]["edit"] == wanted[4]["reward_terms"]["edit"][1]
    second, wanted = vector_env.step(action), envs.step(action)
    assert second[2].tolist() == [True, True]
    for i, info in enumerate(second[3]):
        np.testing.assert_array_equal(info["terminal_observation"], wanted[4]["final_obs"][i])
        assert info["edit_index"] == 1  # of the episode that ended, not of the one that began
        assert info["TimeLimit.truncated"] is False
    assert vector_env.get_attr("num_edits") == [2, 2]
    assert vector_env.env_method("observe", indices=[1])[0].shape == (137,)
    assert len({id(llm.model) for llm in vector_env.get_attr("llm")}) == 1
    vector_env.close()


def test_environments_that_begin_again_later_are_refused() -> None:
    with pytest.raises(SettingsError, match="autoreset_mode='SameStep', not 'NextStep'"):
        EditingVecEnv(
            gym.make_vec(
                "hiedit/LayerSelection-v1",
                num_envs=1,
                vectorization_mode="vector_entry_point",
                num_edits=2,
            )
        )


def test_the_library_alone_trains_on_the_id() -> None:
    env = gym.make("hiedit/LayerSelection-v1", **TINY)
    PPO("MlpPolicy", env, n_steps=4, batch_size=4, device="cpu").learn(4)


# Training, files, playing


# What Stable-Baselines3 says when it loads a DQN of its own that has n_steps; it does use them.
@pytest.mark.filterwarnings("ignore:`n_steps=3` is ignored")
@pytest.mark.parametrize(("library", "algorithm"), ALL)
def test_what_is_trained_plays_as_the_library_says(
    library: str, algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policy"
    how = MODULES[library].ALGORITHMS[algorithm]  # type: ignore[attr-defined]
    form = how.forms[0]
    run(library, algorithm, out, TINY if form == "step-sizes" else TOY)
    assert f"{library}:{out}" in capsys.readouterr().out
    files = {path.name for path in out.iterdir()}
    assert files >= {"model.zip", "monitor.csv", "progress.csv", "evaluations.npz"}
    assert files >= {"best_model.zip", "agent.json", "agent.safetensors"}
    # Statistics of episodes, the library's own way.
    rows = list(csv.reader((out / "monitor.csv").read_text().splitlines()))
    assert rows[1] == ["r", "l", "t"]
    agent: Any = make_agent(f"{library}:{out}")
    assert agent.record.algorithm == algorithm
    assert json.loads((out / "agent.json").read_text())["training"]["steps"] >= 8
    # The rebuilt network says what the library's own saved model says.
    model = how.make.load(out / "model.zip", device="cpu")
    space = model.observation_space
    space.seed(0)
    agent.policy.begin()
    for _ in range(3):
        seen = space.sample()
        if how.masks:
            mask = np.array([False, True, False, True, False])
            named = {"action_masks": mask}
        else:
            mask, named = None, {}
        if algorithm != "recurrent-ppo":
            expected = model.predict(seen, deterministic=True, **named)[0]
            assert np.array_equal(agent.policy(seen, mask), expected)
    with pytest.raises(ResultsExistError, match="another --out"):
        run(library, algorithm, out, TOY)


def test_a_recurrent_policy_remembers_and_forgets(tmp_path: Path) -> None:
    run("sb3-contrib", "recurrent-ppo", tmp_path, {**TOY}, "--form", "box")
    policy: Any = make_agent(f"sb3-contrib:{tmp_path}").policy  # type: ignore[attr-defined]
    model = sb3_contrib.RecurrentPPO.load(tmp_path / "model.zip", device="cpu")
    seen = [model.observation_space.sample() for _ in range(3)]
    state, expected = None, []
    for t, observation in enumerate(seen):
        action, state = model.predict(observation, state, np.array([t == 0]), deterministic=True)
        expected.append(action)
    for _ in range(2):
        policy.begin()
        np.testing.assert_array_equal([policy(observation, None) for observation in seen], expected)
    assert not np.array_equal(policy(seen[0], None), expected[0])  # it remembers


def test_a_policy_is_compared_and_goes_on_training(tmp_path: Path) -> None:
    run("sb3", "ppo", tmp_path / "policy", TINY)
    name = f"sb3:{tmp_path / 'policy'}"
    settings = CompareSettings(model="tiny", num_edits=2, generation=())
    rows = compare(settings, [name], [0], tmp_path / "table", progress=False).rows
    assert [row["agent"] for row in rows] == ["no-edit", name]
    vector_env = EditingVecEnv(Task("layers", TINY).make_vec(2))
    model = PPO.load(tmp_path / "policy" / "model.zip", env=vector_env, device="cpu")
    before = model.num_timesteps
    model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == before + 8


def test_a_model_of_your_own_code_is_kept(tmp_path: Path) -> None:
    task = Task("box", TOY)
    model = A2C(
        "MlpPolicy", EditingVecEnv(task.make_vec(2)), policy_kwargs={"net_arch": [3]}, device="cpu"
    )
    sb3.save(model, task, tmp_path / "mine")
    agent: Any = make_agent(f"sb3:{tmp_path / 'mine'}")
    assert agent.record.algorithm == "a2c"
    assert agent.record.policy == {"kwargs": {"net_arch": [3]}}
    env = gym.make("hiedit/Toy-v1", num_layers=4)
    agent.reset(env, 0)
    observation, info = env.reset(seed=0)
    expected = model.predict(observation, deterministic=True)[0] > 0
    assert agent.select_action(observation, info).tolist() == expected.astype(int).tolist()


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_state_dependent_exploration_is_kept(algorithm: str, tmp_path: Path) -> None:
    settings = {**SHORT.get(algorithm, OFF_POLICY), "use_sde": True}
    pairs = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    run("sb3", algorithm, tmp_path, TOY, "--form", "box", "--set", *pairs)
    model = sb3.ALGORITHMS[algorithm].make.load(tmp_path / "model.zip", device="cpu")
    policy: Any = make_agent(f"sb3:{tmp_path}").policy  # type: ignore[attr-defined]
    model.observation_space.seed(0)
    seen = model.observation_space.sample()
    np.testing.assert_array_equal(policy(seen, None), model.predict(seen, deterministic=True)[0])


def test_a_model_of_sb3_contrib_is_kept_by_its_own_function(tmp_path: Path) -> None:
    task = Task("sequential", TOY)
    vector_env = EditingVecEnv(task.make_vec(2))
    model = sb3_contrib.MaskablePPO("MlpPolicy", vector_env, n_steps=4, batch_size=8, device="cpu")
    with pytest.raises(SettingsError, match=r"not of MaskablePPO; .*train_sb3_contrib\.save"):
        sb3.save(model, task, tmp_path)
    sb3_contrib.save(model, task, tmp_path)
    agent: Any = make_agent(f"sb3-contrib:{tmp_path}")
    assert agent.record.algorithm == "maskable-ppo"


@pytest.mark.parametrize("name", ["lrate", "seed"])
def test_hyperparameters_the_algorithm_does_not_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"--set has no {name}; it has learning_rate, n_steps"):
        run("sb3", "ppo", tmp_path / "out", TOY, "--set", f"{name}=1")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    task = Task("box", TOY)
    vector_env = EditingVecEnv(task.make_vec(2))
    classes = {"activation_fn": torch.nn.ReLU}
    model = PPO(
        "MlpPolicy", vector_env, n_steps=4, batch_size=8, policy_kwargs=classes, device="cpu"
    )
    with pytest.raises(SettingsError, match="plain JSON"):
        sb3.save(model, task, tmp_path)
    model = PPO("MlpPolicy", VecNormalize(vector_env), n_steps=4, batch_size=8, device="cpu")
    with pytest.raises(SettingsError, match="VecNormalize"):
        sb3.save(model, task, tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_policies_are_refused(tmp_path: Path) -> None:
    run("sb3", "a2c", tmp_path, TOY)
    file = tmp_path / "agent.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "algorithm": "magic"}))
    with pytest.raises(CheckpointError, match="'magic'; known are ppo, a2c, dqn, sac, td3"):
        make_agent(f"sb3:{tmp_path}")
    file.write_text(json.dumps({**record, "policy": {"kwargs": {"net_arch": [7]}}}))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its settings.*size mismatch"):
        make_agent(f"sb3:{tmp_path}")
    with pytest.raises(CheckpointError, match=f"name it sb3:{tmp_path}"):
        make_agent(f"sb3-contrib:{tmp_path}")


def test_loading_leaves_torch_alone(tmp_path: Path) -> None:
    run("sb3", "a2c", tmp_path, TOY)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_agent(f"sb3:{tmp_path}")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("algorithm", "form"), [("dqn", "layers"), ("sac", "discrete"), ("ppo", "sequential")]
)
def test_forms_an_algorithm_cannot_act_in(algorithm: str, form: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{algorithm} cannot act in form '{form}'.*give it"):
        run("sb3", algorithm, tmp_path, TOY, "--form", form)


@pytest.mark.parametrize(
    "module",
    [
        "hiedit_agents.rl.train_sb3",
        "hiedit_agents.rl.train_sb3_contrib",
        "hiedit_agents.rl.sb3_vec_env",
    ],
)
def test_without_the_library_the_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = importlib.import_module(module)
    gone = "sb3_contrib" if module == "hiedit_agents.rl.train_sb3_contrib" else "stable_baselines3"
    for name in [name for name in sys.modules if name.split(".")[0] == gone]:
        monkeypatch.setitem(sys.modules, name, None)
    extra = "sb3-contrib" if gone == "sb3_contrib" else "sb3"
    with pytest.raises(SettingsError, match=rf"pip install '\.\[{extra}\]'"):
        importlib.reload(loaded)


# The margin


@pytest.mark.libraries
@pytest.mark.parametrize(("library", "algorithm"), ALL)
def test_training_beats_random_by_the_margin(library: str, algorithm: str, tmp_path: Path) -> None:
    how = MODULES[library].ALGORITHMS[algorithm]  # type: ignore[attr-defined]
    env = TRAIN_STEP_SIZES if how.forms[0] == "step-sizes" else TRAIN
    MODULES[library].main(
        ["--algorithm", algorithm, "--out", str(tmp_path), "--evaluations", "0", "--env"]
        + [f"{name}={value}" for name, value in env.items()]
    )
    agent = make_agent(f"{library}:{tmp_path}")
    outcome = held_out(agent)
    print(f"{library}:{algorithm}: {outcome}, share {outcome.share:.2f}")
    assert outcome.share > needed_share(agent)


def test_random_environments_are_played_by_the_same_seeds(tmp_path: Path) -> None:
    run("sb3", "a2c", tmp_path, TINY)
    env = gym.make("hiedit/LayerSelection-v1", **TINY)
    agent = make_agent(f"sb3:{tmp_path}")
    one, two = (play(env, agent, 5, progress=False) for _ in range(2))
    assert [edit.reward for edit in one.edits] == [edit.reward for edit in two.edits]
