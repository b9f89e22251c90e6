"""What all libraries share: forms, records, and policies that play as they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from hiedit_agents.named.checkpoints import FACTS, JSON_FILE, fact_hashes
from hiedit_agents.policies import (
    FunctionPolicy,
    PolicyAgent,
    PolicyRecord,
    Task,
    read_policy,
    save_policy,
)
from hiedit_agents.policies.task import Sizes
from hiedit_agents.registry import make_agent
from hiedit_agents.rl.command import parse_arguments, run_script
from hiedit_benchmarks.comparison.episode import play
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import (
    CheckpointError,
    MissingLibraryError,
    ResultsExistError,
    SettingsError,
)
from hiedit_env.wrappers import SequentialSelection
from tests.support.policies import Outcome, random_agent

TINY = {"model": "tiny", "num_edits": 4, "max_steps_per_edit": 2}
TOY = {"id": "hiedit/Toy-v1", "num_layers": 5, "num_edits": 6}
FORMS: dict[str, dict[str, Any]] = {
    "layers": {},
    "box": {},
    "discrete": {"size": 2},
    "sequential": {"max_layers": 3},
    "step-sizes": {},
}


def agent_of(task: Task, function: Any, sizes: Sizes | None = None) -> PolicyAgent:
    sizes = sizes or task.sizes(task.make_env())
    record = PolicyRecord("any", "any", task, sizes, {}, {}, "", Path("here"))
    return PolicyAgent(record, FunctionPolicy(function))


def drawn(task: Task, sizes: Sizes) -> Any:
    """A policy whose action depends on the whole observation, in a way nobody could guess."""
    space = task.spaces(sizes)[1]

    def act(observation: Any, mask: Any) -> Any:
        space.seed(int(np.abs(observation.astype(np.float64)).sum() * 1e6) % 2**31)
        return space.sample() if mask is None else space.sample(mask.astype(np.int8))

    return act


def trained_episode(task: Task, function: Any, seed: int) -> list[dict[str, Any]]:
    """What the policy does in the environment it is trained in: one entry per fact."""
    env = task.make_env()
    observation, _ = env.reset(seed=seed)
    ended, total, facts = False, 0.0, []
    while not ended:
        mask = env.action_masks() if isinstance(env, SequentialSelection) else None
        action = function(observation, mask)
        observation, reward, ended, _, info = env.step(action)
        total += float(reward)
        if info["edit_over"]:
            facts.append({"layers": info["layers"].tolist(), "reward": total})
            total = 0.0
    return facts


@pytest.mark.parametrize("form", [form for form in FORMS if form != "step-sizes"])
def test_a_policy_plays_the_layers_it_plays_in_its_own_environment(form: str) -> None:
    task = Task(form, TINY, FORMS[form])
    sizes = task.sizes(task.make_env())
    function = drawn(task, sizes)
    expected = trained_episode(task, function, 3)
    env = gym.make("hiedit/LayerSelection-v1", **TINY)
    edits = play(env, agent_of(task, function, sizes), 3, progress=False).edits
    assert [edit.layers.astype(int).tolist() for edit in edits] == [x["layers"] for x in expected]
    assert [edit.reward for edit in edits] == [x["reward"] for x in expected]
    assert len({tuple(x["layers"]) for x in expected}) > 1


@pytest.mark.parametrize("high_level", ["all-layers", "gradient-norm"])
def test_step_sizes_are_paid_what_they_are_paid_in_their_own_environment(high_level: str) -> None:
    # Another rule and horizon than the environment it is played in: it brings its own.
    own = {"update_rule": "outer-product", "step_size": 3e-4, "high_level": high_level}
    task = Task("step-sizes", {**TINY, **own, "max_steps_per_edit": 3})
    sizes = task.sizes(task.make_env())
    function = drawn(task, sizes)
    expected = trained_episode(task, function, 3)
    env = gym.make("hiedit/LayerSelection-v1", **TINY)
    edits = play(env, agent_of(task, function, sizes), 3, progress=False).edits
    np.testing.assert_allclose(
        [edit.reward for edit in edits], [x["reward"] for x in expected], atol=1e-5
    )
    assert [edit.layers.astype(int).tolist() for edit in edits] == [x["layers"] for x in expected]
    # The sizes matter.
    nominal = play(env, agent_of(task, lambda o, m: np.zeros(6), sizes), 3, progress=False).edits
    assert abs(nominal[0].reward - edits[0].reward) > 1e-4


def test_the_oracle_tries_a_policy_over_step_sizes_in_every_twin() -> None:
    world = {"model": "planted", "num_edits": 2, "max_steps_per_edit": 2}
    task = Task("step-sizes", world)
    sizes = task.sizes(task.make_env())
    env = gym.make("hiedit/Planted-v1", **world)
    # Smooth: twins see observations that differ by rounding.
    weights = np.random.default_rng(0).normal(size=(6, sizes.observation)) / 4
    agent = agent_of(task, lambda seen, mask: np.tanh(weights @ seen).astype(np.float32), sizes)
    agent.reset(env, 0)
    observation, info = env.reset(seed=0)
    oracle = env.unwrapped.oracle()  # type: ignore[attr-defined]
    action = agent.select_action(observation, info)
    _, reward, *_ = env.step(action)
    assert reward == pytest.approx(oracle.reward_of(action), abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_spaces_are_those_of_the_environment(form: str) -> None:
    task = Task(form, TINY, FORMS[form])
    env = task.make_env()
    assert task.spaces(task.sizes(env)) == (env.observation_space, env.action_space)
    again = Task.from_json(json.loads(json.dumps(task.to_json())))
    assert again.make_env().action_space == env.action_space
    assert again.id == task.id


@pytest.mark.parametrize("form", FORMS)
def test_vector_forms_are_the_single_ones(form: str) -> None:
    task = Task(form, TINY, FORMS[form])
    vector, singles = task.make_vec(3), [task.make_env() for _ in range(3)]
    assert vector.single_action_space == singles[0].action_space
    assert vector.single_observation_space == singles[0].observation_space
    assert task.sizes(vector) == task.sizes(singles[0])
    function = drawn(task, task.sizes(vector))
    observations, _ = vector.reset(seed=5)
    seen = [env.reset(seed=5 + i)[0] for i, env in enumerate(singles)]
    np.testing.assert_allclose(observations, seen, atol=1e-5)
    for _ in range(3):
        masks = vector.call("action_masks") if form == "sequential" else [None] * 3
        actions = [function(o, m) for o, m in zip(observations, masks, strict=True)]
        observations, rewards, *_ = vector.step(np.array(actions))
        results = [env.step(action) for env, action in zip(singles, actions, strict=True)]
        np.testing.assert_allclose(rewards, [result[1] for result in results], atol=1e-4)
    vector.close()


def test_episodes_share_one_model() -> None:
    envs = Task("sequential", TINY).make_envs(3)
    models = {id(env.unwrapped.llm.model) for env in envs}  # type: ignore[attr-defined]
    assert len(models) == 1
    assert len(Task("layers", TOY).make_envs(2)) == 2


# Records


def write(folder: Path, task: Task | None = None, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "library": "any",
        "algorithm": "x",
        "task": task or Task("discrete", TINY, {"size": 3}),
        "sizes": Sizes(137, 6, tuple("abcdef")),
        "policy": {"hidden": 4},
        "tensors": {"w": torch.arange(6.0).reshape(2, 3).T},
        "training": {"seed": 1},
    }
    save_policy(folder, **{**arguments, **changes})


def test_a_record_goes_there_and_back(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    record = read_policy(tmp_path / "a" / "b", "any")
    assert record.task == Task.from_json(Task("discrete", TINY, {"size": 3}).to_json())
    assert record.sizes == Sizes(137, 6, tuple("abcdef"))
    assert record.policy == {"hidden": 4}
    assert record.tensors["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert record.algorithm == "x"
    with pytest.raises(ResultsExistError, match="another --out"):
        write(tmp_path / "a" / "b")
    agent = PolicyAgent(record, FunctionPolicy(lambda o, m: 0))
    assert agent.candidate_layers("tiny") == list("abcdef")
    assert agent.candidate_layers("smollm2-135m") is None
    assert agent.identity["weights"] == [record.digest]


def test_a_record_says_which_facts_it_was_trained_on(tmp_path: Path) -> None:
    task = Task("layers", {**TINY, "dataset": "tiny-facts"})
    wanted = fact_hashes(load_requests("tiny-facts"))
    for name, env in (("one", task.make_env()), ("many", task.make_vec(2))):
        write(tmp_path / name, task, sizes=task.sizes(env))
        agent = PolicyAgent(read_policy(tmp_path / name, "any"), FunctionPolicy(lambda o, m: 0))
        assert agent.training_facts("tiny") == wanted
    toy = Task("layers", TOY)
    assert toy.sizes(toy.make_env()).facts == frozenset()
    # A record need not say.
    file = tmp_path / "one" / JSON_FILE
    record = json.loads(file.read_text())
    del record["training"][FACTS]
    file.write_text(json.dumps(record))
    assert read_policy(tmp_path / "one", "any").sizes.facts == frozenset()


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no policy"):
        read_policy(tmp_path, "any")
    write(tmp_path)
    with pytest.raises(CheckpointError, match="name it any:"):
        read_policy(tmp_path, "sb3")
    file = tmp_path / "agent.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "format": 7}))
    with pytest.raises(CheckpointError, match="format 7"):
        read_policy(tmp_path, "any")
    file.write_text(json.dumps({k: v for k, v in good.items() if k != "sizes"}))
    with pytest.raises(CheckpointError, match="sizes"):
        read_policy(tmp_path, "any")
    file.write_text(json.dumps(good))
    (tmp_path / "agent.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        read_policy(tmp_path, "any")


# Refusals


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: gym.make("hiedit/Toy-v1"), r"137 observed.*6 layers.*\(7,\).*layers it was"),
        (lambda: gym.make("hiedit/LifelongEdit-v1"), r"Dict.*FixedStepSize around it"),
        (lambda: gym.make("hiedit/StepSize-v1"), r"Box.*acts in hiedit/LayerSelection-v1"),
        (lambda: Task("discrete", TINY).make_env(), r"Discrete\(6\): .*without wrappers"),
        (lambda: Task("sequential", TINY).make_env(), r"\(143,\).*without wrappers"),
    ],
)
def test_other_spaces_are_refused_with_the_remedy(made: Any, words: str) -> None:
    agent = agent_of(Task("box", TINY), None, Sizes(137, 6))
    with pytest.raises(CheckpointError, match=words):
        agent.reset(made(), 0)
    with pytest.raises(SettingsError, match="must be reset"):
        agent.select_action(np.zeros(137, np.float32), {})


def test_a_masked_choice_is_refused() -> None:
    task = Task("sequential", TINY)
    env = gym.make("hiedit/LayerSelection-v1", **TINY)
    agent = agent_of(task, lambda observation, mask: 2, task.sizes(env))
    agent.reset(env, 0)
    observation, info = env.reset(seed=0)
    with pytest.raises(CheckpointError, match=r"policy of any:here: action 2 is masked"):
        agent.select_action(observation, info)


@pytest.mark.parametrize(
    ("form", "env", "options", "words"),
    [
        ("flat", {}, {}, "unknown form 'flat'"),
        ("layers", {}, {"size": 2}, r"no options \['size'\]"),
        ("discrete", {}, {"max_layers": 2}, r"it has \['limit', 'size'\]"),
        ("layers", {"id": "hiedit/StepSize-v1"}, {}, "does not fit hiedit/StepSize-v1"),
        ("step-sizes", {"id": "hiedit/Toy-v1"}, {}, "does not fit hiedit/Toy-v1"),
    ],
)
def test_rubbish_tasks_are_refused(form: str, env: Any, options: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Task(form, env, options)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared: dict[str, Any] = {
        "program": "python -m agents.any",
        "description": "Any.",
        "forms": {"ppo": ("layers", "box"), "dqn": ("sequential",)},
        "steps": {"ppo": 100, "dqn": 200},
        "num_envs": {"ppo": 8, "dqn": 1},
    }
    words = ["--algorithm", "ppo", "--out", str(tmp_path), "--env", "model=tiny", "num_edits=3"]
    found = parse_arguments([*words, "--set", "gamma=0.5", "--steps", "7"], **shared)
    assert found.task == Task("layers", {"model": "tiny", "num_edits": 3})
    assert (found.steps, found.num_envs, found.settings) == (7, 8, {"gamma": 0.5})
    with pytest.raises(SettingsError, match=r"ppo cannot act in form 'step-sizes'.*--form layers"):
        parse_arguments([*words, "--form", "step-sizes"], **shared)
    for name, least in {"steps": 1, "num_envs": 1, "evaluations": 0}.items():
        option = "--" + name.replace("_", "-")
        with pytest.raises(SettingsError, match=f"{name} must be ≥ {least}"):
            parse_arguments([*words, option, "-1"], **shared)
    with pytest.raises(SettingsError, match="--set takes name=value, got 'gamma'"):
        parse_arguments([*words, "--set", "gamma"], **shared)
    write(tmp_path)
    with pytest.raises(ResultsExistError):
        parse_arguments(words, **shared)


def test_the_folder_of_a_policy_alone_is_refused_with_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    library = json.loads((tmp_path / "agent.json").read_text())["library"]
    with pytest.raises(CheckpointError, match=f"name it {library}:{tmp_path}"):
        make_agent(str(tmp_path))


def test_scripts_end_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise SettingsError("steps must be at least 1")

    assert run_script(main) == 2
    assert capsys.readouterr().err == "error: steps must be at least 1\n"
    assert run_script(lambda: None) == 0


def test_a_missing_library_names_the_extra() -> None:
    error = MissingLibraryError("tianshou", "tianshou")
    assert isinstance(error, SettingsError)
    assert isinstance(error, ImportError)
    assert str(error) == (
        "tianshou is not installed; in the checkout of hiedit run: pip install '.[tianshou]'"
    )


# The margin


def test_the_share_of_the_way_by_hand() -> None:
    assert Outcome(trained=-1.0, random=-3.0, oracle=1.0).share == 0.5


def test_random_agents_of_every_form_play(tmp_path: Path) -> None:
    env = gym.make("hiedit/LayerSelection-v1", **TINY)
    for form, options in FORMS.items():
        task = Task(form, TINY, options)
        agent = random_agent(task, task.sizes(env))
        assert len(play(env, agent, 0, progress=False).edits) == 4
