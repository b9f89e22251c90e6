"""The picture of a comparison: which layers were written, and what became of the facts.

Each curve averages to the number of the same name in the printed table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hiedit_benchmarks.comparison.results import UNEDITED
from hiedit_benchmarks.comparison.statistics import PAIRED
from hiedit_env.envs.plotting import (
    bare_axes,
    draw_layers,
    edit_axis,
    line_style,
    name_end,
    new_figure,
    png,
    running_mean,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Details = Mapping[tuple[str, int], Mapping[str, Any]]

#: Measure of the table, title and label of the y axis of each panel with curves.
PANELS = (
    ("right_after", "Efficacy right after each edit", "efficacy, %"),
    ("efficacy", "Efficacy after the last edit", "efficacy, %"),
    ("generalization", "Generalization after the last edit", "generalization, %"),
    ("agreement", "Agreement after the last edit", "agreement, %"),
)
#: The same of panels that are drawn where a run has such numbers.
MORE_PANELS = (
    ("paraphrases_generated", "Paraphrases generated after the last edit", "generated, %"),
    ("neighbour_agreement", "Agreement on neighbours after the last edit", "agreement, %"),
    ("chat_efficacy", "Efficacy in chat after the last edit", "efficacy, %"),
    ("chat_agreement", "Agreement in chat after the last edit", "agreement, %"),
)
_WIDTH, _NAME_LENGTH = 11.0, 45


def draw(
    agents: Sequence[str], seeds: Sequence[int], details: Details, layers: Sequence[str]
) -> bytes:
    """The picture as PNG.

    Args:
        agents: Names, the unedited model's first.
        seeds: The seeds averaged over.
        details: ``(agent, seed)`` → details of the run, see
            :mod:`hiedit_benchmarks.comparison.compare`.
        layers: L names in forward order.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    edited = [name for name in agents if name != UNEDITED]
    num_facts = max(len(run["prompts"]) for run in details.values())
    rows = -(-len(edited) // 2)
    legend_rows = -(-len(agents) // 3)
    panels = [*PANELS, *(panel for panel in MORE_PANELS if _has(panel[0], details))]
    heights = [0.75 + 0.16 * len(layers)] * rows + [2.5] * -(-len(panels) // 2)
    figure = new_figure(_WIDTH, sum(heights) + 0.4 + 0.25 * legend_rows, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    maps = []
    for i, name in enumerate(edited):
        axes = figure.add_subplot(grid[i // 2, i % 2])
        shares = [_written(details[name, seed], len(layers), num_facts) for seed in seeds]
        mesh = draw_layers(axes, np.mean(shares, axis=0), layers)
        title = f"{name_end(name, _NAME_LENGTH)}: layers written"
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        maps.append(axes)
    if maps:
        bar = figure.colorbar(mesh, ax=maps, fraction=0.03, pad=0.01, aspect=30, ticks=[0, 0.5, 1])
        bar.ax.tick_params(labelsize=8)
        bar.set_label(_share(seeds), fontsize=9)
    window = max(1, min(25, num_facts // 4))
    lines: list[Any] = []
    for k, (measure, title, label) in enumerate(panels):
        axes = figure.add_subplot(grid[rows + k // 2, k % 2])
        lines = []
        for i, name in enumerate(agents):
            values = mean_curve(measure, [details[name, seed] for seed in seeds], num_facts)
            means = running_mean(values, window)
            lines += axes.plot(
                np.arange(1, num_facts + 1), means, linewidth=1.8, **line_style(i), clip_on=False
            )
        _curve_axes(axes, num_facts, window, title, label)
    names = [f" {name_end(name, _NAME_LENGTH)}" for name in agents]
    # Below the panels, where it hides no curve.
    legend = figure.legend(
        lines, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False, handlelength=3
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(figure)


def mean_curve(
    measure: str, runs: Sequence[Mapping[str, Any]], num_facts: int
) -> NDArray[np.float64]:
    """What one panel draws of one agent, before the running mean.

    Args:
        measure: One of those in :data:`PANELS` or :data:`MORE_PANELS`.
        runs: Details of one run per seed.
        num_facts: F, the length of the longest stream.

    Returns:
        F float64, the mean over the runs that have a value in percent; NaN where none has.
    """
    curves = np.array([_curve(run, measure, num_facts) for run in runs])
    known = np.isfinite(curves)
    count = known.sum(axis=0)
    total = np.where(known, curves, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _curve(run: Mapping[str, Any], measure: str, num_facts: int) -> NDArray[np.float64]:
    if measure == "right_after":
        found = [100.0 * edit["metrics"]["efficacy"] for edit in run["edits"]]
    else:
        metric, reading = PAIRED[measure]
        found = run["per_fact"].get(metric, {}).get(reading, [])
    values = np.full(num_facts, np.nan)
    values[: len(found)] = [np.nan if value is None else value for value in found]
    return values


def _has(measure: str, details: Details) -> bool:
    """Whether any run has a number of a measure."""
    metric, reading = PAIRED[measure]
    values = (run["per_fact"].get(metric, {}).get(reading, []) for run in details.values())
    return any(value is not None for column in values for value in column)


def _curve_axes(axes: Axes, num_facts: int, window: int, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    bare_axes(axes)
    mean = f" (mean of the last {window})" if window > 1 else ""
    edit_axis(axes, num_facts, f"edit{mean}")
    axes.set_ylabel(label, fontsize=9)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="y", labelsize=8)


def _share(seeds: Sequence[int]) -> str:
    return "written" if len(seeds) == 1 else f"share of {len(seeds)} seeds"


def _written(run: Mapping[str, Any], num_layers: int, num_facts: int) -> NDArray[np.float64]:
    """F × L, 1 where an edit wrote a layer."""
    mask = np.zeros((num_facts, num_layers))
    for i, edit in enumerate(run["edits"]):
        mask[i, edit["layers"]] = 1
    return mask
