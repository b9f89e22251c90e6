r"""PPO of Tianshou.

    python -m hiedit_agents.rl.train_tianshou --out runs/tianshou \
        --env model=planted dataset=planted-facts-train num_edits=30
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents tianshou:runs/tianshou random-layers oracle

N environments on one resident model are one of Tianshou's vector environments
(:class:`EditingVectorEnv`). DIR then holds what Tianshou writes (TensorBoard files; ``last.pth``
and the best evaluated ``best.pth``, state dicts of its algorithm) and what hiedit reads
(``agent.json``, ``agent.safetensors``). To go
on training, do as Tianshou does: ``algorithm.load_state_dict(torch.load("DIR/last.pth"))``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import nn

from hiedit_agents.policies import refuse_finished, save_policy
from hiedit_agents.policies.coins import LayerCoins
from hiedit_agents.policies.networks import describe
from hiedit_agents.rl.command import TrainingArguments, parse_arguments, refuse_missing, run_script
from hiedit_agents.rl.hyperparameters import replaced
from hiedit_env.errors import SettingsError

try:
    from tianshou.algorithm import PPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import BaseVectorEnv
    from tianshou.env.worker import DummyEnvWorker
    from tianshou.trainer import OnPolicyTrainerParams
    from tianshou.utils import TensorboardLogger
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousCritic
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    refuse_missing("tianshou", "tianshou", __name__, error)

#: What ``--set`` can change.
SETTINGS: Mapping[str, Any] = {
    "rollout": 16,  # facts of every environment between two updates
    "epochs": 4,
    "batch_size": 64,
    "lr": 3e-3,
    "gamma": 0.5,
    "gae_lambda": 0.95,
    "eps_clip": 0.2,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "hidden_sizes": [64, 64],
}


class EditingVectorEnv(BaseVectorEnv):
    """Environments that share one resident model, as Tianshou's vector environment.

    Args:
        envs: The environments, with autoreset disabled; Tianshou resets those that have ended.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        inner: Any = envs.unwrapped
        super().__init__([_giving(one) for one in inner.envs], DummyEnvWorker)
        self.envs = envs

    def reset(
        self, env_id: int | Sequence[int] | NDArray[Any] | None = None, **kwargs: Any
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Begins new episodes in some environments.

        Args:
            env_id: Which; None for all.
            kwargs: ``seed``.
        """
        chosen = list(self._wrap_id(env_id))
        mask = np.isin(np.arange(self.env_num), chosen)
        observations, _ = self.envs.reset(options={"reset_mask": mask}, **kwargs)
        return observations[chosen], _infos(chosen)

    def step(
        self, action: Any, id: int | Sequence[int] | NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], ...]:
        """One step of every environment.

        Raises:
            SettingsError: not all environments are stepped.
        """
        chosen = list(self._wrap_id(id))
        if chosen != list(range(self.env_num)):
            raise SettingsError(
                f"the environments are stepped together, all {self.env_num} of them, got {chosen}; "
                "collect as many episodes as there are environments, or a number of steps"
            )
        observations, rewards, terminated, truncated, _ = self.envs.step(action)
        return observations, rewards, terminated, truncated, _infos(chosen)

    def seed(self, seed: int | list[int] | None = None) -> list[list[int] | None]:
        """Begins new episodes: of seed, seed + 1 and so on, or of a seed each."""
        # Gymnasium's vector environments take a list too, which their base class does not say.
        seeds: Any = seed
        self.envs.reset(seed=seeds)
        return [None] * self.env_num


def _giving(env: gym.Env[Any, Any]) -> Callable[[], gym.Env[Any, Any]]:
    return lambda: env


def _infos(vector_env: Sequence[int]) -> NDArray[Any]:
    return np.array([{"env_id": one} for one in vector_env])


def train(args: TrainingArguments) -> PPO:
    """Trains a policy and saves it, Tianshou's way and ours.

    Args:
        args: What to train on, and how; ``args.evaluations`` is the number of Tianshou's epochs, at
            the end of which it tests the policy, and before the first.

    Raises:
        ResultsExistError: ``args.out`` holds a trained policy.
        SettingsError: an unknown name among ``args.settings``.
    """
    refuse_finished(args.out)
    settings = replaced(SETTINGS, args.settings)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    vector_env = args.task.make_vec(args.num_envs, autoreset_mode=AutoresetMode.DISABLED)
    sizes = args.task.sizes(vector_env)
    shape = {"hidden_sizes": settings["hidden_sizes"], "activation": nn.Tanh}
    actor = Net(state_shape=(sizes.observation,), action_shape=sizes.layers, **shape)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=LayerCoins,
        deterministic_eval=True,
        action_space=vector_env.single_action_space,
        action_scaling=False,
        action_bound_method=None,
    )
    named = ("gamma", "gae_lambda", "eps_clip", "ent_coef", "vf_coef", "max_grad_norm")
    algorithm = PPO(
        policy=policy,
        critic=ContinuousCritic(preprocess_net=Net(state_shape=(sizes.observation,), **shape)),
        optim=AdamOptimizerFactory(lr=settings["lr"]),
        **{name: settings[name] for name in named},
    )
    frames = settings["rollout"] * args.num_envs
    epochs = max(args.evaluations, 1)
    test = {}
    if args.evaluations:
        others = args.task.make_vec(
            args.num_envs, autoreset_mode=AutoresetMode.DISABLED, **args.eval_env
        )
        test = {
            "test_collector": Collector(algorithm, _seeded(others, args.seed + 1_000_000)),
            "test_step_num_episodes": args.num_envs,
            "save_best_fn": lambda found: torch.save(found.state_dict(), args.out / "best.pth"),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    result = algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=Collector(
                algorithm, _seeded(vector_env, args.seed), VectorReplayBuffer(frames, args.num_envs)
            ),
            max_epochs=epochs,
            epoch_num_steps=max(args.steps // epochs, 1),
            collection_step_num_env_steps=frames,
            collection_step_num_episodes=None,
            update_step_num_repetitions=settings["epochs"],
            batch_size=settings["batch_size"],
            logger=TensorboardLogger(SummaryWriter(str(args.out))),
            verbose=False,
            show_progress=sys.stdout.isatty(),
            **test,
        )
    )
    torch.save(algorithm.state_dict(), args.out / "last.pth")
    described, tensors = describe(actor, head="coins")
    save_policy(
        args.out,
        library="tianshou",
        algorithm=args.algorithm,
        task=args.task,
        sizes=sizes,
        policy=described,
        tensors=tensors,
        training={"steps": int(result.train_step), "seed": args.seed, "settings": settings}
        | ({"best_episode_reward": float(result.best_reward)} if args.evaluations else {}),
        packages=("tianshou",),
    )
    return algorithm


def _seeded(envs: VectorEnv[Any, Any, Any], seed: int) -> EditingVectorEnv:
    vector_env = EditingVectorEnv(envs)
    vector_env.seed(seed)
    return vector_env


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(
        arguments,
        program="python -m hiedit_agents.rl.train_tianshou",
        description=__doc__,
        forms={"ppo": ("layers",)},
        steps={"ppo": 4096},
        num_envs={"ppo": 16},
    )
    train(args)
    print(f"trained policy: {args.out} (hiedit compare --agents tianshou:{args.out})")


if __name__ == "__main__":
    sys.exit(run_script(main))
