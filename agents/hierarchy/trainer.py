"""Trains an agent on the environment: ``hiedit train``.

One loop for every agent. A trajectory is one episode on a stream of training facts. For each
fact the high level chooses, the option runs, and

* a trained low level gets the gradient of the environment's objective (edit, paraphrases,
  unrelated prompts, remembered edits, L2) through the overlay, at the weights the option leaves
  behind, through the updates of all its primitive steps: what is left undone by a step that another
  one follows costs nothing, as in the environment's reward. It is exact for options of one step;
  what an update changes in the captures of later steps is left out (first order), and where a low
  level rehearses, what :mod:`hiedit_agents.hierarchy.rehearsal` says. The graphs of an option's
  updates are kept until it ends;
* a straight-through router gets the same gradient through its gates;
* a policy router gets REINFORCE (Williams 1992) on the option's reward. What is subtracted is the
  mean reward of the *other* options sampled for the same fact from the same state (leave-one-out)
  or, with ``intrinsic``, the reward of the same option with all layers (HiEdit's intrinsic reward).

  ``normalize_advantage`` divides by their root mean square over a window, which makes step size and
  entropy weight independent of the scale of the rewards.

With ``lasting`` the objective of a low level that is trained is also charged for what the option
leaves behind for the rest of the episode: :mod:`hiedit_agents.hierarchy.future_damage`. (A
straight-through router above it gets the same gradient.)

Gradients are averaged over a window of facts or a whole trajectory, then Adam steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from hiedit_agents.hierarchy.future_damage import LastingDamage
from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_agents.hierarchy.option_runner import Outcome, run_option
from hiedit_agents.hierarchy.options import Choice, HierarchicalAgent, Option
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.protocol import Observation, Trainable
from torch import Tensor, nn

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.streams import stream
from hiedit_env.envs.accounting import Judging
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import NonFiniteUpdateError, SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate, Updates

#: Learning rate of a low level's vectors over that of its matrices: one number per layer (step
#: size, ridge, weight of the prior) has to go further than an entry of a matrix.
VECTOR_FACTOR = 10.0
#: A row of the training log: one per trajectory.
LogRow = dict[str, float]


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
        if settings.edits_per_trajectory > len(self.requests):
            raise SettingsError(
                f"edits_per_trajectory is {settings.edits_per_trajectory}, but there are only "
                f"{len(self.requests)} training facts"
            )
        self.high = agent.high
        self.low = agent.low if isinstance(agent.low, Trainable) else None
        self.optimizers: dict[str, torch.optim.Adam] = {}
        if settings.train_low and self.low is not None:
            self.optimizers["low"] = _adam(self.low, settings.low_learning_rate, VECTOR_FACTOR)
        if settings.train_high and isinstance(self.high, Trainable):
            self.optimizers["high"] = _adam(self.high, settings.high_learning_rate, 1.0)
        # With no trajectories a low level may still be calibrated.
        if settings.trajectories and not self.optimizers:
            raise SettingsError(
                f"agent {agent.name!r} has nothing to train: its high level is {self.high.name!r} "
                f"and its low level {getattr(agent.low, 'name', 'the update rule')!r}; one of them "
                "must be learned (policy, straight-through; hypernetwork, rehearsal, step-sizes) "
                "and its training not switched off (as that of hiedit's low level is, which "
                "--train-low trains, and --trajectories 0 calibrates and nothing more)"
            )
        env.use_low_level(agent.low, max_steps_per_edit=agent.max_steps_per_edit)
        self._gated = "high" in self.optimizers and getattr(self.high, "straight_through", False)
        self._sampled = "high" in self.optimizers and not self._gated
        #: Whether the objective's gradient is needed at all.
        self._differentiated = "low" in self.optimizers or self._gated
        self._generator = torch.Generator()
        charged = settings.lasting and "low" in self.optimizers
        self._lasting = LastingDamage(env, self.requests, settings) if charged else None

    def calibration_prompts(self) -> list[Probe]:
        """Unrelated prompts of training facts that the low level is to be shown.

        Empty for a low level that takes none (all but the decorrelated form) or had them already.
        """
        if not (isinstance(self.low, Hypernetwork) and self.low.wants_calibration):
            return []
        rng = np.random.default_rng([self.settings.seed, 2])
        probes = list(dict.fromkeys(p for request in self.requests for p in request.locality))
        return [probes[i] for i in rng.permutation(len(probes))[: self.settings.calibration]]

    def calibrate(self, on_prompt: Callable[[], None] | None = None) -> None:
        """Shows the low level its :meth:`calibration_prompts` at the unedited weights, once."""
        low, llm = self.low, self.env.llm
        chosen = self.calibration_prompts()
        if not chosen or not isinstance(low, Hypernetwork):
            return
        llm.restore_unedited()

        def captures() -> Iterator[Capture]:
            for probe in chosen:
                yield llm.read(llm.encode(probe.prompt, probe.answer)).capture()
                if on_prompt is not None:
                    on_prompt()

        low.calibrate(captures())

    # -- one trajectory ---------------------------------------------------------------------------

    def trajectory(self, number: int, on_fact: Callable[[Tally], None] | None = None) -> LogRow:
        """Plays and learns from trajectory ``number``; everything random follows from it.

        Args:
            number: From 0.
            on_fact: Called after every fact with the :class:`Tally` so far.

        Returns:
            Means over the trajectory's facts: ``reward`` (where only gradients are learned from,
            the edited model is not judged, and the reward is the low level's own, −L_t),
            ``loss`` (L_t, without what ``lasting`` charges, at the end of the options that wrote
            something), ``right_after`` (efficacy, share), ``layers``, ``steps``; and ``updates``,
            the number of optimiser steps, with the mean ``gradient_norm``.
        """
        settings = self.settings
        seed = np.random.SeedSequence([settings.seed, number])
        self._generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        levels = seed.generate_state(3)
        self.high.reset(int(levels[1]))
        if self.agent.low is not None:
            self.agent.low.seed(int(levels[2]))
        rng = np.random.default_rng(seed)
        facts = stream(self.requests, settings.edits_per_trajectory, rng)
        observation, _ = self.env.reset(seed=0, options={"requests": facts})
        tally = Tally()
        tried: list[list[Tried]] = []
        window = settings.window or len(facts)
        for place in range(len(facts)):
            if self._lasting is not None:
                self._lasting.draw(rng)
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
        return tally.row()

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
        # What is paid is only needed where it is learned from.
        judge: Judging = "fact" if self._sampled else "never"
        outcome = run_option(
            self.env, option, gamma=self.settings.gamma, policy=policy, judge=judge
        )
        if lesson is not None:
            lesson.learn()
            tally.losses.append(lesson.loss)
        return outcome

    def _lesson(self, made: Sequence[Updates]) -> Lesson | None:
        """The objective at the weights after an option's updates, and the gradient in all of them.

        The gradient is that of what ``lasting`` charges, too.

        Args:
            made: Updates of the primitive steps so far, attached to the parameters they come from;
                all but the last are written already.

        Returns:
            None after updates that wreck the model: they teach nothing, the environment ends the
            episode.
        """
        factors = [f for step in made for u in step if u is not None for f in (u.left, u.right)]
        leaves = [factor.detach().requires_grad_(factor.requires_grad) for factor in factors]
        pairs = iter(zip(leaves[::2], leaves[1::2], strict=True))
        own = [[None if u is None else LowRankUpdate(*next(pairs)) for u in step] for step in made]
        try:
            written = [_with_earlier(layer) for layer in zip(*own, strict=True)]
            loss = self.env.loss(written)
            damage = None if self._lasting is None else self._lasting.loss(written)
        except NonFiniteUpdateError:
            return None
        if self.settings.l2:
            loss = loss + self.settings.l2 * sum(
                u.squared_norm() for step in own for u in step if u is not None
            )
        total = loss if damage is None else loss + damage
        if not torch.isfinite(total):
            return None
        places = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        gradients = torch.autograd.grad(total, [leaves[i] for i in places]) if places else ()
        return Lesson(float(loss.detach()), [factors[i] for i in places], gradients)

    def _reward(self, layers: np.ndarray) -> float:
        """What an option would be paid; the caller restores the state."""
        option = self._option(Choice(layers))
        return run_option(self.env, option, gamma=self.settings.gamma).reward

    def _option(self, choice: Choice) -> Option:
        episode = self.env.episode
        return Option(
            choice.layers, episode.rule, episode.max_steps_per_edit, episode.stop_when_answered
        )

    # -- learning -------------------------------------------------------------------------------

    def _reinforce(self, tried: Sequence[Sequence[Tried]]) -> None:
        """Gradient of −Σ log π(ω) A(ω) − entropy weight × Σ entropy over a window of facts.

        Args:
            tried: For each fact the options tried, last the one the episode went on with.
        """
        settings = self.settings
        log_probabilities: list[Tensor] = []
        advantages: list[float] = []
        entropies: list[Tensor] = []
        for options in tried:
            for option in options:
                if option.choice.log_probability is None:
                    raise SettingsError(
                        f"the high level {self.high.name!r} has parameters, but its choice has no "
                        "log_probability to learn from (or say straight_through = True, and give "
                        "gates)"
                    )
                # Each counts a share, since they tell of one fact.
                log_probabilities.append(option.choice.log_probability / len(options))
                advantages.append(option.advantage)
            if options:
                entropy = options[-1].choice.entropy
                entropies += [] if entropy is None else [entropy]
        if not advantages:
            return
        weights = torch.tensor(advantages)
        if settings.normalize_advantage:
            weights = weights / weights.square().mean().sqrt().clamp_min(1e-8)
        stacked = torch.stack(log_probabilities)
        loss = -(stacked * weights.to(stacked.device)).sum()
        if entropies:
            loss = loss - settings.entropy_weight * torch.stack(entropies).sum()
        if loss.requires_grad:
            torch.autograd.backward(loss)

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


@dataclass(frozen=True, slots=True)
class Tried:
    """An option that a policy router tried for a fact.

    Args:
        choice: With the log-probability it was drawn with.
        advantage: Its own reward over what it is compared with.
    """

    choice: Choice
    advantage: float


class Tally:
    """What happened on the facts of a trajectory: a list per quantity."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.efficacy: list[float] = []
        self.layers: list[float] = []
        self.steps: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._counted = 0

    def add(self, outcome: Outcome, *, judged: bool) -> None:
        """Takes in a finished fact, whose loss is in already, if it has one.

        Args:
            outcome: What became of it.
            judged: Whether its reward was paid by the environment. If not, it is minus the loss
                that was learned from, with what an episode that ended early was paid for that.
        """
        own = self.losses[self._counted :]
        self._counted = len(self.losses)
        self.rewards.append(outcome.reward if judged else outcome.reward - sum(own))
        self.efficacy.append(float(outcome.info["metrics"].get("efficacy", 0.0)))
        self.layers.append(float(np.asarray(outcome.info["layers"]).sum()))
        self.steps.append(float(outcome.steps))

    def row(self) -> LogRow:
        """Means, see :meth:`Trainer.trajectory`."""

        def mean(values: list[float]) -> float:
            return float(np.mean(values)) if values else 0.0

        return {
            "reward": mean(self.rewards),
            "loss": mean(self.losses),
            "right_after": mean(self.efficacy),
            "layers": mean(self.layers),
            "steps": mean(self.steps),
            "updates": float(len(self.norms)),
            "gradient_norm": mean(self.norms),
        }


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an option teaches a low level.

    Args:
        loss: The objective at the weights it left behind, without what ``lasting`` charges.
        factors: Of its updates, attached to the parameters they come from.
        gradients: Of ``loss`` and the charge, in each of them.
    """

    loss: float
    factors: Sequence[Tensor]
    gradients: Sequence[Tensor]

    def learn(self) -> None:
        """Adds the gradient to that of the parameters."""
        # A choice that leaves nothing to learn (no layer, or an answered fact) has no factors.
        if self.factors:
            torch.autograd.backward(list(self.factors), list(self.gradients))


def _with_earlier(steps: Sequence[LowRankUpdate | None]) -> LowRankUpdate | None:
    """A layer's last update, plus 0 through which a gradient flows into the ones before it."""
    *earlier, last = steps
    parts = [] if last is None else [last]
    for update in earlier:
        if update is not None:
            parts += (update, update.detach().scaled(-1.0))
    if not parts:
        return None
    return LowRankUpdate(torch.cat([p.left for p in parts]), torch.cat([p.right for p in parts]))


def _adam(level: Trainable, learning_rate: float, vector_factor: float) -> torch.optim.Adam:
    parameters = cast(list[nn.Parameter], list(level.parameters()))
    few = [p for p in parameters if p.ndim == 1]
    many = [p for p in parameters if p.ndim > 1]
    groups = [(many, learning_rate), (few, vector_factor * learning_rate)]
    return torch.optim.Adam([{"params": part, "lr": lr} for part, lr in groups if part])
