"""Trains an agent on the environment: ``hiedit train``.

One loop for every agent. An episode is one stream of training facts. For each fact
the high level chooses, the option runs, and

* a trained low level gets the gradient of the environment's objective (edit, paraphrases,
  unrelated prompts, remembered edits, L2) through the overlay. Only the weights at the end of the
  option count, with gradients in the updates of all its primitive steps; intermediate steps are not
  penalised, as in the environment's reward. The gradient is exact for options of one step. For
  longer ones it is first-order: how an update changes the captures of later steps is left out. For
  a low level that rehearses see :mod:`hiedit_agents.hierarchy.rehearsal`. The graphs of an option's
  updates are kept until it ends;
* a straight-through router gets the same gradient through its gates;
* a policy router gets REINFORCE (Williams 1992) on the option's reward. The baseline is the mean
  reward of the *other* options sampled for the same fact from the same state (leave-one-out) or,
  with ``intrinsic``, the reward of the same option with all layers (HiEdit's intrinsic reward).
  ``normalize_advantage`` divides advantages by their root mean square over a window, which makes
  step size and entropy weight independent of the scale of the rewards.

With ``future_damage`` the objective of a trained low level also contains a penalty for damage to
the later facts of the episode: :mod:`hiedit_agents.hierarchy.future_damage`. (A straight-through
router above it gets the same gradient.)

Gradients are averaged over a window of facts or a whole episode, then Adam steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hiedit_agents.hierarchy.calibration import calibration_prompts, own_texts
from hiedit_agents.hierarchy.future_damage import FutureDamage
from hiedit_agents.hierarchy.lesson import Lesson, make_lesson
from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.option_runner import Outcome, run_option
from hiedit_agents.hierarchy.options import Choice, HierarchicalAgent, Option
from hiedit_agents.hierarchy.policy_gradient import Tried, policy_loss
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.training_log import LogRow, Tally
from hiedit_agents.protocol import Observation, Trainable
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import stream
from hiedit_env.envs.accounting import Judging
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import Updates

#: Learning rate of a low level's vectors over that of its matrices: one number per layer (step
#: size, ridge, weight of the prior) has to go further than an entry of a matrix.
VECTOR_FACTOR = 10.0


class Trainer:
    """Trains the levels of one agent in one environment.

    Args:
        env: A LayerSelection environment; its low level and horizon become the agent's.
        agent: Built for the environment's model.
        requests: Training facts.
        settings: How to train.

    Raises:
        SettingsError: the agent has nothing to train, or there are too few facts.
    """

    def __init__(
        self,
        env: EditingEnv,
        agent: HierarchicalAgent,
        requests: Sequence[Request],
        settings: TrainSettings,
    ) -> None:
        self.env, self.agent, self.settings = env, agent, settings
        self.requests = list(requests)
        if settings.edits_per_episode > len(self.requests):
            raise SettingsError(
                f"edits_per_episode is {settings.edits_per_episode}, but there are only "
                f"{len(self.requests)} training facts"
            )
        self.high = agent.high
        self.low = agent.low if isinstance(agent.low, Trainable) else None
        self.optimizers: dict[str, torch.optim.Adam] = {}
        if settings.train_low and self.low is not None and list(self.low.parameters()):
            self.optimizers["low"] = _adam(self.low, settings.low_learning_rate, VECTOR_FACTOR)
        if settings.train_high and isinstance(self.high, Trainable):
            self.optimizers["high"] = _adam(self.high, settings.high_learning_rate, 1.0)
        # With no episodes a low level may still be calibrated.
        if settings.episodes and not self.optimizers:
            raise SettingsError(
                f"agent {agent.name!r} has nothing to train: its high level is {self.high.name!r} "
                f"and its low level {getattr(agent.low, 'name', 'the update rule')!r}; one of them "
                "must be learned (policy, straight-through; hypernetwork, rehearsal, step-sizes) "
                "and its training not switched off (as that of hiedit's low level is, which "
                "--train-low trains, and --episodes 0 calibrates and nothing more)"
            )
        if settings.own_texts and not getattr(self.low, "reads_texts", False):
            raise SettingsError(
                f"own_texts is {settings.own_texts}, but the low level "
                f"{getattr(agent.low, 'name', 'of this agent')!r} is shown no texts; leave it out, "
                "or take the low level 'neuron'"
            )
        env.use_low_level(agent.low, max_steps_per_edit=agent.max_steps_per_edit)
        self._gated = "high" in self.optimizers and getattr(self.high, "straight_through", False)
        self._sampled = "high" in self.optimizers and not self._gated
        #: Whether the objective's gradient is needed at all.
        self._differentiated = "low" in self.optimizers or self._gated
        self._generator = torch.Generator()
        penalised = settings.future_damage and "low" in self.optimizers
        self._future_damage = FutureDamage(env, self.requests, settings) if penalised else None

    def calibration_prompts(self) -> list[EncodedPrompt]:
        """Prompts of training facts that the low level is to be shown, each in one form.

        Unrelated prompts; for a low level whose ``calibrates_on`` is ``"all"`` also the facts' own
        and their paraphrases, and every fourth in chat form where the tokenizer has one. Empty for
        a low level that takes none (most do not) or had them already.
        """
        if not getattr(self.low, "wants_calibration", False):
            return []
        every = getattr(self.low, "calibrates_on", "unrelated") == "all"
        count, seed = self.settings.calibration, self.settings.seed
        return calibration_prompts(self.requests, self.env.llm.encoder, count, seed, every=every)

    def write_texts(self, on_texts: Callable[[int], None] | None = None) -> list[EncodedPrompt]:
        """What the unedited model writes itself, for :meth:`calibrate` to show the low level.

        Args:
            on_texts: Called with the number of texts after every few of them.

        Returns:
            The texts; none for a low level that is calibrated already.

        Raises:
            PromptError: the tokenizer has no token that a text begins with.
        """
        count, seed = self.settings.own_texts, self.settings.seed
        if not count or not getattr(self.low, "wants_calibration", False):
            return []
        return own_texts(self.env.llm, self.requests, count, seed, on_texts)

    def calibrate(
        self,
        on_prompt: Callable[[], None] | None = None,
        texts: Sequence[EncodedPrompt] = (),
    ) -> None:
        """Shows the low level its :meth:`calibration_prompts` at the unedited weights, once.

        Args:
            on_prompt: Called after every prompt and text.
            texts: From :meth:`write_texts`.
        """
        llm, chosen = self.env.llm, self.calibration_prompts()
        if not chosen:
            return
        llm.restore_unedited()
        if isinstance(self.low, Neuron):

            def on_prompts(count: int) -> None:
                for _ in range(count if on_prompt else 0):
                    cast(Any, on_prompt)()

            self.low.calibrate_on(chosen, on_prompts, texts)
            return

        def captures() -> Iterator[Capture]:
            for prompt in chosen:
                yield llm.read(prompt).capture()
                if on_prompt is not None:
                    on_prompt()

        cast(Any, self.low).calibrate(captures())

    # -- one episode ------------------------------------------------------------------------------

    def episode(self, number: int, on_fact: Callable[[Tally], None] | None = None) -> LogRow:
        """Plays and learns from episode ``number``; everything random follows from it.

        Args:
            number: From 0.
            on_fact: Called after every fact with the :class:`Tally` so far.

        Returns:
            Means over the episode's facts: ``reward`` (where only gradients are learned from,
            the edited model is not judged, and the reward is the low level's own, −L_t),
            ``loss`` (L_t, without the penalty for future damage, at the end of the options that
            wrote something), ``right_after`` (efficacy, share), ``layers``, ``steps``; and
            ``updates``, the number of optimiser steps, with the mean ``gradient_norm``; and
            ``collapsed``, 1 if the model collapsed, which ended the episode early, else 0.
        """
        settings = self.settings
        seed = np.random.SeedSequence([settings.seed, number])
        self._generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        levels = seed.generate_state(3)
        self.high.reset(int(levels[1]))
        if self.agent.low is not None:
            self.agent.low.seed(int(levels[2]))
        self._anneal(number)
        rng = np.random.default_rng(seed)
        facts = stream(self.requests, settings.edits_per_episode, rng)
        observation, _ = self.env.reset(seed=0, options={"requests": facts})
        tally = Tally()
        tried: list[list[Tried]] = []
        window = settings.window or len(facts)
        for place in range(len(facts)):
            if self._future_damage is not None:
                self._future_damage.draw(rng)
            outcome, options = self._fact(observation, tally)
            observation = outcome.observation
            tried.append(options)
            tally.add(outcome, judged=self._sampled)
            if on_fact is not None:
                on_fact(tally)
            last = outcome.ended or place + 1 == len(facts)
            if last or (place + 1) % window == 0:
                self._reinforce(tried)
                tally.norms.append(self._step(len(tried)))
                tried = []
            if last:
                break
        return {**tally.row(), "collapsed": float(bool(outcome.info["error_type"]))}

    # -- one fact ---------------------------------------------------------------------------------

    def _fact(self, observation: Observation, tally: Tally) -> tuple[Outcome, list[Tried]]:
        """Chooses and runs one option; a policy router's others are tried first, and undone."""
        settings, env = self.settings, self.env
        if not self._sampled:
            sample = self._generator if self._gated else None
            return self._run(self.high.choose(observation, env.capture, sample), tally), []
        state = env.save_state()
        choices: list[Choice] = []
        rewards: list[float] = []
        baseline = 0.0
        try:
            for _ in range(settings.samples_per_fact - 1):
                choices.append(self.high.choose(observation, env.capture, self._generator))
                rewards.append(self._reward(choices[-1].layers))
                env.restore_state(state)
            if settings.intrinsic:
                baseline = self._reward(np.ones(len(env.llm.layers), bool))
                env.restore_state(state)
        except BaseException:
            env.restore_state(state)
            raise
        choices.append(self.high.choose(observation, env.capture, self._generator))
        outcome = self._run(choices[-1], tally)
        advantages = np.array([*rewards, outcome.reward]) - baseline
        if len(choices) > 1 and not settings.intrinsic:
            # Leave-one-out: every option is compared with the mean of the others.
            advantages *= len(choices) / (len(choices) - 1)
            advantages -= advantages.mean()
        return outcome, [Tried(c, float(a)) for c, a in zip(choices, advantages, strict=True)]

    def _run(self, choice: Choice, tally: Tally) -> Outcome:
        option = self._option(choice)
        gates = choice.gates if self._gated else None
        made: list[Updates] = []
        lesson: Lesson | None = None

        def learn(capture: Capture) -> Updates:
            nonlocal lesson
            layers = np.ones_like(choice.layers) if gates is not None else choice.layers
            made.append(option.policy.compute(capture, layers, gates))
            # Only after the step was written is it known whether it was the last one, and then the
            # weights have changed that a backward pass needs.
            lesson = self._lesson(made)
            chosen = zip(made[-1], choice.layers, strict=True)
            return tuple(
                update.detach() if update is not None and used else None for update, used in chosen
            )

        policy = learn if self._differentiated else None
        # The reward costs a pass; only policy-gradient learning needs it.
        judge: Judging = "fact" if self._sampled else "never"
        outcome = run_option(
            self.env, option, gamma=self.settings.gamma, policy=policy, judge=judge
        )
        if lesson is not None:
            lesson.learn()
            tally.losses.append(lesson.loss)
        return outcome

    def _lesson(self, made: Sequence[Updates]) -> Lesson | None:
        """See :func:`~hiedit_agents.hierarchy.lesson.make_lesson`."""
        return make_lesson(self.env, made, self.settings.l2, self._future_damage)

    def _reward(self, layers: np.ndarray) -> float:
        """The reward of an option; the caller restores the state."""
        option = self._option(Choice(layers))
        return run_option(self.env, option, gamma=self.settings.gamma).reward

    def _option(self, choice: Choice) -> Option:
        env = self.env
        return Option(choice.layers, env.rule, env.max_steps_per_edit, env.stop_when_answered)

    # -- learning -------------------------------------------------------------------------------

    def _reinforce(self, tried: Sequence[Sequence[Tried]]) -> None:
        """Adds the gradient of :func:`.policy_gradient.policy_loss` over a window of facts."""
        loss = policy_loss(tried, self.settings, self.high.name)
        if loss is not None and loss.requires_grad:
            torch.autograd.backward(loss)

    def _anneal(self, number: int) -> None:
        """Sets the learning rates of an episode: from the full ones down to 0 after the last."""
        left = 1 - number / self.settings.episodes if self.settings.anneal else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = left * group["initial_lr"]

    def _step(self, facts: int) -> float:
        """One optimiser step on the mean gradient over ``facts``; returns its norm."""
        total = 0.0
        for optimizer in self.optimizers.values():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= facts
            norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += norm**2
        return math.sqrt(total)

    # -- state ------------------------------------------------------------------------------------

    def levels(self) -> dict[str, Trainable]:
        """The levels that have parameters, trained here or not."""
        found: dict[str, Any] = {"high": self.high, "low": self.agent.low}
        return {name: level for name, level in found.items() if isinstance(level, Trainable)}

    def optimizer_state(self) -> dict[str, Any]:
        """The optimisers' moments, nested by level, parameter and name."""
        return {
            name: {str(i): dict(entry) for i, entry in optimizer.state_dict()["state"].items()}
            for name, optimizer in self.optimizers.items()
        }

    def load_optimizer_state(self, flat: dict[str, Tensor]) -> None:
        """Puts moments back that were saved by dotted path: ``level.parameter.name``."""
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for path, tensor in flat.items():
                level, parameter, entry = path.split(".")
                if level == name:
                    state.setdefault(int(parameter), {})[entry] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _adam(level: Trainable, learning_rate: float, vector_factor: float) -> torch.optim.Adam:
    parameters = cast(list[nn.Parameter], list(level.parameters()))
    few = [p for p in parameters if p.ndim == 1]
    many = [p for p in parameters if p.ndim > 1]
    groups = [(many, learning_rate), (few, vector_factor * learning_rate)]
    return torch.optim.Adam(
        [{"params": part, "lr": lr, "initial_lr": lr} for part, lr in groups if part]
    )
