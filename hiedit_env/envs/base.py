"""The base class of the environments: construction, reset, information, access for agents."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.streams import stream
from hiedit_env.envs import rendering
from hiedit_env.envs.access import EpisodeAccess
from hiedit_env.envs.accounting import Accounting, Judging, Outcome, Write
from hiedit_env.envs.actions import Choice
from hiedit_env.envs.episode import EditingEpisode
from hiedit_env.envs.loading import draw_stream, load_resident
from hiedit_env.envs.observations import Observer, View
from hiedit_env.envs.reward_weights import reward_weights
from hiedit_env.envs.scheduler import Passes, run
from hiedit_env.envs.settings import RENDER_MODES, EnvSettings
from hiedit_env.envs.state import EnvState, copy_model
from hiedit_env.errors import HieditError, SettingsError
from hiedit_env.evaluation.reward import Evaluator
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import check_rule, make_rule

#: Observation, reward, whether the episode has ended, whether it was cut off, information.
StepResult = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


class EditingEnv(EpisodeAccess, gym.Env[NDArray[np.float32], Any], gym.utils.EzPickle):
    """Base of the environments; the arguments are described in :class:`LifelongEdit`."""

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 4}

    #: Names, types, defaults and ranges of the arguments.
    settings_class: ClassVar[type[EnvSettings]] = EnvSettings

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        # What help() and editors show: the arguments with their types and defaults.
        cls.__signature__ = inspect.signature(cls.settings_class)  # type: ignore[attr-defined]

    def __init__(self, **arguments: Any) -> None:
        gym.utils.EzPickle.__init__(self, **arguments)
        # Everything cheap is checked before the model is loaded.
        settings = self.settings_class(**arguments)
        check_rule(settings.rule, settings.rule_settings)
        self.render_mode = settings.render_mode
        self.shuffle = settings.shuffle
        self.num_edits = settings.num_edits
        self.model_name = settings.model
        self.dataset = settings.facts
        self.requests = load_requests(self.dataset)
        stream(self.requests, settings.num_edits, np.random.default_rng(0))
        self.settings = settings
        self._settle(load_resident(settings, self.requests))

    def _settle(self, llm: ResidentLLM, unedited: UneditedModel | None = None) -> None:
        """Builds on a model everything that belongs to one environment.

        Args:
            llm: The model.
            unedited: What the unedited model says, shared by forks of one model.
        """
        settings = self.settings
        self.llm = llm
        evaluator = Evaluator(
            llm,
            kind=settings.reward,
            decay=settings.retention_decay,
            reference=settings.locality_reference,
            unedited=unedited,
            prompt_form=settings.prompt_form,
        )
        self._own_low_level = make_rule(
            settings.rule, llm.shapes, llm.device, settings.rule_settings
        )
        self._own_max_steps = settings.max_steps_per_edit
        self.episode = EditingEpisode(
            llm,
            self._own_low_level,
            evaluator,
            max_steps_per_edit=self._own_max_steps,
            stop_when_answered=settings.stop_when_answered,
            retention_window=settings.retention_window,
            edits_per_step=settings.edits_per_step,
            version=settings.version,
        )
        weights = reward_weights(settings.reward_weights, settings.version, settings.reward)
        self.accounting = Accounting(self.episode, weights, settings.intrinsic)
        self.observer = Observer(llm, version=settings.version)
        self.observation_space = spaces.Box(-1.0, 1.0, (self.observer.size,), np.float32)
        self.action_space = self._make_action_space(len(llm.layers))

    def fork(self) -> Self:
        """Another environment of the same settings on the same resident base weights.

        Its edits are its own and are never written into the shared model. It has a random state of
        its own, to be seeded by its first ``reset``.

        Raises:
            SettingsError: this environment's model is edited; reset a new one and fork that.
        """
        # copy.copy would load the model again: EzPickle keeps the arguments.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._np_random, twin._np_random_seed = None, None
        llm = self.llm.fork()
        twin._settle(llm, self.episode.evaluator.unedited.clone_for(llm))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with a model of its own that goes on from the present state, bit for bit."""
        # The default would rebuild the environment from its arguments, as unpickling does.
        return self._copy_on(copy_model(self.llm), memo)

    def _copy_on(
        self, llm: ResidentLLM, memo: dict[int, Any], unedited: UneditedModel | None = None
    ) -> Self:
        """A copy of this environment, state included, on another model with the same weights."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin._np_random = copy.deepcopy(self._np_random)
        twin._settle(llm, unedited)
        twin.weights_of_terms, twin.intrinsic = dict(self.weights_of_terms), self.intrinsic
        twin.episode.evaluator.on_device = self.episode.evaluator.on_device
        if self.episode.rule is not self._own_low_level:
            twin.episode.use(self.episode.rule.clone_for(llm), self.episode.max_steps_per_edit)
        if self.episode.facts:
            twin.restore_state(self.save_state())
        return twin

    # -- Gymnasium ------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begins a new episode: the unedited model and a stream drawn with the environment's seed.

        Args:
            seed: Seeds ``np_random``, from which the stream is drawn.
            options: ``{"requests": [Request, …]}`` replaces the drawn stream.

        Raises:
            PromptError: a request of the stream cannot be tokenised; nothing has changed.
            SettingsError: unknown option, or requests that are none; nothing has changed.
        """
        info = run(self.begin(seed=seed, options=options))
        return self.observe(), info

    def begin(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> Passes[dict[str, Any]]:
        """:meth:`reset` as passes, without the observation."""
        random = copy.deepcopy((self._np_random, self._np_random_seed))
        try:
            super().reset(seed=seed)
            generator = self.np_random if self.shuffle else None
            facts = draw_stream(options, self.requests, self.num_edits, generator)
            yield from self.episode.start(facts)
        except HieditError:
            self._np_random, self._np_random_seed = random
            raise
        self.accounting.begin()
        self._begin_fact()
        return self._tell(self.accounting.first())

    def step(self, action: Any) -> StepResult:
        """One step; what it means depends on the id, see the class docstring."""
        reward, ended, info = run(self.act(action))
        return self.observe(), reward, ended, False, info

    def act(self, action: Any) -> Passes[Outcome]:
        """:meth:`step` as passes, without the observation; checks the action when it is called."""
        choice = self._check_action(action)
        self._require_running()
        return self._step(partial(self._write, choice))

    def render(self) -> Any:
        """The edits so far: text (``"ansi"``) or a picture, H × W × 3 uint8 (``"rgb_array"``)."""
        if self.render_mode == "ansi":
            return rendering.render_ansi(self.history)
        if self.render_mode == "rgb_array":
            return rendering.render_rgb(self.history)
        gym.logger.warn("render() was called without a render_mode; pass it to gym.make")
        return None

    def observe(self) -> NDArray[np.float32]:
        """The present observation, float32."""
        observation: NDArray[np.float32] = self.observer.batch([self.view()])[0].cpu().numpy()
        return observation

    def view(self) -> View:
        """What the present observation is made of."""
        self._require_started()
        episode = self.episode
        share = episode.written_counts / max(episode.position, 1)
        return View(
            llm=self.llm,
            capture=episode.capture,
            written_share=share.astype(np.float32),
            steps_share=min(episode.steps / episode.max_steps_per_edit, 1.0),
            stream_share=episode.position / len(episode.facts),
            counts=tuple(len(fact.prompts) for fact in episode.unit),
            standing=None if episode.standing is None else episode.standing.metrics,
        )

    # -- for torch agents -------------------------------------------------------------------------

    @property
    def capture(self) -> Capture:
        """The full keys and value gradients of the present unit, on the model's device."""
        self._require_running()
        return self.episode.capture

    def observe_fact(self) -> Capture:
        """:attr:`capture`, after the rule's statistics took it in (once per fact and weights)."""
        self._require_running()
        return self.episode.observe()

    def loss(self, updates: Updates, *, l2: float = 0.0) -> Tensor:
        """What the model would lose by these updates, without writing them.

        Args:
            updates: One :class:`~hiedit_env.resident.low_rank.LowRankUpdate` or None per layer.
            l2: Weight η of Σ_l ‖Δ_l‖²_F.

        Returns:
            Scalar tensor, differentiable in the factors of the updates: the negative of the edit,
            locality and recent-retention terms as under ``reward="loss"``, weighted by the
            environment's ``reward_weights``, plus the penalty.

        Raises:
            UpdateShapeError, NonFiniteUpdateError: updates that do not fit or are not finite.
        """
        self._require_running()
        episode = self.episode
        return episode.evaluator.loss(
            episode.unit, episode.remembered, updates, self.weights_of_terms, l2
        )

    def apply(
        self, updates: Updates, *, judge: Judging = "step", rule_made: bool = False
    ) -> StepResult:
        """Writes the given updates as one primitive step of the present fact.

        Args:
            updates: One :class:`~hiedit_env.resident.low_rank.LowRankUpdate` or None per layer;
                detached before they are written.
            judge: When the model is judged: at every ``"step"``, once at the end of the
                ``"fact"`` (the reward there is the increase of the terms over the whole fact), or
                ``"never"``. The reward of a step without judgement is 0, and only ``efficacy`` and
                ``answered`` of its metrics are known. With ``intrinsic`` every step is judged.
            rule_made: Whether updates that are not finite end the episode, as they do in ``step``,
                and are not an error of the caller's.

        Returns:
            The same five-tuple as :meth:`step`.

        Raises:
            UpdateShapeError, NonFiniteUpdateError: nothing has changed.
        """
        self._require_running()

        def write(everything: bool) -> Passes[NDArray[np.bool_]]:
            every = np.ones(len(self.llm.layers), bool)
            return self.episode.primitive(self.episode.propose(every) if everything else updates)

        reward, ended, info = run(self._step(write, rule_made=rule_made, judge=judge))
        return self.observe(), reward, ended, False, info

    def use_low_level(
        self, low_level: UpdateRule | None, *, max_steps_per_edit: int | None = None
    ) -> None:
        """Puts a live update rule in the place of the one the environment was made with.

        The present episode ends: :meth:`reset` begins one with the new rule.

        Args:
            low_level: Made for ``llm.shapes`` on ``llm.device``; None for the environment's own.
            max_steps_per_edit: Maximum number of primitive steps per fact from now on; None for
                the environment's own.

        Raises:
            SettingsError: a rule for other layers, or fewer than one step; nothing has changed.
        """
        rule = self._own_low_level if low_level is None else low_level
        steps = self._own_max_steps if max_steps_per_edit is None else max_steps_per_edit
        if rule.shapes != self.llm.shapes:
            raise SettingsError(
                f"the low level is made for layers of shapes {rule.shapes}, the environment's are "
                f"{self.llm.shapes}; give both the same layers"
            )
        self.episode.use(rule, steps)

    def save_state(self) -> EnvState:
        """The whole state: weights, statistics, random state, position; bit-exact and cheap."""
        self._require_started()
        return EnvState(
            episode=self.episode.save(),
            random=self.np_random.bit_generator.state,
            records=tuple(self.history.records),
            edit_reward=self.accounting.edit_reward,
        )

    def return_point(self) -> Callable[[], None]:
        """A function that brings this environment back to where it is now, begun or not."""
        generator, seed = self._np_random, self._np_random_seed
        random = None if generator is None else generator.bit_generator.state
        state = self.save_state() if self.episode.facts else None

        def back() -> None:
            if state is None:
                self.episode.use(self.episode.rule, self.episode.max_steps_per_edit)
            else:
                self.restore_state(state)
            self._np_random, self._np_random_seed = generator, seed
            if generator is not None and random is not None:
                generator.bit_generator.state = random

        return back

    def restore_state(self, state: EnvState) -> None:
        """Goes back (or forward) to a saved state of this environment, bit for bit."""
        self.episode.restore(state.episode)
        self.np_random.bit_generator.state = state.random
        self.accounting.begin()
        self.accounting.history.records = list(state.records)
        self.accounting.edit_reward = state.edit_reward

    # -- what an id adds --------------------------------------------------------------------------

    @abstractmethod
    def _make_action_space(self, num_layers: int) -> spaces.Space[Any]: ...

    @abstractmethod
    def _check_action(self, action: Any) -> Choice:
        """The action, checked; raises ActionError."""

    def _carry_out(self, choice: Choice) -> Passes[NDArray[np.bool_]]:
        """One primitive step by the update rule; gives L bool, the layers written.

        An answered fact is left alone.
        """
        if self.episode.edit_over or not choice.layers.any():
            return self.episode.primitive((None,) * len(self.llm.layers))
        self.episode.rule.look(self.observe)
        return self.episode.primitive(self.episode.propose(choice.layers, choice.multipliers))

    def _begin_fact(self) -> None:
        """Called when a new fact begins."""

    def _tell(self, info: dict[str, Any]) -> dict[str, Any]:
        """The information of a step, with what an id adds to it."""
        return info

    def _write(self, choice: Choice, everything: bool) -> Passes[NDArray[np.bool_]]:
        """Carries out a choice, or the same with all layers."""
        if everything:
            choice = replace(choice, layers=np.ones_like(choice.layers))
        return self._carry_out(choice)

    def _step(
        self, write: Write, *, rule_made: bool = True, judge: Judging = "step"
    ) -> Passes[Outcome]:
        """One step of the accounting, with what an id adds."""
        reward, ended, info = yield from self.accounting.step(
            write, rule_made=rule_made, judge=judge
        )
        if info["edit_over"] and not ended:
            self._begin_fact()
        return reward, ended, self._tell(info)
