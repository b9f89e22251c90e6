"""RLlib, TorchRL, Tianshou and skrl train on the planted world, as a user would start them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from hiedit_agents.policies import Task
from hiedit_agents.registry import make_agent
from hiedit_env.errors import SettingsError
from tests.support.policies import MARGIN, TRAIN, held_out

pytestmark = [pytest.mark.libraries, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
#: Library → its package, and what it writes beside what hiedit reads.
LIBRARIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rllib": ("ray.rllib", ("checkpoint/rllib_checkpoint.json", "results.jsonl")),
    "skrl": ("skrl", ("training/checkpoints/best_agent.pt", "evaluation/events.out.tfevents.*")),
    "tianshou": ("tianshou", ("best.pth", "last.pth", "events.out.tfevents.*")),
    "torchrl": (
        "torchrl",
        ("actor.pt", "critic.pt", "best_actor.pt", "training/scalars/eval_episode_reward.csv"),
    ),
}
TOY: dict[str, Any] = {"id": "hiedit/Toy-v1", "num_layers": 3, "num_edits": 4}


def need(package: str) -> None:
    """Skips the test where a library is not installed; nothing is imported."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")


def words(env: Any) -> list[str]:
    return [f"{name}={value}" for name, value in env.items()]


def run(library: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, whose global random state and warnings are its own."""
    return subprocess.run(
        [sys.executable, "-m", f"hiedit_agents.rl.train_{library}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        # Only for what hangs: an old processor needs several times as long as a new one.
        timeout=1800,
    )


def train(library: str, out: Path, env: Any, *more: str) -> dict[str, Any]:
    done = run(library, "--out", str(out), "--env", *words(env), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"hiedit compare --agents {library}:{out}" in done.stdout
    record: dict[str, Any] = json.loads((out / "agent.json").read_text())
    return record


@pytest.mark.parametrize("library", LIBRARIES)
def test_learns_the_planted_world(library: str, tmp_path: Path) -> None:
    package, files = LIBRARIES[library]
    need(package)
    out = tmp_path / library
    held = ("--eval-env", "dataset=planted-facts-test")
    record = train(library, out, TRAIN, "--evaluations", "2", *held)
    assert record["training"]["steps"] >= 4096
    for pattern in files:
        assert list(out.glob(pattern)), f"{pattern} is missing in {list(out.rglob('*'))}"
    outcome = held_out(make_agent(f"{library}:{out}"))
    assert outcome.share >= MARGIN, outcome


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_environment_is_enough(library: str, tmp_path: Path) -> None:
    need(LIBRARIES[library][0])
    train(library, tmp_path, TOY, "--num-envs", "1", "--steps", "16", "--evaluations", "0")


@pytest.mark.parametrize("library", LIBRARIES)
def test_hyperparameters_the_script_does_not_have(library: str, tmp_path: Path) -> None:
    need(LIBRARIES[library][0])
    done = run(library, "--out", str(tmp_path), "--env", *words(TOY), "--set", "lrate=1")
    assert done.returncode != 0
    assert "--set has no lrate; it has " in done.stderr


def test_tianshou_steps_environments_as_gymnasium_does() -> None:
    need("tianshou")
    from hiedit_agents.rl.train_tianshou import EditingVectorEnv

    task = Task("layers", TOY)
    plain = task.make_vec(3, autoreset_mode=AutoresetMode.DISABLED)
    vector_env = EditingVectorEnv(task.make_vec(3, autoreset_mode=AutoresetMode.DISABLED))
    vector_env.seed(5)
    expected, _ = plain.reset(seed=5)
    actions = np.eye(3, dtype=np.int8)
    for _ in range(3):
        after, rewards, ended, cut, infos = vector_env.step(actions)
        expected, gained, *_ = plain.step(actions)
        assert after.tolist() == expected.tolist()
        assert rewards.tolist() == gained.tolist()
        assert [info["env_id"] for info in infos] == [0, 1, 2]
    assert not ended.any()
    *_, ended, cut, _ = vector_env.step(actions)
    assert ended.all()
    first, infos = vector_env.reset([2, 0])
    assert first.shape == (2, expected.shape[1])
    assert [info["env_id"] for info in infos] == [2, 0]
    with pytest.raises(SettingsError, match=r"stepped together, all 3 of them, got \[0, 2\]"):
        vector_env.step(actions[:2], [0, 2])
    assert vector_env.action_space == [task.make_env().action_space] * 3
