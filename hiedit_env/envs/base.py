"""What the environments share: construction, reset, information, torch agents' door."""

from __future__ import annotations

import copy
import inspect
import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray
from torch import Tensor

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import longest_prompt
from hiedit_env.datasets.streams import stream
from hiedit_env.envs import rendering
from hiedit_env.envs.accounting import Judging, Paid, StepSemantics
from hiedit_env.envs.episode import LEVELS, EditingEpisode
from hiedit_env.envs.observations import Observer, View
from hiedit_env.envs.scheduler import Passes, run
from hiedit_env.envs.settings import RENDER_MODES, EnvSettings, draw_stream, reward_weights
from hiedit_env.envs.state import EnvState, History
from hiedit_env.errors import HieditError, SettingsError
from hiedit_env.evaluation.reward import Evaluator
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import check_rule, make_rule

Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


class EditingEnv(StepSemantics, gym.Env[NDArray[np.float32], Any], gym.utils.EzPickle):
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
        self.weights_of_terms = reward_weights(settings.reward_weights)
        self.render_mode = settings.render_mode
        self.intrinsic = settings.intrinsic
        self.shuffle = settings.shuffle
        self.num_edits = settings.num_edits
        self.model_name = settings.model
        self.dataset = settings.facts
        self.requests = load_requests(self.dataset)
        stream(self.requests, settings.num_edits, np.random.default_rng(0))
        loaded = load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            progress=settings.progress,
            layers=settings.layers,
            tokens=longest_prompt(self.requests),
        )
        candidates = find_candidates(loaded.model, settings.layers, settings.model)
        self.settings = settings
        llm = ResidentLLM(loaded.model, loaded.tokenizer, candidates)
        for note in llm.notes:
            print(f"hiedit: {note}", file=sys.stderr)
        self._settle(llm)

    def _settle(self, llm: ResidentLLM, unedited: UneditedModel | None = None) -> None:
        """Builds on a model everything that belongs to one episode.

        Args:
            llm: The model.
            unedited: Asks the unedited model, see
                :class:`~hiedit_env.evaluation.reward.Evaluator`.
        """
        settings = self.settings
        self.llm = llm
        evaluator = Evaluator(
            llm,
            kind=settings.reward,
            decay=settings.retention_decay,
            reference=settings.locality_reference,
            unedited=unedited,
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
        )
        self.observer = Observer(llm)
        self.observation_space = spaces.Box(-1.0, 1.0, (self.observer.size,), np.float32)
        self.history = History(llm.names, 0)
        self._edit_reward = 0.0
        self.action_space = self._make_action_space(len(llm.layers))

    def fork(self) -> Self:
        """Another environment of the same settings on the same resident base weights.

        Its edits are its own and are never written into the shared model. It has a random state of
        its own, to be seeded by its first ``reset``.

        Raises:
            SettingsError: this environment's model is edited; reset a new one and fork that.
        """
        # copy.copy would build a whole environment, since that is how EzPickle is read.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._np_random, twin._np_random_seed = None, None
        llm = self.llm.fork()
        twin._settle(llm, self.episode.evaluator.unedited.clone_for(llm))
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
        self.history = History(self.llm.names, len(self.episode.facts))
        self._edit_reward = 0.0
        self._begin_fact()
        nothing = dict.fromkeys((*LEVELS, "collapse"), 0.0)
        none = np.zeros(len(self.llm.layers), bool)
        return self._info(nothing, self.episode.reading.metrics, none, 0)

    def step(self, action: Any) -> Step:
        """One step; what it means depends on the id, see the class docstring."""
        reward, ended, info = run(self.act(action))
        return self.observe(), reward, ended, False, info

    def act(self, action: Any) -> Passes[Paid]:
        """:meth:`step` as passes, without the observation."""
        chosen = self._check_action(action)
        self._require_running()
        return self._pay(lambda: self._run(*chosen), lambda: self._run_all(*chosen))

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
        episode = self.episode
        share = episode.written_counts / max(episode.position, 1)
        return View(
            llm=self.llm,
            capture=episode.capture,
            written_share=share.astype(np.float32),
            steps_share=min(episode.steps / episode.max_steps_per_edit, 1.0),
            stream_share=episode.position / len(episode.facts),
        )

    # -- for torch agents -------------------------------------------------------------------------

    @property
    def capture(self) -> Capture:
        """The full keys and value gradients of the present fact, on the model's device."""
        self._require_running()
        return self.episode.capture

    def loss(self, updates: Updates, *, l2: float = 0.0) -> Tensor:
        """What the model would lose by these updates, without writing them.

        Args:
            updates: One :class:`~hiedit_env.resident.low_rank.LowRankUpdate` or None per layer.
            l2: Weight η of Σ_l ‖Δ_l‖²_F.

        Returns:
            Scalar tensor, differentiable in the factors of the updates: the negative of the edit,
            locality and retention terms as under ``reward="loss"``, weighted by the
            environment's ``reward_weights``, plus the penalty.

        Raises:
            UpdateShapeError, NonFiniteUpdateError: updates that do not fit or are not finite.
        """
        self._require_running()
        episode = self.episode
        return episode.evaluator.loss(
            episode.fact, episode.remembered, updates, self.weights_of_terms, l2
        )

    def apply(self, updates: Updates, *, judge: Judging = "step", rule_made: bool = False) -> Step:
        """Writes the given updates as one primitive step of the present fact.

        Args:
            updates: One :class:`~hiedit_env.resident.low_rank.LowRankUpdate` or None per layer;
                detached before they are written.
            judge: When the model is judged and levels are paid: at every ``"step"``, once at the
                end of the ``"fact"`` (what the levels rose by until then is paid there), or
                ``"never"``. A step without judgement is paid 0, and its ``metrics`` hold only what
                the fact's own reading tells. With ``intrinsic`` every step is judged.
            rule_made: Whether updates that are not finite end the episode, as they do in ``step``,
                and are not an error of the caller's.

        Returns:
            The same five-tuple as :meth:`step`.

        Raises:
            UpdateShapeError, NonFiniteUpdateError: nothing has changed.
        """
        self._require_running()
        everything = np.ones(len(self.llm.layers), bool)
        reward, ended, info = run(
            self._pay(
                lambda: self.episode.primitive(updates),
                lambda: self.episode.primitive(self.episode.propose(everything)),
                rule_made=rule_made,
                judge=judge,
            )
        )
        return self.observe(), reward, ended, False, info

    def use_low_level(
        self, low_level: UpdateRule | None, *, max_steps_per_edit: int | None = None
    ) -> None:
        """Puts a live update rule in the place of the one the environment was made with.

        The present episode ends: :meth:`reset` begins one with the new rule.

        Args:
            low_level: Made for ``llm.shapes`` on ``llm.device``; None for the environment's own.
            max_steps_per_edit: Most primitive steps per fact from now on; None for the
                environment's own.

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
            edit_reward=self._edit_reward,
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
        self.history = History(self.llm.names, len(state.episode.facts), list(state.records))
        self._edit_reward = state.edit_reward

    # -- what an id adds --------------------------------------------------------------------------

    @abstractmethod
    def _make_action_space(self, num_layers: int) -> spaces.Space[Any]: ...

    @abstractmethod
    def _check_action(self, action: Any) -> tuple[Any, ...]:
        """The action's parts, checked; raises ActionError."""

    @abstractmethod
    def _run(self, *chosen: Any) -> Passes[NDArray[np.bool_]]:
        """Runs a checked action; gives L bool, the layers written."""

    @abstractmethod
    def _run_all(self, *chosen: Any) -> Passes[NDArray[np.bool_]]:
        """The same with all layers, for the intrinsic reward."""

    def _begin_fact(self) -> None:
        """As in :class:`StepSemantics`; nothing here."""

    # -- inside -----------------------------------------------------------------------------------

    def _primitive(
        self, layers: NDArray[np.bool_], multipliers: NDArray[np.float32] | None = None
    ) -> Passes[NDArray[np.bool_]]:
        """One primitive step by the update rule; an answered fact is left alone."""
        if self.episode.edit_over or not layers.any():
            return self.episode.primitive((None,) * len(self.llm.layers))
        self.episode.rule.look(self.observe)
        return self.episode.primitive(self.episode.propose(layers, multipliers))

    def _require_started(self) -> None:
        if not self.episode.facts:
            raise ResetNeeded("call reset() before anything else")

    def _require_running(self) -> None:
        self._require_started()
        if self.episode.ended:
            raise ResetNeeded("the episode has ended; call reset() to begin a new episode")
