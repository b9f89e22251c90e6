"""What an episode looks like: as text, and as a picture of the layers written and the metrics.

``draw_layers``, ``draw_shares`` and ``draw_metrics`` draw on any matplotlib axes, so that other
figures can use them. matplotlib is imported when something is drawn, and pyplot never: it keeps
global state and may open windows.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiedit_env.envs.state import EditRecord, History
from hiedit_env.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.container import BarContainer
    from matplotlib.lines import Line2D


class MetricStyle(NamedTuple):
    """How a metric is drawn: its key in the record, its name for readers, colour and line style."""

    key: str
    label: str
    colour: str
    dashes: str


#: The metrics shown, in this order. The colours are from the colour-blind-safe palette of Okabe and
#: Ito (2008); the line styles make sure that colour is not the only difference.
METRICS = (
    MetricStyle("efficacy", "efficacy right after", "#0072B2", "-"),
    MetricStyle("generalization", "generalization", "#E69F00", "--"),
    MetricStyle("agreement", "agreement", "#009E73", "-."),
    MetricStyle("retention", "retention", "#CC79A7", ":"),
)
#: Edits in a running mean, unless told otherwise.
WINDOW = 20
#: Colours of a layer no edit wrote and of one every edit wrote; lightness alone tells them apart.
UNWRITTEN, WRITTEN = "#E2E8EF", "#08457E"

_TEXT_WIDTH, _TEXT_EDITS, _TEXT_NAME = 100, 60, 24
_WIDTH, _HEIGHT, _DPI, _PICTURE_NAME = 960, 540, 100, 16
_MOST_COLUMNS = 125


def short_layer_names(layer_names: Sequence[str]) -> tuple[str, ...]:
    """Block and matrix of each layer, or the full names where that does not tell them apart.

    Args:
        layer_names: L dotted module names.

    Returns:
        L distinct names if the given ones are distinct.

    >>> short_layer_names(["model.layers.9.mlp.up_proj", "model.layers.10.mlp.up_proj"])
    ('9 up_proj', '10 up_proj')
    """
    short = []
    for name in layer_names:
        *outer, matrix = name.split(".")
        block = next((part for part in outer if part.isdecimal()), None)
        short.append(matrix if block is None else f"{block} {matrix}")
    if len(Counter(short)) < len(Counter(layer_names)):
        return tuple(layer_names)
    return tuple(short)


def metric_values(records: Iterable[EditRecord], key: str) -> NDArray[np.float64]:
    """One metric of E records: E float64, NaN where it is absent."""
    return np.array([record.metrics.get(key, np.nan) for record in records], np.float64)


def running_mean(values: ArrayLike, window: int = WINDOW) -> NDArray[np.float64]:
    """Mean of each value and those before it, at most ``window`` of them.

    Args:
        values: E numbers; NaN and infinite ones are left out of the means.
        window: Most values in a mean.

    Returns:
        E float64, NaN where a window holds no finite value.

    Raises:
        SettingsError: ``window`` below 1.

    >>> running_mean([1.0, 0.0, float("nan"), 0.5], window=2).tolist()
    [1.0, 0.5, 0.0, 0.5]
    """
    if window < 1:
        raise SettingsError(f"window must be ≥ 1, got {window!r}")
    array = np.asarray(values, np.float64)
    finite = np.isfinite(array)
    sums, counts = (
        np.concatenate((np.zeros(1), np.cumsum(part)))
        for part in (np.where(finite, array, 0.0), finite)
    )
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - window, 0)
    number = counts[ends] - counts[starts]
    means: NDArray[np.float64] = np.full(len(array), np.nan)
    np.divide(sums[ends] - sums[starts], number, out=means, where=number > 0)
    return means


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
    names = [_tail(name, _TEXT_NAME) for name in short_layer_names(history.layer_names)]
    left = max(map(len, names), default=0)
    middle = min(max(history.num_edits, done), _TEXT_EDITS)
    for layer, name in enumerate(names):
        marks = "".join("■" if written else "·" for written in shown[:, layer])
        share = f"{masks[:, layer].mean():.0%}" if done else "–"
        lines.append(f"{name:<{left}}  {marks:<{middle}}  {share:>4}")
    means = ("last edit", f"last {WINDOW}", "all edits")
    lines += ["", f"{'token accuracy, %':<20}" + "".join(f"{mean:>12}" for mean in means)]
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


def _tail(name: str, columns: int) -> str:
    """A layer name, cut at the front, since long names differ at the end."""
    return name if len(name) <= columns else "…" + name[1 - columns :]


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
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records, masks = history.records, _masks(history)
    total = max(history.num_edits, len(records), 1)
    figure = Figure((_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI)
    canvas: Any = FigureCanvasAgg(figure)  # its methods are not typed
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
    per_column = _edits_per_column(total)
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


def draw_layers(
    axes: Axes, masks: ArrayLike, layer_names: Sequence[str], *, num_edits: int | None = None
) -> QuadMesh:
    """A heatmap of the layers (rows, first layer on top) written by each edit (columns).

    Edit i of the stream, counted from 1, is centred at x = i; layer l, from 0, at y = l. From 126
    edits on a column is the mean of several edits (the last column: of those finished), so that
    there are at most 125 columns; then the label of the x axis tells how many.

    Args:
        axes: Drawn upon; limits, ticks and axis labels are set, the title is left to the caller.
        masks: E × L, True or 1 where the edit wrote the layer; fractions, such as means over
            several episodes, are drawn in between.
        layer_names: L dotted module names; the ticks show block and matrix.
        num_edits: Width in edits, for an episode that is not over; by default E.

    Returns:
        The heatmap, from 0 to 1, e.g. for a colour bar.

    Raises:
        SettingsError: masks that are not E × L, or hold values outside [0, 1].
    """
    from matplotlib.colors import LinearSegmentedColormap

    shares = _checked_masks(masks, len(layer_names))
    done, num_layers = shares.shape
    total = max(num_edits or 0, done, 1)
    per_column = _edits_per_column(total)
    # A mesh needs a cell; NaN leaves it empty.
    edges, columns = np.array([0, 1]), np.full((1, num_layers), np.nan)
    if done:
        starts = np.arange(0, done, per_column)
        columns = np.add.reduceat(shares, starts) / np.diff(starts, append=done)[:, None]
        edges = np.append(starts, min(starts[-1] + per_column, total))
    colours = LinearSegmentedColormap.from_list("written", [UNWRITTEN, WRITTEN])
    rows = np.arange(num_layers + 1) - 0.5
    mesh = axes.pcolormesh(edges + 0.5, rows, columns.T, cmap=colours, vmin=0, vmax=1)
    # Thin gaps between the cells, where the cells are large enough to spare the room.
    paper = axes.get_facecolor()
    if axes.bbox.height / num_layers >= 6:
        axes.hlines(rows[1:-1], 0.5, total + 0.5, colors=paper, linewidth=0.8)
    if axes.bbox.width / total * per_column >= 6:
        axes.vlines(edges[1:-1] + 0.5, rows[0], rows[-1], colors=paper, linewidth=0.8)

    # Text needs 1.2 times its size; below 5 points it is better to leave names out.
    points = axes.bbox.height / num_layers / axes.figure.dpi * 72
    every = max(1, int(np.ceil(6 / points)))
    size = float(np.clip(points * every / 1.2, 5, 8))
    names = [_tail(name, _PICTURE_NAME) for name in short_layer_names(layer_names)]
    axes.set_yticks(range(0, num_layers, every), names[::every], fontsize=size, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(rows[-1], rows[0])
    axes.set_ylabel("layer", fontsize=9)
    _edit_axis(axes, total, "edit" if per_column == 1 else f"edit ({per_column} per column)")
    return mesh


def draw_shares(axes: Axes, masks: ArrayLike) -> BarContainer:
    """Bars of each layer's share of the edits in percent, the rows as in :func:`draw_layers`.

    Args:
        axes: Drawn upon; limits and ticks are set, layers have no names here.
        masks: E × L as in :func:`draw_layers`; without edits all bars have length 0.

    Returns:
        The L bars.

    Raises:
        SettingsError: masks that are not E × L, or hold values outside [0, 1].
    """
    shares = _checked_masks(masks)
    done, num_layers = shares.shape
    percent = 100 * shares.sum(0) / max(done, 1)
    bars = axes.barh(np.arange(num_layers), percent, height=0.72, color=WRITTEN)
    axes.set_ylim(num_layers - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 50, 100], ["0", "50", "100 %"], fontsize=8)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return bars


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
    axes.set_ylabel(f"token accuracy, %{mean}", fontsize=9)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    _edit_axis(axes, max(num_edits or 0, len(records), 1), "edit")
    return lines


def _checked_masks(masks: ArrayLike, num_layers: int | None = None) -> NDArray[np.float64]:
    array = np.asarray(masks, np.float64)
    if array.ndim != 2 or num_layers not in (None, array.shape[1]):
        raise SettingsError(
            f"masks must be edits × layers ({num_layers or 'L'} of them), got shape {array.shape}"
        )
    if not ((array >= 0) & (array <= 1)).all():
        raise SettingsError(
            f"masks must lie in [0, 1], got {array.min()} to {array.max()}; give booleans or shares"
        )
    return array


def _edits_per_column(num_edits: int) -> int:
    return -(-num_edits // _MOST_COLUMNS)


def _edit_axis(axes: Axes, num_edits: int, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, num_edits + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5], integer=True, min_n_ticks=1))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
