"""The ablation study: commands, their order, finished work that is kept, and one small run."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hiedit_benchmarks.commands import cli
from hiedit_benchmarks.studies.ablation import VARIANTS, Plan, ablate, in_a_process, main
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import SettingsError

LAYERS = "model.layers.{0-2}.mlp.{up,gate}_proj"


def in_here(calls: list[list[str]]) -> object:
    """Runs command lines in this process, and notes them."""

    def run(command: Sequence[str], log: Path) -> None:
        calls.append(list(command))
        with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            assert cli.main(list(command)) == 0

    return run


def halves(folder: Path) -> tuple[str, str]:
    """Two files of different facts."""
    rows = [
        {
            "prompt": r.prompt,
            "answer": r.answer,
            "subject": r.subject,
            "paraphrases": list(r.paraphrases),
            "locality": [{"prompt": p.prompt, "answer": p.answer} for p in r.locality],
        }
        for r in load_requests("tiny-facts")
    ]
    files = []
    for name, part in (("train", rows[:60]), ("test", rows[60:80])):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(part), encoding="utf-8")
    return str(files[0]), str(files[1])


def plan_of(folder: Path, *variants: str) -> Plan:
    train, test = halves(folder)
    common = ("--model", "tiny", "--layers", LAYERS)
    return Plan(
        out=folder / "out",
        train=(
            *common,
            *("--dataset", train, "--exclude", test, "--evaluation-edits", "0"),
            *("--edits-per-episode", "2", "--no-tensorboard"),
        ),
        compare=(
            *common,
            *("--dataset", test, "--num-edits", "2", "--seeds", "0", "--no-generation"),
        ),
        layers_per_edit=2,
        low_settings="",
        low_window=None,
        low_episodes=1,
        high_episodes=1,
        variants=variants,
    )


def test_rows_are_made_once_and_put_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pictures of the comparisons take half of the time and are tested elsewhere.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls: list[list[str]] = []
    plan = plan_of(tmp_path, "hiedit", "straight-through", "trained-low")
    ablate(plan, in_here(calls))  # type: ignore[arg-type]
    made = [(command[0], Path(command[-1]).name) for command in calls]
    assert made == [
        ("train", "calibrated"),
        ("compare", "unedited.part"),
        ("train", "hiedit"),
        ("train", "trained"),
        ("train", "straight-through"),
        ("compare", "hiedit"),
        ("compare", "straight-through"),
        ("compare", "trained-low"),
        ("compare", "table"),
    ]
    printed = capsys.readouterr().out
    for name in ("no-edit", *plan.variants):
        assert f"\n{name}" in printed
    assert "Difference from hiedit on the same facts" in printed
    rows = (plan.out / "table" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    agents = [json.loads(row)["agent"] for row in rows]
    assert agents == ["no-edit", "hiedit", "straight-through", "trained-low"]
    # Rows differ in what they name, and in nothing that would make them another comparison.
    low, trained = (
        json.loads((plan.out / name / "agent.json").read_text(encoding="utf-8"))
        for name in ("calibrated", "trained")
    )
    assert low["log"] == {}
    assert trained["log"] != {}
    assert low["low"] == trained["low"]
    assert low["low"]["name"] == "rehearsal"
    calls.clear()
    ablate(plan, in_here(calls))  # type: ignore[arg-type]
    assert [Path(command[-1]).name for command in calls] == ["table"]
    with pytest.raises(SettingsError, match="was begun with layers_per_edit 2 and not 3"):
        ablate(replace(plan, layers_per_edit=3), in_here(calls))  # type: ignore[arg-type]


def test_after_a_failure_nothing_more_is_begun(tmp_path: Path) -> None:
    calls: list[str] = []

    def fails(command: Sequence[str], log: Path) -> None:
        calls.append(Path(command[-1]).name)
        raise SettingsError("no room")

    plan = replace(plan_of_nothing(("hiedit", "no-history")), out=tmp_path)
    with pytest.raises(SettingsError, match="no room"):
        ablate(plan, fails)
    assert set(calls) <= {"calibrated", "unedited.part"}
    assert "calibrated" in calls


def test_every_variant_leaves_out_one_thing() -> None:
    plan = plan_of_nothing(tuple(VARIANTS))
    base = plan.high("hiedit")
    for name, variant in VARIANTS.items():
        if variant.train:
            command = plan.high(name)
            assert "--no-train-low" in command
            assert command[command.index("--episodes") + 1] == "8"
            if name != "straight-through":
                differing = set(command) ^ set(base)
                # Its agent or one more option, its name and its folder.
                assert len({text for text in differing if text not in (name, "hiedit")}) <= 4
        else:
            assert "/hiedit" in plan.rows(name)[2] or "/calibrated" in plan.rows(name)[2]
    assert plan.rows("one-step")[2] == "one-step=out/hiedit,max_steps_per_edit=1"
    assert plan.rows("trained-low")[2] == "trained-low=out/hiedit+out/trained"
    assert plan.low(0, "calibrated")[1] == "random-layers,layers_per_edit=3+hiedit,step_size=1e-4"


def plan_of_nothing(variants: tuple[str, ...]) -> Plan:
    return Plan(Path("out"), (), (), 3, "step_size=1e-4", None, 6, 8, variants)


def test_bad_input(tmp_path: Path) -> None:
    def never(command: Sequence[str], log: Path) -> None:
        raise AssertionError(command)

    for variants in (("hiedit", "none-such"), ("one-step",)):
        with pytest.raises(SettingsError, match="variants must be hiedit and any of"):
            ablate(plan_of_nothing(variants), never)
    # A process that fails before it has imported torch; what it said is kept.
    wrong = ["compare", "--num-edits", "many", "--out", str(tmp_path / "o")]
    with pytest.raises(SettingsError, match=r"in hiedit compare --num-edits many .*agent\.err"):
        in_a_process(1)(wrong, tmp_path / "agent.txt")
    assert "many" in (tmp_path / "agent.err").read_text(encoding="utf-8")
    with pytest.raises(SettingsError, match="--train"):
        main(["--out", str(tmp_path)])
