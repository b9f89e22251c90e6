r"""Algorithms of Stable-Baselines3: PPO, A2C, DQN, SAC and TD3.

    python -m hiedit_agents.rl.train_sb3 --algorithm ppo --out runs/ppo \
        --env model=planted dataset=planted-facts-train num_edits=30
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents sb3:runs/ppo random-layers oracle

PPO and A2C choose layers, DQN picks one layer after another, SAC and TD3 choose step sizes; --form
makes other choices. DIR then holds what Stable-Baselines3 writes (``model.zip``,
``best_model.zip``, ``monitor.csv``, ``progress.csv``, ``evaluations.npz``) and what hiedit reads
(``agent.json``, ``agent.safetensors``). To go on training, do as Stable-Baselines3 does:
``PPO.load("DIR/model.zip", env=EditingVecEnv(task.make_vec(16)))``.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hiedit_agents.policies import PolicyAgent, Task, read_policy, refuse_finished, save_policy
from hiedit_agents.rl.command import TrainingArguments, parse_arguments, refuse_missing, run_script
from hiedit_agents.rl.hyperparameters import check_names, names_of
from hiedit_env.errors import CheckpointError, SettingsError

try:
    from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.policies import BasePolicy
    from stable_baselines3.common.vec_env import VecMonitor

    from hiedit_agents.rl.sb3_vec_env import EditingVecEnv
except ImportError as error:
    refuse_missing("stable-baselines3", "sb3", __name__, error)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How an algorithm is used here.

    Args:
        make: Its class.
        forms: The forms it can act in, the default first.
        steps: Default number of steps, over all environments.
        num_envs: Default number of environments.
        settings: Its arguments that differ from the library's own.
        policy: Its policy class, or the library's name of it.
        masks: Whether it asks for ``action_masks()``.
        noise: Standard deviation of the noise that explores, for algorithms that add it to actions.
        evaluation: The callback that evaluates it.
    """

    make: type[BaseAlgorithm]
    forms: tuple[str, ...]
    steps: int
    num_envs: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: str | type[BasePolicy] = "MlpPolicy"
    masks: bool = False
    noise: float = 0.0
    evaluation: type[EvalCallback] = EvalCallback


#: A short look ahead: a fact says little about the facts that follow. Many gradient steps, since
#: a step of the environment takes more time than they do.
_OFF_POLICY = {
    "gamma": 0.1,
    "learning_rate": 1e-3,
    "learning_starts": 512,
    "gradient_steps": 24,
    "policy_kwargs": {"net_arch": [64, 64]},
}

#: Arguments of an algorithm's class that the script gives, or makes no sense of.
_GIVEN = ("policy", "env", "seed", "device", "action_noise", "_init_setup_model")

ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm(
        PPO,
        ("layers", "box", "discrete", "step-sizes"),
        steps=4096,
        num_envs=16,
        settings={"n_steps": 16, "batch_size": 64, "gamma": 0.5, "learning_rate": 3e-3},
    ),
    "a2c": Algorithm(
        A2C,
        ("layers", "box", "discrete", "step-sizes"),
        steps=4096,
        num_envs=16,
        settings={"gamma": 0.5, "learning_rate": 3e-3},
    ),
    "dqn": Algorithm(
        DQN,
        ("sequential", "discrete"),
        steps=6144,
        num_envs=16,
        settings={
            **_OFF_POLICY,
            "gamma": 0.9,
            "learning_rate": 2e-3,
            "train_freq": 1,
            "gradient_steps": 8,
            # A fact takes several picks, and only the last one has a reward.
            "n_steps": 3,
            "target_update_interval": 256,
            "exploration_fraction": 0.5,
        },
    ),
    "sac": Algorithm(
        SAC,
        ("step-sizes", "box"),
        steps=2048,
        num_envs=32,
        settings={**_OFF_POLICY, "ent_coef": 0.05},
    ),
    "td3": Algorithm(
        TD3, ("step-sizes", "box"), steps=2048, num_envs=32, settings=_OFF_POLICY, noise=0.3
    ),
}


def train(
    args: TrainingArguments,
    algorithms: Mapping[str, Algorithm] = ALGORITHMS,
    library: str = "sb3",
    packages: Sequence[str] = ("stable_baselines3",),
) -> BaseAlgorithm:
    """Trains a policy and saves it, the library's way and ours.

    Args:
        args: What to train on, and how.
        algorithms: The table that ``args.algorithm`` is looked up in.
        library: Prefix of the policy in ``hiedit compare``.
        packages: Packages whose versions are recorded.

    Raises:
        ResultsExistError: ``args.out`` holds a trained policy.
        SettingsError: the algorithm has no such argument as one of ``args.settings``.
    """
    refuse_finished(args.out)
    how, task = algorithms[args.algorithm], args.task
    check_names(args.settings, names_of(how.make, taken=_GIVEN))
    if task.form == "sequential" and not how.masks:
        # The algorithm would pick layers twice; that stops the picking.
        task = replace(task, options={"allow_empty": True, "masked": "stop", **task.options})
    args.out.mkdir(parents=True, exist_ok=True)
    vector_env = VecMonitor(
        EditingVecEnv(task.make_vec(args.num_envs)), str(args.out / "monitor.csv")
    )
    settings = {**how.settings, **args.settings}
    noise: dict[str, Any] = {}
    if how.noise:
        count = task.sizes(vector_env.get_attr("unwrapped")[0]).layers
        noise["action_noise"] = NormalActionNoise(np.zeros(count), np.full(count, how.noise))
    # A copy: the library writes into policy_kwargs.
    model = how.make(
        how.policy, vector_env, seed=args.seed, device="cpu", **copy.deepcopy(settings), **noise
    )
    model.set_logger(configure(str(args.out), ["csv"]))
    callback = others = None
    if args.evaluations:
        # Environments of their own on a second model, perhaps on other facts.
        others = VecMonitor(EditingVecEnv(task.make_vec(args.num_envs, **args.eval_env)))
        others.seed(args.seed + 1_000_000)
        callback = how.evaluation(
            others,
            n_eval_episodes=args.num_envs,
            eval_freq=max(args.steps // (args.evaluations * args.num_envs), 1),
            log_path=str(args.out),
            best_model_save_path=str(args.out),
            verbose=0,
        )
    model.learn(args.steps, callback=callback)
    model.save(args.out / "model.zip")
    save(
        model,
        task,
        args.out,
        training={"seed": args.seed, "num_envs": args.num_envs, "settings": settings},
        algorithms=algorithms,
        library=library,
        packages=packages,
    )
    vector_env.close()
    if others is not None:
        others.close()
    model.logger.close()
    return model


def save(
    model: BaseAlgorithm,
    task: Task,
    out: Path | str,
    *,
    training: Mapping[str, Any] | None = None,
    algorithms: Mapping[str, Algorithm] = ALGORITHMS,
    library: str = "sb3",
    packages: Sequence[str] = ("stable_baselines3",),
) -> None:
    """Keeps a policy for ``hiedit compare --agents sb3:DIR``; works for models of your own code.

    Those of sb3-contrib have :func:`hiedit_agents.rl.train_sb3_contrib.save`.

    Args:
        model: Trained on environments of ``task``.
        task: What it was trained on.
        out: The folder.
        training: What else to record, plain JSON.
        algorithms: The table in which the model's class gives the algorithm's name.
        library: Prefix of the policy in ``hiedit compare``.
        packages: Packages whose versions are recorded.

    Raises:
        ResultsExistError: ``out`` holds a policy.
        SettingsError: a class of model that is not in the table, ``policy_kwargs`` that JSON
            cannot hold, such as classes, or VecNormalize.
    """
    names = [name for name, how in algorithms.items() if isinstance(model, how.make)]
    if not names:
        known = ", ".join(how.make.__name__ for how in algorithms.values())
        raise SettingsError(
            f"{library}:DIR plays models of {known}, not of {type(model).__name__}; "
            "train_sb3.save and train_sb3_contrib.save each keep those of their own library"
        )
    if model.get_vec_normalize_env() is not None:
        raise SettingsError(
            "the model sees observations through VecNormalize, which hiedit compare does not have; "
            "train without it: the environment's observations lie in [-1, 1]"
        )
    # How it was optimised does not matter to how it acts.
    ignored = {"use_sde", "optimizer_class", "optimizer_kwargs"}
    kwargs = {name: value for name, value in model.policy_kwargs.items() if name not in ignored}
    if model.use_sde:
        # Its networks are others, however they act.
        kwargs["use_sde"] = True
    try:
        json.dumps(kwargs)
    except TypeError as error:
        raise SettingsError(
            f"policy_kwargs must be plain JSON to be kept for hiedit compare, got {kwargs}"
        ) from error
    vector_env: Any = model.get_env()
    save_policy(
        Path(out),
        library=library,
        algorithm=names[0],
        task=task,
        sizes=task.sizes(vector_env.get_attr("unwrapped")[0]),
        policy={"kwargs": kwargs},
        tensors=model.policy.state_dict(),
        training={"steps": model.num_timesteps, **(training or {})},
        packages=packages,
    )


class Network:
    """A network of Stable-Baselines3 as it acts without exploring; recurrent ones remember.

    Args:
        network: Its policy.
        masks: Whether it takes masks.
    """

    def __init__(self, network: BasePolicy, masks: bool) -> None:
        self.network, self.masks = network, masks
        self.begin()

    def begin(self) -> None:
        """Forgets."""
        self._state: tuple[NDArray[Any], ...] | None = None
        self._first = True

    def __call__(self, observation: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> Any:
        """The most probable action, or the best one."""
        named: dict[str, Any] = {"action_masks": mask} if self.masks else {}
        action, self._state = self.network.predict(
            observation, self._state, np.array([self._first]), deterministic=True, **named
        )
        self._first = False
        return action


def load(
    folder: Path, algorithms: Mapping[str, Algorithm] = ALGORITHMS, library: str = "sb3"
) -> PolicyAgent:
    """The agent ``sb3:DIR``.

    Args:
        folder: What :func:`train` or :func:`save` wrote.
        algorithms: The table that the algorithm's name is looked up in.
        library: The prefix.

    Raises:
        CheckpointError: the folder holds no policy of the library, an algorithm that is not in the
            table, or tensors that do not fit.
    """
    record = read_policy(folder, library)
    how = algorithms.get(record.algorithm)
    if how is None:
        raise CheckpointError(
            f"{folder} was trained with {record.algorithm!r}; known are {', '.join(algorithms)}"
        )
    seen, acted = record.task.spaces(record.sizes)
    try:
        # Initial values, which are replaced, come from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            kind: Any = how.policy
            if isinstance(kind, str):
                kind = how.make.policy_aliases[kind]
            network = kind(seen, acted, lambda _: 0.0, **record.policy["kwargs"])
        network.load_state_dict(dict(record.tensors))
    except (RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"the policy in {folder} does not fit its settings: {error}"
        ) from error
    return PolicyAgent(record, Network(network, how.masks))


def main(
    arguments: Sequence[str] | None = None,
    algorithms: Mapping[str, Algorithm] = ALGORITHMS,
    library: str = "sb3",
    description: str | None = __doc__,
    packages: Sequence[str] = ("stable_baselines3",),
) -> None:
    """The command line."""
    args = parse_arguments(
        arguments,
        program=f"python -m hiedit_agents.rl.train_{library.replace('-', '_')}",
        description=description,
        forms={name: how.forms for name, how in algorithms.items()},
        steps={name: how.steps for name, how in algorithms.items()},
        num_envs={name: how.num_envs for name, how in algorithms.items()},
    )
    train(args, algorithms, library, packages)
    print(f"trained policy: {args.out} (hiedit compare --agents {library}:{args.out})")


if __name__ == "__main__":
    sys.exit(run_script(main))
