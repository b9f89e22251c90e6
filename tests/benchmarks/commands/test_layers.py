"""``hiedit layers``: it finds planted layers, and every command takes its file."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import pytest

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_benchmarks.commands import layers as command
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.layers import find_layers
from hiedit_benchmarks.layers.settings import LayerScanSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import LayerError

SMALL = ("--model", "tiny", "--num-facts", "2", "--layers", "model.layers.{1-2}.mlp.*_proj")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of layers of the tiny model."""
    folder = tmp_path_factory.mktemp("layers")
    assert main(["layers", *SMALL, "--out", str(folder / "found.json"), "--count", "2"]) == 0
    return folder / "found.json"


def names_in(path: Path) -> list[str]:
    names: list[str] = json.loads(path.read_text(encoding="utf-8"))["layers"]
    return names


def test_planted_layers_are_found() -> None:
    true = {name for fact in load_requests("planted-facts") for name in fact.true_layers}
    assert len(true) == 5
    settings = LayerScanSettings(model="planted", num_facts=5, count=5)
    outcome = find_layers(settings, progress=False)
    assert len(outcome.scores) == 28
    # One fact of each relation, so each true layer is right for one fact. Five of 28 layers drawn
    # at random hold 0.9 true ones on average, and four or more with probability 0.001.
    assert len(true & set(outcome.chosen)) >= 4
    ranked = sorted(outcome.scores, key=lambda score: -score.score)
    assert ranked[0].name in true


def test_the_table_the_file_and_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert main(["layers", *SMALL, "--out", str(out), "--picture", str(picture)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    content = json.loads(out.read_text(encoding="utf-8"))
    # By depth, one line each, the proposed ones marked: three at most of six.
    rows = [line for line in lines if line[3:5] in ("1 ", "2 ") and "_proj" in line]
    assert [row[3:].split()[:2] for row in rows] == [
        [block, f"{matrix}_proj"] for block in "12" for matrix in ("gate", "up", "down")
    ]
    marked = [
        m["name"] for m, row in zip(content["measured"], rows, strict=True) if row.startswith("*")
    ]
    assert marked == content["layers"]
    assert len(marked) == 3
    assert all(len(line) <= 80 for line in lines[: lines.index("  *      proposed")])
    assert " ".join(content["layers"]) == lines[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert content["rule"]["name"] == "decorrelated"
    assert content["facts"]["count"] == 2
    assert content["model"]["name"] == "tiny"
    # The score of the file is its formula applied to its other numbers.
    for measured in content["measured"]:
        by_hand = measured["effect"] / (measured["damage"] + 0.05)
        assert measured["score"] == pytest.approx(by_hand, rel=1e-4)


def test_the_same_seed_proposes_the_same(found: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    assert main(["layers", *SMALL, "--out", str(again), "--count", "2"]) == 0
    first, second = (json.loads(p.read_text(encoding="utf-8")) for p in (found, again))
    assert second["layers"] == first["layers"]
    for one, two in zip(first["measured"], second["measured"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_facts_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"{name} lives in", "answer": "Averlund", "subject": name}
        for name in ("Corrin", "Dasmo")
    ]
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(rows))
    layers = ["--layers", "model.layers.2.mlp.*_proj"]
    assert main(["layers", "--model", "tiny", "--facts", str(facts), *layers]) == 0
    assert "Proposed: the 1 layers" in capsys.readouterr().out


def test_edit_takes_the_file(found: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"prompt": "Dasmo lives in", "answer": "A", "subject": "Dasmo"}]))
    out = tmp_path / "out"
    words = ["edit", "--model", "tiny", "--facts", str(facts), "--out", str(out)]
    main([*words, "--layers", str(found)])
    record = json.loads((out / "edits.json").read_text(encoding="utf-8"))
    assert record["facts"][0]["layers"] == names_in(found)


def test_compare_takes_the_file(found: Path, tmp_path: Path) -> None:
    words = ["compare", "--model", "tiny", "--num-edits", "1", "--no-generation"]
    words += ["--agents", "all-layers", "--out", str(tmp_path / "out"), "--layers", str(found)]
    assert main(words) == 0
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert row["settings"]["candidate_layers"] == names_in(found)


def test_train_takes_the_file(found: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", "mend", "--model", "tiny", "--layers", str(found), "--out", str(out)]
    words += ["--no-tensorboard", "--episodes", "1", "--edits-per-episode", "2"]
    words += ["--calibration", "2", "--evaluation-edits", "0"]
    assert main(words) == 0
    record = json.loads((out / "agent.json").read_text(encoding="utf-8"))
    assert record["model"]["layers"] == names_in(found)


def test_environments_take_the_file(found: Path) -> None:
    env = gymnasium.make("hiedit/LayerSelection-v1", model="tiny", layers=str(found))
    inner = env.unwrapped
    assert list(inner.llm.names) == names_in(found)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere' is not an existing folder"),
        (["--model", "tiny", "--facts", "no.json"], "no.json"),
        (["--model", "tiny", "--layers", "nothing.*"], "matches no module"),
        (["--model", "tiny", "--layers", "found.json"], "there is no file of layers 'found.json'"),
        (["--model", "tiny", "--update-rule", "magic"], "unknown update rule 'magic'"),
        (["--model", "tiny", "--num-facts", "0"], "num_facts must be ≥ 1"),
        (["--model", "tiny", "--out", "found.txt"], "--out must end in .json, got found.txt"),
        (["--model", "tiny", "--out", "no/found.json"], "its folder must exist"),
        (["--model", "tiny", "--picture", "found.jpg"], "--picture must end in .png"),
    ],
)
def test_mistakes_are_named_in_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["layers", *words]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_model_is_refused(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--model", "planted", "--layers", str(found)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "was made for model 'tiny'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_facts_that_the_model_gives_already_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [
        {"prompt": r.prompt, "answer": r.old_answer, "subject": r.subject}
        for r in load_requests("tiny-facts")[:2]
    ]
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(known))
    words = ["layers", "--model", "tiny", "--facts", str(facts)]
    assert main(words) == 2
    assert "the model gives all 2 facts" in capsys.readouterr().err


def test_where_no_library_draws_the_file_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_library(*_: object) -> bytes:
        raise command.MissingLibraryError("matplotlib", "plots")

    monkeypatch.setattr(command, "draw", no_library)
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert main(["layers", *SMALL, "--out", str(out), "--picture", str(picture)]) == 0
    assert out.exists()
    assert not picture.exists()
    assert "no picture: matplotlib is not installed" in capsys.readouterr().err


def test_layers_that_give_no_fact_are_not_proposed() -> None:
    settings = LayerScanSettings(
        model="tiny",
        layers=("model.layers.0.mlp.gate_proj",),
        num_facts=1,
        max_steps_per_edit=1,
    )
    with pytest.raises(LayerError, match="no layer alone gives any of these facts"):
        find_layers(settings, progress=False)
