"""The picture of a comparison: which layers were edited, and what became of the facts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Details = Mapping[tuple[str, int], Mapping[str, Any]]

# Okabe and Ito's colours, told apart by colour-blind people too; dashes differ as well.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
_DASHES = ("-", "--", "-.", ":")

#: Titles of the curves and the environment's metric after each edit; None for the end's efficacy.
_PANELS = (
    ("Efficacy right after the edit", "efficacy"),
    ("Efficacy at the end of the stream", None),
    ("Generalization right after the edit", "generalization"),
    ("Agreement with the unedited model\non unrelated prompts", "agreement"),
)


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
    """
    edited = [name for name in agents if name != "no-edit"]
    num_facts = max(len(run["prompts"]) for run in details.values())
    heights = [0.6 + 0.16 * len(layers)] * len(edited) + [2.6, 2.6]
    figure = Figure(figsize=(11, sum(heights) + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for row, name in enumerate(edited):
        axes = figure.add_subplot(grid[row, :])
        share = np.mean(
            [_written(details[name, seed], len(layers), num_facts) for seed in seeds], axis=0
        )
        image = axes.imshow(
            share,
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=0,
            vmax=1,
            extent=(0.5, num_facts + 0.5, len(layers) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(layers)), _short(layers), fontsize=7)
        axes.set_title(f"{name}: layers edited", fontsize=10)
        axes.set_xlabel("edit", fontsize=8)
        label = "edited" if len(seeds) == 1 else f"share of {len(seeds)} seeds"
        figure.colorbar(image, ax=axes, label=label, fraction=0.02, pad=0.01, ticks=[0, 1])
    window = max(1, min(25, num_facts // 4))
    for k, (title, metric) in enumerate(_PANELS):
        axes = figure.add_subplot(grid[len(edited) + k // 2, k % 2])
        for i, name in enumerate(agents):
            curves = [_curve(details[name, seed], metric, num_facts) for seed in seeds]
            _plot(axes, _running_mean(_nanmean(np.array(curves)), window), name, i)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"fact in the stream (mean of the last {window})", fontsize=8)
        axes.set_ylabel("token accuracy, %" if metric != "agreement" else "agreement, %")
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    # Below the panels, where it hides no curve; the last panel has the same curves as the others.
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(agents), 6),
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plot(axes: Axes, values: NDArray[np.float64], name: str, index: int) -> None:
    axes.plot(
        np.arange(1, len(values) + 1),
        values,
        color=_COLOURS[index % len(_COLOURS)],
        linestyle=_DASHES[index % len(_DASHES)],
        label=name,
    )


def _written(run: Mapping[str, Any], num_layers: int, num_facts: int) -> NDArray[np.float64]:
    """L × F, 1 where an edit wrote a layer."""
    mask = np.zeros((num_layers, num_facts))
    for i, edit in enumerate(run["edits"]):
        mask[edit["layers"], i] = 1
    return mask


def _curve(run: Mapping[str, Any], metric: str | None, num_facts: int) -> NDArray[np.float64]:
    """F values in percent; NaN where there is none."""
    values = np.full(num_facts, np.nan)
    if metric is None:
        found = run["per_fact"]["efficacy"]["token_accuracy"]
        values[: len(found)] = found
        return values
    for i, edit in enumerate(run["edits"]):
        values[i] = 100.0 * edit["metrics"].get(metric, np.nan)
    return values


def _nanmean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over rows, NaN only where all rows are."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of each value and those before it within the window, leaving out NaN.

    >>> _running_mean(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist()
    [1.0, 2.0, 3.0, 5.0]
    """
    rows = [np.concatenate((np.full(k, np.nan), values[: len(values) - k])) for k in range(window)]
    return _nanmean(np.array(rows))


def _short(names: Sequence[str]) -> list[str]:
    """Layer names without the part they all begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while (
        all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts) and len(parts) > 1
    ):
        shared += 1
    return [".".join(p[shared:]) for p in parts]
