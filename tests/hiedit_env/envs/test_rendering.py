"""Text and pictures of small episodes, against lines and pixels worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hiedit_env.envs.plotting import UNWRITTEN, WRITTEN
from hiedit_env.envs.rendering import METRICS, draw_metrics, metric_values, render_ansi, render_rgb
from hiedit_env.envs.state import EditRecord, History

NAMES = tuple(f"model.layers.{n}" for n in ("1.mlp.gate_proj", "1.mlp.up_proj", "12.mlp.down_proj"))
DARK, LIGHT = (tuple(round(255 * part) for part in to_rgb(c)) for c in (WRITTEN, UNWRITTEN))


def record(index: int, layers: Sequence[int], **metrics: float) -> EditRecord:
    return EditRecord(
        edit_index=index,
        prompt=f"Fact {index} is",
        answer="so",
        layers=np.array(layers, bool),
        steps=2,
        reward=0.25,
        metrics=metrics,
    )


def short_episode() -> History:
    """Three of four edits, with every way a metric can be absent."""
    return History(
        NAMES,
        4,
        [
            record(0, [1, 0, 0], efficacy=1.0, generalization=0.5, answered=True),
            record(1, [1, 1, 0], efficacy=0.5, generalization=1.0, recent_retention=1.0),
            record(2, [0, 1, 0], efficacy=0.0, recent_retention=0.5),
        ],
    )


def long_episode(num_records: int, num_edits: int, num_layers: int = 3) -> History:
    random = np.random.default_rng(7)
    names = tuple(f"transformer.h.{i}.mlp.c_fc" for i in range(num_layers))
    masks = random.random((num_records, num_layers)) < 0.5
    return History(
        names, num_edits, [record(i, mask, efficacy=0.5) for i, mask in enumerate(masks.tolist())]
    )


def an_axes() -> tuple[Any, Figure]:
    figure = Figure((4, 3), dpi=100)
    return FigureCanvasAgg(figure), figure


# -- numbers and names ---------------------------------------------------------------------------


def test_absent_metrics_are_nan() -> None:
    values = metric_values(short_episode().records, "generalization")
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, [0.5, 1.0, np.nan])


# -- text ----------------------------------------------------------------------------------------


def test_text_of_three_edits() -> None:
    assert render_ansi(short_episode()).splitlines() == [
        "edit 3 of 4",
        "",
        "layers written (■) in edits 1 to 3; share of all edits so far",
        "1 gate_proj   ■■·    67%",
        "1 up_proj     ·■■    67%",
        "12 down_proj  ···     0%",
        "",
        "share of tokens, %     last edit     last 20   all edits",
        "efficacy right after         0.0        50.0        50.0",
        "generalization                 –        75.0        75.0",
        "agreement                      –           –           –",
        "recent retention            50.0        75.0        75.0",
        "",
        "last edit: Fact 2 is → so",
        "steps: 2, reward: +0.25",
    ]


@pytest.mark.parametrize("num_edits", [0, 4])
def test_text_before_the_first_edit(num_edits: int) -> None:
    lines = render_ansi(History(NAMES, num_edits)).splitlines()
    assert lines[0] == f"edit 0 of {num_edits}"
    assert lines[2] == "layers written: no edit is finished yet"
    assert lines[3].split() == ["1", "gate_proj", "–"]
    assert lines[-1].split() == ["recent", "retention", "–", "–", "–"]


def test_text_shows_the_last_60_edits_and_the_share_of_all() -> None:
    # Layer 0 is written by edits 11 and 70 only; 60 columns show edits 11 to 70.
    records = [record(i, [i in (10, 69), i < 10, 0]) for i in range(70)]
    lines = render_ansi(History(NAMES, 500, records)).splitlines()
    assert lines[2].startswith("layers written (■) in edits 11 to 70;")
    assert lines[3] == "1 gate_proj   ■" + 58 * "·" + "■    3%"  # 2 of 70
    assert lines[4] == "1 up_proj     " + 60 * "·" + "   14%"  # 10 of 70, none in sight


def test_text_tells_recent_from_all_edits() -> None:
    # 2 wrong edits, then 20 right ones: 20 of 20 lately, 20 of 22 in all.
    records = [record(i, [1, 0, 0], efficacy=float(i >= 2)) for i in range(22)]
    lines = render_ansi(History(NAMES, 22, records)).splitlines()
    assert "efficacy right after       100.0       100.0        90.9" in lines


@pytest.mark.parametrize(
    "prompt",
    ["word " * 400, "字" * 200, "é" * 500, "e\N{COMBINING ACUTE ACCENT}" * 300, "x" * 99],
)
def test_text_fits_100_columns(prompt: str) -> None:
    history = long_episode(70, 100_000, 24)
    history.records[-1] = replace(history.records[-1], prompt=prompt, answer=prompt, reward=-1e300)

    def columns(line: str) -> int:
        # Independent of the code under test: 字 takes two columns, the accent none.
        return len(line) + line.count("字") - line.count("\N{COMBINING ACUTE ACCENT}")

    lines = render_ansi(history).splitlines()
    assert max(map(columns, lines)) <= 100
    last = next(line for line in lines if line.startswith("last edit:"))
    assert last.count("…") == 2
    assert last.endswith("…")
    assert columns(last) >= 96, "shortened more than needed"


def test_a_prompt_that_just_fits_is_whole() -> None:
    history = short_episode()
    fits = "x" * (100 - len("last edit: ") - len(" → so"))
    for prompt, shown in ((fits, fits), (fits + "y", fits[:-1] + "…")):
        history.records[-1] = replace(history.records[-1], prompt=prompt)
        assert f"last edit: {shown} → so" in render_ansi(history).splitlines()


def test_text_never_holds_line_breaks_or_escape_codes_of_a_prompt() -> None:
    history = short_episode()
    history.records[-1] = replace(
        history.records[-1], prompt="a\r\n\tb\x1b[31m\x00c", answer="d\ne"
    )
    assert "last edit: a b[31mc → d e" in render_ansi(history).split("\n")


# -- picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "num_edits"), [(1, 1), (12, 3), (60, 300)])
def test_pictures_of_an_episode_have_one_shape(num_layers: int, num_edits: int) -> None:
    whole = long_episode(num_edits, num_edits, num_layers)
    for done in sorted({0, 1, num_edits}):
        picture = render_rgb(History(whole.layer_names, num_edits, whole.records[:done]))
        assert picture.shape == (540, 960, 3)
        assert picture.dtype == np.uint8


def test_a_picture_changes_with_a_mask_and_only_then() -> None:
    episode = long_episode(5, 8)
    before = render_rgb(episode)
    np.testing.assert_array_equal(render_rgb(episode), before)
    episode.records[2].layers[1] ^= True
    assert (render_rgb(episode) != before).any()


def rows_in_colour(picture: NDArray[np.uint8], colour: tuple[int, ...]) -> NDArray[np.intp]:
    """Rows with more than 300 pixels of a colour, more than any text or legend has."""
    return np.flatnonzero((picture == colour).all(-1).sum(1) > 300)


def test_the_first_layer_is_on_top_of_the_picture() -> None:
    tops = []
    for layer in range(3):
        mask = [int(i == layer) for i in range(3)]
        picture = render_rgb(History(NAMES, 1, [record(0, mask)]))
        dark, light = rows_in_colour(picture, DARK), rows_in_colour(picture, LIGHT)
        assert len(light) == pytest.approx(2 * len(dark), abs=4)
        tops.append(dark[0])
    assert tops == sorted(set(tops))


def test_no_layer_written_draws_no_dark_cell() -> None:
    picture = render_rgb(History(NAMES, 1, [record(0, [0, 0, 0], efficacy=1.0)]))
    assert len(rows_in_colour(picture, LIGHT)) > 100
    assert len(rows_in_colour(picture, DARK)) == 0


def test_metric_lines_hold_the_running_means() -> None:
    axes = an_axes()[1].add_subplot()
    lines = draw_metrics(axes, short_episode().records, num_edits=4, window=2)
    points = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in lines}
    assert points == {
        "efficacy right after": [[1, 100], [2, 75], [3, 25]],
        "generalization": [[1, 50], [2, 75], [3, 100]],
        "agreement": [],
        "recent retention": [[2, 100], [3, 75]],
    }
    assert axes.get_xlim() == (0.5, 4.5)
    assert "last 2" in axes.get_ylabel()
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len({colour for colour, _ in looks}) == len({dash for _, dash in looks}) == len(METRICS)


def test_a_single_edit_shows_as_a_dot() -> None:
    canvas, figure = an_axes()
    axes = figure.add_subplot()
    draw_metrics(axes, [record(0, [1], efficacy=0.5)], num_edits=10)
    canvas.draw()
    x, y = axes.transData.transform((1, 50)).astype(int)
    pixel = np.asarray(canvas.buffer_rgba())[::-1][y, x, :3]
    assert tuple(pixel) == tuple(round(255 * part) for part in to_rgb(METRICS[0].colour))


# -- manners -------------------------------------------------------------------------------------


def test_rendering_leaves_the_settings_of_matplotlib_alone() -> None:
    before = dict(rcParams)
    render_rgb(short_episode())
    assert dict(rcParams) == before


def test_matplotlib_is_imported_late_and_pyplot_never() -> None:
    program = (
        "import sys\n"
        "from hiedit_env.envs import rendering\n"
        "from hiedit_env.envs.state import History\n"
        "rendering.render_ansi(History(('a.1.b',), 1))\n"
        "print('matplotlib' in sys.modules)\n"
        "rendering.render_rgb(History(('a.1.b',), 1))\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"]
