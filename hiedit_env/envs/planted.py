"""``hiedit/Planted-v1``: layer selection where the right answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hiedit_env.datasets.difficulty import WorldName, is_world
from hiedit_env.datasets.planted import make_world
from hiedit_env.datasets.requests import Probe
from hiedit_env.envs.layer_selection import LayerSelection
from hiedit_env.envs.settings import PlantedSettings
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.resident.reading import Reading
from hiedit_env.resident.resident import ResidentLLM

#: Most layers whose subsets are enumerated.
MOST_LAYERS = 12
#: Rewards this close are equal: what is computed side by side differs by rounding.
TIE = 1e-5


@dataclass(frozen=True, slots=True)
class Oracle:
    """The reward that every option would have on the present fact.

    Args:
        layers: L bool, the best option; among equals (up to rounding) the one of fewest layers,
            then the first in lexicographic order of their indices.
        reward: Its reward.
        rewards: 2^L float64, the reward of every option; option ``i`` writes layer ``l`` if bit
            ``l`` of ``i`` is 1, so ``rewards[0]`` is that of writing nothing.
    """

    layers: NDArray[np.bool_]
    reward: float
    rewards: NDArray[np.float64]

    def reward_of(self, layers: NDArray[Any]) -> float:
        """The reward of an option, L zeros and ones."""
        return float(self.rewards[_number(np.flatnonzero(layers))])


class Planted(LayerSelection):
    """Choose the layers of each fact, in a model in which the layer of every fact is known.

    :class:`~hiedit_env.envs.layer_selection.LayerSelection` on the model ``"planted"``, whose facts
    were trained into one known layer each and into no other (``benchmarks/worlds/make_planted.py``
    says how), and an oracle that finds the best option exactly, by trying all of them. What is not
    said here is said there and in :class:`~hiedit_env.envs.lifelong_edit.LifelongEdit`.

    ## Description
    Five relations, six candidate layers, ``mlp.down_proj`` of blocks 1 to 6. The facts of a
    relation live in one of these layers. The one before it holds which answers the relation can
    have at all: its gradient is larger, but to write there changes the answers of all subjects. The
    other four layers do not react to the relation: to write there changes nothing.

    Other worlds are made on demand, from a seed and a difficulty:
    ``gymnasium.make("hiedit/Planted-v2", world_seed=3, difficulty="pairs")``, or the model
    ``"planted:pairs:3"``. Which layers hold what, all facts and all keys differ from seed to seed;
    :class:`~hiedit_env.datasets.difficulty.Difficulty` has what can be chosen. Their facts can have
    several homes (all of them are in ``true_layers``) and several decoys, and layers can fill up,
    so the best option may depend on what was written before.

    ## Information
    As there, and ``true_layers`` (L int8): the candidate layers that hold the fact which the
    observation shows, the next one to be edited; after the last fact, that fact's. All zero for a
    fact that was given to ``reset`` without any. Of facts that one step edits, those of any.

    ## Oracle
    ``env.unwrapped.oracle()`` gives the reward that each of the 2^L options would have on the
    present fact, from the present state and with the low level in use, and the best option, by
    ``try_options``: rewards are those of ``step`` up to rounding. It leaves no trace.
    The *one-step regret* of an action is ``oracle().reward`` minus its reward: never below 0, up to
    rounding. The best option looks one fact ahead: it is the best for this fact, not for
    those that follow, and the best with the low level in use, however bad that is. So
    ``hiedit compare`` reports regret against the oracle's own episode with the environment's own
    rule as well.

    ## Arguments
    - ``world_seed``, ``difficulty``: a world made on demand in the place of ``model``. Seeds from
      1,000,000 on are kept for tests, see :func:`~hiedit_env.datasets.difficulty.world_seeds`.

    The others as there, but ``model`` is ``"planted"`` and ``update_rule`` is ``"gradient"`` by
    default, and every fact of ``dataset`` must come with its ``true_layers``. The gradient, clipped
    so that one bad choice does not ruin the rest of an episode, keeps no statistics, so what is
    best for a fact hardly depends on the facts before it; with rules that standardise keys and
    gradients the true layer is less often the best one, above all early.
    ``"planted-facts-train"`` and ``"planted-facts-test"`` are halves of the data set that share
    relations but no subjects.

    ## Version History
    - v2: a fact is rewarded what the agent changed, steps and layers have prices, an early end
      costs every fact that is lost, and the observation holds L + 2 numbers more; see
      ``docs/decisions/reward-of-changes.md``. v1 stays.
    - v1: ``agreement`` and ``recent_retention`` have one meaning each; the keys of ``info`` never
      vary, and its fingerprint and error are numbers.
      ``true_layers`` belongs to the fact that the observation shows.
      A step may edit several facts, in several forms, with an end token.
    - v0: first version, never released.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/Planted-v1", num_edits=3)
    >>> observation, info = env.reset(seed=0)
    >>> best = env.unwrapped.oracle()
    >>> best.layers.astype(int).tolist() == info["true_layers"].tolist()
    True
    >>> observation, reward, terminated, truncated, info = env.step(best.layers.astype("int8"))
    >>> abs(reward - best.reward) < 1e-4
    True
    """

    settings_class = PlantedSettings

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for request in self.requests:
            if not request.true_layers:
                raise SettingsError(
                    f"{request.source} does not say which layers hold it (true_layers), so nothing "
                    "is known about it; take dataset='planted-facts' or hiedit/LayerSelection-v1"
                )
        self._last: tuple[Reading, Oracle] | None = None

    @property
    def controls(self) -> tuple[Probe, ...]:
        """Unrelated prompts of the world that no fact asks, so that an agent may look at them.

        Empty for the planted model of the package.
        """
        name = self.settings.model
        return make_world(WorldName.read(name)).controls() if is_world(name) else ()

    def oracle(self) -> Oracle:
        """The reward of every option on the present fact; takes 2^L options' time.

        The result is kept until the fact or the weights change.

        Raises:
            ResetNeeded: there is no present fact.
            SettingsError: more than 12 candidate layers.
        """
        self._require_running()
        count = len(self.llm.layers)
        if count > MOST_LAYERS:
            raise SettingsError(
                f"the oracle tries all subsets of the candidate layers, at most {MOST_LAYERS}; "
                f"there are {count}"
            )
        # One reading belongs to one fact at one state of the weights.
        reading = self.episode.reading
        if self._last is None or self._last[0] is not reading:
            options = list(_subsets(count))
            masks = np.stack([_mask(layers, count) for layers in options])
            worths = self.try_options(masks).rewards.tolist()
            best = int(np.argmax(np.array(worths) >= max(worths) - TIE))
            rewards = np.empty(2**count)
            rewards[[_number(layers) for layers in options]] = worths
            self._last = reading, Oracle(_mask(options[best], count), worths[best], rewards)
        return self._last[1]

    def fork(self) -> Self:
        """As in :class:`.base.EditingEnv`."""
        twin = super().fork()
        twin._last = None
        return twin

    def _copy_on(
        self, llm: ResidentLLM, memo: dict[int, Any], unedited: UneditedModel | None = None
    ) -> Self:
        """As in :class:`.base.EditingEnv`."""
        twin = super()._copy_on(llm, memo, unedited)
        twin._last = None
        return twin

    def _tell(self, info: dict[str, Any]) -> dict[str, Any]:
        names = {name for fact in self.episode.unit for name in fact.request.true_layers}
        true = np.array([name in names for name in self.llm.names], np.int8)
        return {**info, "true_layers": true}


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """All subsets of ``range(count)``: fewest first, then lexicographic."""
    for size in range(count + 1):
        yield from combinations(range(count), size)


def _number(layers: Any) -> int:
    return sum(1 << int(layer) for layer in layers)


def _mask(layers: tuple[int, ...], count: int) -> NDArray[np.bool_]:
    mask = np.zeros(count, bool)
    mask[list(layers)] = True
    return mask
