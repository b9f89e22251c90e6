"""Update rules by name: the built-in ones, one's own, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hiedit_env.errors import SettingsError
from hiedit_env.rules.closed_form import DecorrelatedRule, GradientRule, OuterProductRule, RidgeRule
from hiedit_env.rules.names import RULES
from tests.hiedit_env.rules.test_closed_form import by_name

#: A name in this module that is no rule.
ALL = ()


class HalfRule(GradientRule):
    """A rule of one's own."""

    name = "half"
    default_step_size = 0.5


def test_rules_by_name() -> None:
    assert {name: type(by_name(name)) for name in RULES} == {
        "decorrelated": DecorrelatedRule,
        "outer-product": OuterProductRule,
        "ridge": RidgeRule,
        "gradient": GradientRule,
    }
    assert by_name("ridge", step_size=0.3).step_size == 0.3
    own = by_name(f"{__name__}:HalfRule")
    assert isinstance(own, HalfRule)
    assert own.step_size == 0.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ultra", {}, "unknown update rule 'ultra'.*outer-product, ridge, gradient.*of your own"),
        ("no_such_module:Rule", {}, "cannot be imported.*no_such_module"),
        (":Rule", {}, "cannot be imported"),
        (".rules:GradientRule", {}, "cannot be imported"),
        (f"{__name__}:Nothing", {}, "cannot be imported.*Nothing"),
        (f"{__name__}:ALL", {}, "not a subclass of"),
        ("gradient", {"ridge": 1.0}, "'gradient'.*ridge"),
        ("ridge", {"rigde": 1.0}, "no argument 'rigde'; it has ridge, step.*did you mean 'ridge'"),
        ("gradient", {"max_grad_norm": 10**400}, "max_grad_norm must be a positive number, got 10"),
        ("gradient", {"step_size": 0}, "step_size must be a positive number, got 0"),
        ("gradient", {"step_size": -1e-4}, "positive number, got -0.0001"),
        ("gradient", {"step_size": math.nan}, "positive number, got nan"),
        ("gradient", {"step_size": "big"}, "step_size must be a positive number, got 'big'"),
        ("ridge", {"tokens": "some"}, "must be one of .*'subject'.*, got 'some'"),
        ("ridge", {"ridge": 0.0}, "ridge must be a positive number, got 0.0"),
        ("ridge", {"ridge": math.nan}, "ridge must be a positive number, got nan"),
        ("ridge", {"ridge": "1"}, "ridge must be a positive number, got '1'"),
    ],
)
def test_errors(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        by_name(name, **settings)
