"""Regret in planted worlds that no agent has seen.

Training worlds are recorded once, with the outcome of every set of layers on every fact. Each
training seed draws some of them; fixed-best, linear bandit, PPO and the router of ``hiedit`` learn
from the same facts, all with the environment's own update rule. Then all agents play the same
streams of test worlds. Episodes are compared by outcomes, see
:mod:`hiedit_benchmarks.worlds.headroom`. Writes ``results.json``, ``table.md`` and ``regret.png``,
and each seed's router as an agent of ``hiedit compare`` in ``router-SEED``::

    python -m hiedit_benchmarks.studies.unseen_worlds --difficulty pairs --out runs/unseen-pairs
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from hiedit_agents.bandits.fixed_best import greedy_search, recorded_score
from hiedit_agents.bandits.full_information import LearnSettings, Pool, learn
from hiedit_agents.bandits.linear import LinearBandit
from hiedit_agents.bandits.recorded_env import RecordedFacts
from hiedit_agents.bandits.shared_agent import save_shared
from hiedit_agents.bandits.worlds import masks_of, open_world, record_world
from hiedit_agents.command_line import parse, run_script
from hiedit_agents.hierarchy.shared_router import SharedRouter
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies.unseen_report import draw, summarise, table
from hiedit_benchmarks.worlds.headroom import Choose, measure, play
from hiedit_env.datasets.difficulty import WorldName, read_difficulty, require_apart, world_seeds
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import ResultsExistError, SettingsError, require_libraries
from hiedit_env.files import write_bytes
from hiedit_env.rules.layer_choice import make_choice

PROGRAM = "python -m hiedit_benchmarks.studies.unseen_worlds"
#: Settings of Stable-Baselines3's PPO; an episode is one fact, so there is nothing to discount.
PPO: dict[str, Any] = {
    "n_steps": 1024,
    "batch_size": 128,
    "n_epochs": 10,
    "gamma": 0.0,
    "ent_coef": 0.01,
}
PPO_LEARNING_RATE = 1e-3


@settings
class Options:
    """What is recorded, learned and played."""

    out: Path
    """folder of the results; recordings that are there already are used again"""
    difficulty: str = "pairs"
    """of all worlds: flat, plain, pairs, decoys, crowded, hard, or fields as in 'plain,layers=4'"""
    worlds: AtLeast1 = 24
    """training worlds that are recorded"""
    worlds_per_seed: AtLeast1 = 16
    """those of them that a training seed learns from, drawn with it"""
    test_worlds: AtLeast1 = 12
    """worlds to test on"""
    num_edits: AtLeast1 = 20
    """facts per episode, one episode per world"""
    training_seeds: AtLeast1 = 5
    """seeds of everything that learns or draws"""
    router_steps: AtLeast1 = 2000
    """steps of Adam in which the router learns, on batches of recorded facts"""
    ppo_steps: AtLeast0 = 40960
    """recorded facts that PPO sees, again and again; 0 leaves it out"""


def record_worlds(given: Options, masks: NDArray[np.int8]) -> dict[str, NDArray[Any]]:
    """Training worlds with every option tried; kept in ``recorded.safetensors``.

    Returns:
        ``observations`` W × E × D float32, and ``rewards`` W × E × M float64.
    """
    file = given.out / "recorded.safetensors"
    if file.exists():
        found: dict[str, NDArray[Any]] = load_file(file)
        if found["rewards"].shape != (given.worlds, given.num_edits, len(masks)):
            raise ResultsExistError(
                f"{file} holds other recordings; give another folder with --out"
            )
        return found
    observations, rewards = [], []
    for seed in world_seeds("train", given.worlds):
        name = WorldName(read_difficulty(given.difficulty), seed)
        one = record_world(name, given.num_edits)
        observations.append(one.observations)
        rewards.append(one.rewards)
        say(f"recorded world {seed}")
    made: dict[str, NDArray[Any]] = {
        "observations": np.stack(observations),
        "rewards": np.stack(rewards),
    }
    save_file(made, file)
    return made


def pool_of(
    recorded: dict[str, NDArray[Any]], masks: NDArray[np.int8], worlds: NDArray[np.int64]
) -> Pool:
    """The facts of some recorded worlds."""
    observations, rewards = (recorded[name][worlds] for name in ("observations", "rewards"))
    return Pool(
        masks.astype(bool),
        observations.reshape(-1, observations.shape[-1]),
        rewards.reshape(-1, rewards.shape[-1]),
    )


def learners(given: Options, pool: Pool, worlds: Sequence[str], seed: int) -> dict[str, Choose]:
    """Agents that learned from a pool, by name; the router also as an agent in ``router-SEED``.

    Args:
        given: The settings.
        pool: The recorded facts.
        worlds: Names of the worlds that they are of.
        seed: Of everything that learns or draws.
    """
    count = pool.masks.shape[1]
    fixed = greedy_search(recorded_score(pool.masks, pool.rewards), count).layers
    router = SharedRouter(count, seed=seed)
    how = LearnSettings(steps=given.router_steps)
    learn(router, pool, torch.Generator().manual_seed(seed), how)

    def common(observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the router reads of observations, N × D to N × (L · features)."""
        found: NDArray[np.float32] = router.features(observations).flatten(1).numpy()
        return found

    bandits = LinearBandit(seed=seed), LinearBandit(seed=seed)
    bandits[0].fit(pool.observations, pool.rewards)
    bandits[1].fit(common(pool.observations), pool.rewards)

    def route(env: EditingEnv, observation: NDArray[np.float32]) -> NDArray[Any]:
        with torch.no_grad():
            return router.choose(observation, env.capture).layers

    found: dict[str, Choose] = {
        "fixed-best": lambda env, observation: fixed,
        "linear-bandit": lambda env, seen: pool.masks[int(bandits[0].choose(seen[None])[0])],
        "linear-bandit-common": lambda env, seen: pool.masks[
            int(bandits[1].choose(common(seen[None]))[0])
        ],
        "hiedit": route,
    }
    training = {"worlds": list(worlds), "num_edits": given.num_edits, "seed": seed}
    save_shared(given.out / f"router-{seed}", router, {**training, "settings": asdict(how)})
    if given.ppo_steps:
        found["ppo"] = learn_ppo(pool, given.ppo_steps, seed)
    return found


def learn_ppo(pool: Pool, steps: int, seed: int) -> Choose:
    """Stable-Baselines3's PPO over sets of layers, on the recorded facts."""
    require_libraries("sb3", "stable_baselines3")
    from stable_baselines3 import PPO as Algorithm

    env = RecordedFacts(pool)
    model = Algorithm(
        "MlpPolicy", env, seed=seed, device="cpu", learning_rate=PPO_LEARNING_RATE, **PPO
    )
    model.learn(steps)
    return lambda _, observation: model.predict(env.seen(observation), deterministic=True)[0]


def untrained(given: Options, count: int, seed: int) -> dict[str, Choose]:
    """Agents that learn nothing; K is the number of homes that are needed."""
    size = read_difficulty(given.difficulty).needed
    by_gradient = make_choice("gradient-norm", count, size)

    def drawn(choose: Callable[[np.random.Generator], NDArray[Any]], salt: int) -> Choose:
        generator = np.random.default_rng([seed, salt])
        return lambda env, observation: choose(generator)

    def some(generator: np.random.Generator) -> NDArray[Any]:
        mask = np.zeros(count, np.int8)
        mask[generator.permutation(count)[:size]] = 1
        return mask

    unused = np.random.default_rng(0)
    return {
        "random": drawn(lambda generator: generator.integers(0, 2, count), 11),
        "random-layers": drawn(some, 12),
        "gradient-norm": lambda env, observation: by_gradient(env.capture, unused),
    }


def study(given: Options) -> dict[str, Any]:
    """Records, learns and plays; the results as they are written to JSON.

    Raises:
        SettingsError: more worlds per seed than there are.
        ResultsExistError: recordings of other settings are in the folder.
    """
    if given.worlds_per_seed > given.worlds:
        raise SettingsError(
            f"worlds_per_seed is {given.worlds_per_seed}, but only {given.worlds} worlds are "
            "recorded; raise --worlds"
        )
    difficulty = read_difficulty(given.difficulty)
    training = world_seeds("train", given.worlds)
    test = world_seeds("test", given.test_worlds)
    require_apart(training, test)
    given.out.mkdir(parents=True, exist_ok=True)
    masks = masks_of(difficulty.layers)
    started = time.process_time()
    recorded = record_worlds(given, masks)
    seconds = {"recording": time.process_time() - started}
    agents: list[dict[str, Choose]] = []
    started = time.process_time()
    for seed in range(given.training_seeds):
        drawn = np.random.default_rng([seed, 10]).permutation(given.worlds)
        places = drawn[: given.worlds_per_seed]
        pool = pool_of(recorded, masks, places)
        names = [str(WorldName(difficulty, training[place])) for place in places]
        learned = learners(given, pool, names, seed)
        agents.append({**learned, **untrained(given, difficulty.layers, seed)})
        say(f"learned with seed {seed}")
    seconds["learning"] = time.process_time() - started
    outcomes: dict[str, list[list[float]]] = {name: [[] for _ in agents] for name in agents[0]}
    references: dict[str, list[float]] = {
        name: [] for name in ("oracle", "best-constant", "no-edit", "all-layers")
    }
    started = time.process_time()
    for world in (WorldName(difficulty, seed) for seed in test):
        known = measure(world, given.num_edits)
        for name, value in (
            ("oracle", known.oracle),
            ("best-constant", known.best_constant),
            ("no-edit", float(known.constants[0])),
            ("all-layers", float(known.constants[-1])),
        ):
            references[name].append(value)
        env = open_world(world, given.num_edits)
        for seed, chosen in enumerate(agents):
            for name, choose in chosen.items():
                outcomes[name][seed].append(float(np.mean(play(env, choose, 0))))
        shown = {name: f"{values[-1][-1]:.2f}" for name, values in outcomes.items()}
        say(f"played {world}: oracle {known.oracle:.2f}, {shown}")
    seconds["playing"] = time.process_time() - started
    results: dict[str, Any] = {
        "difficulty": difficulty.words,
        "training_worlds": given.worlds,
        "worlds_per_seed": given.worlds_per_seed,
        "test_seeds": list(test),
        "num_edits": given.num_edits,
        "training_seeds": given.training_seeds,
        "router_steps": given.router_steps,
        "ppo": {**PPO, "learning_rate": PPO_LEARNING_RATE, "steps": given.ppo_steps},
        "references": references,
        "outcomes": outcomes,
        "processor_seconds": seconds,
        "versions": versions(),
    }
    results["summary"] = summarise(references, outcomes)
    return results


def say(text: str) -> None:
    """Progress, to standard error."""
    print(f"hiedit: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study, writes its results and prints the table; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    results = study(given)
    shown = table(results)
    write_bytes(given.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_bytes(given.out / "table.md", (shown + "\n").encode())
    write_bytes(given.out / "regret.png", draw(results))
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
