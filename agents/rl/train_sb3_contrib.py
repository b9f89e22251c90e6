r"""Algorithms of sb3-contrib: MaskablePPO, TQC and RecurrentPPO.

    python -m hiedit_agents.rl.train_sb3_contrib --algorithm maskable-ppo --out runs/maskable \
        --env model=planted dataset=planted-facts-train num_edits=30
    hiedit compare --model planted --dataset planted-facts-test --num-edits 20 --out table \
        --agents sb3-contrib:runs/maskable random-layers

MaskablePPO picks one layer after another under ``action_masks()``, TQC chooses step sizes,
RecurrentPPO chooses layers and remembers the facts before. Everything else is as in
:mod:`hiedit_agents.rl.train_sb3`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gymnasium import spaces

from hiedit_agents.policies import PolicyAgent, Task
from hiedit_agents.rl.command import refuse_missing, run_script

try:
    from sb3_contrib import TQC, MaskablePPO, RecurrentPPO
    from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from stable_baselines3.common.base_class import BaseAlgorithm

    from hiedit_agents.rl import train_sb3 as sb3
    from hiedit_agents.rl.train_sb3 import Algorithm
except ImportError as error:
    refuse_missing("sb3-contrib", "sb3-contrib", __name__, error)


class LstmPolicy(RecurrentActorCriticPolicy):
    """The library's ``MlpLstmPolicy`` for masks, which its buffer keeps as integers."""

    def evaluate_actions(self, obs: Any, actions: Any, *rest: Any, **named: Any) -> Any:
        """As there; log-probabilities of coins need floats."""
        if isinstance(self.action_space, spaces.MultiBinary):
            actions = actions.float()
        return super().evaluate_actions(obs, actions, *rest, **named)


ALGORITHMS: Mapping[str, Algorithm] = {
    "maskable-ppo": Algorithm(
        MaskablePPO,
        ("sequential", "discrete"),
        steps=8192,
        num_envs=16,
        settings={
            "n_steps": 64,
            "batch_size": 128,
            "gamma": 0.9,
            "learning_rate": 1e-3,
            "ent_coef": 0.01,
        },
        masks=True,
        evaluation=MaskableEvalCallback,
    ),
    "tqc": Algorithm(
        TQC,
        ("step-sizes", "box"),
        steps=2048,
        num_envs=32,
        settings=sb3.ALGORITHMS["sac"].settings,
    ),
    "recurrent-ppo": Algorithm(
        RecurrentPPO,
        ("layers", "box", "discrete"),
        steps=4096,
        num_envs=16,
        settings=sb3.ALGORITHMS["ppo"].settings,
        policy=LstmPolicy,
    ),
}
_OURS = (ALGORITHMS, "sb3-contrib")
_PACKAGES = ("stable_baselines3", "sb3_contrib")


def save(
    model: BaseAlgorithm,
    task: Task,
    out: Path | str,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Keeps a policy for ``hiedit compare --agents sb3-contrib:DIR``; see ``train_sb3.save``.

    Args:
        model: Trained on environments of ``task``.
        task: What it was trained on.
        out: The folder.
        training: What else to record, plain JSON.

    Raises:
        ResultsExistError: ``out`` holds a policy.
        SettingsError: as there.
    """
    table, library = _OURS
    sb3.save(
        model,
        task,
        out,
        training=training,
        algorithms=table,
        library=library,
        packages=_PACKAGES,
    )


def load(folder: Path) -> PolicyAgent:
    """The agent ``sb3-contrib:DIR``; see :func:`hiedit_agents.rl.train_sb3.load`."""
    return sb3.load(folder, *_OURS)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    sb3.main(arguments, *_OURS, __doc__, _PACKAGES)


if __name__ == "__main__":
    sys.exit(run_script(main))
