"""The command line that the training scripts of all libraries have."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hiedit_agents.policies.record import refuse_finished
from hiedit_agents.policies.task import FORMS, Task

from hiedit_env.errors import HieditError, SettingsError, whole_number


@dataclass(frozen=True, slots=True)
class TrainingArguments:
    """What every training script takes.

    Args:
        algorithm: Name of the algorithm.
        task: What to train on.
        out: Folder of the result.
        steps: Environment steps in the task's form, over all environments.
        num_envs: Environments that are trained on at once.
        seed: Of everything.
        settings: The library's own hyperparameters that replace the script's.
        evaluations: How often the policy is evaluated while it is trained; 0 for never.
        eval_env: Arguments of the environment that differ in these evaluations.
    """

    algorithm: str
    task: Task
    out: Path
    steps: int
    num_envs: int
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 4
    eval_env: Mapping[str, Any] = field(default_factory=dict)


def parse_arguments(
    arguments: Sequence[str] | None,
    *,
    program: str,
    description: str | None,
    forms: Mapping[str, Sequence[str]],
    steps: Mapping[str, int],
    num_envs: Mapping[str, int],
) -> TrainingArguments:
    """Reads the command line of a training script.

    Args:
        arguments: The words; None for those of the process.
        program: How it is called.
        description: What it does.
        forms: Algorithm → the forms it can act in, its default first.
        steps: Algorithm → default of ``--steps``.
        num_envs: Algorithm → default of ``--num-envs``.

    Raises:
        SettingsError: a form that the algorithm cannot act in, ``--env`` without ``name=value``,
            or a number of steps, environments or evaluations that is none.
        ResultsExistError: ``--out`` holds a trained policy.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pairs: dict[str, Any] = {"nargs": "*", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument(
        "--algorithm", choices=list(forms), default=next(iter(forms)), required=len(forms) > 1
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the policy")
    parser.add_argument("--env", help="arguments of the environment, and its id", **pairs)
    parser.add_argument(
        "--form", choices=list(FORMS), help="how the environment is wrapped; by the algorithm"
    )
    parser.add_argument("--form-options", help="arguments of the form's wrapper", **pairs)
    parser.add_argument("--steps", type=int, help="steps in all, over all environments")
    parser.add_argument("--num-envs", type=int, help="environments on one resident model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", help="hyperparameters of the library's algorithm", **pairs)
    parser.add_argument("--evaluations", type=int, default=4, help="evaluations during training")
    parser.add_argument("--eval-env", help="what differs in the evaluations' environment", **pairs)
    given = parser.parse_args(arguments)
    name = given.algorithm
    form = given.form or forms[name][0]
    if form not in forms[name]:
        raise SettingsError(
            f"{name} cannot act in form {form!r} ({FORMS[form]}); give it --form "
            + " or ".join(f"{known} ({FORMS[known]})" for known in forms[name])
        )
    refuse_finished(given.out)
    given.steps = steps[name] if given.steps is None else given.steps
    given.num_envs = num_envs[name] if given.num_envs is None else given.num_envs
    for option, least in (("steps", 1), ("num_envs", 1), ("evaluations", 0)):
        whole_number(getattr(given, option), "--" + option.replace("_", "-"), least)
    options = pairs_of(given.form_options, "--form-options")
    task = Task(form, pairs_of(given.env, "--env"), options)
    return TrainingArguments(
        algorithm=name,
        task=task,
        out=given.out,
        steps=given.steps,
        num_envs=given.num_envs,
        seed=given.seed,
        settings=pairs_of(given.set, "--set"),
        evaluations=given.evaluations,
        eval_env=pairs_of(given.eval_env, "--eval-env"),
    )


def run_script(main: Callable[[], None]) -> int:
    """Runs a script's ``main``; errors of the user's end in one line and not in a traceback.

    Returns:
        Exit status: 0, or 2 for an error of the user's.
    """
    try:
        main()
    except HieditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def pairs_of(texts: Sequence[str], option: str) -> dict[str, Any]:
    """``name=value`` words as a dict; values are JSON where they can be, else text.

    Raises:
        SettingsError: a word without ``=``.

    >>> pairs_of(["model=tiny", "num_edits=20", "shuffle=false"], "--env")
    {'model': 'tiny', 'num_edits': 20, 'shuffle': False}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"{option} takes name=value, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
