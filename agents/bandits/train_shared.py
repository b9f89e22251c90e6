"""Learns the shared router from recorded planted worlds, as an agent in a folder.

    python -m hiedit_agents.bandits.train_shared --difficulty pairs --out runs/shared
    hiedit compare --model planted:pairs:1000000 --agents runs/shared oracle --out table

Every set of layers is tried on each fact of a stream of every training world, and one network for
all layers learns from all of them. Prints as JSON what its choices earn on the recorded facts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiedit_agents.bandits.fixed_best import greedy_search, recorded_score
from hiedit_agents.bandits.full_information import LearnSettings, Pool, learn, pooled
from hiedit_agents.bandits.shared_agent import save_shared
from hiedit_agents.bandits.worlds import masks_of, record_world
from hiedit_agents.command_line import parse, run_script
from hiedit_agents.hierarchy.shared_router import SharedRouter
from hiedit_agents.named.checkpoints import fact_hashes, facts_entry
from hiedit_env.datasets.difficulty import WorldName, read_difficulty, world_seeds
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import ResultsExistError

PROGRAM = "python -m hiedit_agents.bandits.train_shared"


@settings
class Options:
    """From which worlds the router learns, and how."""

    out: Path
    """a new folder, for the agent"""
    difficulty: str = "pairs"
    """of all worlds: flat, plain, pairs, decoys, crowded, hard, or fields as in 'plain,layers=4'"""
    worlds: AtLeast1 = 16
    """training worlds, the first of those kept for training"""
    num_edits: AtLeast1 = 20
    """facts per world"""
    seed: AtLeast0 = 0
    """of the network and the batches"""
    hidden: AtLeast1 = 64
    """units of the network"""
    learning: LearnSettings = LearnSettings()


def train(given: Options) -> dict[str, Any]:
    """Records, learns, and writes the agent.

    Returns:
        Mean recorded rewards per fact: of the router's choices, of the best set of layers for all
        facts, and of the best for each.

    Raises:
        ResultsExistError: the folder holds something.
        SettingsError: an unknown difficulty, more than 8 layers, or too few facts in a world.
    """
    if given.out.exists() and any(given.out.iterdir()):
        raise ResultsExistError(f"{given.out} is not empty; give another folder with --out")
    difficulty = read_difficulty(given.difficulty)
    masks_of(difficulty.layers)
    names = [WorldName(difficulty, seed) for seed in world_seeds("train", given.worlds)]
    recordings = []
    for name in names:
        recordings.append(record_world(name, given.num_edits))
        print(f"hiedit: recorded {name}", file=sys.stderr, flush=True)
    pool = pooled(recordings)
    router = SharedRouter(difficulty.layers, hidden=given.hidden, seed=given.seed)
    learn(router, pool, torch.Generator().manual_seed(given.seed), given.learning)
    requests = [
        request
        for name, one in zip(names, recordings, strict=True)
        for request in load_requests(str(name))
        if (request.prompt, request.answer) in set(one.facts)
    ]
    save_shared(
        given.out,
        router,
        {
            "difficulty": difficulty.words,
            "worlds": [str(name) for name in names],
            "num_edits": given.num_edits,
            "seed": given.seed,
            "settings": asdict(given.learning),
            **facts_entry(fact_hashes(requests)),
        },
    )
    return {"agent": str(given.out), "facts": len(pool.rewards), **_scores(router, pool)}


def _scores(router: SharedRouter, pool: Pool) -> dict[str, float]:
    """Mean recorded rewards per fact."""
    with torch.no_grad():
        chosen = (router.scores(router.features(pool.observations)) > 0).numpy()
    places = (chosen[:, None] == pool.masks[None]).all(2).argmax(1)
    score = recorded_score(pool.masks, pool.rewards)
    return {
        "router": float(pool.rewards[np.arange(len(places)), places].mean()),
        "best_fixed": float(greedy_search(score, pool.masks.shape[1]).reward),
        "best_per_fact": float(pool.rewards.max(1).mean()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Learns and prints JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    print(json.dumps(train(given), indent=2))
    print(
        f"hiedit: agent {given.out} (use it as --agents {given.out} with --model planted:"
        f"{given.difficulty}:SEED; seeds from 1000000 on are of worlds that it never learns from)",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
