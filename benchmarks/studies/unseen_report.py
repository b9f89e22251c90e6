"""Regret in worlds never seen: intervals, the table and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiedit_env.envs.plotting import COLOURS, bare_axes, new_figure, png

RESAMPLES = 4000
OURS = "hiedit"
#: Order of the rows; what is not named here comes last.
ORDER = (
    "oracle",
    OURS,
    "best-constant",
    "ppo",
    "linear-bandit",
    "linear-bandit-common",
    "gradient-norm",
    "fixed-best",
    "all-layers",
    "random",
    "random-layers",
    "no-edit",
)


def interval(values: ArrayLike, seed: int = 0) -> dict[str, float]:
    """Mean of S × W numbers with a 95 % bootstrap interval.

    Training seeds and worlds are drawn with replacement, independently of each other (every seed
    plays every world); percentiles of ``RESAMPLES`` resamples.

    Args:
        values: Training seeds × worlds, such as differences of two agents.
        seed: Of the resampling.

    >>> interval([[1.0, 1.0], [1.0, 1.0]])
    {'mean': 1.0, 'low': 1.0, 'high': 1.0}
    """
    table: NDArray[np.float64] = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    seeds, worlds = (
        generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size
        for size in table.shape
    )
    drawn = np.einsum("bs,sw,bw->b", seeds, table, worlds)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"mean": float(table.mean()), "low": float(low), "high": float(high)}


def summarise(
    references: Mapping[str, Sequence[float]], outcomes: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """Regret of every agent, and what ``hiedit`` earns more than each, paired.

    Args:
        references: Outcome per fact in W worlds of what has no seed, the oracle among it.
        outcomes: Training seeds × W, of every other agent.

    Returns:
        ``regret`` and ``ours_minus``: agent → interval; ``share_of_random``: regret of ``hiedit``
        over the smaller regret of the two random agents; ``headroom``: oracle minus best constant,
        an interval; ``share_of_headroom``: how much of it ``hiedit`` takes, None where there is
        none.
    """
    seeds = len(outcomes[OURS])
    tables = {name: np.asarray(values) for name, values in outcomes.items()}
    tables |= {name: np.tile(values, (seeds, 1)) for name, values in references.items()}
    oracle = tables["oracle"]
    regret = {name: interval(oracle - values) for name, values in tables.items()}
    headroom = interval(oracle - tables["best-constant"])
    taken = float((tables[OURS] - tables["best-constant"]).mean())
    random = min(regret[name]["mean"] for name in ("random", "random-layers"))
    return {
        "regret": regret,
        "ours_minus": {
            name: interval(tables[OURS] - values) for name, values in tables.items() if name != OURS
        },
        "share_of_random": regret[OURS]["mean"] / random,
        "headroom": headroom,
        "share_of_headroom": taken / headroom["mean"] if headroom["low"] > 0 else None,
    }


def rows_of(results: Mapping[str, Any]) -> list[str]:
    """Agents in the order of the table."""
    known = list(results["summary"]["regret"])
    return [name for name in ORDER if name in known] + [n for n in known if n not in ORDER]


def table(results: Mapping[str, Any]) -> str:
    """The table in Markdown: regret per fact, and what ``hiedit`` earns more."""
    summary = results["summary"]
    lines = [
        f"Difficulty `{results['difficulty']}`, {len(results['test_seeds'])} test worlds of "
        f"{results['num_edits']} facts, {results['training_seeds']} training seeds; nats per fact.",
        "",
        "| agent | regret | of random's | hiedit minus this, paired |",
        "|---|---|---|---|",
    ]
    random = min(summary["regret"][name]["mean"] for name in ("random", "random-layers"))
    for name in rows_of(results):
        regret = summary["regret"][name]
        more = summary["ours_minus"].get(name)
        lines.append(
            f"| {name} | {_shown(regret)} | {_number(100 * regret['mean'] / random, 1)} % | "
            f"{_shown(more) if more else '–'} |"
        )
    headroom, share = summary["headroom"], summary["share_of_headroom"]
    taken = (
        "there is none to take" if share is None else f"`hiedit` takes {100 * share:.0f} % of it"
    )
    lines += ["", f"Headroom (oracle − best constant): {_shown(headroom)}; {taken}."]
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> bytes:
    """The picture as PNG: regret of every agent, one small point per training seed and world.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    names = [name for name in rows_of(results) if name != "oracle"]
    oracle = np.asarray(results["references"]["oracle"])
    figure = new_figure(7.5, 0.8 + 0.34 * len(names), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        if name in results["outcomes"]:
            own = np.asarray(results["outcomes"][name])
        else:
            own = np.asarray(results["references"][name])[None]
        points = (oracle - own).ravel()
        colour = COLOURS[1] if name == OURS else "#888888"
        spread = np.linspace(-0.22, 0.22, len(points))
        axes.plot(points, row + spread, ".", color=colour, alpha=0.35, markersize=3)
        found = results["summary"]["regret"][name]
        axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.5)
        axes.plot(found["mean"], row, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel(
        f"regret in worlds never seen, nats per fact (difficulty {results['difficulty']})",
        fontsize=9,
    )
    bare_axes(axes)
    return png(figure)


def _shown(found: Mapping[str, float]) -> str:
    mean, low, high = (_number(found[key], 2) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")
