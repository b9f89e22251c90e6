"""Recordings: episodes in which every option was tried, as full-information bandit data.

How they are written and read is in :mod:`.recording_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.tried_options import TriedOptions
from hiedit_env.errors import SettingsError

#: Called after every fact with the numbers done and in all.
Progress = Callable[[int, int], None]
#: From what every option would give, and a generator, to the index of the one that is carried out.
Behaviour = Callable[[TriedOptions, np.random.Generator], int]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a recording is of.

    Args:
        environment: Id.
        model: Name of the model.
        fingerprint: Of its unedited candidate weights.
        layers: Names of the L candidate layers.
        observation_size: D.
        settings: Arguments of the environment that differ from its defaults.
        versions: Of Python and the libraries.
    """

    environment: str
    model: str
    fingerprint: str
    layers: tuple[str, ...]
    observation_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What has to agree, for messages."""
        return (
            f"model {self.model!r} ({self.fingerprint}) with {len(self.layers)} candidate layers "
            f"and observations of {self.observation_size} numbers"
        )


@dataclass(frozen=True, slots=True)
class Recording:
    """N facts of E episodes, with the outcome of each of M options on every fact.

    Args:
        origin: What it is of.
        masks: M × L bool, the options.
        seeds: E, of the episodes.
        episodes: N, index of every fact's episode.
        observations: N × D float32, before the fact.
        last_observations: E × D float32, after each episode.
        actions: N, index of the option that was carried out.
        rewards: N × M float64, of every option.
        terms: By name, N × M float64; they sum up to ``rewards``.
        metrics: By name, N × M float64, NaN for what was not measured.
        facts: N times prompt and answer.
    """

    origin: Origin
    masks: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    episodes: NDArray[np.int64]
    observations: NDArray[np.float32]
    last_observations: NDArray[np.float32]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float64]
    terms: Mapping[str, NDArray[np.float64]]
    metrics: Mapping[str, NDArray[np.float64]]
    facts: Sequence[tuple[str, str]]

    def __len__(self) -> int:
        """Number of facts, N."""
        return len(self.rewards)

    def part(self, episodes: Sequence[int]) -> Recording:
        """The facts of some episodes, given by index."""
        rows = np.flatnonzero(np.isin(self.episodes, episodes))
        places = {old: new for new, old in enumerate(episodes)}
        return Recording(
            origin=self.origin,
            masks=self.masks,
            seeds=self.seeds[list(episodes)],
            episodes=np.array([places[int(e)] for e in self.episodes[rows]], np.int64),
            observations=self.observations[rows],
            last_observations=self.last_observations[list(episodes)],
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            terms={name: values[rows] for name, values in self.terms.items()},
            metrics={name: values[rows] for name, values in self.metrics.items()},
            facts=[self.facts[i] for i in rows.tolist()],
        )

    def check_fits(self, env: gym.Env[Any, Any], *, observations: bool = True) -> None:
        """Refuses an environment of another model, other layers or another observation.

        Args:
            env: The environment.
            observations: Whether these have to agree too.

        Raises:
            SettingsError: names both.
        """
        own, recorded = origin_of(env), self.origin
        same = (own.fingerprint, own.layers) == (recorded.fingerprint, recorded.layers)
        if observations:
            same = same and own.observation_size == recorded.observation_size
        if not same:
            raise SettingsError(
                f"the recording is of {recorded.words}, the environment of {own.words}; record "
                "again with this one"
            )


def origin_of(env: gym.Env[Any, Any], versions: Mapping[str, Any] | None = None) -> Origin:
    """What a recording of an environment would be of.

    Raises:
        SettingsError: no environment whose actions are layers.
    """
    inner = env.unwrapped
    if not isinstance(inner, EditingEnv) or not isinstance(inner.action_space, spaces.MultiBinary):
        raise SettingsError(
            "options are recorded on hiedit/LayerSelection and hiedit/Planted, whose actions are "
            f"MultiBinary; this environment's are {env.action_space}"
        )
    spec = inner.spec
    given: dict[str, Any] = {} if spec is None else dict(spec.kwargs)
    with inner.llm.unedited():
        fingerprint = inner.llm.weights_fingerprint()
    return Origin(
        environment="" if spec is None else spec.id,
        model=str(inner.model_name),
        fingerprint=fingerprint,
        layers=tuple(inner.llm.names),
        observation_size=int(np.prod(env.observation_space.shape or ())),
        settings={k: v for k, v in given.items() if isinstance(v, str | int | float | bool)},
        versions=dict(versions or {}),
    )


def any_option(tried: TriedOptions, generator: np.random.Generator) -> int:
    """An option drawn uniformly."""
    return int(generator.integers(len(tried)))


def mostly_best(tried: TriedOptions, generator: np.random.Generator) -> int:
    """The best option, or with probability 0.15 any."""
    other = any_option(tried, generator)
    return other if generator.random() < 0.15 else int(tried.best)


def record(
    env: gym.Env[Any, Any],
    masks: NDArray[Any],
    seeds: Sequence[int],
    *,
    chunk: int | None = None,
    versions: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    behaviour: Behaviour | None = None,
) -> Recording:
    """Plays one episode per seed, tries every option on every fact, and carries one out.

    Args:
        env: A layer-selection environment.
        masks: M × L zeros and ones.
        seeds: One episode each; its option is drawn from the same seed.
        chunk: Options at a time, see ``try_options``.
        versions: Kept in the recording.
        progress: Called after every fact.
        behaviour: Says which one; None for any, drawn uniformly. :func:`mostly_best` keeps the
            states near those that a good agent meets.

    Raises:
        SettingsError: another environment.
        ActionError: masks that are none.
    """
    origin = origin_of(env, versions)
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    observations, ends, tried, actions, episodes = [], [], [], [], []
    facts: list[tuple[str, str]] = []
    for place, seed in enumerate(seeds):
        observation, _ = env.reset(seed=seed)
        # Not the bits that the stream is drawn from.
        generator = np.random.default_rng([seed, 6])
        ended = False
        while not ended:
            found: TriedOptions = inner.try_options(masks, chunk=chunk)
            action = int((behaviour or any_option)(found, generator))
            observations.append(observation)
            tried.append(found)
            actions.append(action)
            episodes.append(place)
            facts.append((inner.fact.request.prompt, inner.fact.request.answer))
            mask = found.masks[action].astype(np.int8)
            observation, _, ended, _, _ = env.step(mask)
            if progress is not None:
                progress(len(tried), len(seeds) * len(inner.stream))
        ends.append(observation)

    def table(name: str) -> dict[str, NDArray[np.float64]]:
        names = getattr(tried[0], name)
        return {n: np.stack([getattr(t, name)[n] for t in tried]).astype(np.float64) for n in names}

    return Recording(
        origin=origin,
        masks=tried[0].masks,
        seeds=np.array(seeds, np.int64),
        episodes=np.array(episodes, np.int64),
        observations=np.stack(observations),
        last_observations=np.stack(ends),
        actions=np.array(actions, np.int64),
        rewards=np.stack([t.rewards for t in tried]),
        terms=table("reward_terms"),
        metrics=table("metrics"),
        facts=facts,
    )
