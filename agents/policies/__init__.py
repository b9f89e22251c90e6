"""Common parts of all RL libraries: wrapped environments, records on disk, agents that play.

A training script of a library (:mod:`hiedit_agents.rl.train_sb3` is the shortest) does three things
with it:

* :class:`Task` makes the environments: :meth:`Task.make_env`, :meth:`Task.make_envs` (N
environments on
  one resident model), :meth:`Task.make_vec` (the same as one Gymnasium vector environment);
* :func:`save_policy` keeps the trained policy beside the library's own files, as
  ``agent.json`` and ``agent.safetensors``;
* its ``load(folder)`` returns a :class:`PolicyAgent`, which plays the policy in
  ``hiedit compare --agents LIBRARY:DIR``.
"""

from __future__ import annotations

from hiedit_agents.policies.agent import FunctionPolicy, Policy, PolicyAgent
from hiedit_agents.policies.record import PolicyRecord, read_policy, refuse_finished, save_policy
from hiedit_agents.policies.task import FORMS, Task

__all__ = [
    "FORMS",
    "FunctionPolicy",
    "Policy",
    "PolicyAgent",
    "PolicyRecord",
    "Task",
    "read_policy",
    "refuse_finished",
    "save_policy",
]
