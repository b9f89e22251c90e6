"""``hiedit/LayerSelection-v1``: which layers; one step is a whole option on one fact."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_env.envs.actions import Choice, check_selection
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.scheduler import Passes


class LayerSelection(EditingEnv):
    """Choose the layers of each fact; the low level runs until the fact is answered.

    A semi-Markov view of :class:`~hiedit_env.envs.lifelong_edit.LifelongEdit`, whose docstring
    describes everything not said here.

    ## Action Space
    ``MultiBinary(L)``: the layers of the present fact. One step is one option: the low level (the
    ``update_rule`` at its nominal step size) updates these layers again and again until the fact is
    answered or ``max_steps_per_edit`` primitive steps are taken. So one step is one fact, and an
    episode has ``num_edits`` steps; with ``edits_per_step=n`` one step is n facts, and an episode
    has ``num_edits / n`` steps, rounded up.

    ## Rewards
    The sum of the rewards of the option's primitive steps, that is the final terms of the fact
    (γ = 1). With ``intrinsic=True``, minus those of the same option with all layers.

    ## Information
    As there; ``layers`` are those written during the option, ``edit_steps`` its length. Where
    ``env.unwrapped.apply`` is used, a primitive step may leave the fact unfinished
    (``edit_over`` is False); ``step`` then goes on with the steps left.

    ## Version History
    - v2: a fact is rewarded what the agent changed, steps and layers have prices, an early end
      costs every fact that is lost, and the observation holds L + 2 numbers more; see
      ``docs/decisions/reward-of-changes.md``. v1 stays.
    - v1: ``agreement`` and ``recent_retention`` have one meaning each; the keys of ``info`` never
      vary, and its fingerprint and error are numbers.
      A step may edit several facts, in several forms, with an end token.
    - v0: first version, never released.

    >>> import gymnasium, hiedit_env, numpy as np
    >>> env = gymnasium.make("hiedit/LayerSelection-v1", num_edits=3)
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(np.ones(6, np.int8))
    >>> info["edit_over"], terminated
    (True, False)
    """

    def _make_action_space(self, num_layers: int) -> spaces.Space[Any]:
        return spaces.MultiBinary(num_layers)

    def _check_action(self, action: Any) -> Choice:
        return Choice(check_selection(action, len(self.llm.layers)))

    def _carry_out(self, choice: Choice) -> Passes[NDArray[np.bool_]]:
        """A whole option: primitive steps until the fact is over."""
        written = np.zeros_like(choice.layers)
        while not self.episode.edit_over:
            written |= yield from super()._carry_out(choice)
            if not choice.layers.any():
                # Nothing will change any more: the option's remaining steps are spent at once.
                self.episode.steps = self.episode.max_steps_per_edit
        return written
