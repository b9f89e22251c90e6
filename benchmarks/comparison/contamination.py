"""Finds agents that are evaluated on facts on which they were trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from hiedit_agents.named.checkpoints import fact_hashes
from hiedit_agents.protocol import Agent
from hiedit_env.datasets.streams import stream
from hiedit_env.envs.base import EditingEnv


def trained_on(
    agents: Mapping[str, Agent], env: EditingEnv, seeds: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Prints a warning for each agent that was trained on facts of this comparison.

    Args:
        agents: Label → agent.
        env: The environment of the comparison.
        seeds: The seeds whose streams are compared.

    Returns:
        Label of each such agent → ``{"facts", "of"}``: how many facts of the comparison it was
        trained on, and how many facts the comparison has.
    """
    # The streams that env.reset(seed) draws.
    streams = [stream(env.requests, env.num_edits, np.random.default_rng(s)) for s in seeds]
    facts = fact_hashes(request for one in streams for request in one)
    found = {}
    for name, agent in agents.items():
        find = getattr(agent, "training_facts", None)
        count = 0 if find is None else len(facts & find(env.model_name))
        if count:
            found[name] = {"facts": count, "of": len(facts)}
            print(
                f"hiedit: warning: agent {name!r} was trained on {count} of the {len(facts)} facts "
                "of this table",
                file=sys.stderr,
            )
    return found
