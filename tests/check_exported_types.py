"""Types of exported names as a user's type checker sees them; "make types" checks this file."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np

import hiedit_agents
import hiedit_env


def of_a_function(path: Path) -> None:
    requests = hiedit_env.load_requests(str(path))
    assert_type(requests, list[hiedit_env.Request])
    assert_type(hiedit_env.stream(requests, 1, np.random.default_rng(0)), list[hiedit_env.Request])
    assert_type(hiedit_agents.make_agent("hiedit"), hiedit_agents.Agent)


def of_a_class(request: hiedit_env.Request, update: hiedit_env.LowRankUpdate) -> None:
    assert_type(request.prompt, str)
    assert_type(update.scaled(2.0), hiedit_env.LowRankUpdate)


def of_a_name_that_is_not_exported() -> None:
    # An error, which is expected: an unneeded "ignore" would be an error itself.
    hiedit_env.NoSuchName  # type: ignore[attr-defined]  # noqa: B018
    hiedit_agents.NoSuchName  # type: ignore[attr-defined]  # noqa: B018
