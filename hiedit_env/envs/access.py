"""Questions that agents may ask an environment about its present episode."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Request
from hiedit_env.envs.accounting import Accounting
from hiedit_env.envs.actions import Choice
from hiedit_env.envs.episode import EditingEpisode
from hiedit_env.envs.scheduler import Passes
from hiedit_env.envs.state import History
from hiedit_env.envs.tried_options import TriedOptions, check_masks, try_options
from hiedit_env.model.tokenization import EncodedFact
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule


class EpisodeAccess:
    """Read access to the episode, and to the settings of the reward."""

    llm: ResidentLLM
    episode: EditingEpisode
    accounting: Accounting

    @abstractmethod
    def _write(self, choice: Choice, everything: bool) -> Passes[NDArray[np.bool_]]: ...

    @property
    def rule(self) -> UpdateRule:
        """The low level in use, see :meth:`use_low_level`."""
        return self.episode.rule

    @property
    def max_steps_per_edit(self) -> int:
        """Maximum number of primitive steps on a fact."""
        return self.episode.max_steps_per_edit

    @property
    def stop_when_answered(self) -> bool:
        """Whether a fact ends as soon as it is answered."""
        return self.episode.stop_when_answered

    @property
    def fact(self) -> EncodedFact:
        """The present fact as tokens, the first of its unit; after the stream, of the last unit."""
        self._require_started()
        return self.episode.fact

    @property
    def unit(self) -> tuple[EncodedFact, ...]:
        """The facts that are edited together at present; after the stream, the last ones."""
        self._require_started()
        return self.episode.unit

    @property
    def past_facts(self) -> tuple[EncodedFact, ...]:
        """The facts edited before the present unit, earliest first."""
        self._require_started()
        return self.episode.facts[: self.episode.position]

    @property
    def stream(self) -> tuple[Request, ...]:
        """The requests of the present episode, in the order they are edited."""
        self._require_started()
        return tuple(fact.request for fact in self.episode.facts)

    @property
    def history(self) -> History:
        """The finished edits of the present episode."""
        return self.accounting.history

    @property
    def weights_of_terms(self) -> dict[str, float]:
        """Weight of every reward term; one that is changed counts from the next step on."""
        return self.accounting.weights

    @weights_of_terms.setter
    def weights_of_terms(self, weights: dict[str, float]) -> None:
        self.accounting.weights = weights

    @property
    def intrinsic(self) -> bool:
        """Whether the reward is the advantage over editing all layers."""
        return self.accounting.intrinsic

    @intrinsic.setter
    def intrinsic(self, intrinsic: bool) -> None:
        self.accounting.intrinsic = intrinsic

    def try_options(self, masks: Any, *, chunk: int | None = None) -> TriedOptions:
        """What ``step`` would give for many choices of layers, each from the present state.

        Options run side by side in shared passes. No trace is left: weights, statistics, random
        state and episode are as before. Rewards, terms and metrics are those of ``save_state``,
        ``step`` and ``restore_state`` one after another, up to rounding (2e-4 in float32).

        An option is what one step is: with ``hiedit/LayerSelection-v1`` all primitive steps of the
        fact, elsewhere one primitive step with these layers at the nominal step size.

        Args:
            masks: N × L zeros and ones, one row per option.
            chunk: Options at a time; None for as many as fit into half of the free memory, at most
                32.

        Raises:
            ResetNeeded: there is no present fact.
            ActionError: masks of another shape, or with other numbers.
            NotEnoughMemoryError: ``chunk`` options do not fit; the message names what they need
                and the chunk that fits.

        >>> import gymnasium, hiedit_env, numpy as np
        >>> env = gymnasium.make("hiedit/LayerSelection-v1", num_edits=2)
        >>> observation, info = env.reset(seed=0)
        >>> tried = env.unwrapped.try_options(np.eye(6, dtype=np.int8))
        >>> best = tried.masks[tried.best].astype(np.int8)
        >>> bool(abs(env.step(best)[1] - tried.rewards.max()) < 1e-4)
        True
        """
        own = check_masks(masks, len(self.llm.layers))
        return try_options([self], [own], chunk)[0]

    def _require_started(self) -> None:
        if not self.episode.facts:
            raise ResetNeeded(
                "call reset() first: no episode has begun since the environment was made or "
                "use_low_level() changed its low level"
            )

    def _require_running(self) -> None:
        self._require_started()
        if self.episode.ended:
            raise ResetNeeded("the episode has ended; call reset() to begin a new episode")
