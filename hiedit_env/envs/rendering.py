"""An episode as text, and as a picture of the layers written and the running metrics."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiedit_env.envs.plotting import (
    COLOURS,
    DASHES,
    WINDOW,
    bare_axes,
    draw_layers,
    draw_shares,
    edit_axis,
    edits_per_column,
    name_end,
    new_figure,
    running_mean,
    short_layer_names,
)
from hiedit_env.envs.state import EditRecord, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


class MetricStyle(NamedTuple):
    """How a metric is drawn: its key in the record, its name for readers, colour and line style."""

    key: str
    label: str
    colour: str
    dashes: str


#: The metrics shown, in this order.
METRICS = (
    MetricStyle("efficacy", "efficacy right after", COLOURS[1], DASHES[0]),
    MetricStyle("generalization", "generalization", COLOURS[2], DASHES[1]),
    MetricStyle("agreement", "agreement", COLOURS[3], DASHES[2]),
    MetricStyle("recent_retention", "recent retention", COLOURS[4], DASHES[3]),
)

_TEXT_WIDTH, _TEXT_EDITS, _TEXT_NAME = 100, 60, 24
_WIDTH, _HEIGHT, _DPI = 960, 540, 100


def metric_values(records: Iterable[EditRecord], key: str) -> NDArray[np.float64]:
    """One metric of E records: E float64, NaN where it is absent."""
    return np.array([record.metrics.get(key, np.nan) for record in records], np.float64)


def _masks(history: History) -> NDArray[np.bool_]:
    """E × L bool."""
    masks = np.zeros((len(history.records), len(history.layer_names)), bool)
    for row, record in zip(masks, history.records, strict=True):
        row[:] = record.layers
    return masks


def render_ansi(history: History) -> str:
    """The episode so far as plain text: layers by edits, metrics, the last edit.

    Returns:
        Lines of at most 100 columns without escape codes. Metrics and shares are in percent.
    """
    records, masks = history.records, _masks(history)
    done = len(records)
    lines = [f"edit {done} of {max(history.num_edits, done)}", ""]
    shown = masks[-_TEXT_EDITS:]
    if done:
        first = done - len(shown) + 1
        lines.append(f"layers written (■) in edits {first} to {done}; share of all edits so far")
    else:
        lines.append("layers written: no edit is finished yet")
    names = [name_end(name, _TEXT_NAME) for name in short_layer_names(history.layer_names)]
    left = max(map(len, names), default=0)
    middle = min(max(history.num_edits, done), _TEXT_EDITS)
    for layer, name in enumerate(names):
        marks = "".join("■" if written else "·" for written in shown[:, layer])
        share = f"{masks[:, layer].mean():.0%}" if done else "–"
        lines.append(f"{name:<{left}}  {marks:<{middle}}  {share:>4}")
    means = ("last edit", f"last {WINDOW}", "all edits")
    lines += ["", f"{'share of tokens, %':<20}" + "".join(f"{mean:>12}" for mean in means)]
    for style in METRICS:
        values = metric_values(records, style.key)
        cells = (_percent(values, window) for window in (1, WINDOW, max(done, 1)))
        lines.append(f"{style.label:<20}" + "".join(f"{cell:>12}" for cell in cells))
    if done:
        last = records[-1]
        answer = _shorten(_one_line(last.answer), 40)
        room = _TEXT_WIDTH - len("last edit:  → ") - _columns(answer)
        prompt = _shorten(_one_line(last.prompt), room)
        lines += ["", f"last edit: {prompt} → {answer}"]
        lines.append(f"steps: {last.steps}, reward: {last.reward:+.4g}")
    return "\n".join(line.rstrip() for line in lines)


def _percent(values: NDArray[np.float64], window: int) -> str:
    """The last running mean in percent, or a dash."""
    mean = running_mean(values, window)[-1] if len(values) else np.nan
    return f"{100 * mean:.1f}" if np.isfinite(mean) else "–"


def _one_line(text: str) -> str:
    """Line breaks become spaces; what cannot be printed (control characters) is dropped."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _columns(text: str) -> int:
    """Columns a terminal needs: two for East Asian wide characters, none for combining marks."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _shorten(text: str, columns: int) -> str:
    """The text, cut at the end so that it fits with an ellipsis."""
    if _columns(text) <= columns:
        return text
    end, used = 0, _columns(text[0])
    while used < columns:
        end += 1
        used += _columns(text[end])
    return text[:end].rstrip() + "…"


def render_rgb(history: History) -> NDArray[np.uint8]:
    """The episode so far as a picture: which layers each edit wrote, above the running metrics.

    The axes span the whole stream from the start, so that the pictures of an episode make a film.

    Returns:
        540 × 960 × 3 uint8: red, green and blue.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    records, masks = history.records, _masks(history)
    total = max(history.num_edits, len(records), 1)
    figure = new_figure(_WIDTH / _DPI, _HEIGHT / _DPI, dpi=_DPI)
    canvas: Any = figure.canvas  # its methods are not typed
    # Fixed places rather than a layout engine: the axes must not move during an episode.
    grid = figure.add_gridspec(
        2, 2, width_ratios=(5, 1), height_ratios=(5, 3),
        left=0.14, right=0.965, bottom=0.09, top=0.87, wspace=0.04, hspace=0.17,
    )  # fmt: skip
    top, side = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    bottom = figure.add_subplot(grid[1, 0])
    title = f"Lifelong editing: edit {len(records)} of {max(history.num_edits, len(records))}"
    figure.text(0.14, 0.95, title, fontsize=13, fontweight="bold", va="center")

    mesh = draw_layers(top, masks, history.layer_names, num_edits=total)
    per_column = edits_per_column(total)
    how = "by each edit" if per_column == 1 else f"({per_column} edits per column, shade: share)"
    top.set_title(f"Layers written {how}", loc="left", fontsize=9)
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    if not records:
        middle = ((total + 1) / 2, (masks.shape[1] - 1) / 2)
        top.annotate("no edit is finished yet", middle, ha="center", va="center")
    draw_shares(side, masks)
    side.set_title("Share of all edits", loc="left", fontsize=9)
    key = figure.add_axes((0.785, 0.941, 0.1, 0.018))
    figure.colorbar(mesh, cax=key, orientation="horizontal", ticks=[])
    key.text(-0.06, 0.45, "not written", transform=key.transAxes, ha="right", va="center", size=8)
    key.text(1.06, 0.45, "written", transform=key.transAxes, ha="left", va="center", size=8)

    lines = draw_metrics(bottom, records, num_edits=total)
    means = (_percent(metric_values(records, style.key), WINDOW) for style in METRICS)
    bottom.legend(
        lines,
        [f"{style.label}\n{mean}" for style, mean in zip(METRICS, means, strict=True)],
        loc="upper left", bbox_to_anchor=(1.02, 1.04), frameon=False, fontsize=8,
        handlelength=2.6, labelspacing=0.8, borderaxespad=0,
    )  # fmt: skip
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), np.uint8)[..., :3].copy()


def draw_metrics(
    axes: Axes,
    records: Sequence[EditRecord],
    *,
    num_edits: int | None = None,
    window: int = WINDOW,
    metrics: Sequence[MetricStyle] = METRICS,
) -> list[Line2D]:
    """Running means of the metrics over the edits, in percent; a dot marks the last value.

    Args:
        axes: Drawn upon; limits, ticks and axis labels are set, title and legend are left to the
            caller. Edit i of the stream, counted from 1, is at x = i.
        records: E records of one episode.
        num_edits: Width in edits, for an episode that is not over; by default E.
        window: Edits in a running mean, see :func:`running_mean`; 1 draws the values themselves.
        metrics: The metrics and how to draw them.

    Returns:
        One line per metric, labelled with its name; without points if no record has the metric.

    Raises:
        SettingsError: ``window`` below 1.
    """
    lines = []
    for style in metrics:
        means = running_mean(metric_values(records, style.key), window)
        finite = np.flatnonzero(np.isfinite(means))
        lines += axes.plot(
            finite + 1, 100 * means[finite], style.dashes, color=style.colour, label=style.label,
            linewidth=1.6, marker="o", markersize=4, markevery=[-1], clip_on=False,
        )  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="y", labelsize=8)
    mean = f"\n(mean of the last {window})" if window > 1 else ""
    axes.set_ylabel(f"share of tokens, %{mean}", fontsize=9)
    bare_axes(axes)
    edit_axis(axes, max(num_edits or 0, len(records), 1))
    return lines
