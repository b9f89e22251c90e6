"""What a choice per fact can bring in a planted world: the oracle beside constant choices.

Episodes are compared by the *outcomes* of their facts: the terms of the reward as they are when the
fact is done, minus the prices of layers and steps. In version 2 a reward is an outcome minus the
terms before the fact, so within one state both rank options alike. Summed over an episode they do
not: an agent that breaks facts which are edited later is rewarded for their repair, and can earn
more than the oracle. Outcomes pay nothing for it.

A fact that is lost because the episode ended early counts as in the unedited model, minus the
price of a collapse, so that an early end never pays.

``python -m hiedit_benchmarks.worlds.headroom`` measures difficulties and prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_agents.bandits.worlds import masks_of
from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.comparison.results import versions
from hiedit_env.datasets.difficulty import LEVELS, WorldName, read_difficulty, world_seeds
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.envs.vector import VectorEditing

PROGRAM = "python -m hiedit_benchmarks.worlds.headroom"
#: From the environment to the layers of its present fact, L zeros and ones.
Choose = Callable[[EditingEnv, NDArray[np.float32]], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Headroom:
    """Outcomes per fact in one world, on one stream.

    Args:
        world: Name of the world.
        oracle: Of the best option of every fact, one after another.
        constants: 2^L, of each set of layers that is written for every fact, see :func:`masks_of`.
    """

    world: str
    oracle: float
    constants: NDArray[np.float64]

    @property
    def best_constant(self) -> float:
        """Of the best set for this very stream, chosen in hindsight."""
        return float(self.constants.max())

    @property
    def headroom(self) -> float:
        """Oracle minus best constant: what a choice per fact can bring at most, one fact ahead."""
        return self.oracle - self.best_constant


def measure(world: WorldName, num_edits: int, seed: int = 0) -> Headroom:
    """Plays the oracle and all constant choices on one stream of a world.

    Args:
        world: Which.
        num_edits: Facts of the stream.
        seed: Of the stream.

    Raises:
        SettingsError: more than 8 layers, or fewer facts than asked for.
    """
    masks = masks_of(world.difficulty.layers)
    env = gym.make(
        "hiedit/Planted-v2", disable_env_checker=True, model=str(world), num_edits=num_edits
    )

    def best(inner: EditingEnv, _: NDArray[np.float32]) -> NDArray[Any]:
        found: NDArray[np.int8] = masks[int(inner.try_options(masks).best)]
        return found

    oracle = float(np.mean(play(env, best, seed)))
    return Headroom(str(world), oracle, play_constants(world, masks, num_edits, seed))


def play(env: gym.Env[Any, Any], choose: Choose, seed: int) -> list[float]:
    """The outcome of each fact of one episode of version 2."""
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    observation, _ = env.reset(seed=seed)
    outcomes: list[float] = []
    ended, lost = False, False
    while not ended:
        before = terms_before(inner)
        action = np.asarray(choose(inner, observation), np.int8)
        observation, reward, ended, _, info = env.step(action)
        outcomes.append(before + float(reward))
        lost = bool(info["error_type"])
    if lost:
        finished = len(outcomes) - 1
        nothing = np.zeros(len(inner.llm.layers), np.int8)
        alone = play(env, lambda _, seen: nothing, seed)
        price = inner.weights_of_terms["collapse"]
        outcomes[finished:] = [outcome - price for outcome in alone[finished:]]
    return outcomes


def terms_before(env: EditingEnv) -> float:
    """The weighted terms of the present fact before its first step; 0 after the stream."""
    standing = env.episode.standing
    if standing is None or env.episode.ended:
        return 0.0
    terms = standing.terms.items()
    return float(sum(env.weights_of_terms[name] * value for name, value in terms))


def error_types(info: dict[str, Any]) -> NDArray[np.int64]:
    """Why episodes ended early in a step of a vector environment, N; 0 where they did not.

    Args:
        info: The step's information; of an episode that ended within it, its last one counts.
    """
    found = np.array(info["error_type"], np.int64)
    if "final_info" in info:
        over = info["_final_info"]
        found[over] = info["final_info"]["error_type"][over]
    return found


def play_constants(
    world: WorldName, masks: NDArray[np.int8], num_edits: int, seed: int
) -> NDArray[np.float64]:
    """Outcome per fact of constant choices, all episodes side by side.

    Args:
        world: Which.
        masks: M × L, the first of them without any layer.
        num_edits: Facts of the stream.
        seed: Of the stream.

    Returns:
        M float64.
    """
    envs = cast(
        VectorEditing[Any],
        gym.make_vec(
            "hiedit/Planted-v2",
            len(masks),
            vectorization_mode="vector_entry_point",
            autoreset_mode="SameStep",
            model=str(world),
            num_edits=num_edits,
        ),
    )
    envs.reset(seed=[seed] * len(masks))
    total = np.zeros(len(masks))
    going, price = np.ones(len(masks), bool), envs.envs[0].weights_of_terms["collapse"]
    for _ in range(num_edits):
        before = np.array([terms_before(env) for env in envs.envs])
        _, rewards, ended, _, info = envs.step(masks)
        going &= error_types(info) == 0
        total += np.where(going, before + rewards, before[0] + rewards[0] - price)
        going &= ~ended
    envs.close()
    return total / num_edits


@settings
class Options:
    """What is measured."""

    difficulty: tuple[str, ...] = tuple(LEVELS)
    """difficulties, by name or fields"""
    worlds: AtLeast1 = 5
    """training worlds of each, from seed 0 on"""
    num_edits: AtLeast1 = 20
    """facts of the one stream in each world"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints one JSON object per difficulty; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    for text in given.difficulty:
        difficulty = read_difficulty(text)
        names = [WorldName(difficulty, seed) for seed in world_seeds("train", given.worlds)]
        found = [measure(name, given.num_edits) for name in names]
        constants = np.stack([one.constants for one in found])
        own = np.array([one.headroom for one in found])
        row = {
            "difficulty": difficulty.words,
            "oracle": float(np.mean([one.oracle for one in found])),
            "best_constant": float(np.mean([one.best_constant for one in found])),
            "best_constant_over_worlds": float(constants.mean(0).max()),
            "no_edit": float(constants[:, 0].mean()),
            "all_layers": float(constants[:, -1].mean()),
            "headroom": float(own.mean()),
            "headroom_of_worlds": own.tolist(),
        }
        print(json.dumps(row), flush=True)
    print(json.dumps({"num_edits": given.num_edits, "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
