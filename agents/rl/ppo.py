r"""Proximal policy optimisation over layer sets, in one file, read from top to bottom.

    python -m hiedit_agents.rl.ppo --out runs/ppo \
        --env model=planted dataset=planted-facts-train num_edits=20
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents ppo:runs/ppo random-layers

Each layer is chosen by an independent coin whose probability the policy gives: PPO (arXiv
1707.06347) with clipped ratios, generalised advantages (arXiv 1506.02438), an entropy bonus and a
linear schedule. One environment step is one fact, so γ looks ahead over facts. N environments are
trained on at once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import pydantic
import torch
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn
from tqdm import tqdm

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.command_line import parse
from hiedit_agents.policies import (
    FunctionPolicy,
    PolicyAgent,
    Task,
    read_policy,
    refuse_finished,
    save_policy,
)
from hiedit_agents.policies.networks import ChainPolicy, describe
from hiedit_agents.policies.task import Sizes
from hiedit_agents.rl.command import Pairs, pairs_of, run_script
from hiedit_env.envs.settings import settings
from hiedit_env.errors import SettingsError, as_float, shown
from hiedit_env.files import write_bytes

LOG_FILE = "train.jsonl"


#: Given as name=value on the command line.
Environment = Annotated[dict[str, Any], tyro.conf.Suppress, tyro.conf.Fixed]


@settings
class Args:
    """What can be set; every field is an option of the command line."""

    env_id: str = "hiedit/LayerSelection-v1"
    """environment whose actions are MultiBinary(L)"""
    env: Environment = pydantic.Field(default_factory=dict)
    """its keyword arguments, as name=value"""
    num_envs: int = 8
    """environments that are trained on at once"""
    steps: int = 20_000
    """facts seen in all, over all environments"""
    num_steps: int = 16
    """facts of every environment between two updates"""
    learning_rate: float = 3e-3
    """of Adam, falling linearly to 0"""
    gamma: float = 0.5
    """discount per fact"""
    gae_lambda: float = 0.95
    """λ of the generalised advantage estimate"""
    epochs: int = 4
    """passes over the collected facts per update"""
    minibatches: int = 4
    """parts the collected facts are split into"""
    clip: float = 0.2
    """how far from 1 the ratio of probabilities is followed"""
    entropy_weight: float = 0.01
    """weight of the entropy bonus, per layer"""
    value_weight: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """norm that gradients are clipped to"""
    hidden: int = 64
    """units in each of the two hidden layers"""
    seed: int = 0
    """of initial values, streams, samples and minibatches"""

    @property
    def task(self) -> Task:
        """What the policy is trained on, as the folder records it."""
        return Task("layers", {"id": self.env_id, **self.env})

    def __post_init__(self) -> None:
        for name in ("num_envs", "steps", "num_steps", "epochs", "minibatches", "hidden"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be ≥ 1, got {getattr(self, name)!r}")
        if self.steps < self.num_envs * self.num_steps:
            raise SettingsError(
                f"steps must be at least num_envs × num_steps = "
                f"{self.num_envs * self.num_steps}, got {self.steps}"
            )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")
        for name in ("learning_rate", "clip", "max_grad_norm"):
            value = getattr(self, name)
            if not 0 < as_float(value) < math.inf:
                raise SettingsError(f"{name} must be a number > 0, got {shown(value)}")
        if self.num_envs * self.num_steps < self.minibatches:
            raise SettingsError("there are more minibatches than facts collected per update")


class ActorCritic(nn.Module):
    """Policy and value over one observation vector.

    Args:
        size: Numbers in an observation.
        num_layers: L.
        hidden: Units per hidden layer.
        generator: Draws the initial values (orthogonal); the policy begins at even odds.
    """

    def __init__(self, size: int, num_layers: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
            # Not initialised by torch, which would draw from its global generator.
            layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
            nn.init.zeros_(layer.bias)
            return layer

        def body(outputs: int, gain: float) -> nn.Sequential:
            return nn.Sequential(
                linear(size, hidden, math.sqrt(2)),
                nn.Tanh(),
                linear(hidden, hidden, math.sqrt(2)),
                nn.Tanh(),
                linear(hidden, outputs, gain),
            )

        self.actor, self.critic = body(num_layers, 0.01), body(1, 1.0)

    def value(self, observations: Tensor) -> Tensor:
        """N × size to N."""
        values: Tensor = self.critic(observations)[:, 0]
        return values

    def log_probability(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Of N × L choices (0 or 1), summed over layers; and the entropy, mean over layers: N."""
        logits = self.actor(observations)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, actions, reduction="none")
        # Of a coin: (1 − p) z − log p.
        entropy = logits * (1 - logits.sigmoid()) - nn.functional.logsigmoid(logits)
        return -losses.sum(1), entropy.mean(1)


def make_envs(args: Args) -> VectorEnv[Any, Any, Any]:
    """N environments; one resident model for all of them where the id has a vector form."""
    if gym.spec(args.env_id).vector_entry_point is not None:
        return gym.make_vec(
            args.env_id,
            args.num_envs,
            vectorization_mode="vector_entry_point",
            autoreset_mode=AutoresetMode.SAME_STEP,
            **args.env,
        )
    settings = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gym.make_vec(
        args.env_id, args.num_envs, vectorization_mode="sync", vector_kwargs=settings, **args.env
    )


def estimate(
    rewards: Tensor, values: Tensor, ends: Tensor, last: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantages A_t = δ_t + γ λ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t.

    Args:
        rewards: T × N.
        values: T × N, V_t.
        ends: T × N, 1 where an environment ended with the fact: nothing is looked ahead over it.
        last: N, value of what follows.
        gamma: Discount.
        gae_lambda: λ.
    """
    advantages, advantage, following = torch.zeros_like(rewards), torch.zeros_like(last), last
    for t in reversed(range(len(rewards))):
        going = 1 - ends[t]
        delta = rewards[t] + gamma * following * going - values[t]
        advantage = delta + gamma * gae_lambda * going * advantage
        advantages[t], following = advantage, values[t]
    return advantages


def train(args: Args, out: Path | None = None, *, progress: bool = True) -> ActorCritic:
    """Trains a policy, and saves it with its log.

    Args:
        args: Settings.
        out: Folder for policy and log; None keeps both in memory only.
        progress: Whether to show a bar with the mean reward per fact.

    Raises:
        ResultsExistError: ``out`` holds a trained agent.
        SettingsError: an environment whose actions are not MultiBinary.
    """
    if out is not None:
        refuse_finished(out)
    envs = make_envs(args)
    if not isinstance(envs.single_action_space, gym.spaces.MultiBinary):
        raise SettingsError(
            f"{args.env_id} has actions {envs.single_action_space}; this PPO chooses layers, as in "
            "hiedit/LayerSelection-v1"
        )
    sizes = args.task.sizes(envs)
    size, num_layers = sizes.observation, sizes.layers
    generator = torch.Generator().manual_seed(args.seed)
    model = ActorCritic(size, num_layers, args.hidden, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, eps=1e-5)

    rows: list[dict[str, float]] = []
    updates = args.steps // (args.num_envs * args.num_steps)
    shape = (args.num_steps, args.num_envs)
    observations, actions = torch.zeros(*shape, size), torch.zeros(*shape, num_layers)
    log_probabilities, rewards, ends, values = (torch.zeros(shape) for _ in range(4))
    observation = torch.from_numpy(envs.reset(seed=args.seed)[0])
    with tqdm(total=updates, desc="ppo", disable=not progress) as bar:
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)

            # Collect: one action per environment and fact.
            for t in range(args.num_steps):
                with torch.no_grad():
                    odds = model.actor(observation).sigmoid()
                    action = (torch.rand(odds.shape, generator=generator) < odds).float()
                    log_probabilities[t], _ = model.log_probability(observation, action)
                    values[t] = model.value(observation)
                observations[t], actions[t] = observation, action
                found, reward, terminated, truncated, info = envs.step(
                    action.numpy().astype(np.int8)
                )
                rewards[t] = torch.from_numpy(reward)
                cut = truncated & ~terminated
                if cut.any():
                    # Nothing has ended but the counting: what would have followed is looked at.
                    ahead = model.value(torch.from_numpy(np.stack(info["final_obs"][cut])))
                    rewards[t, torch.from_numpy(cut)] += args.gamma * ahead.detach()
                ends[t] = torch.from_numpy(terminated | truncated)
                observation = torch.from_numpy(found)

            with torch.no_grad():
                last = model.value(observation)
            advantages = estimate(rewards, values, ends, last, args.gamma, args.gae_lambda)
            targets = advantages + values

            # Improve: several epochs over shuffled minibatches.
            flat = [x.flatten(0, 1) for x in (observations, actions, log_probabilities)]
            flat += [advantages.flatten(), targets.flatten()]
            for _ in range(args.epochs):
                order = torch.randperm(len(flat[0]), generator=generator)
                for part in order.chunk(args.minibatches):
                    seen, chosen, before, gain, target = (x[part] for x in flat)
                    log_probability, entropy = model.log_probability(seen, chosen)
                    ratio = (log_probability - before).exp()
                    gain = (gain - gain.mean()) / (gain.std(correction=0) + 1e-8)
                    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                    policy_loss = -torch.min(ratio * gain, clipped * gain).mean()
                    value_loss = 0.5 * (model.value(seen) - target).square().mean()
                    loss = policy_loss + args.value_weight * value_loss
                    loss = loss - args.entropy_weight * entropy.mean()
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()

            # reward: mean per fact. layers: mean number chosen. entropy: in nats per layer, of the
            # last minibatch. value_loss: likewise.
            rows.append(
                {
                    "steps": float((update + 1) * args.num_envs * args.num_steps),
                    "reward": float(rewards.mean()),
                    "layers": float(actions.sum(2).mean()),
                    "entropy": float(entropy.mean().detach()),
                    "value_loss": float(value_loss.detach()),
                }
            )
            bar.set_postfix_str(f"reward {rows[-1]['reward']:.3f}", refresh=False)
            bar.update()
    envs.close()
    if out is not None:
        save(model, args, sizes, rows, out)
    return model


# -- files and use --------------------------------------------------------------------------------


def save(
    model: ActorCritic, args: Args, sizes: Sizes, rows: Sequence[Mapping[str, float]], out: Path
) -> None:
    """Writes the log, and the policy as :mod:`hiedit_agents.policies` keeps those of libraries."""
    out.mkdir(parents=True, exist_ok=True)
    log = "".join(json.dumps(dict(row)) + "\n" for row in rows)
    write_bytes(out / LOG_FILE, log.encode())
    policy, tensors = describe(model.actor, head="coins")
    save_policy(
        out,
        library="ppo",
        algorithm="PPO",
        task=args.task,
        sizes=sizes,
        policy=policy,
        tensors=tensors,
        training={**asdict(args), "env": dict(args.env)},
    )


def load(folder: Path) -> PolicyAgent:
    """A trained policy as an agent: a layer is written where its coin shows it more often than not.

    Raises:
        CheckpointError: the folder holds no policy of this script.
    """
    record = read_policy(folder, "ppo")
    return PolicyAgent(record, FunctionPolicy(ChainPolicy(record)))


@settings
class Command:
    """The options of the command line."""

    out: Path
    """folder of the policy"""
    env: Pairs = ()
    """keyword arguments of the environment"""
    training: Args = Args()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    program = "python -m hiedit_agents.rl.ppo"
    given = parse(Command, arguments, program=program, description=__doc__)
    train(replace(given.training, env=pairs_of(given.env, "--env")), given.out)
    print(f"trained policy: {given.out} (hiedit compare --agents ppo:{given.out})")


if __name__ == "__main__":
    sys.exit(run_script(main))
