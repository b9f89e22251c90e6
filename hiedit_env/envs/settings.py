"""What the environments are made and reset with, checked before a model is loaded."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import stream
from hiedit_env.errors import SettingsError, whole_number
from hiedit_env.evaluation.reward import check_judging
from hiedit_env.rules.names import make_rule

#: Weight of every term of the reward; a mapping given by the user overrides single entries.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "edit": 1.0,
    "locality": 1.0,
    "sparsity": 0.1,
    "retention": 1.0,
    "collapse": 10.0,
}

#: The data set of a built-in model; world-facts for every other model.
MODEL_DATASETS: Mapping[str, str] = {"tiny": "tiny-facts", "planted": "planted-facts"}

#: The update rule that a built-in model is made for; decorrelated for every other model.
MODEL_RULES: Mapping[str, str] = {"planted": "gradient"}

#: Arguments tuned for a built-in model: model → rule → name → value.
MODEL_RULE_SETTINGS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "tiny": {
        "decorrelated": {"step_size": 1e-3},
        "outer-product": {"step_size": 2e-3},
        "ridge": {"step_size": 5e-4},
        "gradient": {"step_size": 0.03},
    },
    "planted": {
        "decorrelated": {"step_size": 0.01},
        "outer-product": {"step_size": 0.01},
        "gradient": {"step_size": 1.5, "max_grad_norm": 4.0},
    },
}

RENDER_MODES = ("ansi", "rgb_array")
_SWITCHES = ("intrinsic", "stop_when_answered", "shuffle", "trust_remote_code", "progress")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses arguments of an environment that no model could make right.

    Args:
        settings: All arguments of :class:`.base.EditingEnv` by name.

    Raises:
        SettingsError: names the argument, its value and what would be right.
    """
    model, dataset, mode = (settings[k] for k in ("model", "dataset", "render_mode"))
    if not isinstance(model, str):
        raise SettingsError(
            f"model must be a name or a path, got {type(model).__name__}; gym.make copies its "
            "arguments, so a live model cannot be passed"
        )
    if not (dataset is None or isinstance(dataset, str | os.PathLike)):
        raise SettingsError(f"dataset must be a name, a path or None, got {dataset!r}")
    if mode not in (None, *RENDER_MODES):
        raise SettingsError(f"render_mode must be one of {(None, *RENDER_MODES)}, got {mode!r}")
    for name in _SWITCHES:
        if not isinstance(settings[name], bool | np.bool_):
            raise SettingsError(f"{name} must be True or False, got {settings[name]!r}")
    whole_number(settings["max_steps_per_edit"], "max_steps_per_edit", 1)
    whole_number(settings["retention_window"], "retention_window", 0)
    check_judging(settings["reward"], settings["retention_decay"], settings["locality_reference"])
    reward_weights(settings["reward_weights"])
    _check_rule(settings["update_rule"], rule_settings(settings))


def reward_weights(given: Mapping[str, float] | None) -> dict[str, float]:
    """Default weights with the given ones in place.

    Raises:
        SettingsError: unknown term or a weight that is not a finite number ≥ 0.

    >>> reward_weights({"sparsity": 0.0})["sparsity"], reward_weights(None)["edit"]
    (0.0, 1.0)
    """
    if not (given is None or isinstance(given, Mapping)):
        raise SettingsError(
            f"reward_weights must be a dict such as {{'sparsity': 0}}, got {given!r}"
        )
    weights = dict(DEFAULT_WEIGHTS)
    for term, weight in (given or {}).items():
        if term not in weights:
            raise SettingsError(
                f"unknown reward term {term!r}; the terms are {', '.join(DEFAULT_WEIGHTS)}"
            )
        if not (isinstance(weight, Real) and 0 <= float(weight) < np.inf):
            raise SettingsError(
                f"reward weight of {term!r} must be a finite number ≥ 0, got {weight!r}"
            )
        weights[term] = float(weight)
    return weights


def rule_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the update rule; those tuned for the model only where none were given.

    Args:
        settings: All arguments of :class:`.base.EditingEnv` by name.

    Raises:
        SettingsError: ``update_rule_settings`` is no mapping, or there are two step sizes.
    """
    model, rule, step_size = (settings[k] for k in ("model", "update_rule", "step_size"))
    given = settings["update_rule_settings"]
    if not (given is None or isinstance(given, Mapping)):
        raise SettingsError(f"update_rule_settings must be a dict or None, got {given!r}")
    chosen = dict(given or {})
    if step_size is not None:
        if "step_size" in chosen:
            raise SettingsError(
                f"step_size={step_size!r} and update_rule_settings['step_size']="
                f"{chosen['step_size']!r} are both given; leave one of them out"
            )
        chosen["step_size"] = step_size
    known = MODEL_RULE_SETTINGS.get(model, {}).get(rule, {}) if isinstance(rule, str) else {}
    return {**known, **chosen}


def draw_stream(
    options: Mapping[str, Any] | None,
    requests: Sequence[Request],
    num_edits: int | None,
    generator: np.random.Generator | None,
) -> Sequence[Request]:
    """The facts of a new episode.

    Args:
        options: Options of ``reset``; ``requests`` replaces everything else.
        requests: The data set.
        num_edits: How many of them; None for all.
        generator: Draws them; None for the first ones in their order.

    Raises:
        SettingsError: another option than ``requests``, or one that is no list of Requests.
    """
    if not isinstance(options or {}, Mapping):
        raise SettingsError(f"reset options must be a dict or None, got {options!r:.200}")
    unknown = sorted(map(str, set(options or {}) - {"requests"}))
    if unknown:
        raise SettingsError(f"unknown reset options {unknown}; known is 'requests'")
    if options:
        given = options["requests"]
        if not isinstance(given, list | tuple) or not all(isinstance(r, Request) for r in given):
            raise SettingsError(f"requests must be a list of hiedit Requests, got {given!r:.200}")
        return given
    return requests[:num_edits] if generator is None else stream(requests, num_edits, generator)


def _check_rule(name: object, settings: Mapping[str, Any]) -> None:
    if not isinstance(name, str):
        raise SettingsError(f"update_rule must be a name or 'module:Class', got {name!r}")
    if ":" not in name:
        # Made for no layers at all, and thrown away.
        make_rule(name, (), torch.device("cpu"), settings)
        return
    # A class of the user's own may need real layers.
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"update rule {name!r} cannot be imported: {error}") from error
