"""The console script ``hiedit``: one data class per command; nothing heavy is imported for help."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Protocol, TextIO

import tyro

from hiedit_agents.command_line import Switch, parse, run_script
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_benchmarks.commands.export_cli import Export
from hiedit_benchmarks.commands.record_cli import Record
from hiedit_benchmarks.commands.serve_cli import Serve
from hiedit_benchmarks.commands.stream_settings import StreamSettings
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.commands.undo_cli import Diff, Log, Revoke, Rewind, Show
from hiedit_benchmarks.comparison.console import replace_what_cannot_be_encoded
from hiedit_benchmarks.comparison.settings import CompareSettings, EditSettings, Ending
from hiedit_benchmarks.layers.settings import LayerScanSettings
from hiedit_env import __version__
from hiedit_env.envs.settings import AtLeast1, settings, unknown_name
from hiedit_env.errors import HieditWarning, SettingsError

PROGRAM = "hiedit"
Agent = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AGENT")]
File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


class Command(Protocol):
    """A command with its options read."""

    def run(self) -> int | None:
        """Does it; returns the exit status, 0 where None."""


@settings
class Edit:
    """Write facts into a model and save it.

    The facts of a file are written in file order, and the edited model is saved as an ordinary
    Hugging Face folder.
    """

    facts: str
    """.json or .jsonl with prompt, answer and subject per row (or zsRE, CounterFact, … rows), a
    built-in name: world-facts, tiny-facts; or - for facts as they come, one JSON a line, each
    answered by one JSON a line"""
    out: Path
    """folder of the edited model; must not exist or be empty"""
    agent: str | None = None
    """who edits; by default hiedit if a trained one fits the model and neither layers nor a rule
    are given, else all-layers"""
    ending: Ending = Ending()
    editing: EditSettings = EditSettings()
    stream: StreamSettings = StreamSettings()

    def run(self) -> int:
        """Edits and saves."""
        if self.facts == "-":
            from hiedit_benchmarks.commands import edit_stream

            chosen_end = self.ending.chosen
            return edit_stream.main(self.editing, self.agent, chosen_end, self.out, self.stream)
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(StreamSettings)
            if field.name != "ledger" and getattr(self.stream, field.name) != field.default
        ]
        if given:
            raise SettingsError(
                f"{', '.join(given)}: for facts as they come (--facts -); leave it out"
            )
        from hiedit_agents.registry import default_agent
        from hiedit_benchmarks.commands import edit

        values = {**_values(self.editing), "end_token": self.ending.chosen}
        chosen = CompareSettings(dataset=self.facts, **values)
        own = self.editing
        agent = self.agent or default_agent(own.model, own.layers, own.update_rule)
        return edit.main(chosen, agent, self.out, self.stream.ledger)


@settings
class Compare:
    """Run agents on the same streams of facts and compare them.

    The unedited model is always included.
    """

    out: Path
    """folder of the results"""
    agents: tuple[str, ...] = ("all-layers", "random-layers", "gradient-norm")
    """names, such as no-edit, all-layers, hiedit or policy+ridge, folders of trained agents, spec
    files, module:Class, or LIBRARY:DIR; settings follow a comma, as in rledit,ridge=2; LABEL=NAME
    gives a row another name; 'hiedit agents' lists them"""
    seeds: tuple[int, ...] = (0,)
    """one stream each, the same for every agent"""
    baseline: str | None = None
    """agent that the others are compared with in pairs; by default all-layers, or the first"""
    resume: Switch = False
    """skip runs that --out already holds"""
    no_generation: Switch = False
    """measure under teacher forcing only, which is much faster, but overestimates"""
    ending: Ending = Ending()
    shared: CompareSettings = CompareSettings()

    def run(self) -> None:
        """Compares and prints."""
        from hiedit_benchmarks.comparison import compare

        values = {**_values(self.shared), "end_token": self.ending.chosen}
        if self.no_generation:
            values["generation"] = ()
        chosen = CompareSettings(**values)
        compare.main(chosen, self.agents, self.seeds, self.out, self.resume, self.baseline)


@settings
class Train:
    """Train an agent on a model and a data set.

    Defaults of the training options are those of the agent that is named: 'hiedit train
    AGENT --help' shows them, 'hiedit train --help' those of an agent without any of its own.
    """

    agent: Agent
    """hiedit, hiedit-paper, rledit, mend, malmen, HIGH+LOW, the folder of a trained agent, or a
    spec file"""
    out: Path
    """folder of the trained agent"""
    resume: Switch = False
    """go on from the last checkpoint"""
    no_tensorboard: Switch = False
    """write no TensorBoard files"""
    ending: Ending = Ending()
    model: TrainingRun = TrainingRun(agent="")
    training: TrainSettings = TrainSettings()

    def run(self) -> int:
        """Trains."""
        from hiedit_benchmarks.commands import train

        values = {"agent": self.agent, "end_token": self.ending.chosen}
        run = TrainingRun(**{**_values(self.model), **values})
        return train.main(run, self.training, self.out, self.resume, not self.no_tensorboard)


@settings
class Layers:
    """Find candidate layers for a model: effect per unit of damage, measured on a few facts.

    Each fact is written into each layer alone, and nothing is kept. A table is printed; the file
    of --out is what --layers of every command takes.
    """

    out: Path | None = None
    """.json file for the proposed layers and all scores; by default none is written"""
    picture: Path | None = None
    """.png file for a picture; by default none is drawn"""
    measurement: LayerScanSettings = LayerScanSettings()

    def run(self) -> int:
        """Measures and prints."""
        from hiedit_benchmarks.commands import layers

        return layers.main(self.measurement, self.out, self.picture)


@settings
class Demo:
    """Edit a small real model and look at the result, in a few minutes.

    Its answers before and after are shown, and several agents are compared.
    """

    out: Path = Path("demo")
    """folder of the results"""
    num_edits: AtLeast1 = 8
    """facts per agent"""
    agents: tuple[str, ...] | None = None
    """agents to compare, besides the unedited model; by default the trained hiedit where one ships
    for the model, and simple agents"""
    model: str = "smollm2-135m"
    """smollm2-135m, tiny (a toy, offline), a folder, or a Hugging Face id"""

    def run(self) -> None:
        """Shows it."""
        from hiedit_benchmarks.commands import demo

        demo.main(self.model, self.agents, self.num_edits, self.out)


@settings
class Data:
    """Show what hiedit understands of a file of facts.

    Its format, counts, the first three facts in full, and warnings; nothing is edited.
    """

    file: File
    """.json or .jsonl, a built-in name, or - for standard input"""

    def run(self) -> None:
        """Prints it."""
        from hiedit_benchmarks.commands import data

        data.describe(self.file)


@settings
class Agents:
    """List agents and levels with their settings, defaults and meanings."""

    name: Name = ""
    """an agent or a level to show alone"""

    def run(self) -> None:
        """Prints the list."""
        from hiedit_benchmarks.commands import agents

        agents.main(self.name)


#: Command → data class of its options.
COMMANDS: Mapping[str, type[Any]] = {
    "edit": Edit,
    "serve": Serve,
    "compare": Compare,
    "train": Train,
    "layers": Layers,
    "record": Record,
    "demo": Demo,
    "data": Data,
    "agents": Agents,
    "log": Log,
    "show": Show,
    "revoke": Revoke,
    "rewind": Rewind,
    "diff": Diff,
    "export": Export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: Without the program's name; ``sys.argv`` where None.

    Returns:
        Exit status: 0, 2 for an error of the user's, 3 where nothing useful came of it, 130 when
        interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read by OpenMP when torch is imported. Threads that spin while they wait make a step ten times
    # slower as soon as another program wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read by transformers when it is imported: what it says about a model in tables and advice of
    # its own, this program says in one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    replace_what_cannot_be_encoded()
    # So that module:Class finds modules of the working folder, as "python -m" does.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return run_script(lambda: _run(words), PROGRAM)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings of hiedit's own in one line; others as Python shows them."""
    if issubclass(category, HieditWarning):
        print(f"{PROGRAM}: warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise SettingsError(unknown_name(name, list(COMMANDS), "command"))
    kind = COMMANDS[name]
    default = _train_defaults(rest) if kind is Train else None
    command: Command = parse(kind, rest, program=f"{PROGRAM} {name}", default=default)
    return command.run() or 0


def overview() -> str:
    """What ``hiedit --help`` prints."""
    lines = [f"usage: {PROGRAM} COMMAND [OPTIONS]", ""]
    lines += [f"  {name:8} {str(kind.__doc__).splitlines()[0]}" for name, kind in COMMANDS.items()]
    lines += ["", f"'{PROGRAM} COMMAND --help' shows the options of a command."]
    return "\n".join(lines)


def _values(given: Any) -> dict[str, Any]:
    """Fields of settings by name."""
    return {field.name: getattr(given, field.name) for field in fields(given)}


def _train_defaults(words: Sequence[str]) -> Train | None:
    """The command with the defaults of the agent that the words name; None if they name none."""
    name = _agent_of(words)
    if name is None:
        return None
    from hiedit_agents.registry import spec_agent

    # Not checked, since what must be given is missing: tyro only reads the defaults.
    default = object.__new__(Train)
    for field in fields(Train):
        object.__setattr__(default, field.name, field.default)
    chosen = TrainSettings(**spec_agent(name).spec.train)
    for key, value in {"agent": name, "out": tyro.MISSING, "training": chosen}.items():
        object.__setattr__(default, key, value)
    return default


def _agent_of(words: Sequence[str]) -> str | None:
    """The agent of ``hiedit train``: the first word that is no option and no value of one."""
    takes: dict[str, Any] = {}
    for kind in (Train, TrainingRun, TrainSettings):
        for field in fields(kind):
            option = "--" + field.name.replace("_", "-")
            takes[option] = "many" if "Patterns" in str(field.type) else "one"
            if "bool" in str(field.type) or "Switch" in str(field.type):
                takes[option] = takes[f"--no-{option[2:]}"] = "none"
    left = "none"
    for word in words:
        if word.startswith("-") and len(word) > 1:
            option = word.partition("=")[0].replace("_", "-")
            left = "none" if "=" in word else takes.get(option, "none")
        elif left == "none":
            return word
        elif left == "one":
            left = "none"
    return None


if __name__ == "__main__":
    sys.exit(main())
