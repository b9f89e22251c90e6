"""``hiedit/PlantedWorlds-v2``: another planted world in every episode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_env.datasets.difficulty import Split, read_difficulty, world_seeds
from hiedit_env.envs.planted import Planted
from hiedit_env.errors import SettingsError
from hiedit_env.wrappers.observe_effects import ObserveEffects

Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


class PlantedWorlds(gym.Env[NDArray[np.float32], NDArray[np.int8]]):
    """``hiedit/Planted-v2`` in a world that is drawn anew for every episode.

    An agent that is trained here on some worlds and tested on others cannot remember which layers
    hold which facts: it has to read it off the observation.

    ## Action Space
    ``MultiBinary(L)``, as there.

    ## Observation Space
    As there, and with ``effects`` five more numbers per layer, which mean the same in all worlds;
    see :class:`~hiedit_env.wrappers.observe_effects.ObserveEffects`.

    ## Rewards
    As there.

    ## Starting State
    A world of the split, drawn with the environment's seed, then a stream of its facts, drawn with
    the same. ``reset(options={"world_seed": s})`` takes the world of this seed.

    ## Information
    As there, and ``world_seed``.

    ## Arguments
    - ``difficulty``: name or fields, see :func:`~hiedit_env.datasets.difficulty.read_difficulty`.
    - ``split``: ``"train"`` or ``"test"``; no world is in both.
    - ``num_worlds``, ``first_world``: how many worlds of the split, from which on.
    - ``effects``: whether the observation holds them.
    - everything else: as for ``hiedit/Planted-v2``, except ``model``, ``dataset``, ``world_seed``.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/PlantedWorlds-v2", num_worlds=2, num_edits=2)
    >>> observation, info = env.reset(seed=1)
    >>> env.unwrapped.world.model_name == f"planted:plain:{info['world_seed']}"
    True
    """

    metadata: dict[str, Any] = Planted.metadata

    def __init__(
        self,
        *,
        difficulty: str = "plain",
        split: Split = "train",
        num_worlds: int = 16,
        first_world: int = 0,
        effects: bool = True,
        **arguments: Any,
    ) -> None:
        own = {"model", "dataset", "world_seed"} & set(arguments)
        if own:
            raise SettingsError(
                f"{sorted(own)[0]!r} is drawn here; take hiedit/Planted-v2 for one world"
            )
        self.seeds = world_seeds(split, num_worlds, first_world)
        self.difficulty = read_difficulty(difficulty).words
        self.effects = effects
        self._arguments = {"version": 2, **arguments}
        #: Worlds that were loaded, by seed.
        self._worlds: dict[int, gym.Env[NDArray[np.float32], Any]] = {}
        self._present = self.seeds[0]
        first = self._env(self._present)
        self.observation_space, self.action_space = first.observation_space, first.action_space
        self.render_mode = first.render_mode

    @property
    def world(self) -> Planted:
        """The environment of the present world, with its oracle and ``try_options``."""
        inner = self._env(self._present).unwrapped
        assert isinstance(inner, Planted)
        return inner

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begins an episode in another world.

        Args:
            seed: Seeds ``np_random``, from which world and stream are drawn.
            options: ``{"world_seed": s}`` takes this world, one of ``seeds``.

        Raises:
            SettingsError: another option, or a world that is none of ``seeds``.
        """
        super().reset(seed=seed)
        drawn, stream = self.np_random.integers(2**31, size=2).tolist()
        chosen = dict(options or {})
        world = chosen.pop("world_seed", self.seeds[drawn % len(self.seeds)])
        if chosen:
            raise SettingsError(f"unknown reset options {sorted(chosen)}; known is 'world_seed'")
        if world not in self.seeds:
            raise SettingsError(
                f"world_seed must be from {self.seeds[0]} to {self.seeds[-1]}, got {world!r:.200}"
            )
        self._present = int(world)
        observation, info = self._env(self._present).reset(seed=stream)
        return observation, self._told(info)

    def step(self, action: Any) -> Step:
        """One fact."""
        observation, reward, terminated, truncated, info = self._env(self._present).step(action)
        return observation, float(reward), terminated, truncated, self._told(info)

    def render(self) -> Any:
        """As the present world's."""
        return self._env(self._present).render()

    def close(self) -> None:
        """Forgets the loaded worlds."""
        self._worlds.clear()

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "world_seed": self._present}

    def _env(self, seed: int) -> gym.Env[NDArray[np.float32], Any]:
        if seed not in self._worlds:
            env: gym.Env[NDArray[np.float32], Any] = Planted(
                world_seed=seed, difficulty=self.difficulty, **self._arguments
            )
            self._worlds[seed] = ObserveEffects(env) if self.effects else env
        return self._worlds[seed]
