"""One layer after another, then stop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from hiedit_env.envs.actions import check_index
from hiedit_env.errors import ActionError, SettingsError, whole_number
from hiedit_env.wrappers.spaces import chosen_layers

#: What a masked action does.
Masked = Literal["refuse", "stop"]
Step = tuple[NDArray[np.float32], Any, bool, bool, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SelectionState:
    """A saved state of :class:`SequentialSelection`: the inner environment's and the picks.

    Args:
        inner: What the wrapped environment's ``save_state`` returned.
        picked: L int8, the layers picked so far.
        observation: The wrapped environment's last observation.
        info: Its last information.
        over: Whether the episode has ended.
    """

    inner: Any
    picked: NDArray[np.int8]
    observation: NDArray[np.float32]
    info: dict[str, Any]
    over: bool


class SequentialSelection(
    gym.Wrapper[NDArray[np.float32], np.int64, NDArray[np.float32], Any],
    gym.utils.RecordConstructorArgs,
):
    """Layers are picked one at a time: L + 1 actions instead of 2^L, whatever the size.

    The action space becomes ``Discrete(L + 1)``: action l < L picks layer l, action L stops. A
    picking step has reward 0 and changes nothing but the picks; stopping runs the wrapped
    environment's step on the picked layers and returns its reward, after which nothing is picked.
    A layer is picked at most once. With γ = 1 the return of an episode is that of the wrapped
    environment.

    The observation is the wrapped environment's, followed by L numbers, 1 for a picked layer.

    The information of a picking step is the last one of the wrapped environment with
    ``reward_terms`` and ``layers`` at 0, ``edit_over`` False, and ``edit_index`` and
    ``edit_steps`` of the present fact; ``metrics`` are those last measured. ``picked`` (L int8) is
    added to all of them; after a stop it is what was stopped with.

    :meth:`action_masks` says which actions are allowed, in the form that MaskablePPO of sb3-contrib
    asks for. Whoever ignores the mask meets an ActionError; that includes checkers of environments.
    For algorithms that know no masks, ``masked="stop"`` makes picking a layer that is masked the
    same as stopping.

    Args:
        env: An environment whose action space is ``MultiBinary(L)`` and whose observation is a
            one-dimensional Box.
        max_layers: Most layers picked, from 1 to L; None for L.
        allow_empty: Whether stopping is allowed before the first pick.
        stop_at_max: Whether the pick that reaches ``max_layers`` stops as well.
        masked: What a masked action does: ``"refuse"`` raises an ActionError, ``"stop"`` stops;
            the latter needs ``allow_empty=True``, so that stopping is always allowed.

    Attributes:
        stop: The action that stops, L.
        picked: L int8, the layers picked so far.

    Raises:
        SettingsError: another action or observation space, or ``max_layers`` outside 1 … L,
            or another ``masked``.

    >>> import gymnasium, hiedit_env
    >>> env = SequentialSelection(gymnasium.make("hiedit/Toy-v1", num_layers=3), max_layers=2)
    >>> observation, info = env.reset(seed=0)
    >>> env.action_masks()
    array([ True,  True,  True, False])
    >>> observation, reward, *_ = env.step(1)
    >>> reward, observation[-3:], env.action_masks()
    (0.0, array([0., 1., 0.], dtype=float32), array([ True, False,  True,  True]))
    >>> env.step(env.stop)[4]["layers"]
    array([0, 1, 0], dtype=int8)
    """

    def __init__(
        self,
        env: gym.Env[NDArray[np.float32], Any],
        max_layers: int | None = None,
        *,
        allow_empty: bool = False,
        stop_at_max: bool = False,
        masked: Masked = "refuse",
    ) -> None:
        gym.Wrapper.__init__(self, env)
        self.stop = layers = chosen_layers(env, "SequentialSelection")
        self.max_layers = whole_number(
            layers if max_layers is None else max_layers, "max_layers", 1
        )
        if self.max_layers > layers:
            raise SettingsError(
                f"max_layers must be from 1 to {layers}, the number of layers, got {max_layers}"
            )
        inner = env.observation_space
        if not isinstance(inner, spaces.Box) or len(inner.shape) != 1:
            raise SettingsError(
                "SequentialSelection needs a one-dimensional Box as observation space, to add "
                f"{layers} numbers to; got {inner}"
            )
        self.allow_empty, self.stop_at_max = bool(allow_empty), bool(stop_at_max)
        if masked not in ("refuse", "stop"):
            raise SettingsError(f"masked must be 'refuse' or 'stop', got {masked!r}")
        if masked == "stop" and not allow_empty:
            raise SettingsError("masked='stop' needs allow_empty=True: stopping is always allowed")
        self.masked = masked
        gym.utils.RecordConstructorArgs.__init__(
            self,
            max_layers=self.max_layers,
            allow_empty=self.allow_empty,
            stop_at_max=self.stop_at_max,
            masked=self.masked,
        )
        self.action_space = spaces.Discrete(layers + 1)
        self.observation_space = spaces.Box(
            np.concatenate((inner.low, np.zeros(layers))).astype(np.float32),
            np.concatenate((inner.high, np.ones(layers))).astype(np.float32),
        )
        self.picked = np.zeros(layers, np.int8)
        self._observation: NDArray[np.float32] | None = None
        self._info: dict[str, Any] = {}
        self._over = True

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are allowed now: L + 1 bool."""
        full = self.picked.sum() >= self.max_layers
        stop = self.allow_empty or self.picked.any()
        return np.append((self.picked == 0) & ~full, stop).astype(bool)

    def pick(self, action: Any) -> tuple[NDArray[np.int8], bool]:
        """What an action would make of the present picks; changes nothing.

        Returns:
            L int8, the picks after it, and whether it stops.

        Raises:
            ActionError: as :meth:`step`.
        """
        choice = self._check_action(action)
        if not self.action_masks()[choice]:
            if self.masked == "refuse":
                self._refuse(choice)
            choice = self.stop
        picks = self.picked.copy()
        if choice == self.stop:
            return picks, True
        picks[choice] = 1
        return picks, self.stop_at_max and bool(picks.sum() == self.max_layers)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Resets the wrapped environment; nothing is picked."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._remember(observation, info, False)
        return self._shown(), {**info, "picked": self.picked.copy()}

    def step(self, action: Any) -> Step:
        """Picks a layer, or stops and runs the wrapped environment's step on what was picked.

        Args:
            action: From 0 to L; L stops.

        Raises:
            ActionError: not such a number, or one that :meth:`action_masks` rules out; nothing has
                changed.
        """
        self._check_action(action)
        if self._observation is None:
            raise ResetNeeded("call reset() before anything else")
        if self._over:
            raise ResetNeeded("the episode has ended; call reset() to begin a new episode")
        picks, stops = self.pick(action)
        if not stops:
            self.picked = picks
            return self._shown(), 0.0, False, False, self._picking_info()
        chosen: Any = picks.copy()
        observation, reward, terminated, truncated, info = self.env.step(chosen)
        self._remember(observation, info, terminated or truncated)
        return self._shown(), reward, terminated, truncated, {**info, "picked": picks}

    def save_state(self) -> SelectionState:
        """The wrapped environment's state and the picks, for :meth:`restore_state`."""
        inner = self.env.get_wrapper_attr("save_state")()
        if self._observation is None:
            raise ResetNeeded("call reset() before anything else")
        return SelectionState(
            inner,
            self.picked.copy(),
            self._observation.copy(),
            copy.deepcopy(self._info),
            self._over,
        )

    def restore_state(self, state: SelectionState) -> None:
        """Goes back to a saved state of this environment, bit for bit."""
        self.env.get_wrapper_attr("restore_state")(state.inner)
        self._remember(state.observation, state.info, state.over)
        self.picked = state.picked.copy()

    def _remember(self, observation: NDArray[np.float32], info: dict[str, Any], over: bool) -> None:
        # Copies: what is returned belongs to the caller.
        self._observation, self._info = observation.copy(), copy.deepcopy(info)
        self._over = over
        self.picked = np.zeros(self.stop, np.int8)

    def _shown(self) -> NDArray[np.float32]:
        assert self._observation is not None
        return np.concatenate((self._observation, self.picked), dtype=np.float32)

    def _picking_info(self) -> dict[str, Any]:
        info = copy.deepcopy(self._info)
        info["picked"] = self.picked.copy()
        if "reward_terms" in info:
            info["reward_terms"] = dict.fromkeys(info["reward_terms"], 0.0)
        if "layers" in info:
            info["layers"] = np.zeros_like(info["layers"])
        if info.get("edit_over"):
            following = info["edit_index"] + info.get("unit_size", 1)
            info |= {"edit_index": following, "edit_steps": 0, "edit_over": False}
        return info

    def _check_action(self, action: Any) -> int:
        return check_index(action, self.stop + 1, f"a layer or {self.stop} to stop")

    def _refuse(self, choice: int) -> None:
        picked = np.flatnonzero(self.picked).tolist()
        if choice == self.stop:
            reason = "nothing is picked yet; pick a layer first, or make it with allow_empty=True"
        elif len(picked) >= self.max_layers:
            reason = f"max_layers={self.max_layers} layers are picked ({picked}); only stop is left"
        else:
            reason = f"layer {choice} is picked already; picked are {picked}"
        name = f"{choice} (stop)" if choice == self.stop else str(choice)
        raise ActionError(f"action {name} is masked: {reason}; action_masks() says what is allowed")
