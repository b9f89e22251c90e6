"""Agents of several comparisons in one table, with paired differences.

``python -m hiedit_benchmarks.studies.side_by_side DIR … --baseline AGENT``

Agents that need other candidate layers cannot play in one ``hiedit compare``. Where they edited the
same streams of the same model in several, this prints what one comparison would have printed, and
with ``--out`` writes its summary as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import RenderableType

from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.comparison.report import report, show
from hiedit_benchmarks.comparison.results import UNEDITED, ResultsFolder, Row, write_json
from hiedit_benchmarks.comparison.statistics import (
    PairedDifferences,
    Summary,
    baseline_of,
    paired_differences,
    summarise,
)
from hiedit_env.errors import ResultsExistError, SettingsError

PROGRAM = "python -m hiedit_benchmarks.studies.side_by_side"

_Places = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="DIR [DIR ...]", help_behavior_hint=""),
]

#: Settings that all rows must have in common: who is edited, with what, and how it is judged.
COMMON = ("model", "dtype", "dataset_fingerprint", "num_edits", "prompt_form", "end_token")


@dataclass(frozen=True, slots=True)
class Joined:
    """Rows of several comparisons.

    Args:
        rows: One per agent and seed, agents in the order they are met.
        summary: Their means.
        baseline: The agent that the others are compared with.
        paired: Agent → differences from the baseline.
    """

    rows: list[Row]
    summary: Summary
    baseline: str
    paired: PairedDifferences

    def report(self, encoding: str | None = None) -> RenderableType:
        """What is printed, in characters that ``encoding`` has."""
        return report(self.summary, self.paired, self.baseline, self.rows, encoding=encoding)


def join(folders: Sequence[Path], baseline: str | None = None) -> Joined:
    """Reads comparisons of the same streams.

    Args:
        folders: Each with the results of one ``hiedit compare``.
        baseline: The agent that the others are compared with; None for ``all-layers``, or the first
            that edits.

    Raises:
        SettingsError: a folder without results; other models, facts or ways of asking; seeds that
            not every agent has; an agent that is there twice; or no such baseline.
    """
    rows: dict[tuple[str, int], Row] = {}
    found: dict[tuple[str, int], Any] = {}
    common: dict[str, Any] = {}
    streams: dict[int, str] = {}
    for path in folders:
        folder = ResultsFolder(path, {}, resume=True)
        if not folder.rows:
            raise SettingsError(f"{path} holds no results of hiedit compare")
        for row in folder.rows:
            agent, seed = row["agent"], row["seed"]
            alike = {name: row["settings"].get(name) for name in COMMON}
            common = common or alike
            for name in COMMON:
                if alike[name] != common[name]:
                    raise SettingsError(
                        f"{path}: {name} is {alike[name]!r}, and {common[name]!r} in "
                        f"{folders[0]}; only comparisons of the same streams can be joined"
                    )
            stream = row["stream_fingerprint"]
            if streams.setdefault(seed, stream) != stream:
                raise SettingsError(f"{path}: seed {seed} saw other facts than in {folders[0]}")
            if (agent, seed) in rows:
                if agent == UNEDITED:  # every comparison measures the unedited model
                    continue
                raise SettingsError(f"{path}: {agent}, seed {seed}, is there twice")
            rows[agent, seed] = row
            found[agent, seed] = folder.details(agent, seed)["per_fact"]
    agents, seeds = list(dict.fromkeys(a for a, _ in rows)), sorted(streams)
    for agent in agents:
        missing = [seed for seed in seeds if (agent, seed) not in rows]
        if missing:
            raise SettingsError(f"{agent} was not measured with seed {missing[0]}, others were")
    chosen = baseline or baseline_of(agents)
    if chosen not in agents:
        raise SettingsError(f"baseline {chosen!r} is none of the agents: {', '.join(agents)}")
    runs = {agent: [found[agent, seed] for seed in seeds] for agent in agents}
    ordered = [rows[agent, seed] for agent in agents for seed in seeds]
    paired = {
        agent: paired_differences(runs[agent], runs[chosen]) for agent in agents if agent != chosen
    }
    return Joined(ordered, summarise(ordered), chosen, paired)


@dataclass(frozen=True, slots=True)
class Options:
    """Puts agents of several folders of ``hiedit compare`` into one table."""

    folders: _Places
    """results of the same streams, for instance with other candidate layers"""
    baseline: str | None = None
    """the agent that the others are compared with, in pairs"""
    out: Path | None = None
    """a new JSON file for means and differences"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Joins, prints and writes; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    if not given.folders:
        raise SettingsError(f"DIR must be given; see {PROGRAM} --help")
    if given.out is not None and given.out.exists():
        raise ResultsExistError(f"{given.out} exists already; give another file")
    joined = join(given.folders, given.baseline)
    show(joined.report(sys.stdout.encoding))
    if given.out is not None:
        write_json(
            given.out,
            {
                "agents": joined.summary,
                "baseline": joined.baseline,
                "paired_differences": joined.paired,
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
