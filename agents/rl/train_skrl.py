r"""PPO of skrl.

    python -m hiedit_agents.rl.train_skrl --out runs/skrl \
        --env model=planted dataset=planted-facts-train num_edits=30
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents skrl:runs/skrl random-layers oracle

N environments on one resident model are one Gymnasium vector environment, which skrl steps as it
is; its actions are shown as MultiDiscrete([2] * L), since skrl knows no MultiBinary. DIR then holds
what skrl writes (``training/`` with TensorBoard files and ``checkpoints/``, ``evaluation/`` with
TensorBoard files) and what hiedit reads (``agent.json``, ``agent.safetensors``). To go on
training, do as skrl does: ``agent.load("DIR/training/checkpoints/best_agent.pt")``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from hiedit_agents.policies import refuse_finished, save_policy
from hiedit_agents.policies.coins import as_multi_discrete
from hiedit_agents.policies.networks import describe
from hiedit_agents.rl.command import TrainingArguments, parse_arguments, refuse_missing, run_script
from hiedit_agents.rl.hyperparameters import check_names, names_of

try:
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, Model, MultiCategoricalMixin
    from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
    from skrl.utils import set_seed
except ImportError as error:
    refuse_missing("skrl", "skrl", __name__, error)

#: Arguments of ``PPO_CFG`` that differ from skrl's own.
SETTINGS: Mapping[str, Any] = {
    "rollouts": 16,
    "learning_epochs": 4,
    "mini_batches": 4,
    "discount_factor": 0.5,
    "learning_rate": 3e-3,
    "entropy_loss_scale": 0.01,
    "value_loss_scale": 0.5,
    "value_clip": 0.0,
}


class Actor(MultiCategoricalMixin, Model):
    """Two scores per layer, for leaving and for writing it."""

    def __init__(self, **spaces: Any) -> None:
        Model.__init__(self, **spaces)
        MultiCategoricalMixin.__init__(self)
        self.net = network(self.num_observations, 2 * len(self.action_space.nvec))

    def compute(self, inputs: Mapping[str, Tensor], role: str = "") -> tuple[Tensor, Any]:
        """N × observation to N × 2 L; the likeliest layers, N × L, are what skrl evaluates."""
        scores = self.net(inputs["observations"])
        return scores, {"mean_actions": scores.unflatten(-1, (-1, 2)).argmax(-1)}


class Critic(DeterministicMixin, Model):
    """The value of an observation."""

    def __init__(self, **spaces: Any) -> None:
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = network(self.num_observations, 1)

    def compute(self, inputs: Mapping[str, Tensor], role: str = "") -> tuple[Tensor, Any]:
        """N × observation to N × 1."""
        return self.net(inputs["observations"]), {}


def network(inputs: int, outputs: int, hidden: int = 64) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    )


def train(args: TrainingArguments) -> PPO:
    """Trains a policy and saves it, skrl's way and ours.

    Args:
        args: What to train on, and how; ``args.evaluations`` above 0 for one at the end, since skrl
            has none in between.

    Raises:
        ResultsExistError: ``args.out`` holds a trained policy.
        SettingsError: an unknown name among ``args.settings``.
    """
    refuse_finished(args.out)
    check_names(args.settings, names_of(PPO_CFG, taken=("experiment",)))
    set_seed(args.seed)
    vector_env = args.task.make_vec(args.num_envs)
    envs = wrap_env(as_multi_discrete(vector_env), verbose=False)
    spaces = {
        "observation_space": envs.observation_space,
        "action_space": envs.action_space,
        "device": "cpu",
    }
    actor = Actor(**spaces)
    models = {"policy": actor, "value": Critic(**spaces)}
    settings = {**SETTINGS, **args.settings}
    memory = RandomMemory(memory_size=settings["rollouts"], num_envs=args.num_envs, device="cpu")
    timesteps = max(args.steps // args.num_envs, 1)
    experiment = {
        "directory": str(args.out),
        "experiment_name": "training",
        "write_interval": settings["rollouts"],
        "checkpoint_interval": max(timesteps // max(args.evaluations, 1), 1),
    }
    agent = PPO(
        models=models, memory=memory, cfg=PPO_CFG(experiment=experiment, **settings), **spaces
    )
    SequentialTrainer(env=envs, agents=agent, cfg=_trainer(timesteps)).train()
    results = {}
    if args.evaluations:
        others = args.task.make_vec(args.num_envs, **args.eval_env)
        results["evaluation"] = evaluate(models, others, args.out, args.seed + 1_000_000)
    policy, tensors = describe(actor.net, head="pairs")
    save_policy(
        args.out,
        library="skrl",
        algorithm=args.algorithm,
        task=args.task,
        sizes=args.task.sizes(vector_env),
        policy=policy,
        tensors=tensors,
        training={"steps": timesteps * args.num_envs, "seed": args.seed, "settings": settings}
        | results,
        packages=("skrl",),
    )
    vector_env.close()
    return agent


def evaluate(
    models: Mapping[str, Model], vector_env: VectorEnv[Any, Any, Any], out: Path, seed: int
) -> float:
    """One episode of every environment with the likeliest layers, by skrl's trainer.

    Args:
        models: ``policy`` and ``value``.
        vector_env: What to play.
        out: Folder in which ``evaluation/`` gets the TensorBoard files.
        seed: Of the environments.

    Returns:
        Mean reward per episode.
    """
    set_seed(seed)
    first: Any = vector_env.unwrapped
    one = first.envs[0].unwrapped
    facts = one.num_edits or len(one.requests)
    timesteps = -(-facts // one.episode.edits_per_step)
    envs = wrap_env(as_multi_discrete(vector_env), verbose=False)
    experiment = {
        "directory": str(out),
        "experiment_name": "evaluation",
        "write_interval": timesteps + 1,
        "checkpoint_interval": 0,
    }
    player = PPO(
        models=dict(models),
        cfg=PPO_CFG(experiment=experiment),
        observation_space=envs.observation_space,
        action_space=envs.action_space,
        device="cpu",
    )
    SequentialTrainer(env=envs, agents=player, cfg=_trainer(timesteps)).eval()
    mean = float(player.tracking_data["Reward / Total reward (mean)"][-1])
    player.write_tracking_data(timestep=timesteps, timesteps=timesteps)
    player.writer.close()
    vector_env.close()
    return mean


def _trainer(timesteps: int) -> SequentialTrainerCfg:
    return SequentialTrainerCfg(
        timesteps=timesteps,
        headless=True,
        disable_progressbar=None,
        close_environment_at_exit=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(
        arguments,
        program="python -m hiedit_agents.rl.train_skrl",
        description=__doc__,
        forms={"ppo": ("layers",)},
        steps={"ppo": 4096},
        num_envs={"ppo": 16},
    )
    train(args)
    print(f"trained policy: {args.out} (hiedit compare --agents skrl:{args.out})")


if __name__ == "__main__":
    sys.exit(run_script(main))
