r"""PPO of Ray RLlib.

    python -m hiedit_agents.rl.train_rllib --out runs/rllib \
        --env model=planted dataset=planted-facts-train num_edits=30
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents rllib:runs/rllib random-layers oracle

RLlib's env runner makes N environments on one resident model (``gym_env_vectorize_mode=
"vector_entry_point"``) and shows their actions as MultiDiscrete([2] * L), since RLlib knows no
MultiBinary. Everything runs in this process; every further env runner (``num_env_runners``) would
hold a model of its own. DIR then holds what RLlib writes (``checkpoint/``, and its statistics of
every iteration in ``results.jsonl``) and what hiedit reads (``agent.json``,
``agent.safetensors``). To go on training, do as RLlib does:
``hiedit_agents.rl.train_rllib.register()``, then ``Algorithm.from_checkpoint("DIR/checkpoint")``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gymnasium.vector import AutoresetMode, VectorEnv

from hiedit_agents.policies import refuse_finished, save_policy
from hiedit_agents.policies.coins import as_multi_discrete
from hiedit_agents.policies.networks import describe
from hiedit_agents.policies.task import Task
from hiedit_agents.rl.command import TrainingArguments, parse_arguments, refuse_missing, run_script
from hiedit_agents.rl.hyperparameters import check_names, names_of
from hiedit_env.files import write_bytes

# Nothing here needs the network.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
    from ray.rllib.algorithms.ppo import PPO, PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.tune.registry import register_env
except ImportError as error:
    refuse_missing("ray[rllib]", "rllib", __name__, error)

#: The name that RLlib knows the environments by.
NAME = "hiedit"
#: Arguments of ``PPOConfig.training`` that differ from RLlib's own; the batch is of one
#: environment.
SETTINGS: Mapping[str, Any] = {
    "lr": 3e-3,
    "gamma": 0.5,
    "lambda_": 0.95,
    "num_epochs": 4,
    "minibatch_size": 64,
    "clip_param": 0.2,
    "entropy_coeff": 0.01,
    "vf_loss_coeff": 0.5,
    "vf_clip_param": float("inf"),
    "use_kl_loss": False,
    "grad_clip": 0.5,
}
#: Facts of every environment between two updates.
ROLLOUT = 16
#: What is kept of every iteration's statistics of episodes.
KEPT = ("episode_return_mean", "episode_return_min", "episode_return_max", "episode_len_mean")


def make_environments(context: Mapping[str, Any]) -> VectorEnv[Any, Any, Any]:
    """Environments as RLlib steps them.

    Args:
        context: ``task`` as :meth:`.task.Task.to_json` gives it, ``changes`` of the environment's
            arguments, and ``num_envs``.
    """
    task = Task.from_json(context["task"]).with_env(**context["changes"])
    # An env runner takes a step after an episode's end for the reset.
    return as_multi_discrete(
        task.make_vec(context["num_envs"], autoreset_mode=AutoresetMode.NEXT_STEP)
    )


def register() -> None:
    """Makes the environments known to RLlib by :data:`NAME`."""
    register_env(NAME, make_environments)


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray on this machine alone, without a dashboard, shut down at the end.

    A Ray that runs already is used and left running.
    """
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of ``PPOConfig.training``.

    Raises:
        SettingsError: there is no such argument as one of ``args.settings``.
    """
    check_names(args.settings, names_of(PPOConfig.training, AlgorithmConfig.training))
    batch = args.settings.get("train_batch_size_per_learner", ROLLOUT * args.num_envs)
    # RLlib refuses a minibatch that is larger than the batch.
    fitting = {
        "train_batch_size_per_learner": batch,
        "minibatch_size": min(SETTINGS["minibatch_size"], batch),
    }
    return {**SETTINGS, **fitting, **args.settings}


def configure(args: TrainingArguments) -> PPOConfig:
    """The algorithm's configuration: RLlib's, to be changed as RLlib says."""
    task = {"task": args.task.to_json()}
    iterations = max(args.steps // (ROLLOUT * args.num_envs), 1)
    return (
        PPOConfig()
        .environment(NAME, env_config={**task, "changes": {}})
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=args.num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=ROLLOUT,
        )
        .learners(num_learners=0)
        .rl_module(
            model_config=DefaultModelConfig(
                fcnet_hiddens=[64, 64], fcnet_activation="tanh", vf_share_layers=False
            )
        )
        .training(**hyperparameters(args))
        .evaluation(
            evaluation_interval=max(iterations // args.evaluations, 1)
            if args.evaluations
            else None,
            evaluation_num_env_runners=0,
            evaluation_duration=args.num_envs,
            evaluation_duration_unit="episodes",
            evaluation_config=PPOConfig.overrides(
                explore=False,
                seed=args.seed + 1_000_000,
                env_config={**task, "changes": dict(args.eval_env)},
            ),
        )
        .debugging(seed=args.seed, log_level="ERROR")
    )


def train(args: TrainingArguments) -> None:
    """Trains a policy and saves it, RLlib's way and ours.

    Args:
        args: What to train on, and how.

    Raises:
        ResultsExistError: ``args.out`` holds a trained policy.
        SettingsError: an unknown name among ``args.settings``.
    """
    refuse_finished(args.out)
    register()
    configuration = configure(args)
    rows: list[dict[str, float]] = []
    with local_ray():
        algorithm: PPO = configuration.build_algo()
        while not rows or rows[-1]["steps"] < args.steps:
            rows.append(_row(algorithm.train()))
        args.out.mkdir(parents=True, exist_ok=True)
        algorithm.save_to_path(str((args.out / "checkpoint").resolve()))
        module = algorithm.get_module()
        policy, tensors = describe(module.encoder.actor_encoder, module.pi, head="pairs")
        vector_env = algorithm.env_runner.env
        sizes = args.task.sizes(vector_env)
        algorithm.stop()
        # RLlib makes one in the home directory, which only Ray Tune would write to.
        shutil.rmtree(algorithm.logdir, ignore_errors=True)
    write_bytes(
        args.out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    save_policy(
        args.out,
        library="rllib",
        algorithm=args.algorithm,
        task=args.task,
        sizes=sizes,
        policy=policy,
        tensors=tensors,
        training={
            "steps": rows[-1]["steps"],
            "seed": args.seed,
            "settings": {k: v for k, v in hyperparameters(args).items() if v != float("inf")},
        },
        packages=("ray",),
    )


def _row(result: Mapping[str, Any]) -> dict[str, float]:
    """RLlib's own statistics of one iteration."""
    row = {"steps": float(result["num_env_steps_sampled_lifetime"])}
    found = {"": result["env_runners"]}
    if "evaluation" in result:
        found["evaluation_"] = result["evaluation"]["env_runners"]
    for prefix, statistics in found.items():
        row |= {
            prefix + name: float(statistics[name])
            for name in KEPT
            if statistics.get(name) == statistics.get(name) is not None
        }
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(
        arguments,
        program="python -m hiedit_agents.rl.train_rllib",
        description=__doc__,
        forms={"ppo": ("layers",)},
        steps={"ppo": 4096},
        num_envs={"ppo": 16},
    )
    train(args)
    print(f"trained policy: {args.out} (hiedit compare --agents rllib:{args.out})")


if __name__ == "__main__":
    sys.exit(run_script(main))
