"""The one-file PPO: known answers, a toy it must learn, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import hiedit_env
from hiedit_agents.named.checkpoints import fact_hashes
from hiedit_agents.registry import make_agent
from hiedit_agents.rl import ppo
from hiedit_agents.rl.ppo import ActorCritic, Args, estimate, main, train
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError

TOY = Args(
    env_id="hiedit/Toy-v1",
    env={"num_layers": 4, "num_edits": 16},
    steps=8192,
    learning_rate=1e-2,
)
SHORT = Args(env={"num_edits": 2}, num_envs=2, num_steps=2, minibatches=2, steps=8, hidden=4)


def test_advantages_by_hand() -> None:
    """Two environments of three facts; the second one's first episode ends with its second fact."""
    rewards = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    values = torch.tensor([[0.5, 1.0], [1.0, 0.0], [2.0, 1.0]])
    ends = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = estimate(rewards, values, ends, torch.tensor([4.0, 2.0]), 0.5, 0.8)
    # First: 0 + 2 − 2 = 0;  2 + 1 − 1 + 0.4 · 0 = 2;  1 + 0.5 − 0.5 + 0.4 · 2 = 1.8.
    # Second: 3 + 1 − 1 = 3;  1 − 0 = 1;  0 + 0 − 1 + 0.4 · 1 = −0.6.
    wanted = torch.tensor([[1.8, -0.6], [2.0, 1.0], [0.0, 3.0]])
    torch.testing.assert_close(found, wanted)


def test_an_environment_that_is_cut_short_is_paid_for_what_would_have_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a value of 8 everywhere, the last reward before the cut counts γ · 8 more."""
    seen: list[torch.Tensor] = []
    own = ppo.estimate

    def note(rewards: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(rewards.clone())
        return own(rewards, *rest)

    monkeypatch.setattr(ppo, "estimate", note)
    monkeypatch.setattr(ActorCritic, "value", lambda _, seen: torch.full((len(seen),), 8.0))
    toy = {"num_layers": 4, "num_edits": 16}
    args = replace(SHORT, env_id="hiedit/Toy-v1", num_steps=3, steps=6, gamma=0.25)
    args = replace(args, value_weight=0.0)
    train(replace(args, env=toy), progress=False)
    train(replace(args, env={**toy, "max_episode_steps": 2}), progress=False)
    plain, cut = seen
    # After the cut other facts follow.
    torch.testing.assert_close(cut[:2] - plain[:2], torch.tensor([[0.0, 0.0], [2.0, 2.0]]))


def test_probabilities_and_entropy_of_independent_coins() -> None:
    model = ActorCritic(3, 2, 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.actor[-1].bias.copy_(torch.tensor([0.4, -1.2]))  # type: ignore[union-attr, operator]
    seen = torch.tensor([[0.1, -0.3, 0.8]])
    p, q = model.actor(seen).sigmoid()[0].tolist()
    found, entropy = model.log_probability(seen, torch.tensor([[1.0, 0.0]]))
    assert found.item() == pytest.approx(math.log(p) + math.log(1 - q), rel=1e-5)
    wanted = -sum(x * math.log(x) + (1 - x) * math.log(1 - x) for x in (p, q)) / 2
    assert entropy.item() == pytest.approx(wanted, rel=1e-5)


def test_learns_the_toy() -> None:
    model = train(TOY, progress=False)
    env = gym.make("hiedit/Toy-v1", num_layers=4, num_edits=200)
    observation, _ = env.reset(seed=99)
    total, ended = 0.0, False
    while not ended:
        with torch.no_grad():
            chosen = (model.actor(torch.from_numpy(observation)[None])[0] > 0).numpy()
        observation, reward, ended, _, _ = env.step(chosen.astype(np.int8))
        total += float(reward)
    toy: Any = env.unwrapped
    assert total / 200 > 0.95 * toy.expected_reward("best")
    assert toy.expected_reward("best") > 5 * toy.expected_reward("random")


def test_same_seed_same_parameters() -> None:
    short = replace(TOY, steps=512)
    one, two = (train(short, progress=False).state_dict() for _ in range(2))
    other = train(replace(short, seed=1), progress=False).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_trained_policy_is_compared_like_any_agent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policy"
    sizes = {"num-envs": 2, "num-steps": 2, "minibatches": 2, "steps": 8, "hidden": 4}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    main(["--out", str(out), "--env", "model=tiny", "num_edits=2", *options])
    assert f"ppo:{out}" in capsys.readouterr().out
    record = json.loads((out / "agent.json").read_text())
    assert record["training"]["env"] == {"model": "tiny", "num_edits": 2}
    assert len((out / "train.jsonl").read_text().splitlines()) == 2
    settings = CompareSettings(model="tiny", num_edits=2, generation=())
    rows = compare(settings, [f"ppo:{out}"], [0], tmp_path / "table", progress=False).rows
    assert [row["agent"] for row in rows] == ["no-edit", f"ppo:{out}"]
    assert "was trained on 2 of the 2 facts" in capsys.readouterr().err
    agent = make_agent(f"ppo:{out}")
    assert agent.training_facts("tiny") == fact_hashes(load_requests("tiny-facts"))  # type: ignore[attr-defined]
    with pytest.raises(ResultsExistError, match="another --out"):
        train(SHORT, out)


def test_a_policy_refuses_other_spaces_and_folders(tmp_path: Path) -> None:
    train(SHORT, tmp_path / "policy", progress=False)
    agent = make_agent(f"ppo:{tmp_path / 'policy'}")
    assert hiedit_env.__version__
    with pytest.raises(CheckpointError, match=r"137 observed numbers and 6 layers.*\(7,\)"):
        agent.reset(gym.make("hiedit/Toy-v1"), 0)
    with pytest.raises(CheckpointError, match="holds no policy"):
        make_agent(f"ppo:{tmp_path}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"steps": 3}, "steps must be at least"),
        ({"minibatches": 500}, "minibatches"),
        ({"gamma": 1.5}, "gamma must be from 0 to 1, got 1.5"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0"),
        ({"clip": math.inf}, "clip"),
    ],
)
def test_rubbish_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Args(**settings)  # type: ignore[arg-type]


def test_other_actions_are_refused() -> None:
    with pytest.raises(SettingsError, match="LayerSelection"):
        train(replace(SHORT, env_id="hiedit/StepSize-v1"))
