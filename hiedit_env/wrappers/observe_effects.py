"""What a write to each layer would do at first order, as part of the observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Probe
from hiedit_env.errors import SettingsError

if TYPE_CHECKING:
    from hiedit_env.envs.base import EditingEnv

#: Numbers per layer, see :class:`ObserveEffects`.
EFFECTS = 5
#: Share of the largest squared gradient below which a layer counts as one without any.
NOTHING = 1e-6


class ObserveEffects(
    gym.Wrapper[NDArray[np.float32], Any, NDArray[np.float32], Any],
    gym.utils.RecordConstructorArgs,
):
    """Appends to the observation, layer after layer, five numbers about one plain gradient step.

    A gradient step on the present fact in layer l alone, Δ = −s g with g = uᵀ v, would do this at
    first order:

    ===== ==========================================================================================
    0     effect: the loss of the fact falls by s ‖g‖² nats; log10(1 + s ‖g‖²) / 2
    1     spill: how much it would change what the layer writes at the controls, ‖k g‖ over the same
          at the fact itself; root mean square over the controls
    2     the same, of the control that changes most
    3     interference: as number 1, at the facts edited earlier in the episode
    4     the same, of the fact that changes most
    ===== ==========================================================================================

    All are clipped to [0, 1]. So these numbers mean the same in every layer and in every world: a
    layer in which a fact has a key of its own has no spill; one where many facts share a key has.
    Keys k are those at the tokens that predict the answer: of a control at the unedited model, of
    an earlier fact when it was edited. No prompt that a reward asks is looked at.

    Args:
        env: An environment of one fact per step on a language model.
        controls: Prompts with their true answers that stand for all that must not change; None for
            those of a planted world, ``env.unwrapped.controls``.
        step_size: s; None for that of the environment's low level.

    Raises:
        SettingsError: another environment, or no controls.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/Planted-v2", world_seed=0, num_edits=2)
    >>> env.observation_space.shape, ObserveEffects(env).observation_space.shape
    ((145,), (175,))
    """

    def __init__(
        self,
        env: gym.Env[NDArray[np.float32], Any],
        controls: Sequence[Probe] | None = None,
        step_size: float | None = None,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, controls=controls, step_size=step_size)
        gym.Wrapper.__init__(self, env)
        # Not at the top: it imports torch.
        from hiedit_env.envs.base import EditingEnv

        inner = env.unwrapped
        if not isinstance(inner, EditingEnv) or not isinstance(env.observation_space, spaces.Box):
            raise SettingsError(
                f"ObserveEffects wraps a hiedit environment with a model, got {env}"
            )
        if inner.settings.edits_per_step > 1:
            raise SettingsError(
                f"ObserveEffects looks at one fact per step, got edits_per_step="
                f"{inner.settings.edits_per_step}; set it to 1"
            )
        self._inner: EditingEnv = inner
        chosen = getattr(inner, "controls", ()) if controls is None else controls
        if not chosen:
            raise SettingsError(
                "ObserveEffects needs prompts that must not change; give it controls"
            )
        self.controls = tuple(chosen)
        self._step_size = step_size
        self._controls: list[Any] | None = None
        self._edited: list[list[Any]] = []
        count = len(inner.llm.layers)
        low, high = env.observation_space.low, env.observation_space.high
        self.observation_space = spaces.Box(
            np.concatenate((low, np.zeros(EFFECTS * count, np.float32))),
            np.concatenate((high, np.ones(EFFECTS * count, np.float32))),
            dtype=np.float32,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """As the environment's, with a longer observation."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._edited = [[] for _ in self._inner.llm.layers]
        if self._controls is None:
            # The model is unedited now.
            self._controls = self._read_controls()
        return self._longer(observation), info

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """As the environment's, with a longer observation."""
        keys = self._answer_keys(self._inner.episode.capture)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if info["edit_over"]:
            for known, own in zip(self._edited, keys, strict=True):
                known.append(own)
        return self._longer(observation), float(reward), terminated, truncated, info

    # -- inside -----------------------------------------------------------------------------------

    def _longer(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        found = self._effects().clip(0.0, 1.0).astype(np.float32)
        return np.concatenate((observation, np.nan_to_num(found).ravel()))

    def _effects(self) -> NDArray[np.float64]:
        """L × EFFECTS; 0 in layers where the fact has hardly any gradient."""
        inner, capture = self._inner, self._inner.episode.capture
        step = inner.rule.step_size if self._step_size is None else self._step_size
        assert self._controls is not None
        pairs = list(zip(capture.keys, capture.value_gradients, strict=True))
        pairs = [(u.float(), v.float()) for u, v in pairs]
        grams = [float(((u @ u.mT) * (v @ v.mT)).sum().clamp_min(0)) for u, v in pairs]
        rows = np.zeros((len(pairs), EFFECTS))
        rows[:, 0] = np.log10(1 + step * np.array(grams)) / 2
        for layer, own in enumerate(self._answer_keys(capture)):
            if grams[layer] <= NOTHING * max(grams):
                continue
            u, v = pairs[layer]
            size = float(((own @ u.mT) @ v).norm(dim=1).mean())
            for place, others in ((1, self._controls[layer]), (3, self._edited[layer])):
                moved = [float(((k @ u.mT) @ v).norm(dim=1).mean()) / size for k in others]
                if moved:
                    rows[layer, place] = np.sqrt(np.mean(np.square(moved)))
                    rows[layer, place + 1] = max(moved)
        return rows

    def _read_controls(self) -> list[Any]:
        """Per layer the keys of every control."""
        llm = self._inner.llm
        found: list[list[Any]] = [[] for _ in llm.layers]
        for control in self.controls:
            capture = llm.read(llm.encode(control.prompt, control.answer)).capture()
            for known, own in zip(found, self._answer_keys(capture), strict=True):
                known.append(own)
        return found

    def _answer_keys(self, capture: Any) -> list[Any]:
        """Per layer the keys at the tokens that predict the answers, float32."""
        places: list[int] = []
        start = 0
        for prompt in capture.prompts:
            first = start + len(prompt.prompt_ids) - 1
            places += range(first, first + len(prompt.answer_ids))
            start += prompt.length
        return [keys[places].float() for keys in capture.keys]
