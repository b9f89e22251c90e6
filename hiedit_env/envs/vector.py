"""Many environments on one resident model, advanced together: the vector environments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from hiedit_env.envs.accounting import Outcome
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.layer_selection import LayerSelection
from hiedit_env.envs.lifelong_edit import LifelongEdit
from hiedit_env.envs.planted import Planted
from hiedit_env.envs.scheduler import Passes, run_together
from hiedit_env.envs.state import copy_model
from hiedit_env.envs.step_size import StepSize
from hiedit_env.envs.tried_options import (
    TriedOptions,
    check_masks_of_several,
    stacked,
    try_options,
)
from hiedit_env.envs.vector_arguments import action_rows, check_reset_mask, seeds_of
from hiedit_env.errors import ActionError, SettingsError, whole_number
from hiedit_env.evaluation.unedited import UneditedModel

T = TypeVar("T")
E = TypeVar("E", bound=EditingEnv)
Observations = NDArray[np.float32]
#: Observations, rewards, whether episodes ended and were cut off, information.
Batch = tuple[Any, Any, Any, Any, dict[str, Any]]


class VectorEditing(VectorEnv[Observations, Any, NDArray[Any]], EzPickle, Generic[E]):
    """N independent environments over one set of resident base weights.

    Every environment is an environment of the id, with its own stream, statistics, accumulated
    updates and random state; none is written into the shared model. ``reset`` and ``step`` advance
    all environments together, so that what they ask of the model at the same time is answered by
    one pass. Seeds,
    spaces, rewards and information are those of N single environments, up to rounding: an edited
    layer computes x W + x Δ here and x (W + Δ) there.

    ## Arguments
    - ``num_envs``: N.
    - ``autoreset_mode``: what happens to an environment whose episode has ended. ``"NextStep"``
      (default): the next ``step`` begins a new one in the place of an action; its reward is 0.
      ``"SameStep"``: it begins within the step; the last observation and information are in
      ``info["final_obs"]`` and ``info["final_info"]``. ``"Disabled"``:
      ``reset(options={"reset_mask": mask})`` begins new episodes where ``mask`` (N bool) is True,
      and stepping an ended environment is an error.
    - ``tensors``: if True, observations and rewards are float32 tensors on the model's device that
      were never on the host (rewards by generation excepted), and ended episodes are bool tensors
      there; ``info["reward_terms"]`` holds scalar tensors. Actions may be tensors in any case.
    - ``max_episode_steps``: an episode is truncated after so many steps; None for never.
    - ``max_batch_tokens``: bound of prompts × longest prompt in one pass over all environments.
    - everything else: as for the id.

    ## Starting State
    ``reset(seed=s)`` seeds environment i with s + i; a list gives one seed each. The option
    ``requests`` goes to every environment.

    An error leaves all environments as they were.

    >>> import gymnasium, hiedit_env, numpy as np
    >>> envs = gymnasium.make_vec(
    ...     "hiedit/LayerSelection-v1", 3, vectorization_mode="vector_entry_point", num_edits=2
    ... )
    >>> observations, info = envs.reset(seed=0)
    >>> observations, rewards, terminated, truncated, info = envs.step(np.ones((3, 6), np.int8))
    >>> rewards.shape, info["layers"].shape
    ((3,), (3, 6))
    """

    env_class: ClassVar[type[EditingEnv]]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        tensors: bool = False,
        max_batch_tokens: int | None = None,
        max_episode_steps: int | None = None,
        **settings: Any,
    ) -> None:
        EzPickle.__init__(
            self,
            num_envs,
            autoreset_mode=autoreset_mode,
            tensors=tensors,
            max_batch_tokens=max_batch_tokens,
            max_episode_steps=max_episode_steps,
            **settings,
        )
        self.num_envs = whole_number(num_envs, "num_envs", 1)
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            known = [mode.value for mode in AutoresetMode]
            raise SettingsError(
                f"autoreset_mode must be one of {known}, got {autoreset_mode!r}"
            ) from error
        if max_batch_tokens is not None:
            whole_number(max_batch_tokens, "max_batch_tokens", 1)
        if max_episode_steps is not None:
            whole_number(max_episode_steps, "max_episode_steps", 1)
        self.max_episode_steps = max_episode_steps
        # Holds the model, and is never reset or edited itself.
        first = self.env_class(**settings)
        if max_batch_tokens is not None:
            first.llm.max_batch_tokens = max_batch_tokens
        #: The environments; each is an environment that can be looked into, but not stepped on its
        #: own.
        self.envs: tuple[EditingEnv, ...] = tuple(first.fork() for _ in range(num_envs))
        self.tensors = tensors
        for env in self.envs:
            env.episode.evaluator.on_device = tensors
        self.metadata = {**first.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = first.render_mode
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, num_envs)
        self.action_space = batch_space(first.action_space, num_envs)
        self._observations = torch.zeros(num_envs, first.observer.size, device=first.llm.device)
        self._ended = np.zeros(num_envs, bool)
        self._steps = np.zeros(num_envs, np.int64)
        self._watch: Callable[[Sequence[int]], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with a model of its own that goes on from the present state."""
        # The default would rebuild the environments from their arguments, as unpickling does.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        llm = copy_model(self.envs[0].llm)
        unedited = UneditedModel(llm)
        forks = [llm.fork() for _ in self.envs]
        twin.envs = tuple(
            env._copy_on(fork, memo, unedited.clone_for(fork))
            for env, fork in zip(self.envs, forks, strict=True)
        )
        # Never written in place, except the two that count.
        twin._ended, twin._steps = self._ended.copy(), self._steps.copy()
        return twin

    # -- Gymnasium ------------------------------------------------------------------------------

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begins new episodes: all of them, or those of ``options["reset_mask"]``.

        Args:
            seed: One for all (environment i gets seed + i) or one each.
            options: ``reset_mask`` (N bool), and the options of the single environment.

        Raises:
            SettingsError: a wrong number of seeds, or a mask that is none; nothing has changed.
            PromptError: a request cannot be tokenised; nothing has changed.
        """
        rest = dict(options or {})
        mask = check_reset_mask(rest.pop("reset_mask", None), self.num_envs)
        seeds = seeds_of(seed, self.num_envs)
        chosen = [i for i in range(self.num_envs) if mask[i]]
        with self._all_or_nothing():
            infos = self._run([self.envs[i].begin(seed=seeds[i], options=rest) for i in chosen])
        self._ended = self._ended & ~mask
        self._steps = np.where(mask, 0, self._steps)
        self._look(chosen)
        return self._shown(), self._collect(dict(zip(chosen, infos, strict=True)))

    def step(self, actions: Any) -> Batch:
        """One step of every environment; see the class docstring for environments that have ended.

        Raises:
            ActionError: actions of another shape, or one that its environment refuses.
            SettingsError: an ended environment is stepped although ``autoreset_mode`` is
                ``"Disabled"``.
        """
        rows = action_rows(actions, self.num_envs, self.action_space)
        fresh = [i for i in range(self.num_envs) if self._ended[i]]
        if fresh and self.autoreset_mode is AutoresetMode.DISABLED:
            raise SettingsError(
                f"the episodes of environments {fresh} have ended; begin new ones with "
                "reset(options={'reset_mask': mask})"
            )
        going = [i for i in range(self.num_envs) if not self._ended[i]]
        rewards: list[Any] = [0.0] * self.num_envs
        ended, truncated = np.zeros((2, self.num_envs), bool)
        # Every action is checked before anything happens.
        steps: list[Passes[Any]] = [self._act(i, rows[i]) for i in going]
        steps += [self.envs[i].begin() for i in fresh]
        infos: dict[int, dict[str, Any]] = {}
        with self._all_or_nothing():
            results = self._run(steps)
            self._steps = np.where(self._ended, 0, self._steps + 1)
            for i, result in zip([*going, *fresh], results, strict=True):
                if i in fresh:
                    infos[i] = result
                else:
                    outcome: Outcome = result
                    rewards[i], ended[i], infos[i] = outcome
                    truncated[i] = self._steps[i] == self.max_episode_steps
            self._look(range(self.num_envs))
            over = [i for i in range(self.num_envs) if ended[i] or truncated[i]]
            if over and self.autoreset_mode is AutoresetMode.SAME_STEP:
                seen = self._shown()
                finals = {i: (seen[i], infos[i]) for i in over}
                begun = self._run([self.envs[i].begin() for i in over])
                self._steps[over] = 0
                self._look(over)
                for i, info in zip(over, begun, strict=True):
                    final_obs, final_info = finals[i]
                    infos[i] = {"final_obs": final_obs, "final_info": final_info, **info}
        is_over = ended | truncated
        self._ended = is_over & (self.autoreset_mode is not AutoresetMode.SAME_STEP)
        rest = self._collect(infos)
        if not self.tensors:
            return self._shown(), np.array(rewards, np.float64), ended, truncated, rest
        device = self._observations.device
        gained = torch.stack([torch.as_tensor(r, dtype=torch.float32).to(device) for r in rewards])
        over_now, cut_now = (torch.from_numpy(x).to(device) for x in (ended, truncated))
        return self._shown(), gained, over_now, cut_now, rest

    def try_options(self, masks: Any, *, chunk: int | None = None) -> TriedOptions:
        """The same for all environments; see ``env.unwrapped.try_options``.

        Args:
            masks: N_envs × M × L zeros and ones, or M × L for the same in every environment.
            chunk: Options at a time, over all environments.

        Returns:
            Arrays of N_envs × M.

        Raises:
            ResetNeeded: an environment has no present fact.
            ActionError: masks of another shape, or with other numbers.
            NotEnoughMemoryError: ``chunk`` options do not fit.
        """
        own = check_masks_of_several(masks, self.num_envs, len(self.envs[0].llm.layers))
        return stacked(try_options(self.envs, own, chunk))

    @contextmanager
    def watched(self, watch: Callable[[Sequence[int]], None]) -> Iterator[None]:
        """Within the body, says which environments are observed anew, for vector wrappers.

        Args:
            watch: Called with their numbers right after they were observed: once in ``reset`` and
                in ``step``; a second time in a step within which episodes ended and new ones
                began (``"SameStep"``), with those.
        """
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def render(self) -> tuple[Any, ...] | None:
        """The pictures or texts of all environments; see the single environment."""
        return tuple(env.render() for env in self.envs)

    def call(self, name: str, *arguments: Any, **named: Any) -> tuple[Any, ...]:
        """A method's results, or an attribute's values, environment by environment."""
        found = [getattr(env, name) for env in self.envs]
        return tuple(f(*arguments, **named) if callable(f) else f for f in found)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment."""
        return tuple(getattr(env, name) for env in self.envs)

    def set_attr(self, name: str, values: Any) -> None:
        """Sets an attribute of every environment: one value each, or the same for all."""
        each = values if isinstance(values, list | tuple) else [values] * self.num_envs
        if len(each) != self.num_envs:
            raise SettingsError(f"{name!r} needs {self.num_envs} values, got {len(each)}")
        for env, value in zip(self.envs, each, strict=True):
            setattr(env, name, value)

    @property
    def np_random(self) -> Any:
        """The random generators of all environments."""
        return tuple(env.np_random for env in self.envs)

    @np_random.setter
    def np_random(self, value: Any) -> None:
        for env, generator in zip(self.envs, value, strict=True):
            env.np_random = generator

    @property
    def np_random_seed(self) -> Any:
        """The seeds of all environments; see :attr:`gymnasium.Env.np_random_seed`."""
        return tuple(env.np_random_seed for env in self.envs)

    # -- inside -----------------------------------------------------------------------------------

    def _act(self, i: int, action: Any) -> Passes[Outcome]:
        try:
            return self.envs[i].act(action)
        except ActionError as error:
            raise ActionError(f"action of environment {i}: {error}") from error

    def _run(self, passes: Sequence[Passes[T]]) -> list[T]:
        results: list[T] = []
        for result in run_together(passes):
            if isinstance(result, BaseException):
                raise result
            results.append(result)
        return results

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Puts every environment back if one of them fails."""
        before: list[Callable[[], None]] = [env.return_point() for env in self.envs]
        # Never written in place: the old ones are still whole.
        kept = self._observations, self._ended, self._steps
        try:
            yield
        except BaseException:
            for back in before:
                back()
            self._observations, self._ended, self._steps = kept
            raise

    def _look(self, chosen: Sequence[int]) -> None:
        """Observes some environments again."""
        if chosen:
            views = [self.envs[i].view() for i in chosen]
            found = self.envs[0].observer.batch(views)
            index = torch.tensor(list(chosen), device=found.device)
            self._observations = self._observations.index_copy(0, index, found)
            if self._watch is not None:
                self._watch(chosen)

    def _shown(self) -> Any:
        """The observations as they are handed out, the caller's to keep."""
        shown = self._observations.clone()
        return shown if self.tensors else shown.cpu().numpy()

    def _collect(self, infos: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        collected: dict[str, Any] = {}
        for i in sorted(infos):
            collected = self._add_info(collected, copy.copy(infos[i]), i)
        return collected


class VectorLifelongEdit(VectorEditing[LifelongEdit]):
    """N environments of :class:`~hiedit_env.envs.lifelong_edit.LifelongEdit`."""

    env_class = LifelongEdit


class VectorLayerSelection(VectorEditing[LayerSelection]):
    """N environments of :class:`~hiedit_env.envs.layer_selection.LayerSelection`."""

    env_class = LayerSelection


class VectorPlanted(VectorEditing[Planted]):
    """N environments of :class:`~hiedit_env.envs.planted.Planted`; each has its own oracle."""

    env_class = Planted


class VectorStepSize(VectorEditing[StepSize]):
    """N environments of :class:`~hiedit_env.envs.step_size.StepSize`."""

    env_class = StepSize
