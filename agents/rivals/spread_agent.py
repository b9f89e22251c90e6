"""The common part of the agents MEMIT and AlphaEdit: which matrices, what they read elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.calibration import calibration_prompts
from hiedit_agents.hierarchy.openings import OPENINGS
from hiedit_agents.hierarchy.options import layer_selection
from hiedit_agents.protocol import FixedAgent, Observation
from hiedit_agents.rivals.spread import Spread, looked_up, second_moments
from hiedit_agents.rivals.values import ValueSearch
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError, as_float, whole_number
from hiedit_env.model.architectures import block_list, outputs_of_mlps
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import positive

#: Second moments by model, then by layers and prompts: agents of one comparison share them.
_MEASURED: WeakKeyDictionary[ResidentLLM, dict[Any, dict[int, Tensor]]] = WeakKeyDictionary()


class SpreadAgent(FixedAgent, ABC):
    """Spreads every fact over the last matrices of several MLPs, see :mod:`.spread`.

    Args:
        blocks: Indices of the blocks to write into, as in ``blocks=6:7:8``; None for every block
            whose MLP's last matrix is a candidate layer, but not the model's last block, behind
            which no token reads another one.
        steps: Largest number of times that a fact is written while it is not answered; the papers
            write once.
        step_size: Length of a step of the search, as a share of that of the hidden state.
        momentum: Share of the last step that is taken again.
        search_steps: Largest number of steps of the search.
        enough: −log p per answer token, in nats, below which a fact needs no more.
        clamp: Largest length of a vector, as a share of that of the hidden state.
        kl_factor: Weight of the divergence behind "SUBJECT is a".
        weight_decay: Weight of the vector's length over the hidden state's squared length.
        openings: Number of opening words that plain prompts are read behind as well.
        prompts: Largest number of prompts from which second moments are taken.
        dataset: Where they are from; must not be what is evaluated.

    Raises:
        SettingsError: a number out of range.
    """

    name: ClassVar[str]
    #: Whether what was written counts in the metric.
    remembers: ClassVar[bool]

    def __init__(
        self,
        *,
        blocks: int | list[int] | None = None,
        steps: int = 1,
        step_size: float = 0.12,
        momentum: float = 0.5,
        search_steps: int = 20,
        enough: float = 0.1,
        clamp: float = 0.75,
        kl_factor: float = 0.0625,
        weight_decay: float = 0.5,
        openings: int = 2,
        prompts: int = 400,
        dataset: str = "world-facts-train",
    ) -> None:
        self.blocks = [blocks] if isinstance(blocks, int) else blocks
        self.steps = whole_number(steps, "steps", 1)
        if not 0 <= as_float(momentum) < 1:
            raise SettingsError(f"momentum must be a number in [0, 1), got {momentum!r}")
        for name, value in (("kl_factor", kl_factor), ("weight_decay", weight_decay)):
            if not 0 <= as_float(value) < np.inf:
                raise SettingsError(f"{name} must be a number ≥ 0, got {value!r}")
        if whole_number(openings, "openings", 0) > len(OPENINGS):
            raise SettingsError(f"openings must be at most {len(OPENINGS)}, got {openings!r}")
        self.search = ValueSearch(
            step_size=positive(step_size, "step_size"),
            momentum=float(momentum),
            steps=whole_number(search_steps, "search_steps", 1),
            enough=positive(enough, "enough"),
            clamp=positive(clamp, "clamp"),
            kl_factor=float(kl_factor),
            weight_decay=float(weight_decay),
        )
        self.openings, self.dataset = openings, dataset
        self.prompts = whole_number(prompts, "prompts", 1)
        self._built: tuple[ResidentLLM, Spread] | None = None

    @abstractmethod
    def metric(self, moment: Tensor) -> Tensor:
        """M from the mean of kᵀ k over tokens, both d_in × d_in float32."""

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, by which a comparison that is resumed knows the agent."""
        own = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "search"}
        search = {name: getattr(self.search, name) for name in ValueSearch.__slots__}
        return {**own, "search": search}

    def reset(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Hands over a low level that writes every fact; takes second moments, once for a model.

        Raises:
            SettingsError: not a LayerSelection environment, candidate layers without the last
                matrix of an MLP, or a model whose MLPs do not write to the residual stream as is.
        """
        inner = layer_selection(env, self.name)
        if self._built is None or self._built[0] is not inner.llm:
            self._built = inner.llm, self._rule(inner)
        inner.use_low_level(self._built[1], max_steps_per_edit=self.steps)

    def select_action(self, observation: Observation, info: dict[str, Any]) -> NDArray[np.int8]:
        """L int8: the last matrices of the MLPs of its blocks."""
        if self._built is None:
            raise SettingsError(f"agent {self.name!r} must be reset before it can act")
        llm, rule = self._built
        action = np.zeros(len(llm.layers), np.int8)
        action[list(rule.layers)] = 1
        return action

    def _rule(self, env: EditingEnv) -> Spread:
        llm = env.llm
        layers = self._layers(llm)
        prompts = calibration_prompts(
            load_requests(self.dataset), llm.encoder, self.prompts, 0, every=True
        )
        known = _MEASURED.setdefault(llm, {})
        key = self.dataset, self.prompts, layers
        if key not in known:
            known[key] = second_moments(llm, layers, prompts)
        self._check(llm, layers[-1], prompts[0])
        metrics = {layer: self.metric(moment) for layer, moment in known[key].items()}
        return Spread(llm, metrics, self.search, openings=self.openings, remembers=self.remembers)

    def _layers(self, llm: ResidentLLM) -> tuple[int, ...]:
        """Indices of the layers to write into."""
        last = len(block_list(llm.model)[0]) - 1
        found = [i for i in outputs_of_mlps(llm.model, llm.layers) if llm.layers[i].block < last]
        if not found:
            raise SettingsError(
                f"agent {self.name!r} writes into the last matrix of MLPs before the last block, "
                f"and there is none among {_some(llm.names)}; give --layers, such as "
                "'model.layers.{6-8}.mlp.down_proj'"
            )
        have = {llm.layers[i].block for i in found}
        if self.blocks is not None and not (self.blocks and set(self.blocks) <= have):
            raise SettingsError(
                f"agent {self.name!r}: blocks={self.blocks} must be among those before the last "
                f"whose MLP's last matrix is a candidate layer: {_some(sorted(have))}"
            )
        return tuple(i for i in found if self.blocks is None or llm.layers[i].block in self.blocks)

    def _check(self, llm: ResidentLLM, layer: int, prompt: EncodedPrompt) -> None:
        """Refuses a model that does something to what an MLP writes, such as a norm behind it."""
        place, branch = [(prompt, prompt.first_position)], llm.branch()
        with llm.unedited():
            keys, before = looked_up(branch, [layer], place)
            vector = before.flip(-1)
            left = keys[0] / keys[0].square().sum().clamp_min(1e-30)
            change = LowRankUpdate(left, vector)
            branch.commit([change if i == layer else None for i in range(len(llm.layers))])
            _, after = looked_up(branch, [layer], place)
        if float((after - before - vector).norm()) > 0.05 * float(vector.norm()):
            raise SettingsError(
                f"agent {self.name!r} needs a model whose MLPs write straight to the residual "
                f"stream, and {llm.names[layer]} does not; use 'anchored' or 'fine-tuning-kl'"
            )


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:4])) + ", …" * (len(names) > 4)
