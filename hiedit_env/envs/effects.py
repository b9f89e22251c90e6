"""What a write to each layer would do at first order, for one environment after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Probe
from hiedit_env.errors import SettingsError

if TYPE_CHECKING:
    from hiedit_env.envs.base import EditingEnv
    from hiedit_env.resident.resident import ResidentLLM

#: Numbers per layer, see :class:`~hiedit_env.wrappers.observe_effects.ObserveEffects`.
EFFECTS = 5
#: Share of the largest squared gradient below which a layer counts as one without any.
NOTHING = 1e-6


def choose_controls(
    env: EditingEnv, controls: Sequence[Probe] | None, owner: str
) -> tuple[Probe, ...]:
    """The prompts that stand for all that must not change.

    Args:
        env: The environment.
        controls: Given ones; None for those of a planted world, ``env.controls``.
        owner: How messages call who needs them.

    Raises:
        SettingsError: there are none, or the environment edits several facts per step.
    """
    if env.settings.edits_per_step > 1:
        raise SettingsError(
            f"{owner} looks at one fact per step, got edits_per_step="
            f"{env.settings.edits_per_step}; set it to 1"
        )
    chosen = getattr(env, "controls", ()) if controls is None else controls
    if not chosen:
        raise SettingsError(f"{owner} needs prompts that must not change; give it controls")
    return tuple(chosen)


def control_keys(llm: ResidentLLM, controls: Sequence[Probe]) -> list[list[Any]]:
    """Per layer the keys of every control at the unedited model, T × d_in float32.

    Args:
        llm: The model; edits stay as they are.
        controls: The controls.
    """
    found: list[list[Any]] = [[] for _ in llm.layers]
    with llm.unedited():
        for control in controls:
            capture = llm.read(llm.encode(control.prompt, control.answer)).capture()
            for known, own in zip(found, answer_keys(capture), strict=True):
                known.append(own)
    return found


def answer_keys(capture: Any) -> list[Any]:
    """Per layer the keys at the tokens that predict the answers, T × d_in float32.

    Args:
        capture: A :class:`~hiedit_env.resident.capture.Capture`.
    """
    places: list[int] = []
    start = 0
    for prompt in capture.prompts:
        first = start + len(prompt.prompt_ids) - 1
        places += range(first, first + len(prompt.answer_ids))
        start += prompt.length
    return [keys[places].float() for keys in capture.keys]


class Effects:
    """The effects in one environment, whose edited facts are remembered.

    Call :meth:`keep` before every step.

    Args:
        controls: What :func:`control_keys` found; environments of one model may share them.
        step_size: s; None for that of the environment's low level.
    """

    def __init__(self, controls: list[list[Any]], step_size: float | None = None) -> None:
        self._controls, self._step_size = controls, step_size
        #: Keys of facts by their place in the stream: those before the last step on each.
        self._keys: dict[int, list[Any]] = {}

    def keep(self, env: EditingEnv) -> None:
        """Remembers the keys of the present fact, which the next step writes to."""
        self._keys[env.episode.position] = answer_keys(env.episode.capture)

    def now(self, env: EditingEnv) -> NDArray[np.float32]:
        """L × ``EFFECTS`` float32 in [0, 1], of the present fact at the present weights.

        Numbers that are not finite, after a numerical collapse, are 0.
        """
        found = self._measure(env).clip(0.0, 1.0).astype(np.float32)
        return np.nan_to_num(found)

    def _measure(self, env: EditingEnv) -> NDArray[np.float64]:
        """L × ``EFFECTS``; 0 in layers where the fact has hardly any gradient."""
        capture = env.episode.capture
        step = env.rule.step_size if self._step_size is None else self._step_size
        pairs = list(zip(capture.keys, capture.value_gradients, strict=True))
        pairs = [(u.float(), v.float()) for u, v in pairs]
        grams = [float(((u @ u.mT) * (v @ v.mT)).sum().clamp_min(0)) for u, v in pairs]
        # Finished facts only: keys of later places are of an earlier episode.
        finished = range(env.episode.position)
        edited = [self._keys[place] for place in finished if place in self._keys]
        rows = np.zeros((len(pairs), EFFECTS))
        rows[:, 0] = np.log10(1 + step * np.array(grams)) / 2
        for layer, own in enumerate(answer_keys(capture)):
            if grams[layer] <= NOTHING * max(grams):
                continue
            u, v = pairs[layer]
            size = float(((own @ u.mT) @ v).norm(dim=1).mean())
            earlier = [keys[layer] for keys in edited]
            for place, others in ((1, self._controls[layer]), (3, earlier)):
                moved = [float(((k @ u.mT) @ v).norm(dim=1).mean()) / size for k in others]
                if moved:
                    rows[layer, place] = np.sqrt(np.mean(np.square(moved)))
                    rows[layer, place + 1] = max(moved)
        return rows
