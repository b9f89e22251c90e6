"""Efficacy against agreement.

``python -m hiedit_benchmarks.studies.tradeoff DIR … --out FILE.png``

Reads folders that ``hiedit compare`` wrote, all with the same facts, and draws one point per agent:
how much of what was edited is answered at the end, against how much of what was not edited is still
answered as by the unedited model. Agents called ``NAME@anything`` are joined to one curve ``NAME``.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hiedit_benchmarks.comparison.results import UNEDITED, Row
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hiedit_env.errors import HieditError, SettingsError
from hiedit_env.files import write_bytes

#: Settings that points of one picture have in common.
_ALIKE = ("model", "dtype", "candidate_layers", "num_edits")


@dataclass(frozen=True, slots=True)
class Point:
    """Means over seeds of one agent, percent.

    Args:
        agent: Its name.
        agreement: With the unedited model's own answers to unrelated prompts.
        efficacy: Token accuracy on the edited facts at the end.
        seeds: How many.
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
    try:
        text = (folder / "results.jsonl").read_text(encoding="utf-8")
        rows: list[Row] = [json.loads(line) for line in text.splitlines() if line.strip()]
        for row in rows:
            row["agent"], row["seed"], row["stream_fingerprint"], row["metrics"]
            for name in _ALIKE:
                row["settings"][name]
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder} holds no results: {error}") from error
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{folder} holds no results of a comparison: {error!r}") from error
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
    """The picture as PNG."""
    figure = Figure(figsize=(7.5, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves: dict[str, list[Point]] = {}
    for point in found:
        curves.setdefault(point.agent.partition("@")[0], []).append(point)
    for name, curve in curves.items():
        ordered = sorted(curve, key=lambda point: point.agreement)
        x, y = [p.agreement for p in ordered], [p.efficacy for p in ordered]
        axes.plot(x, y, marker="o", label=name)
        for point in ordered:
            if "@" in point.agent:
                axes.annotate(
                    point.agent.partition("@")[2],
                    (point.agreement, point.efficacy),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=8,
                )
    axes.set_xlabel("agreement with the unedited model on unrelated prompts, %")
    axes.set_ylabel("efficacy at the end, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the points and writes the picture; returns 0, or 1 if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m hiedit_benchmarks.studies.tradeoff", description=__doc__
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png")
    given = parser.parse_args(arguments)
    try:
        found = points(given.folders)
        for point in found:
            print(
                f"{point.agent}: agreement {point.agreement:.1f}, efficacy {point.efficacy:.1f} "
                f"({point.seeds} seeds)"
            )
        write_bytes(given.out, draw(found))
    except (HieditError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
