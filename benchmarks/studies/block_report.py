"""The choice of a block per fact: tables in Markdown, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiedit_benchmarks.studies.block_agents import ORACLE, REFERENCE
from hiedit_env.envs.plotting import COLOURS, bare_axes, new_figure, png

#: Where intervals of agents are drawn, in points.
_NOT_DRAWN = ("no edit",)


def report(results: Mapping[str, Any]) -> str:
    """All tables: of the blocks and of the agents, for both readings; percent."""
    blocks = results["recorded"]["blocks"]
    sections = []
    for reading, found in results["readings"].items():
        facts = (
            f"{found['facts']} facts, each by agents that learned from the other folds of "
            f"{results['folds']}"
            if results["folds"]
            else f"{found['facts']} facts, learned from {found['learned_from']} others"
        )
        lines = [f"**{reading.capitalize()}**, {facts}; percent.", ""]
        lines += [
            "| block | fact | paraphrases | agreement | outcome | harmonic mean of the means |"
            " fires elsewhere | seconds, median |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for block, row in zip(blocks, found["blocks"], strict=True):
            lines.append(
                f"| {block} | {_parts(row)} | {_shown(row['outcome'])} | {_shown(row['of_means'])} "
                f"| {100 * row['fires']:.2f} | {row['seconds']:.1f} |"
            )
        lines += [
            "",
            "| agent | fact | paraphrases | agreement | outcome | over the best block, paired |"
            " of the headroom | harmonic mean of the means | over the best block, paired |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in found["agents"].items():
            share = "–" if row["share"] is None or name == "no edit" else _number(row["share"], 0)
            apart = name == REFERENCE
            over, of_means = (
                "–" if apart else _shown(row[f"{score}_over_constant"])
                for score in ("outcome", "of_means")
            )
            lines.append(
                f"| {name} | {_parts(row)} | {_number(row['outcome']['mean'])} | {over} | {share} "
                f"| {_number(row['of_means']['mean'])} | {of_means} |"
            )
        parts = found["interaction"]
        lines += [
            "",
            f"Headroom by the oracle on other prompts {_shown(found['headroom'])}, at most "
            f"{_shown(found['at_most'])} (same prompts). Variance of the blocks' means "
            f"{parts['of_options']:.4f}, of fact × block {parts['of_pairs']:.4f}, correlated "
            f"between the halves at {_number(parts['correlation'] / 100, 2)}.",
            "",
        ]
        if found["relations"]:
            lines += [*_relations(found["relations"], blocks), ""]
        sections.append("\n".join(lines))
    return "\n".join(sections).rstrip()


def _relations(found: Mapping[str, Any], blocks: Sequence[int]) -> list[str]:
    """The table of the relations: outcome by block, the best in bold, and the headroom."""
    lines = [
        f"| relation | facts | {' | '.join(f'block {block}' for block in blocks)} "
        "| oracle, other prompts, over the best block for all | at most |",
        "|---|---|" + "---|" * (len(blocks) + 2),
    ]
    for relation, row in found.items():
        means = [
            f"**{_number(mean)}**" if mean == max(row["blocks"]) else _number(mean)
            for mean in row["blocks"]
        ]
        lines.append(
            f"| {relation.replace('_', ' ')} | {row['facts']} | {' | '.join(means)} "
            f"| {_shown(row['headroom'])} | {_shown(row['at_most'])} |"
        )
    return lines


def draw(results: Mapping[str, Any]) -> bytes:
    """The picture as PNG: outcome by block, and every agent over the best block.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    figure = new_figure(10, 4.6, dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    blocks = results["recorded"]["blocks"]
    names = [n for n in results["readings"]["smooth"]["agents"] if n not in _NOT_DRAWN]
    for i, (reading, found) in enumerate(results["readings"].items()):
        colour, marker = COLOURS[i + 1], "os"[i]
        rows = [100 * np.array(list(b["outcome"].values())) for b in found["blocks"]]
        left.errorbar(
            np.array(blocks) + 0.15 * (2 * i - 1),
            [row[0] for row in rows],
            yerr=np.abs(np.array([(row[0] - row[1], row[2] - row[0]) for row in rows])).T,
            color=colour,
            marker=marker,
            capsize=2,
            label=reading,
        )
        for place, name in enumerate(names):
            row = found["agents"][name]["outcome_over_constant"]
            height = place + 0.16 * (2 * i - 1)
            low, high = 100 * row["low"], 100 * row["high"]
            right.plot([low, high], [height, height], color=colour, linewidth=2)
            right.plot(100 * row["mean"], height, marker, color=colour, markersize=5)
    left.set_xticks(blocks)
    left.set_xlabel("block whose MLP is written", fontsize=9)
    left.set_ylabel("outcome, %", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_ylim(len(names) - 0.5, -0.5)
    right.axvline(0.0, color="black", linewidth=0.8)
    right.axhline(names.index(ORACLE) - 0.5, color="#999999", linewidth=0.6, linestyle=":")
    right.set_xlabel("outcome over the block that is best in hindsight, points", fontsize=9)
    for axes in (left, right):
        bare_axes(axes)
    return png(figure)


def _parts(row: Mapping[str, Any]) -> str:
    return " | ".join(_number(value) for value in row["parts"].values())


def _shown(found: Mapping[str, float]) -> str:
    mean, low, high = (_number(found[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(value: float, digits: int = 1) -> str:
    # What is rounded to zero has no sign.
    return f"{100 * value:z.{digits}f}".replace("-", "−")
