"""Assertions on what a step means, for any environment of hiedit, wrapped or not.

Each raises AssertionError with a message that names the values. torch is imported only where there
is a model of it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hiedit_env.errors import SettingsError

AnyEnv = gym.Env[Any, Any]
Step = tuple[Any, Any, bool, bool, dict[str, Any]]

_PARTS = ("observation", "reward", "terminated", "truncated", "info")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def assert_reward_terms_sum(step: Step, *, tolerance: float = 1e-12) -> None:
    """The reward is a Python float and the sum of ``info["reward_terms"]``, all finite floats.

    Holds for every step of every id; not under a wrapper that changes rewards.

    Args:
        step: What ``env.step`` returned.
        tolerance: Largest absolute difference.
    """
    _, reward, _, _, info = step
    terms = info["reward_terms"]
    for name, value in {"the reward": reward, **terms}.items():
        if type(value) is not float or not np.isfinite(value):
            raise AssertionError(f"{name} must be a finite Python float, got {value!r}")
    total = sum(terms.values())
    if abs(reward - total) > tolerance:
        raise AssertionError(f"the reward is {reward!r}, the sum of its terms {total!r}: {terms}")


def assert_restores_bit_exact(env: AnyEnv, actions: Iterable[Any]) -> None:
    """Going back with ``restore_state`` undoes steps so well that they happen again bit for bit.

    Saves the state, takes the steps, restores, compares weights and random state with what was
    saved, takes the steps again, and compares everything they return. The environment is then left
    in the state it had.

    Args:
        env: After ``reset``. The outermost ``save_state`` and ``restore_state`` are used, so
            wrappers with a state of their own take part.
        actions: At least one; the rest is left out when the episode ends.
    """
    chosen = _at_least_one(actions)
    save, restore = (env.get_wrapper_attr(name) for name in ("save_state", "restore_state"))
    state = save()
    weights, random = _weights(env), copy.deepcopy(env.unwrapped.np_random.bit_generator.state)
    first = _roll(env, chosen)
    restore(state)
    changed = _changed(weights, _weights(env))
    if changed:
        raise AssertionError(
            f"after {len(first)} steps and restore_state, weights are not as saved: {changed}"
        )
    difference = _difference(
        random, env.unwrapped.np_random.bit_generator.state, "the random state"
    )
    if difference is not None:
        raise AssertionError(f"after restore_state, not as saved: {difference}")
    second = _roll(env, chosen)
    restore(state)
    _compare(first, second, "taken again after restore_state")


def assert_only_layers_changed(env: AnyEnv, action: Any) -> Step:
    """A step changes the weights of exactly the layers that ``info["layers"]`` names.

    Nothing else of the model changes, and these layers are among those that were chosen: by the
    action that reached the innermost environment, or in ``hiedit/StepSize-v1`` by the high level.
    A step that never reaches it (a picking step of SequentialSelection) changes nothing.

    Args:
        env: After ``reset``.
        action: An action of it.

    Returns:
        What ``env.step`` returned.
    """
    inner: Any = env.unwrapped
    inner_step, chosen = inner.step, []

    def recording(action: Any) -> Step:
        part = action["layers"] if isinstance(action, Mapping) else action
        # Before the step, after which the high level may have chosen for the next fact.
        chosen.append(np.array(getattr(inner, "option", part), bool))
        result: Step = inner_step(action)
        return result

    before = _weights(env)
    with mock.patch.object(inner, "step", recording):
        step = env.step(action)
    names = {name: i for i, name in enumerate(_layer_names(env))}
    changed = _changed(before, _weights(env))
    others = [name for name in changed if name not in names]
    if others:
        raise AssertionError(f"the step changed weights that are no candidate layers: {others}")
    indices = sorted(names[name] for name in changed)
    written = np.flatnonzero(step[4]["layers"]).tolist()
    if indices != written:
        raise AssertionError(
            f"the step changed layers {indices}, but info['layers'] names {written}"
        )
    allowed = np.flatnonzero(np.any(chosen, axis=0)).tolist() if chosen else []
    if not set(written) <= set(allowed):
        raise AssertionError(f"the step wrote layers {written}, but chosen were {allowed}")
    return step


def assert_same_episode(make: Callable[[], AnyEnv], seed: int, actions: Iterable[Any]) -> None:
    """A seed and actions decide everything: two environments and a used one show the same bits.

    Args:
        make: Makes the environment; called twice.
        seed: For ``reset``.
        actions: At least one; the rest is left out when the episode ends.
    """
    chosen = _at_least_one(actions)
    one, other = make(), make()
    first = _episode(one, seed, chosen)
    _compare(first, _episode(other, seed, chosen), "in a second environment", reset=True)
    _compare(first, _episode(one, seed, chosen), "in the same environment", reset=True)
    one.close()
    other.close()


def assert_no_hooks_left(env: AnyEnv) -> None:
    """No hook is on any module or parameter of the model: none is left behind by an exception.

    Args:
        env: Any environment; one without a model has no hooks.
    """
    model = _model(env)
    if model is None:
        return
    owners = chain(model.named_modules(), model.named_parameters())
    found = [
        f"{name or 'the model'}.{kind}: {len(hooks)}"
        for name, owner in owners
        for kind in _HOOKS
        if (hooks := getattr(owner, kind, None))
    ]
    if found:
        raise AssertionError(f"hooks were left on the model: {', '.join(found)}")


# Inside


def _at_least_one(actions: Iterable[Any]) -> list[Any]:
    chosen = list(actions)
    if not chosen:
        raise SettingsError("give at least one action; none would check nothing")
    return chosen


def _roll(env: AnyEnv, actions: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Steps until the episode or the actions end."""
    results = []
    for action in actions:
        # Copies, in case the environment overwrites what it returned.
        results.append(copy.deepcopy(env.step(action)))
        if results[-1][2] or results[-1][3]:
            break
    return results


def _episode(env: AnyEnv, seed: int, actions: Sequence[Any]) -> list[tuple[Any, ...]]:
    observation, info = copy.deepcopy(env.reset(seed=seed))
    return [(observation, 0.0, False, False, info), *_roll(env, actions)]


def _compare(
    first: Sequence[tuple[Any, ...]],
    second: Sequence[tuple[Any, ...]],
    where: str,
    *,
    reset: bool = False,
) -> None:
    for i, (one, other) in enumerate(zip(first, second, strict=False)):
        name = "reset" if reset and i == 0 else f"step {i - reset}"
        for part, a, b in zip(_PARTS, one, other, strict=True):
            difference = _difference(a, b, part)
            if difference is not None:
                raise AssertionError(f"{name} is not the same {where}: {difference}")


def _difference(one: Any, other: Any, name: str) -> str | None:
    """Where two values differ in any bit, and how; None if they do not."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return f"{name} has the keys {list(one)} and {list(other)}"
        found = (_difference(one[key], other[key], f"{name}[{key!r}]") for key in one)
        return next((text for text in found if text is not None), None)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{name} is {one.dtype} {one.shape} and {other.dtype} {other.shape}"
        if one.tobytes() == other.tobytes():
            return None
        pairs = zip(np.ndindex(one.shape), one.ravel(), other.ravel(), strict=True)
        place, a, b = next(pair for pair in pairs if pair[1].tobytes() != pair[2].tobytes())
        return f"{name}{list(map(int, place))} is {a!r} and {b!r}"
    if type(one) is type(other) and repr(one) == repr(other):
        return None
    return f"{name} is {one!r:.200} and {other!r:.200}"


def _model(env: AnyEnv) -> Any:
    """The language model, a torch module; None in the toy."""
    llm = getattr(env.unwrapped, "llm", None)
    if llm is None and not hasattr(env.unwrapped, "weights"):
        raise SettingsError(f"not an environment of hiedit: {env}")
    return None if llm is None else llm.model


def _layer_names(env: AnyEnv) -> list[str]:
    """Names of the candidate weights as in :func:`_weights`, in forward order."""
    inner: Any = env.unwrapped
    if _model(env) is None:
        return [f"layer {i}" for i in range(len(inner.weights))]
    return [f"{name}.weight" for name in inner.llm.names]


def _weights(env: AnyEnv) -> dict[str, bytes]:
    """A digest of every weight of the model, by name."""
    model = _model(env)
    if model is None:
        weights: NDArray[np.int64] = env.unwrapped.weights  # type: ignore[attr-defined]
        return {f"layer {i}": value.tobytes() for i, value in enumerate(weights)}
    import torch

    def digest(tensor: torch.Tensor) -> bytes:
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.blake2b(bits.numpy().data, digest_size=16).digest()

    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def _changed(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
