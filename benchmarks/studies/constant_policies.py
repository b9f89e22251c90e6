"""How constant policies rank under versions 1 and 2.

Every subset of the candidate layers is written for every fact of a stream, in its own episode; all
episodes advance together. The policies are ranked by the reward of version 1 per fact, which counts
final terms; by the outcome of version 2 per fact, see :mod:`hiedit_benchmarks.worlds.headroom`; and
by what the edits are for: the mean of the metrics right after each edit. The reward of version 2 is
shown beside, but ranks nothing: summed over an episode it pays for the repair of what earlier edits
broke. Prints JSON::

    python -m hiedit_benchmarks.studies.constant_policies --model tiny --num-edits 24
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

import hiedit_env  # noqa: F401
from hiedit_agents.bandits.worlds import MOST_LAYERS, masks_of
from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.worlds.headroom import error_types, terms_before
from hiedit_env.envs.reward_weights import Version, default_weights
from hiedit_env.envs.settings import AtLeast1, Dataset, Name, settings
from hiedit_env.envs.vector import VectorEditing
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.info_metrics import METRICS

PROGRAM = "python -m hiedit_benchmarks.studies.constant_policies"
#: Metrics that say what an edit is for.
WANTED = ("efficacy", "generalization", "agreement", "recent_retention")


@settings
class Options:
    """What is played."""

    model: Name = "tiny"
    """a model with few candidate layers, such as tiny or planted"""
    dataset: Dataset | None = None
    """facts; by default those of the model"""
    num_edits: AtLeast1 = 24
    """facts per episode"""
    seeds: AtLeast1 = 2
    """streams, from seed 0 on"""
    top: AtLeast1 = 5
    """policies that are shown of each ranking"""


def play(given: Options, version: Version, seed: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """Episodes of all constant policies on one stream.

    Returns:
        The masks, and by name numbers of every policy: ``reward`` per fact, ``outcome`` per fact
        (version 2; of version 1 the reward), ``steps`` per fact, ``collapsed``, and every metric.

    Raises:
        SettingsError: more than 8 candidate layers.
    """
    arguments: dict[str, Any] = {
        "model": given.model, "dataset": given.dataset, "num_edits": given.num_edits
    }  # fmt: skip
    probe = gymnasium.make(f"hiedit/LayerSelection-v{version}", **arguments)
    count = probe.action_space.shape[0] if probe.action_space.shape else 0
    if count > MOST_LAYERS:
        raise SettingsError(
            f"{given.model!r} has {count} candidate layers, and all subsets of at most "
            f"{MOST_LAYERS} are played; choose fewer with --model or take another model"
        )
    masks = masks_of(count)
    envs = cast(
        VectorEditing[Any],
        gymnasium.make_vec(
            f"hiedit/LayerSelection-v{version}",
            len(masks),
            vectorization_mode="vector_entry_point",
            autoreset_mode="SameStep",
            **arguments,
        ),
    )
    envs.reset(seed=[seed] * len(masks))
    going = np.ones(len(masks), bool)
    reward, steps = np.zeros(len(masks)), np.zeros(len(masks))
    outcome, price = np.zeros(len(masks)), envs.envs[0].weights_of_terms["collapse"]
    sums = {name: np.zeros(len(masks)) for name in METRICS}
    known = {name: np.zeros(len(masks)) for name in METRICS}
    collapsed = np.zeros(len(masks), bool)
    for _ in range(given.num_edits):
        before = np.array([terms_before(env) for env in envs.envs])
        _, rewards, ended, _, info = envs.step(masks)
        kept = going & (error_types(info) == 0)
        outcome += np.where(kept, before + rewards, before[0] + rewards[0] - price)
        found = [_of(info, i) for i in range(len(masks))]
        for i in np.flatnonzero(going):
            reward[i] += rewards[i]
            steps[i] += found[i]["edit_steps"]
            collapsed[i] |= found[i]["error_type"] != 0
            for name in METRICS:
                value = found[i]["metrics"][name]
                if np.isfinite(value):
                    sums[name][i] += value
                    known[name][i] += 1
        going &= ~ended
    envs.close()
    metrics = {name: sums[name] / np.maximum(known[name], 1) for name in METRICS}
    edits = given.num_edits
    return masks, {
        "reward": reward / edits,
        "outcome": (outcome if version == 2 else reward) / edits,
        "steps": steps / edits,
        "collapsed": collapsed,
        **metrics,
    }


def _of(info: dict[str, Any], i: int) -> dict[str, Any]:
    """One environment's information; of an episode that ended, that of its last step."""
    if "final_info" in info and info["_final_info"][i]:
        info = info["final_info"]
    return {
        "edit_steps": info["edit_steps"][i],
        "error_type": info["error_type"][i],
        "metrics": {name: info["metrics"][name][i] for name in METRICS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays all constant policies and prints their rankings as JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    runs: dict[Version, dict[str, Any]] = {}
    masks = np.zeros((0, 0), np.int8)
    for version in cast(tuple[Version, ...], (1, 2)):
        played = [play(given, version, seed) for seed in range(given.seeds)]
        masks = played[0][0]
        runs[version] = {n: np.mean([run[n] for _, run in played], 0) for n in played[0][1]}
    wanted = np.mean([runs[1][name] for name in WANTED], 0)
    # By what policies are ranked.
    ranked = {"v1": runs[1]["reward"], "outcome_v2": runs[2]["outcome"]}
    names = ["".join(map(str, mask)) for mask in masks]

    def row(i: int) -> dict[str, Any]:
        own = {name: round(float(runs[1][name][i]), 3) for name in WANTED}
        ranks = {
            f"rank_{name}": int(1 + (worth > worth[i]).sum()) for name, worth in ranked.items()
        }
        shown = {name: round(float(worth[i]), 3) for name, worth in ranked.items()}
        shown["reward_v2"] = round(float(runs[2]["reward"][i]), 3)
        return {"layers": names[i], **shown, **ranks, "metrics": round(float(wanted[i]), 3), **own}

    shown = {
        f"best_{name}": [row(int(i)) for i in np.argsort(-worth)[: given.top]]
        for name, worth in ranked.items()
    }
    result = {
        "model": given.model,
        "policies": len(masks),
        "facts": given.num_edits,
        "seeds": given.seeds,
        **shown,
        "nothing": row(0),
        "all_layers": row(len(masks) - 1),
        # To die with the first step: what an episode would earn for each of its facts.
        "collapse_at_once": {
            "v1": -default_weights(1)["collapse"] / given.num_edits,
            "outcome_v2": float(runs[2]["outcome"][0]) - default_weights(2)["collapse"],
        },
        "spearman_with_metrics": {
            name: float(stats.spearmanr(worth, wanted).statistic) for name, worth in ranked.items()
        },
        "spearman_v1_outcome_v2": float(stats.spearmanr(*ranked.values()).statistic),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
