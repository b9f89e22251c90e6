"""Sequential selection in many lives at once: those that stop are stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from hiedit_env.envs.base import EditingEnv, Step
from hiedit_env.envs.semantics import Paid
from hiedit_env.passes import run_together
from hiedit_env.wrappers import SequentialSelection


class Waiting(gym.Wrapper[NDArray[np.float32], Any, NDArray[np.float32], Any]):
    """An editing environment whose next step may have been run already.

    Args:
        env: A hiedit environment.
    """

    def __init__(self, env: EditingEnv) -> None:
        super().__init__(env)
        self.inner = env
        self.ready: Paid | None = None

    def step(self, action: Any) -> Step:
        """What was run already, or the environment's step."""
        if self.ready is None:
            return self.inner.step(action)
        (reward, ended, info), self.ready = self.ready, None
        return self.inner.observe(), reward, ended, False, info


class SequentialLives(SyncVectorEnv):
    """Lives under :class:`SequentialSelection`, of which those that stop share their passes.

    Args:
        envs: Environments under ``SequentialSelection``; those over a :class:`Waiting` step
            together.
        autoreset_mode: What happens to a life whose episode has ended.
    """

    def __init__(
        self, envs: Sequence[gym.Env[Any, Any]], autoreset_mode: AutoresetMode | str
    ) -> None:
        super().__init__([partial(_same, env) for env in envs], autoreset_mode=autoreset_mode)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One pick or stop in every life."""
        chosen = list(actions)
        stopping: dict[int, NDArray[np.int8]] = {}
        for i, env in enumerate(self.envs):
            assert isinstance(env, SequentialSelection)
            # A life that has ended begins a new one instead.
            if isinstance(env.env, Waiting) and not self._autoreset_envs[i]:
                picks, stops = env.pick(chosen[i])
                if stops:
                    stopping[i] = picks
        lives: dict[int, Any] = {i: self.envs[i].env for i in stopping}  # type: ignore[attr-defined]
        back = [life.inner.return_point() for life in lives.values()]
        results = run_together([lives[i].inner.act(picks) for i, picks in stopping.items()])
        for result in results:
            if isinstance(result, BaseException):
                for undo in back:
                    undo()
                raise result
        for life, result in zip(lives.values(), results, strict=True):
            life.ready = result
        return super().step(actions)


def _same(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env
