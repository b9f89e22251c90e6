"""Fine-tuning as rivals: one layer over all facts (LocFT-BF), and fact by fact with a penalty."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.options import layer_selection
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_agents.rivals.descent import Descent, GivenChange, chosen_layer, references
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError, whole_number
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.rules.base import positive


class _FineTuning(FixedAgent):
    """An agent whose low level writes what the agent has trained."""

    name: ClassVar[str]

    def __init__(self, layer: int | None, learning_rate: float) -> None:
        self.layer = layer
        self.learning_rate = positive(learning_rate, "learning_rate")
        self._env: EditingEnv | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, by which a comparison that is resumed knows the agent."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Hands over a low level that writes one change per fact.

        Raises:
            SettingsError: not a LayerSelection environment, or no such layer.
        """
        self._env = layer_selection(env, self.name)
        llm = self._env.llm
        self._index = chosen_layer(llm, self.layer, self.name)
        self._low = GivenChange(llm)
        self._env.use_low_level(self._low, max_steps_per_edit=1)
        self._rng = np.random.default_rng(seed)

    def _action(self, written: bool) -> NDArray[np.int8]:
        assert self._env is not None
        action = np.zeros(len(self._env.llm.layers), np.int8)
        action[self._index] = written
        return action

    def _running(self) -> EditingEnv:
        if self._env is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        return self._env


class BreadthFirst(_FineTuning):
    """LocFT-BF: ordinary fine-tuning of one layer, epoch by epoch over all facts of the stream.

    It is no lifelong method: it reads the whole stream at its first step, trains, and writes the
    result with the first fact that the model does not answer yet; later facts change nothing. Adam,
    mini-batches in random order, no step on a batch below ``enough``, and an end as soon as an
    epoch's mean loss is below it. After arXiv 2509.22072 and its released code, whose learning
    rate, batch size and number of epochs are the defaults.

    Args:
        layer: Index among the candidates; None for the one nearest to 22/32 of the depth.
        learning_rate: Of Adam.
        epochs: At most so many.
        batch_size: Facts per step.
        enough: Nats per token.
    """

    name: ClassVar[str] = "locft-bf"

    def __init__(
        self,
        *,
        layer: int | None = None,
        learning_rate: float = 5e-4,
        epochs: int = 25,
        batch_size: int = 100,
        enough: float = 1e-2,
    ) -> None:
        super().__init__(layer, learning_rate)
        self.epochs = whole_number(epochs, "epochs", 1)
        self.batch_size = whole_number(batch_size, "batch_size", 1)
        self.enough = positive(enough, "enough")

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8: the layer until it is written, nothing afterwards."""
        env = self._running()
        if not self._low.changes:
            self._low.changes = self._train([p for fact in env.episode.facts for p in fact.prompts])
        return self._action(env.llm.change(self._index) is None)

    def _train(self, prompts: list[EncodedPrompt]) -> dict[int, Any]:
        descent = Descent(self._running().llm, [self._index], self.learning_rate, self.enough)
        for _ in range(self.epochs):
            order = [prompts[i] for i in self._rng.permutation(len(prompts))]
            total = 0.0
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                total += descent.step(batch)[0] * len(batch)
            if total / len(prompts) < self.enough:
                break
        return descent.result()


class PenalisedFineTuning(_FineTuning):
    """FT+KL: fine-tuning of one layer fact by fact, held to the unedited model on other prompts.

    Adam from new on every fact, until all answer tokens are the argmax or ``steps`` are done, on
    −log p(answer) + ``weight`` · KL[unedited ‖ present] at the unedited model's own answers to
    unrelated prompts of another data set than the one that is edited. After the baseline of that
    name in arXiv 2110.11309; learning rate, weight and prompts are ours.

    Args:
        layer: Index among the candidates; None for the one nearest to 22/32 of the depth.
        learning_rate: Of Adam.
        steps: At most so many per fact.
        weight: Of the penalty; 0 is plain fine-tuning.
        probes: Unrelated prompts per step.
        dataset: Where they are from; must not be what is evaluated.
    """

    name: ClassVar[str] = "fine-tuning-kl"

    def __init__(
        self,
        *,
        layer: int | None = None,
        learning_rate: float = 5e-4,
        steps: int = 25,
        weight: float = 1.0,
        probes: int = 8,
        dataset: str = "world-facts-train",
    ) -> None:
        super().__init__(layer, learning_rate)
        self.steps = whole_number(steps, "steps", 1)
        self.probes = whole_number(probes, "probes", 0)
        if not 0 <= weight < np.inf:
            raise SettingsError(f"weight must be a number ≥ 0, got {weight!r}")
        self.weight, self.dataset = float(weight), dataset
        requests = load_requests(dataset)
        texts = [(probe.prompt, probe.answer) for r in requests for probe in r.locality]
        self._texts = list(dict.fromkeys(texts))
        if self.probes and self.weight and not self._texts:
            raise SettingsError(
                f"agent {self.name!r}: {dataset} has no unrelated prompts; name another dataset"
            )

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """As in the base class; encodes the unrelated prompts."""
        super().reset(env, seed)
        llm = self._running().llm
        self._unedited = UneditedModel(llm)
        self._bank = [llm.encode(prompt, answer) for prompt, answer in self._texts]

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8: the layer."""
        env = self._running()
        if env.episode.edit_over:
            return self._action(written=False)
        descent = Descent(env.llm, [self._index], self.learning_rate)
        for _ in range(self.steps):
            _, right = descent.step(list(env.fact.prompts), self._others(), self.weight)
            if right:
                break
        self._low.changes = descent.result()
        return self._action(written=True)

    def _others(self) -> dict[EncodedPrompt, Tensor]:
        """Unrelated prompts of one step, with what the unedited model says to them."""
        count = min(self.probes, len(self._bank)) if self.weight else 0
        if not count:
            return {}
        drawn = self._rng.choice(len(self._bank), count, replace=False)
        return references(self._unedited, [self._bank[i] for i in drawn])
