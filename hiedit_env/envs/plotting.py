"""The style of every picture of hiedit: colours, layer names, running means, heatmaps of layers.

The functions draw on any matplotlib axes. matplotlib is an optional library: it is imported when
something is drawn, and pyplot never, since it keeps global state and may open windows.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiedit_env.errors import SettingsError, require_libraries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

#: The palette of Okabe and Ito (2008), which colour-blind readers can tell apart, without its
#: yellow, which is hard to see on white.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
#: Line styles, so that colour is not the only difference. Seven colours and four styles give 28
#: different lines.
DASHES = ("-", "--", "-.", ":")
#: Colours of a layer that no edit wrote and of one that every edit wrote; they differ in lightness.
UNWRITTEN, WRITTEN = "#E2E8EF", "#08457E"
#: Edits in a running mean, unless told otherwise.
WINDOW = 20

_NAME_LENGTH = 16
_MOST_COLUMNS = 125


def new_figure(width: float, height: float, *, dpi: int = 100, layout: str | None = None) -> Figure:
    """An empty figure that is drawn without a window.

    Args:
        width: Inches.
        height: Inches.
        dpi: Pixels per inch.
        layout: A layout engine of matplotlib, e.g. ``"constrained"``; None for fixed places.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    require_libraries("plots", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=dpi, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names may hold characters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line of a picture, as keyword arguments of ``plot``."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def bare_axes(axes: Axes) -> None:
    """Removes the frame at the top and on the right, and puts a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


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


def name_end(name: str, columns: int) -> str:
    """A name, cut at the front to so many characters, since long names differ at the end."""
    return name if len(name) <= columns else "…" + name[1 - columns :]


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
    per_column = edits_per_column(total)
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
    names = [name_end(name, _NAME_LENGTH) for name in short_layer_names(layer_names)]
    axes.set_yticks(range(0, num_layers, every), names[::every], fontsize=size, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(rows[-1], rows[0])
    axes.set_ylabel("layer", fontsize=9)
    edit_axis(axes, total, "edit" if per_column == 1 else f"edit ({per_column} per column)")
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
    bare_axes(axes)
    axes.grid(visible=False, axis="y")
    return bars


def edit_axis(axes: Axes, num_edits: int, label: str = "edit") -> None:
    """Makes the x axis count edits from 1 to ``num_edits``."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, num_edits + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5], integer=True, min_n_ticks=1))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


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


def edits_per_column(num_edits: int) -> int:
    """How many edits share a column of a heatmap, so that it has at most 125 columns."""
    return -(-num_edits // _MOST_COLUMNS)
