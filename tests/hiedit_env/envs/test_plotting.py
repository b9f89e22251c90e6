"""Shared drawing: names, running means, heatmaps and bars, against values worked out by hand."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hiedit_env.envs.plotting import (
    UNWRITTEN,
    WRITTEN,
    draw_layers,
    draw_shares,
    line_style,
    name_end,
    new_figure,
    png,
    running_mean,
    short_layer_names,
)
from hiedit_env.errors import MissingLibraryError, SettingsError

NAMES = tuple(f"model.layers.{n}" for n in ("1.mlp.gate_proj", "1.mlp.up_proj", "12.mlp.down_proj"))
DARK, LIGHT = (tuple(round(255 * part) for part in to_rgb(c)) for c in (WRITTEN, UNWRITTEN))


def an_axes() -> tuple[Any, Figure]:
    figure = Figure((4, 3), dpi=100)
    return FigureCanvasAgg(figure), figure


def test_short_names_are_block_and_matrix() -> None:
    assert short_layer_names(NAMES) == ("1 gate_proj", "1 up_proj", "12 down_proj")
    assert short_layer_names(["transformer.h.3.mlp.c_fc"]) == ("3 c_fc",)
    assert short_layer_names(["head", "a.body"]) == ("head", "body")
    assert short_layer_names([]) == ()


def test_names_that_would_collide_stay_whole() -> None:
    experts = ("layers.4.mlp.experts.0.down_proj", "layers.4.mlp.experts.1.down_proj")
    assert short_layer_names(experts) == experts


def test_running_mean_by_hand() -> None:
    nan = float("nan")
    np.testing.assert_allclose(running_mean([3, 1, 2, 6], 3), [3, 2, 2, 3])
    np.testing.assert_allclose(
        running_mean([nan, 1, nan, nan, 5, np.inf], 2), [nan, 1, 1, nan, 5, 5]
    )
    assert running_mean([], 3).shape == (0,)
    with pytest.raises(SettingsError, match="window must be ≥ 1, got 0"):
        running_mean([1.0], 0)


def test_cells_of_written_layers_are_dark() -> None:
    masks = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    canvas, figure = an_axes()
    axes = figure.add_subplot()
    draw_layers(axes, masks, NAMES, num_edits=5)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3]  # row 0 at the bottom, as matplotlib
    for edit in range(5):
        for layer in range(3):
            x, y = axes.transData.transform((edit + 1, layer)).astype(int)
            expected = (255, 255, 255) if edit == 4 else DARK if masks[edit, layer] else LIGHT
            assert tuple(pixels[y, x]) == expected, (edit, layer)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "1 gate_proj",
        "1 up_proj",
        "12 down_proj",
    ]
    assert axes.get_xlabel() == "edit"


def test_many_edits_share_columns() -> None:
    # 250 edits in at most 125 columns: two each. Layer 0 by even edits, 1 by all, 2 by the last.
    edits = np.arange(249)
    masks = np.stack((edits % 2 == 0, edits >= 0, edits == 248), 1)
    axes = an_axes()[1].add_subplot()
    mesh = draw_layers(axes, masks, NAMES, num_edits=250)
    columns = np.asarray(mesh.get_array()).reshape(3, 125)
    np.testing.assert_array_equal(columns[0], [0.5] * 124 + [1])  # the last column: one edit so far
    np.testing.assert_array_equal(columns[1], 1)
    np.testing.assert_array_equal(columns[2], [0] * 124 + [1])
    assert axes.get_xlim() == (0.5, 250.5)
    assert axes.get_xlabel() == "edit (2 per column)"


def test_shares_of_several_episodes_are_drawn_in_between() -> None:
    mesh = draw_layers(an_axes()[1].add_subplot(), [[0.25, 1.0, 0.0]], NAMES)
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).ravel(), [0.25, 1.0, 0.0])


def test_crowded_layers_leave_names_out_but_keep_them_legible() -> None:
    axes = an_axes()[1].add_subplot()
    draw_layers(axes, np.zeros((1, 100)), [f"layers.{i}.mlp.fc" for i in range(100)])
    labels = axes.get_yticklabels()
    assert 10 < len(labels) < 50
    assert labels[0].get_text() == "0 fc"
    assert float(labels[0].get_fontsize()) >= 5


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((4, 2)), r"3 of them.*\(4, 2\)"),
        (np.zeros(3), r"edits × layers.*\(3,\)"),
        (np.full((1, 3), 2.0), "2.0 to 2.0"),
        (np.full((1, 3), np.nan), "nan to nan"),
    ],
)
def test_bad_masks_are_named(masks: NDArray[np.float64], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        draw_layers(an_axes()[1].add_subplot(), masks, NAMES)


def test_share_bars() -> None:
    masks = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    for given, expected in ((masks, [100, 50, 0]), (masks[:0], [0, 0, 0])):
        axes = an_axes()[1].add_subplot()
        assert [bar.get_width() for bar in draw_shares(axes, given)] == expected
        assert axes.get_ylim() == (2.5, -0.5)


def test_long_names_keep_their_end() -> None:
    assert name_end("12 down_proj", 12) == "12 down_proj"
    assert name_end("12 down_proj", 5) == "…proj"


def test_28_lines_differ() -> None:
    looks = [tuple(line_style(i).values()) for i in range(29)]
    assert len(set(looks[:28])) == 28
    assert looks[28] == looks[0]


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingLibraryError, match=r"matplotlib is not installed.*\[plots\]"):
        new_figure(4, 3)


def test_a_png_is_drawn_without_a_warning_of_the_font() -> None:
    figure = new_figure(4, 3)
    figure.add_subplot().set_title("東京")
    assert png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
