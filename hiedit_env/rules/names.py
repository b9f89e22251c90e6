"""Update rules by name: the built-in ones, and those of your own."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hiedit_env.errors import SettingsError, arguments_of, import_named, require_known
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.closed_form import DecorrelatedRule, GradientRule, OuterProductRule, RidgeRule

#: Built-in rules by name.
RULES: dict[str, type[UpdateRule]] = {
    rule.name: rule for rule in (DecorrelatedRule, OuterProductRule, RidgeRule, GradientRule)
}


def make_rule(
    name: str,
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
) -> UpdateRule:
    """A rule by name, or by ``"package.module:Class"`` for one of your own.

    Raises:
        SettingsError: unknown name, or settings the rule does not take.
    """
    if ":" in name:
        rule = import_named(name, "update rule")
        if not (isinstance(rule, type) and issubclass(rule, UpdateRule)):
            raise SettingsError(f"{name!r} is not a subclass of hiedit_env.rules.base.UpdateRule")
    elif name in RULES:
        rule = RULES[name]
        for setting in settings or {}:
            require_known(setting, arguments_of(rule), f"update rule {name!r}")
    else:
        raise SettingsError(
            f"unknown update rule {name!r}; built in are {', '.join(RULES)}, and "
            "'package.module:Class' names one of your own"
        )
    try:
        return rule(shapes, device, **dict(settings or {}))
    except SettingsError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingsError(f"update rule {name!r}: {error}") from error


def check_rule(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses a rule, or settings of a built-in one, before there is a model.

    Raises:
        SettingsError: unknown name, settings that the rule does not take, or a class of your own
            that cannot be imported.
    """
    if ":" not in name:
        # Made for no layers at all, and thrown away.
        make_rule(name, (), torch.device("cpu"), settings)
        return
    # A class of the user's own may need real layers.
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"update rule {name!r} cannot be imported: {error}") from error
