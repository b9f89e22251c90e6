"""For tests of agents: a toy environment, tiny environments, assertions on what a step means.

Importing this package imports no torch; ``docs/testing.md`` shows how the parts are used.
"""

from __future__ import annotations

from hiedit_env.testing.assertions import (
    assert_no_hooks_left,
    assert_only_layers_changed,
    assert_restores_bit_exact,
    assert_reward_terms_sum,
    assert_same_episode,
)
from hiedit_env.testing.factories import make_tiny, tiny_requests
from hiedit_env.testing.toy import ToyEditing

__all__ = [
    "ToyEditing",
    "assert_no_hooks_left",
    "assert_only_layers_changed",
    "assert_restores_bit_exact",
    "assert_reward_terms_sum",
    "assert_same_episode",
    "make_tiny",
    "tiny_requests",
]
