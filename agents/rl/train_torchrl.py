r"""PPO of TorchRL.

    python -m hiedit_agents.rl.train_torchrl --out runs/torchrl \
        --env model=planted dataset=planted-facts-train num_edits=30
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents torchrl:runs/torchrl random-layers oracle

N environments on one resident model are one Gymnasium vector environment with autoreset disabled,
whose masked resets TorchRL's ``GymWrapper`` makes by itself. DIR then holds what TorchRL writes
(``training/`` with the scalars of its ``CSVLogger``; ``actor.pt``, ``critic.pt`` and the best
evaluated ``best_actor.pt``, state dicts of its modules) and what hiedit reads (``agent.json``,
``agent.safetensors``). To go on training, do as TorchRL does:
``actor.load_state_dict(torch.load("DIR/actor.pt"))``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from hiedit_agents.policies import refuse_finished, save_policy
from hiedit_agents.policies.coins import LayerCoins
from hiedit_agents.policies.networks import describe
from hiedit_agents.rl.command import TrainingArguments, parse_arguments, refuse_missing, run_script
from hiedit_agents.rl.hyperparameters import replaced

try:
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector, Evaluator
    from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
    from torchrl.envs import EnvBase, GymWrapper, RewardSum, TransformedEnv
    from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE
    from torchrl.record import CSVLogger
except ImportError as error:
    refuse_missing("torchrl", "torchrl", __name__, error)

#: What ``--set`` can change.
SETTINGS: Mapping[str, Any] = {
    "rollout": 16,  # facts of every environment between two updates
    "epochs": 4,
    "batch_size": 64,
    "lr": 3e-3,
    "gamma": 0.5,
    "lmbda": 0.95,
    "clip_epsilon": 0.2,
    "entropy_coeff": 0.01,
    "critic_coeff": 0.5,
    "max_grad_norm": 0.5,
    "num_cells": [64, 64],
}


def train(args: TrainingArguments) -> ProbabilisticActor:
    """Trains a policy and saves it, TorchRL's way and ours.

    Args:
        args: What to train on, and how.

    Raises:
        ResultsExistError: ``args.out`` holds a trained policy.
        SettingsError: an unknown name among ``args.settings``.
    """
    refuse_finished(args.out)
    settings = replaced(SETTINGS, args.settings)
    torch.manual_seed(args.seed)
    vector_env = args.task.make_vec(args.num_envs, autoreset_mode=AutoresetMode.DISABLED)
    envs = _wrapped(vector_env, args.seed)
    sizes = args.task.sizes(vector_env)

    def network(outputs: int) -> MLP:
        return MLP(
            in_features=sizes.observation,
            out_features=outputs,
            num_cells=settings["num_cells"],
            activation_class=nn.Tanh,
        )

    logits = TensorDictModule(network(sizes.layers), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(
        logits, in_keys=["logits"], distribution_class=LayerCoins, return_log_prob=True
    )
    critic = ValueOperator(network(1), in_keys=["observation"])
    frames = settings["rollout"] * args.num_envs
    updates = max(args.steps // frames, 1)
    collector = Collector(
        envs,
        actor,
        frames_per_batch=frames,
        total_frames=updates * frames,
        auto_register_policy_transforms=False,
    )
    advantage = GAE(
        gamma=settings["gamma"], lmbda=settings["lmbda"], value_network=critic, average_gae=True
    )
    loss_of = ClipPPOLoss(
        actor,
        critic,
        **{name: settings[name] for name in ("clip_epsilon", "entropy_coeff", "critic_coeff")},
    )
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=settings["lr"])
    batches = ReplayBuffer(
        storage=LazyTensorStorage(frames),
        sampler=SamplerWithoutReplacement(),
        batch_size=settings["batch_size"],
    )
    logger = CSVLogger("training", log_dir=str(args.out))
    evaluator, best, results = None, -math.inf, []
    if args.evaluations:
        others = args.task.make_vec(
            args.num_envs, autoreset_mode=AutoresetMode.DISABLED, **args.eval_env
        )
        evaluator = Evaluator(
            _wrapped(others, args.seed + 1_000_000),
            actor,
            num_trajectories=args.num_envs,
            frames_per_batch=frames,
            collector_kwargs={"traj_format": "cat", "auto_register_policy_transforms": False},
        )
    every = max(updates // max(args.evaluations, 1), 1)
    for update, collected in enumerate(collector, 1):
        for _ in range(settings["epochs"]):
            with torch.no_grad():
                advantage(collected)
            batches.empty()
            batches.extend(collected.reshape(-1))
            for batch in batches:
                losses = loss_of(batch)
                loss = sum(value for name, value in losses.items() if name.startswith("loss_"))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(loss_of.parameters(), settings["max_grad_norm"])
                optimizer.step()
        collector.update_policy_weights_()
        steps = update * frames
        logger.log_scalar("reward", float(collected["next", "reward"].mean()), steps)
        returns = collected["next", "episode_reward"][collected["next", "done"]]
        if len(returns):
            logger.log_scalar("episode_reward", float(returns.mean()), steps)
        if evaluator is not None and update % every == 0:
            found = float(evaluator.evaluate(step=steps)["eval/reward"])
            logger.log_scalar("eval_episode_reward", found, steps)
            results.append({"steps": steps, "episode_reward": found})
            if found > best:
                best = found
                torch.save(actor.state_dict(), args.out / "best_actor.pt")
    collector.shutdown()
    if evaluator is not None:
        evaluator.shutdown()
    torch.save(actor.state_dict(), args.out / "actor.pt")
    torch.save(critic.state_dict(), args.out / "critic.pt")
    policy, tensors = describe(logits.module, head="coins")
    save_policy(
        args.out,
        library="torchrl",
        algorithm=args.algorithm,
        task=args.task,
        sizes=sizes,
        policy=policy,
        tensors=tensors,
        training={
            "steps": updates * frames,
            "seed": args.seed,
            "settings": settings,
            "evaluations": results,
        },
        packages=("torchrl",),
    )
    return actor


def _wrapped(vector_env: Any, seed: int) -> EnvBase:
    """Environments as a TorchRL environment with the reward of the episode so far."""
    envs = TransformedEnv(GymWrapper(vector_env), RewardSum())
    envs.set_seed(seed)
    return envs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(
        arguments,
        program="python -m hiedit_agents.rl.train_torchrl",
        description=__doc__,
        forms={"ppo": ("layers",)},
        steps={"ppo": 4096},
        num_envs={"ppo": 16},
    )
    train(args)
    print(f"trained policy: {args.out} (hiedit compare --agents torchrl:{args.out})")


if __name__ == "__main__":
    sys.exit(run_script(main))
