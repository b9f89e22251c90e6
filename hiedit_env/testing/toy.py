"""``hiedit/Toy-v1``: choosing layers without a language model, with rewards known by arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from hiedit_env.envs.actions import check_selection
from hiedit_env.errors import SettingsError, as_float, whole_number
from hiedit_env.evaluation.info_metrics import metrics_of

Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]

#: Policies whose mean reward is known, for :meth:`ToyEditing.expected_reward`.
POLICIES = ("best", "all-layers", "no-edit", "random", "one-random-layer")
_TERMS = ("edit", "locality", "sparsity", "recent_retention", "collapse")
_SPARSITY = 0.1
#: Most facts × layers: a stream takes 9 bytes for each, drawn at once.
_MOST_SQUARES = 10_000_000
#: Colours of a written layer in the picture: the fact's own, and another.
_RIGHT, _WRONG = (0, 158, 115), (213, 94, 0)


@dataclass(frozen=True, slots=True)
class ToyState:
    """A saved state of :class:`ToyEditing`.

    Args:
        position: Index of the present fact; the length of the stream when it is over.
        weights: L int64, how often each layer was written.
        written: Facts × L bool, the layers written for each.
        groups: The stream: for each fact the layer it belongs to, int64.
        noise: Facts × L float64, added to what is seen of them.
        random: State of ``np_random``.
    """

    position: int
    weights: NDArray[np.int64]
    written: NDArray[np.bool_]
    groups: NDArray[np.int64]
    noise: NDArray[np.float64]
    random: Mapping[str, Any]


class ToyEditing(gym.Env[NDArray[np.float32], NDArray[np.int8]]):
    """The interface of ``hiedit/LayerSelection-v1`` without a language model; a contextual bandit.

    ## Description
    Every fact belongs to one of L groups and lives in the layer of the same number. Writing this
    layer answers the fact; writing any other damages unrelated answers. An agent that reads the
    group off the observation earns the best reward, and how much an agent earns that does not is
    known too, so that a learning curve can be read off against numbers worked out by hand. A step
    takes microseconds, and nothing of torch is imported.

    ## Action Space
    ``MultiBinary(L)``: the layers of the present fact. One step is one fact.

    ## Observation Space
    ``Box(-1, 1, (L + 1,), float32)``: 1 for the fact's group and 0 for the others, plus
    independent normal noise of the given standard deviation, clipped; then the share of the stream
    already done. After the last fact, that fact again.

    ## Rewards
    ``reward = sum(info["reward_terms"].values())``. With n layers written, h = 1 if the fact's own
    is among them and 0 otherwise:

    - ``edit``: h,
    - ``locality``: −(n − h) / L,
    - ``sparsity``: 0.1 (1 − n / L),
    - ``recent_retention``, ``collapse``: 0.

    Per fact, the mean is

    - ``best`` (only the fact's layer): 1 + 0.1 (1 − 1/L), the most there is,
    - ``all-layers``: 1/L,
    - ``no-edit``: 0.1,
    - ``random`` (each layer by a fair coin, as ``action_space.sample()``): 1/(2 L) + 0.05,
    - ``one-random-layer``: 1/L² + 0.1 (1 − 1/L).

    ## Starting State
    No layer written, a stream of groups drawn uniformly with ``np_random``.

    ## Episode End
    Terminates after ``num_edits`` facts. It is never truncated.

    ## Information
    The keys of ``hiedit/LayerSelection-v1``: ``reward_terms``, ``metrics`` (``efficacy`` h,
    ``agreement`` 1 − (n − h) / L, ``answered``, the others NaN), ``layers``,
    ``weights_fingerprint``, ``edit_index``, ``edit_steps`` (1), ``edit_over`` (True),
    ``error_type`` (0). After ``reset``, zeros.

    ## Arguments
    - ``num_layers``: L, at least 2.
    - ``num_edits``: length of the stream; times ``num_layers`` at most ten million.
    - ``noise``: standard deviation of the noise on the observation. At 0.1 the largest number is
      practically always the group's; at 1 it often is not, and ``best`` becomes out of reach.
    - ``render_mode``: ``"ansi"`` (a line about the last step), ``"rgb_array"`` (H × W × 3 uint8, a
      square per layer and fact: white not written, green the fact's layer, red another) or None.

    ## Version History
    - v1: the ids of the package changed their version together.
    - v0: first version, never released.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/Toy-v1", num_layers=4, num_edits=2)
    >>> observation, info = env.reset(seed=0)
    >>> _, reward, *_ = env.step(env.unwrapped.best_action())
    >>> reward, env.unwrapped.expected_reward("best")
    (1.075, 1.075)
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        num_layers: int = 6,
        num_edits: int = 32,
        noise: float = 0.1,
        render_mode: str | None = None,
    ) -> None:
        self.num_layers = whole_number(num_layers, "num_layers", 2)
        self.num_edits = whole_number(num_edits, "num_edits", 1)
        if self.num_edits * self.num_layers > _MOST_SQUARES:
            raise SettingsError(
                f"num_edits × num_layers must be at most {_MOST_SQUARES}, got "
                f"{as_float(self.num_edits):.3g} × {as_float(self.num_layers):.3g}; "
                "make shorter episodes"
            )
        if not 0 <= as_float(noise) < np.inf:
            raise SettingsError(f"noise must be a finite number ≥ 0, got {noise!r:.200}")
        if render_mode not in (None, "ansi", "rgb_array"):
            raise SettingsError(
                f"render_mode must be 'ansi', 'rgb_array' or None, got {render_mode!r}"
            )
        self.noise = float(noise)
        self.render_mode = render_mode
        self.action_space = spaces.MultiBinary(self.num_layers)
        self.observation_space = spaces.Box(-1.0, 1.0, (self.num_layers + 1,), np.float32)
        #: L int64, how often each layer was written; what a model's weights are elsewhere.
        self.weights = np.zeros(self.num_layers, np.int64)
        self._groups = np.zeros(0, np.int64)
        self._noise = np.zeros((0, self.num_layers))
        self._position = 0
        self._last = "no step yet"
        self._written = np.zeros((self.num_edits, self.num_layers), bool)

    @property
    def group(self) -> int:
        """The layer of the present fact; of the last one when the stream is over."""
        self._require_started()
        return int(self._groups[min(self._position, self.num_edits - 1)])

    def best_action(self) -> NDArray[np.int8]:
        """The action that earns most on the present fact: L int8, a single 1."""
        action = np.zeros(self.num_layers, np.int8)
        action[self.group] = 1
        return action

    def expected_reward(self, policy: str) -> float:
        """Mean reward of a policy per fact, by the formulas of the class docstring.

        Args:
            policy: One of :data:`POLICIES`.

        Raises:
            SettingsError: another name.
        """
        count = self.num_layers
        means = {
            "best": 1 + _SPARSITY * (1 - 1 / count),
            "all-layers": 1 / count,
            "no-edit": _SPARSITY,
            "random": 1 / (2 * count) + _SPARSITY / 2,
            "one-random-layer": 1 / count**2 + _SPARSITY * (1 - 1 / count),
        }
        if policy not in means:
            raise SettingsError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
        return means[policy]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begins a new stream, drawn with the environment's seed; there are no options."""
        if options:
            raise SettingsError(f"unknown reset options {sorted(options)}; there are none")
        super().reset(seed=seed)
        self._groups = self.np_random.integers(self.num_layers, size=self.num_edits)
        self._noise = self.noise * self.np_random.normal(size=(self.num_edits, self.num_layers))
        self.weights = np.zeros(self.num_layers, np.int64)
        self._position = 0
        self._last = "no step yet"
        self._written = np.zeros((self.num_edits, self.num_layers), bool)
        info = self._info(
            terms=dict.fromkeys(_TERMS, 0.0),
            metrics=metrics_of(efficacy=0.0),
            layers=np.zeros(self.num_layers, np.int8),
        )
        return self._observe(), {**info, "edit_index": 0, "edit_steps": 0, "edit_over": False}

    def step(self, action: Any) -> Step:
        """Writes layers for the present fact, and goes on to the next.

        Raises:
            ActionError: not L zeros and ones; nothing has changed.
        """
        mask = check_selection(action, self.num_layers)
        self._require_started()
        if self._position == self.num_edits:
            raise ResetNeeded("the episode has ended; call reset() to begin a new episode")
        index, group = self._position, self.group
        hit, count = float(mask[group]), int(mask.sum())
        damage = (count - hit) / self.num_layers
        terms = {
            "edit": hit,
            "locality": 0.0 - damage,
            "sparsity": _SPARSITY * (1 - count / self.num_layers),
            "recent_retention": 0.0,
            "collapse": 0.0,
        }
        reward = float(sum(terms.values()))
        self.weights = self.weights + mask
        self._written[index] = mask
        self._position += 1
        self._last = (
            f"fact {index + 1} of {self.num_edits}, group {group}: "
            f"layers {np.flatnonzero(mask).tolist()}, reward {reward:.3f}"
        )
        info = self._info(
            terms=terms,
            metrics=metrics_of(efficacy=hit, agreement=1 - damage),
            layers=mask.astype(np.int8),
        )
        info |= {"edit_index": index, "edit_steps": 1, "edit_over": True}
        return self._observe(), reward, self._position == self.num_edits, False, info

    def render(self) -> Any:
        """A line about the last step (``"ansi"``), or the layers written (``"rgb_array"``)."""
        if self.render_mode == "ansi":
            return self._last
        if self.render_mode == "rgb_array":
            return self._picture()
        gym.logger.warn("render() was called without a render_mode; pass it to gym.make")
        return None

    def save_state(self) -> ToyState:
        """The whole state, for :meth:`restore_state`."""
        self._require_started()
        return ToyState(
            self._position,
            self.weights.copy(),
            self._written.copy(),
            self._groups.copy(),
            self._noise.copy(),
            self.np_random.bit_generator.state,
        )

    def restore_state(self, state: ToyState) -> None:
        """Goes back (or forward) to a saved state of this environment, bit for bit."""
        self._position = state.position
        self.weights, self._written = state.weights.copy(), state.written.copy()
        self._groups, self._noise = state.groups.copy(), state.noise.copy()
        self.np_random.bit_generator.state = state.random

    def _picture(self) -> NDArray[np.uint8]:
        """Layers from top to bottom, facts from left to right; 8 pixels a square."""
        picture = np.full((self.num_layers, self.num_edits, 3), 255, np.uint8)
        picture[self._written.T] = _WRONG
        if len(self._groups):
            facts = np.arange(self.num_edits)
            hit = self._written[facts, self._groups]
            picture[self._groups[hit], facts[hit]] = _RIGHT
        return picture.repeat(8, 0).repeat(8, 1)

    def _observe(self) -> NDArray[np.float32]:
        seen = self._noise[min(self._position, self.num_edits - 1)].copy()
        seen[self.group] += 1
        done = self._position / self.num_edits
        return np.append(np.clip(seen, -1, 1), done).astype(np.float32)

    def _info(
        self,
        terms: dict[str, float],
        metrics: dict[str, float | bool],
        layers: NDArray[np.int8],
    ) -> dict[str, Any]:
        bits = self.weights.astype("<i8").tobytes()
        return {
            "reward_terms": terms,
            "metrics": metrics,
            "layers": layers,
            "weights_fingerprint": int.from_bytes(
                hashlib.blake2b(bits, digest_size=8).digest(), "big", signed=True
            ),
            "error_type": 0,
        }

    def _require_started(self) -> None:
        if not len(self._groups):
            raise ResetNeeded("call reset() before anything else")
