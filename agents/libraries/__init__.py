"""What all RL libraries share: how an environment is wrapped, what is kept on disk, how it plays.

A training script of a library (:mod:`agents.sb3` is the shortest) does three things with it:

* :class:`Task` makes the environments: :meth:`Task.make_env`, :meth:`Task.make_envs` (N lives on
  one resident model), :meth:`Task.make_vec` (the same as one Gymnasium vector environment);
* :func:`save_policy` keeps the trained policy beside the library's own files, as
  ``policy.json`` and ``policy.safetensors``;
* its ``load(folder)`` returns a :class:`PolicyAgent`, which plays the policy in
  ``hiedit compare --agents LIBRARY:DIR``.
"""

from __future__ import annotations

from agents.libraries.agent import FunctionPolicy, Policy, PolicyAgent
from agents.libraries.command import TrainingArguments, parse_arguments, run_script
from agents.libraries.record import PolicyRecord, read_policy, refuse_finished, save_policy
from agents.libraries.task import FORMS, Task

__all__ = [
    "FORMS",
    "FunctionPolicy",
    "Policy",
    "PolicyAgent",
    "PolicyRecord",
    "Task",
    "TrainingArguments",
    "parse_arguments",
    "read_policy",
    "refuse_finished",
    "run_script",
    "save_policy",
]
