"""The command line that the training scripts of all libraries have."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.named.grammar import read_value
from hiedit_agents.policies.record import refuse_finished
from hiedit_agents.policies.task import FORMS, Task
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings, unknown_name
from hiedit_env.errors import MissingLibraryError, SettingsError

__all__ = ["TrainingArguments", "pairs_of", "parse_arguments", "refuse_missing", "run_script"]


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


Pairs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=VALUE ...]")]


@settings
class Options:
    """The options of every training script."""

    out: Path
    """folder of the policy"""
    algorithm: str | None = None
    """name of the algorithm; may be left out where a script has only one"""
    env: Pairs = ()
    """arguments of the environment, and its id"""
    form: str | None = None
    """how the environment is wrapped; by default as the algorithm needs it"""
    form_options: Pairs = ()
    """arguments of the form's wrapper"""
    steps: AtLeast1 | None = None
    """steps in all, over all environments"""
    num_envs: AtLeast1 | None = None
    """environments that share one copy of the model"""
    seed: AtLeast0 = 0
    """seed of everything random"""
    set: Pairs = ()
    """hyperparameters of the library's algorithm"""
    evaluations: AtLeast0 = 4
    """evaluations during training; 0 for none"""
    eval_env: Pairs = ()
    """what differs in the evaluations' environment"""


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
    lines = [
        f"{name}: {count} steps, {num_envs[name]} environments; forms: {', '.join(forms[name])}"
        for name, count in steps.items()
    ]
    text = f"{description}\nDefaults of the algorithms, the default form first:\n" + "\n".join(
        lines
    )
    given = parse(Options, arguments, program=program, description=text)
    name = given.algorithm or next(iter(forms))
    if name not in forms:
        raise SettingsError(unknown_name(name, list(forms), "algorithm"))
    if given.algorithm is None and len(forms) > 1:
        raise SettingsError(f"--algorithm must be given: {', '.join(forms)}")
    form = given.form or forms[name][0]
    if form not in FORMS:
        raise SettingsError(unknown_name(form, list(FORMS), "form"))
    if form not in forms[name]:
        raise SettingsError(
            f"{name} cannot act in form {form!r} ({FORMS[form]}); give it --form "
            + " or ".join(f"{known} ({FORMS[known]})" for known in forms[name])
        )
    refuse_finished(given.out)
    options = pairs_of(given.form_options, "--form-options")
    return TrainingArguments(
        algorithm=name,
        task=Task(form, pairs_of(given.env, "--env"), options),
        out=given.out,
        steps=steps[name] if given.steps is None else given.steps,
        num_envs=num_envs[name] if given.num_envs is None else given.num_envs,
        seed=given.seed,
        settings=pairs_of(given.set, "--set"),
        evaluations=given.evaluations,
        eval_env=pairs_of(given.eval_env, "--eval-env"),
    )


def refuse_missing(library: str, extra: str, module: str, error: ImportError) -> NoReturn:
    """Says which library is missing: in one line where the module runs as a script.

    Raises:
        MissingLibraryError: where the module is imported.
        SystemExit: (status 2) where it runs.
    """
    missing = MissingLibraryError(library, extra)
    if module == "__main__":
        print(f"error: {missing}", file=sys.stderr)
        raise SystemExit(2) from error
    raise missing from error


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
        found[name] = read_value(value)
    return found
