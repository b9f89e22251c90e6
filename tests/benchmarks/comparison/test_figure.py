"""The picture of a comparison: its curves are the numbers of the table; odd names draw."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.comparison.compare import Comparison, compare
from hiedit_benchmarks.comparison.figure import PANELS, draw, mean_curve
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.errors import MissingLibraryError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("figure") / "results"
    settings = CompareSettings(
        model="tiny", num_edits=6, max_steps_per_edit=2, update_rule="outer-product", generation=()
    )
    return out, compare(settings, ["all-layers"], [0, 1], out, progress=False)


def run(**more: Any) -> dict[str, Any]:
    values: list[float | None] = [100.0, 0.0, None, 50.0]
    return {
        "prompts": ["a", "b", "c", "d"],
        "edits": [
            {"layers": [0], "metrics": {"efficacy": 1.0, "agreement": 0.125}},
            {"layers": [1], "metrics": {"efficacy": 0.5, "agreement": 0.125}},
        ],
        "per_fact": {
            "efficacy": {"token_accuracy": values},
            "generalization": {"token_accuracy": [None] * 4},
            "specificity": {"token_accuracy": values, "agreement": [75.0, 25.0, None, 0.0]},
        },
        **more,
    }


def test_every_curve_averages_to_the_number_of_the_table(made: tuple[Path, Comparison]) -> None:
    _, comparison = made
    for agent in ("no-edit", "all-layers"):
        runs = [comparison.details[agent, seed] for seed in (0, 1)]
        for measure, _, _ in PANELS:
            curve = mean_curve(measure, runs, 6)
            shown = comparison.summary[agent][measure]["mean"]
            assert np.nanmean(curve) == pytest.approx(shown), (agent, measure)
    # That of one agent is damaged, so that two agreements could be told apart.
    assert comparison.summary["all-layers"]["agreement"]["mean"] < 100


def test_curves_by_hand() -> None:
    nan = float("nan")
    np.testing.assert_array_equal(mean_curve("right_after", [run()], 4), [100, 50, nan, nan])
    np.testing.assert_array_equal(mean_curve("efficacy", [run()], 5), [100, 0, nan, 50, nan])
    # After the last edit, as in the table; what the environment said right after an edit is 12.5.
    np.testing.assert_array_equal(mean_curve("agreement", [run()], 4), [75, 25, nan, 0])
    other = run(edits=[])
    np.testing.assert_array_equal(mean_curve("right_after", [run(), other], 4)[:2], [100, 50])
    assert np.isnan(mean_curve("generalization", [run()], 4)).all()
    without = run()
    del without["per_fact"]["specificity"]["agreement"]
    assert np.isnan(mean_curve("agreement", [without], 4)).all()


def test_further_panels_are_drawn_where_there_are_numbers() -> None:
    plain = {("no-edit", 0): run(edits=[]), ("a", 0): run()}
    chat = {"token_accuracy": [25.0, None, 75.0, 0.0]}
    more = run()
    more["per_fact"]["chat_efficacy"] = chat
    np.testing.assert_array_equal(mean_curve("chat_efficacy", [more], 4), [25, float("nan"), 75, 0])
    assert np.isnan(mean_curve("neighbour_agreement", [more], 4)).all()
    height = [
        int.from_bytes(draw(["no-edit", "a"], [0], details, ["a.0.up", "a.1.up"])[20:24], "big")
        for details in (plain, plain | {("a", 0): more})
    ]
    assert height[1] > height[0], "a row of panels more"


def test_the_picture_is_written(made: tuple[Path, Comparison]) -> None:
    out, comparison = made
    assert comparison.picture == out / "compare.png"
    data = comparison.picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    layers = comparison.details["no-edit", 0]["layer_names"]
    assert draw(["no-edit", "all-layers"], [0, 1], comparison.details, layers) == data
    assert draw(["no-edit", "all-layers"], [0], comparison.details, layers) != data


@pytest.mark.parametrize("name", ["_hidden", "$a_b^{", "字", "x" * 300])
def test_odd_names_are_drawn(name: str) -> None:
    details = {("no-edit", 0): run(edits=[]), (name, 0): run()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw(["no-edit", name], [0], details, ["a.0.up", "a.1.up"])
    unnamed = {("no-edit", 0): run(edits=[]), ("y", 0): run()}
    assert picture != draw(["no-edit", "y"], [0], unnamed, ["a.0.up", "a.1.up"])


def test_only_the_unedited_model_is_drawn_too() -> None:
    details = {("no-edit", 0): run(edits=[])}
    assert draw(["no-edit"], [0], details, ["a.0.up"])[:4] == b"\x89PNG"


def test_without_matplotlib_a_comparison_has_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hiedit_env.envs.plotting as plotting

    def missing(extra: str, *libraries: str) -> None:
        raise MissingLibraryError(libraries[0], extra)

    monkeypatch.setattr(plotting, "require_libraries", missing)
    settings = CompareSettings(model="tiny", num_edits=1, max_steps_per_edit=1, generation=())
    result = compare(settings, [], [0], tmp_path, progress=False)
    assert result.picture is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no picture: matplotlib is not installed" in said[0]
    assert "[plots]" in said[0]
    assert (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    again = compare(settings, [], [0], tmp_path, resume=True, progress=False)
    assert again.picture is not None
    assert again.picture.exists()
