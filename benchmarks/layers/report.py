"""The table and the picture of measured layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hiedit_benchmarks.comparison.console import encodable
from hiedit_benchmarks.layers.scores import FLOOR, LayerScore
from hiedit_env.envs.plotting import (
    COLOURS,
    UNWRITTEN,
    WRITTEN,
    bare_axes,
    new_figure,
    png,
    short_layer_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Characters of the longest bar.
BAR = 10
#: Characters of a name, with its marks, that is not broken.
_LONGEST_NAME = 20
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Heading and meaning of the table's columns.
COLUMNS = (
    ("given, %", "facts that updates of this layer alone give, written one fact at a time"),
    ("gain", "nats per token gained on a fact, from the unedited model"),
    ("in other words", "the same on its paraphrases"),
    ("damage", "KL in nats per token on unrelated and on subject-swapped prompts"),
    ("kept, %", "tokens of the unedited model's own answers to these that are still the first"),
    ("s/edit", "seconds for one update if no earlier block is edited"),
    ("score", f"mean of the two gains (0 where not given) / (damage + {FLOOR}), ± standard error"),
)


def kind_of(name: str) -> str:
    """Name of a matrix inside its block.

    >>> kind_of("model.layers.10.mlp.up_proj")
    'mlp.up_proj'
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


def table(
    scores: Sequence[LayerScore],
    chosen: Sequence[str],
    defaults: Sequence[str],
    *,
    encoding: str | None = None,
) -> RenderableType:
    """All layers by depth, with a bar of their score, and a legend.

    Args:
        scores: In forward order.
        chosen: Names of the proposed layers.
        defaults: Names of the layers that are edited by default.
        encoding: Of the output; characters that it lacks are replaced.
    """

    def fit(text: str) -> Text:
        return Text(encodable(text, encoding))

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    names = short_layer_names([score.name for score in scores])
    # In a narrow window bars are cut off before names of usual length are broken.
    wanted = min(3 + max(map(len, names), default=0), _LONGEST_NAME)
    made.add_column(Text("layer"), overflow="fold", min_width=wanted)
    for heading in ("given", "gain", "other", "damage", "kept", "s/edit", "score"):
        made.add_column(Text(heading), justify="right", no_wrap=True, min_width=len(heading))
    made.add_column(Text(""), overflow="crop", no_wrap=True)
    best = max(max(score.score for score in scores), 0.0)
    for score, name in zip(scores, names, strict=True):
        length = round(BAR * max(score.score, 0.0) / best) if best else 0
        marks = ("*" if score.name in chosen else " ") + ("d" if score.name in defaults else " ")
        made.add_row(
            fit(f"{marks} {name}"),
            f"{100 * score.given:.0f}",
            _number(score.gain),
            _number(score.paraphrase_gain),
            _number(score.damage),
            f"{100 * score.agreement:.0f}",
            _number(score.seconds),
            fit(f"{_number(score.score)}±{_number(score.score_error)}"),
            fit("■" * length),
            style="bold" if score.name in chosen else None,
        )
    legend = Table.grid(padding=(0, 1), pad_edge=False)
    legend.add_column(no_wrap=True)
    legend.add_column()
    shown = ("given", "gain", "other", "damage", "kept", "s/edit", "score")
    for heading, (_, meaning) in zip(shown, COLUMNS, strict=True):
        legend.add_row(Text(heading, style="italic"), fit(meaning))
    legend.add_row("*", "proposed")
    if defaults:
        legend.add_row("d", "edited by default where --layers is not given")
    return Group(made, Padding(legend, (0, 0, 0, 2)))


def _number(value: float) -> str:
    """Three characters or so, as much as a measurement on a few facts is worth."""
    if not np.isfinite(value):
        return "–"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


def draw(scores: Sequence[LayerScore], chosen: Sequence[str], title: str) -> bytes:
    """Scores over the depth, effect against damage, and the time of an update, as PNG.

    Args:
        scores: In forward order.
        chosen: Names of the proposed layers, drawn dark.
        title: Above all panels.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    kinds = list(dict.fromkeys(kind_of(score.name) for score in scores))
    groups = [[s for s in scores if kind_of(s.name) == kind] for kind in kinds]
    heights = [1.15] * len(kinds) + [2.9]
    figure = new_figure(9.0, sum(heights) + 0.9, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    # A layer that breaks the model must not flatten all others.
    low = min(0.0, float(np.percentile([s.score for s in scores], 5)))
    high = max(score.score + _known(score.score_error) for score in scores)
    blocks = [score.block for score in scores]
    for row, (kind, group) in enumerate(zip(kinds, groups, strict=True)):
        axes = figure.add_subplot(grid[row, :])
        axes.bar(
            [s.block for s in group],
            [s.score for s in group],
            yerr=[_known(s.score_error) for s in group],
            color=[WRITTEN if s.name in chosen else "#AFC2D4" for s in group],
            error_kw={"linewidth": 0.8, "ecolor": "#555555"},
        )
        axes.set_title(f"{kind}: score", loc="left", fontsize=9, parse_math=False)
        axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
        axes.set_ylim(1.05 * low, 1.05 * high if high > 0 else 1.0)
        _plain(axes, "block" if row == len(kinds) - 1 else "")
    scatter = figure.add_subplot(grid[-1, 0])
    times = figure.add_subplot(grid[-1, 1])
    for k, (kind, group) in enumerate(zip(kinds, groups, strict=True)):
        look: dict[str, Any] = {
            "color": COLOURS[k % len(COLOURS)],
            "marker": _MARKERS[k % len(_MARKERS)],
        }
        scatter.plot(
            [s.damage for s in group],
            [s.effect for s in group],
            linestyle="",
            markersize=4.5,
            label=kind,
            **look,
        )
        times.plot([s.block for s in group], [s.seconds for s in group], markersize=3.5, **look)
    scatter.set_xscale("symlog", linthresh=FLOOR)
    scatter.xaxis.set_major_formatter("{x:g}")  # the default draws powers with maths fonts
    _plain(scatter, "damage, nats per token", "effect, nats per token")
    scatter.legend(fontsize=8, frameon=False)
    _plain(times, "block", "seconds per update")
    times.set_ylim(bottom=0)
    return png(figure)


def _plain(axes: Axes, x: str, y: str = "") -> None:
    bare_axes(axes)
    axes.set_facecolor("white")
    axes.axhline(0, color=UNWRITTEN, linewidth=1.0, zorder=0)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def _known(value: float) -> float:
    return value if np.isfinite(value) else 0.0
