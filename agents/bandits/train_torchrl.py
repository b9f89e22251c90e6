"""Discrete conservative Q-learning of TorchRL on a recording, without an environment.

    hiedit record --model planted --dataset planted-facts-train --out runs/recorded
    python -m hiedit_agents.bandits.train_torchrl --recording runs/recorded

A fact is an episode of one step, the M recorded options are the actions, and since each was tried
on every fact, each is a transition. The last quarter of the recorded episodes is held out: the
policy, the best fixed option of the training part and the best option per fact are scored on it,
from the recorded rewards. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiedit_agents.bandits.recording import Recording
from hiedit_agents.bandits.recording_files import read_recording
from hiedit_agents.command_line import parse, run_script
from hiedit_env.envs.settings import AtLeast1, Positive, settings
from hiedit_env.errors import MissingLibraryError, SettingsError

PROGRAM = "python -m hiedit_agents.bandits.train_torchrl"


@settings
class Options:
    """What is learned from, and how."""

    recording: Path
    """folder that hiedit record wrote, with at least two episodes"""
    steps: AtLeast1 = 1000
    """gradient steps"""
    batch_size: AtLeast1 = 128
    """transitions of a step"""
    lr: Positive = 1e-3
    """learning rate of Adam"""
    seed: int = 0
    """of the network and the batches"""


def split(recording: Recording) -> tuple[Recording, Recording]:
    """The training part and the last quarter of the episodes, at least one.

    Raises:
        SettingsError: fewer than two episodes.
    """
    count = len(recording.seeds)
    if count < 2:
        raise SettingsError(
            f"the recording has {count} episode, and one is held out; record at least 2 episodes"
        )
    first = count - max(1, count // 4)
    return recording.part(range(first)), recording.part(range(first, count))


def scores(train: Recording, test: Recording, chosen: Any) -> dict[str, float]:
    """Mean rewards on held-out facts.

    Args:
        train: Where the best fixed option is found.
        test: Held out.
        chosen: Index of the policy's option on every held-out fact.
    """
    return {
        "policy": float(test.rewards[np.arange(len(test)), chosen].mean()),
        "random": float(test.rewards.mean()),
        "fixed": float(test.rewards[:, train.rewards.mean(0).argmax()].mean()),
        "best_per_fact": float(test.rewards.max(1).mean()),
    }


def learn(given: Options, train: Recording) -> Any:
    """Trains a Q-network; returns a function from observations to indices of options.

    Raises:
        MissingLibraryError: TorchRL is not installed.
    """
    try:
        from tensordict import TensorDict
        from torchrl.modules import MLP, QValueActor
        from torchrl.objectives import DiscreteCQLLoss
    except ImportError as error:
        raise MissingLibraryError("torchrl", "torchrl") from error
    count, options = train.rewards.shape
    seen = torch.from_numpy(train.observations)
    mean, scale = seen.mean(0), seen.std(0).clamp_min(1e-6)
    worth = torch.from_numpy(train.rewards).float()
    centre, spread = worth.mean(), worth.std().clamp_min(1e-6)
    facts = torch.arange(count).repeat_interleave(options)
    actions = torch.arange(options).repeat(count)
    features = ((seen - mean) / scale)[facts]
    ended = torch.ones(len(facts), 1, dtype=torch.bool)
    following = TensorDict(
        {
            "observation": features,
            "reward": ((worth - centre) / spread).reshape(-1, 1),
            "done": ended,
            "terminated": ended,
        },
        [len(facts)],
    )
    data = TensorDict({"observation": features, "action": actions, "next": following}, [len(facts)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        network = MLP(in_features=seen.shape[1], out_features=options, num_cells=[64, 64])
    actor = QValueActor(network, in_keys=["observation"], action_space="categorical")
    loss = DiscreteCQLLoss(actor, action_space="categorical", delay_value=False)
    loss.make_value_estimator(gamma=0.0)
    optimiser = torch.optim.Adam(loss.parameters(), given.lr)
    generator = torch.Generator().manual_seed(given.seed)
    for _ in range(given.steps):
        # All transitions are in memory and of equal weight: no replay buffer is needed.
        rows = torch.randint(len(facts), (given.batch_size,), generator=generator)
        found = loss(data[rows])
        total = found["loss_qvalue"] + found["loss_cql"]
        optimiser.zero_grad()
        total.backward()
        optimiser.step()

    def choose(observations: Any) -> Any:
        with torch.no_grad():
            table = network((torch.from_numpy(observations) - mean) / scale)
        return table.argmax(-1).numpy()

    return choose


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, scores on held-out episodes and prints JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    recording = read_recording(given.recording)
    train, test = split(recording)
    choose = learn(given, train)
    result = {
        "algorithm": "discrete CQL (TorchRL)",
        "model": recording.origin.model,
        "options": len(recording.masks),
        "facts": {"training": len(train), "held_out": len(test)},
        "rewards": scores(train, test, choose(test.observations)),
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
