"""Efficacy against agreement.

``python -m hiedit_benchmarks.studies.tradeoff DIR … --out FILE.png``

Reads folders that ``hiedit compare`` wrote, all with the same facts, and draws one point per agent:
its efficacy after the last edit against its agreement with the unedited model, both as in the table
of ``hiedit compare``. Agents called ``NAME@anything`` are joined to one curve ``NAME``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.comparison.console import replace_what_cannot_be_encoded
from hiedit_benchmarks.comparison.results import UNEDITED, Row, read_rows
from hiedit_env.envs.plotting import bare_axes, line_style, name_end, new_figure, png
from hiedit_env.errors import SettingsError
from hiedit_env.files import write_bytes

PROGRAM = "python -m hiedit_benchmarks.studies.tradeoff"

_Places = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="DIR [DIR ...]", help_behavior_hint=""),
]

#: Settings that points of one picture have in common.
_ALIKE = ("model", "dtype", "candidate_layers", "num_edits")
_MARKERS = "osD^vPX"


@dataclass(frozen=True, slots=True)
class Point:
    """Means over seeds of one agent, percent.

    Args:
        agent: Its name.
        agreement: Share of the unedited model's own answer tokens, to unrelated prompts, that are
            still the argmax after the last edit.
        efficacy: Token accuracy on the edited facts after the last edit.
        seeds: Number of seeds.
    """

    agent: str
    agreement: float
    efficacy: float
    seeds: int


def points(folders: Sequence[Path]) -> list[Point]:
    """One point per agent, in the order they are met.

    Raises:
        SettingsError: a folder without results, or whose results lack one of the two measures;
            seeds that saw different facts, other models or layers, an agent that is there twice, or
            agents measured with different seeds.
    """
    rows: dict[str, dict[int, Row]] = {}
    streams: dict[int, str] = {}
    common: dict[str, object] = {}
    for folder in folders:
        for row in _rows(folder):
            stream = streams.setdefault(row["seed"], row["stream_fingerprint"])
            if stream != row["stream_fingerprint"]:
                raise SettingsError(f"{folder}: seed {row['seed']} saw other facts than before")
            alike = {name: row["settings"][name] for name in _ALIKE}
            common = common or alike
            if alike != common:
                raise SettingsError(f"{folder} was measured with {alike}, the others with {common}")
            first = rows.setdefault(row["agent"], {}).setdefault(row["seed"], row)
            # Every comparison measures the unedited model.
            if first is not row and row["agent"] != UNEDITED:
                raise SettingsError(f"{folder}: {row['agent']}, seed {row['seed']}, is there twice")
    seeds = {tuple(sorted(by_seed)) for by_seed in rows.values()}
    if len(seeds) > 1:
        raise SettingsError(f"agents were measured with different seeds: {sorted(seeds)}")
    return [
        Point(
            agent,
            _mean(agent, by_seed, "specificity", "agreement"),
            _mean(agent, by_seed, "efficacy", "token_accuracy"),
            len(by_seed),
        )
        for agent, by_seed in rows.items()
    ]


def _rows(folder: Path) -> list[Row]:
    rows = read_rows(folder / "results.jsonl")
    for row in rows:
        missing = [name for name in _ALIKE if name not in row["settings"]]
        if missing:
            raise SettingsError(f"{folder} holds no results of a comparison: no setting {missing}")
    return rows


def _mean(agent: str, by_seed: Mapping[int, Row], metric: str, reading: str) -> float:
    values = [row["metrics"].get(metric, {}).get(reading) for row in by_seed.values()]
    if any(value is None for value in values):
        raise SettingsError(
            f"{agent} has no {reading} of {metric}: its facts come without unrelated prompts, or "
            "nothing was edited, so there is nothing to draw"
        )
    return float(np.mean(values))


def draw(found: Sequence[Point]) -> bytes:
    """The picture as PNG.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    figure = new_figure(7.5, 5, dpi=110, layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list[Point]] = {}
    for point in found:
        curves.setdefault(point.agent.partition("@")[0], []).append(point)
    lines = []
    for index, curve in enumerate(curves.values()):
        ordered = sorted(curve, key=lambda point: point.agreement)
        x, y = [p.agreement for p in ordered], [p.efficacy for p in ordered]
        marker = _MARKERS[index % len(_MARKERS)]
        lines += axes.plot(x, y, marker=marker, clip_on=False, **line_style(index))
        for point in ordered:
            if "@" in point.agent:
                axes.annotate(
                    point.agent.partition("@")[2],
                    (point.agreement, point.efficacy),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=8,
                    parse_math=False,
                )
    axes.set_xlabel("agreement, %", fontsize=9)
    axes.set_ylabel("efficacy after the last edit, %", fontsize=9)
    axes.margins(0.08)
    bare_axes(axes)
    # Outside, where it hides no point.
    names = [f" {name_end(name, 40)}" for name in curves]
    legend = figure.legend(
        lines, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False, handlelength=3
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(figure)


@dataclass(frozen=True, slots=True)
class Options:
    """Draws efficacy against agreement, from folders of ``hiedit compare``."""

    folders: _Places
    """results of one stream with different settings"""
    out: Path
    """the picture, such as tradeoff.png"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the points and writes the picture; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    if not given.folders:
        raise SettingsError(f"DIR must be given; see {PROGRAM} --help")
    replace_what_cannot_be_encoded()
    found = points(given.folders)
    for point in found:
        print(
            f"{point.agent}: agreement {point.agreement:.1f}, efficacy {point.efficacy:.1f} "
            f"({point.seeds} seeds)"
        )
    write_bytes(given.out, draw(found))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
