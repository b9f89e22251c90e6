"""The console script ``hiedit``; each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiedit_env import __version__
from hiedit_env.errors import HieditError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: Without the program's name; ``sys.argv`` where None.

    Returns:
        Exit status: 0, 2 for an error of the user's, 130 when interrupted.
    """
    given = build_parser().parse_args(arguments)
    # Read by OpenMP when torch is imported. Threads that spin while they wait make a step ten times
    # slower as soon as another program wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        given.run(given)
    except HieditError as error:
        print(f"hiedit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hiedit: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="hiedit", description="Edit language models, fact after fact, and measure it."
    )
    parser.add_argument("--version", action="version", version=f"hiedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_edit(commands)
    _add_compare(commands)
    _add_train(commands)
    _add_demo(commands)
    return parser


def _add_edit(commands: Any) -> None:
    parser = commands.add_parser(
        "edit",
        help="write facts into a model and save it",
        description="Writes the facts of a file into a model, in file order, and saves the edited "
        "model as an ordinary Hugging Face folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--facts",
        required=True,
        metavar="FILE",
        help=".json or .jsonl with prompt, answer and subject per row (or zsRE, CounterFact, … "
        "rows), or a built-in name: world-facts, tiny-facts",
    )
    _add_out(parser, "folder of the edited model; must not exist or be empty")
    parser.add_argument(
        "--agent",
        help="who edits; by default hiedit if a trained one ships for the model, else all-layers",
    )
    _add_model(parser)
    _add_rule(parser)
    parser.set_defaults(run=_edit)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="run agents on the same streams of facts and compare them",
        description="Runs agents on the same streams of facts and prints their metrics. The "
        "unedited model is always included.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_out(parser, "folder of the results")
    parser.add_argument(
        "--agents",
        nargs="+",
        default=["all-layers", "random-layers", "gradient-norm"],
        metavar="AGENT",
        help="names (no-edit, all-layers, random-layers, fixed-layers, gradient-norm, hiedit, …; "
        "oracle on the planted model), folders of trained agents, HIGH+LOW, module:Class, "
        "LIBRARY:DIR for policies of RL libraries; LABEL=NAME gives a row another name",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME_OR_FILE",
        help="world-facts, tiny-facts, planted-facts or a .json or .jsonl file; by default that of "
        "a built-in model, else world-facts",
    )
    parser.add_argument("--num-edits", type=int, default=100, metavar="N", help="facts per stream")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="S",
        help="one stream each, the same for every agent",
    )
    parser.add_argument(
        "--baseline",
        metavar="AGENT",
        help="whom the others are compared with in pairs; by default all-layers, or the first",
    )
    parser.add_argument("--resume", action="store_true", help="skip runs that --out already holds")
    parser.add_argument(
        "--reward",
        default="loss",
        choices=("loss", "token_accuracy", "generation"),
        help="what agents are rewarded by",
    )
    parser.add_argument(
        "--retention-window",
        type=int,
        default=0,
        metavar="N",
        help="remembered edits in that reward; only agents that learn from it need any",
    )
    parser.add_argument(
        "--no-generation",
        action="store_true",
        help="measure under teacher forcing only, which is much quicker and flatters",
    )
    _add_model(parser)
    _add_rule(parser)
    parser.set_defaults(run=_compare)


def _add_train(commands: Any) -> None:
    from hiedit_agents.hierarchy.train_settings import describe

    parser = commands.add_parser(
        "train",
        help="train an agent",
        description="Trains an agent on a model and a data set. Some agents have defaults of "
        "their own for the options below 'training'.",
    )
    parser.add_argument("--name", help="of the trained agent; by default AGENT")
    parser.add_argument(
        "agent",
        metavar="AGENT",
        help="hiedit, hiedit-paper, rledit, mend, malmen, HIGH+LOW, or the folder of a trained one",
    )
    _add_out(parser, "folder of the trained agent")
    parser.add_argument("--dataset", metavar="NAME_OR_FILE", help="training facts")
    parser.add_argument(
        "--exclude",
        metavar="NAME_OR_FILE",
        help="data set kept for an evaluation: its subjects and unrelated prompts are left out",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard files")
    parser.add_argument(
        "--layers-per-edit", type=int, metavar="K", help="of the high level that is trained"
    )
    parser.add_argument(
        "--max-steps-per-edit", type=int, metavar="N", help="horizon of the options"
    )
    parser.add_argument("--step-size", type=float, metavar="X", help="nominal, of the low level")
    _add_model(parser)
    group = parser.add_argument_group("training")
    for name, (default, text) in describe().items():
        option = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            shown = f"{text} (default: {default})"
            group.add_argument(option, type=type(default), metavar="X", help=shown)
    parser.set_defaults(run=_train)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="edit a small real model and look at the result, in a few minutes",
        description="Edits a small real language model with several agents, shows its answers "
        "before and after, and compares the agents.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument("--num-edits", type=int, default=30, metavar="N", help="facts per agent")
    parser.add_argument(
        "--agents",
        nargs="+",
        default=None,
        metavar="AGENT",
        help="agents to compare, besides the unedited model; by default the trained hiedit where "
        "one ships for the model, and simple agents",
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="smollm2-135m, tiny (a toy, offline), folder or id"
    )
    parser.set_defaults(run=_demo)


def _add_out(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="smollm2-135m",
        help="smollm2-135m, tiny, planted (a toy whose right layers are known), a folder, or a "
        "Hugging Face id",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    group.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help="candidate weight matrices, e.g. 'model.layers.{10-14}.mlp.gate_proj'; by default "
        "those of published work on the model, or at the same relative depth",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code the model comes with"
    )


def _add_rule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("editing")
    group.add_argument(
        "--layers-per-edit",
        type=int,
        metavar="K",
        help="for agents that choose a fixed number of layers, by default half of them; the folder "
        "of a trained agent keeps its own, which DIR?high.layers_per_edit=K changes",
    )
    group.add_argument(
        "--max-steps-per-edit",
        type=int,
        default=5,
        metavar="N",
        help="most updates per fact; a fact is left alone once it is answered",
    )
    group.add_argument(
        "--update-rule",
        help="decorrelated, outer-product, ridge, gradient or module:Class; by default "
        "decorrelated, and gradient for the planted model",
    )
    group.add_argument(
        "--step-size", type=float, metavar="X", help="of the update rule; by default its own"
    )


def _edit(given: argparse.Namespace) -> None:
    from hiedit_agents.registry import default_agent
    from hiedit_benchmarks.commands import edit

    agent = given.agent or default_agent(given.model)
    edit.main(_settings(given, dataset=given.facts), agent, given.out)


def _compare(given: argparse.Namespace) -> None:
    from hiedit_benchmarks.comparison import compare

    from hiedit_env.evaluation.names import METRICS

    settings = _settings(
        given,
        dataset=given.dataset,
        num_edits=given.num_edits,
        reward=given.reward,
        retention_window=given.retention_window,
        generation=() if given.no_generation else METRICS,
    )
    compare.main(settings, given.agents, given.seeds, given.out, given.resume, given.baseline)


def _train(given: argparse.Namespace) -> None:
    from hiedit_agents.hierarchy.train_settings import TrainSettings, describe
    from hiedit_agents.registry import spec_agent
    from hiedit_benchmarks.commands import train

    named = {name: getattr(given, name) for name in describe()}
    named = {name: value for name, value in named.items() if value is not None}
    run = train.TrainingRun(
        agent=given.agent,
        name=given.name,
        model=given.model,
        dataset=given.dataset,
        layers=None if given.layers is None else tuple(given.layers),
        layers_per_edit=given.layers_per_edit,
        max_steps_per_edit=given.max_steps_per_edit,
        step_size=given.step_size,
        exclude=given.exclude,
        device=given.device,
        dtype=given.dtype,
        trust_remote_code=given.trust_remote_code,
    )
    settings = TrainSettings(**{**spec_agent(given.agent).spec.train, **named})
    train.main(run, settings, given.out, given.resume, not given.no_tensorboard)


def _demo(given: argparse.Namespace) -> None:
    from hiedit_benchmarks.commands import demo

    demo.main(given.model, given.agents, given.num_edits, given.out)


def _settings(given: argparse.Namespace, **more: Any) -> Any:
    from hiedit_benchmarks.comparison.settings import CompareSettings

    return CompareSettings(
        model=given.model,
        max_steps_per_edit=given.max_steps_per_edit,
        layers_per_edit=given.layers_per_edit,
        update_rule=given.update_rule,
        step_size=given.step_size,
        layers=None if given.layers is None else tuple(given.layers),
        device=given.device,
        dtype=given.dtype,
        trust_remote_code=given.trust_remote_code,
        **more,
    )


if __name__ == "__main__":
    sys.exit(main())
