"""``hiedit/StepSize-v1``: how strongly; the layers come from a given high level."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from hiedit_env.envs.actions import Choice, check_only_step_sizes
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import StepSizeSettings
from hiedit_env.envs.state import EnvState
from hiedit_env.rules.layer_choice import make_choice


class StepSize(EditingEnv):
    """Choose step sizes per layer, one primitive update at a time, under a given high level.

    The intra-option view of :class:`~hiedit_env.envs.lifelong_edit.LifelongEdit`, whose docstring
    describes everything not said here.

    ## Action Space
    ``Box(-1, 1, (L,))``: layer l is written with the rule's nominal step size times
    ``10 ** action[l]``; entries of layers the high level did not choose do nothing. One step is one
    primitive update.

    ## Starting State, Episode End
    The high level chooses a fact's layers when the fact begins and keeps them until it ends;
    ``env.unwrapped.option`` is the present mask (L bool).

    ## Arguments
    - ``high_level``: ``"all-layers"``, ``"random-layers"``, ``"fixed-layers"``, ``"gradient-norm"``
      or ``"no-edit"``.
    - ``layers_per_edit``: K of those that have a size; half of the layers where None.

    ## Version History
    - v2: a fact is rewarded what the agent changed, steps and layers have prices, an early end
      costs every fact that is lost, and the observation holds L + 2 numbers more; see
      ``docs/decisions/reward-of-changes.md``. v1 stays.
    - v1: ``agreement`` and ``recent_retention`` have one meaning each; the keys of ``info`` never
      vary, and its fingerprint and error are numbers.
      A step may edit several facts, in several forms, with an end token.
    - v0: first version, never released.

    >>> import gymnasium, hiedit_env, numpy as np
    >>> env = gymnasium.make("hiedit/StepSize-v1", high_level="fixed-layers", layers_per_edit=2)
    >>> observation, info = env.reset(seed=0)
    >>> env.unwrapped.option.tolist()
    [True, True, False, False, False, False]
    """

    settings_class = StepSizeSettings
    settings: StepSizeSettings

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        settings = self.settings
        count = len(self.llm.layers)
        self._choice = make_choice(settings.high_level, count, settings.layers_per_edit)
        self.option = np.zeros(len(self.llm.layers), bool)

    def save_state(self) -> EnvState:
        """As in the base; the option is saved too."""
        return replace(super().save_state(), option=self.option.copy())

    def restore_state(self, state: EnvState) -> None:
        """As in the base; the option is restored too."""
        super().restore_state(state)
        if state.option is not None:
            self.option = state.option.copy()

    def _begin_fact(self) -> None:
        self.option = self._choice(self.episode.capture, self.np_random)

    def _make_action_space(self, num_layers: int) -> spaces.Space[Any]:
        return spaces.Box(-1.0, 1.0, (num_layers,), np.float32)

    def _check_action(self, action: Any) -> Choice:
        return Choice(self.option, check_only_step_sizes(action, len(self.llm.layers)))
