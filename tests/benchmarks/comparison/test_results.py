"""The results folder: names of files, formats, locks, full disks, damaged rows."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.results import (
    FORMAT_VERSION,
    ResultsFolder,
    check_file_names,
    file_name,
    plain,
    read_rows,
)
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.errors import HieditError, OutputError, ResultsExistError, SettingsError
from hiedit_env.files import lock_folder, write_bytes

QUICK = CompareSettings(
    model="tiny",
    num_edits=2,
    max_steps_per_edit=1,
    update_rule="outer-product",
    layers=("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"),
    generation=(),
)


def row(agent: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "agent": agent,
        "seed": 0,
        "num_edits": 1,
        "error_type": None,
        "metrics": {},
        "layers_per_edit": 1.0,
        "steps_per_edit": 1,
        "seconds_per_edit": 0.5,
        "stream_fingerprint": "0",
        "settings": {},
        **more,
    }


def write_rows(folder: Path, *rows: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


# -- names of files --------------------------------------------------------------------------------


def test_file_names_by_hand() -> None:
    assert file_name("hiedit,facts=0") == "hiedit,facts=0"
    assert file_name("a/b") == "a%2Fb"
    assert file_name("a.b") == "a.b"
    assert file_name("x y") == "x%20y"
    assert file_name("x+y") == "x+y"
    assert file_name("..") == ".."  # "..-seed0.json" is an ordinary name


def test_every_label_has_a_file_name_of_its_own() -> None:
    long = ["/folder" * 60 + end for end in ("a", "b")]
    labels = ["a/b", "a.b", "a%2Fb", "x y", "x+y", "x%20y", "é", "e\u0301", "a~b", "a%7Eb", *long]
    names = [file_name(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert all(len(name.encode()) <= 180 and "/" not in name for name in names)


def test_labels_that_differ_in_case_only_are_refused() -> None:
    check_file_names(["a", "b", "a"])
    with pytest.raises(SettingsError, match="'Ridge' and 'ridge' differ in upper and lower case"):
        check_file_names(["Ridge", "a", "ridge"])


@pytest.mark.parametrize("labels", [("a/b", "a.b"), ("x y", "x+y"), ("l" * 300, "l" * 299 + "m")])
def test_labels_that_were_one_file_are_two_results(tmp_path: Path, labels: tuple[str, str]) -> None:
    # A row that read the other's details would show no difference.
    one, two = labels
    settings = replace(QUICK, max_steps_per_edit=5, layers=None)
    result = compare(
        settings, [f"{one}=all-layers", f"{two}=no-edit"], [0], tmp_path / "out", progress=False
    )
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 3
    written = {name: run["edits"][0]["layers"] for (name, _), run in result.details.items()}
    assert written == {"no-edit": [], one: [*range(6)], two: []}
    assert result.paired[two]["efficacy"]["difference"] < 0


# -- formats ---------------------------------------------------------------------------------------


def test_results_and_summary_have_a_format_version(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(QUICK, ["all-layers"], [0], out, progress=False)
    assert [found["format_version"] for found in read_rows(out / "results.jsonl")] == [3, 3]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["format_version"] == FORMAT_VERSION == 3
    names = {"efficacy", "generalization", "specificity", "retention", "average", "exact_match",
             "right_after", "forgetting", "agreement", "neighbour_agreement",
             "unrelated_agreement", "layers_per_edit", "steps_per_edit",
             "seconds_per_edit"}  # fmt: skip
    assert set(summary["agents"]["all-layers"]) == names


@pytest.mark.parametrize("version", [None, 1, 2, 4, "3"])
def test_results_in_another_format_are_refused_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: Any
) -> None:
    out = tmp_path / "out"
    found = row() if version is None else row(format_version=version)
    write_rows(out, found)
    before = (out / "results.jsonl").read_bytes()
    arguments = ["compare", "--model", "tiny", "--agents", "all-layers", "--num-edits", "1"]
    assert hiedit([*arguments, "--out", str(out), "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"has results in format {1 if version is None else version!r}" in lines[0]
    assert "run the comparison again with another --out, or delete this folder" in lines[0]
    assert (out / "results.jsonl").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (7, "line 2 of results.jsonl is 7 and not a row"),
        ({"agent": "a"}, "'seed' is missing"),
        ({k: v for k, v in row().items() if k != "metrics"}, "'metrics' is missing"),
        ({k: v for k, v in row().items() if k != "settings"}, "'settings' is missing"),
        (row(settings=None), "'settings' is None"),
        (row(metrics=[1]), r"'metrics' is \[1\]"),
        (row(num_edits="x" * 900), r"'num_edits' is 'x{59}$"),
    ],
)
def test_damaged_rows_are_one_line(tmp_path: Path, found: Any, message: str) -> None:
    version = {"format_version": FORMAT_VERSION}
    damaged = {**version, **found} if isinstance(found, dict) else found
    write_rows(tmp_path, {**row(), **version}, damaged)
    with pytest.raises(SettingsError, match=message) as raised:
        ResultsFolder(tmp_path, {}, resume=True)
    assert "\n" not in str(raised.value)


def test_a_table_that_is_no_json_or_no_text_is_one_line(tmp_path: Path) -> None:
    for content, message in (
        (b"{", "line 1 of results.jsonl is not JSON"),
        (b"\xff", "no results"),
    ):
        (tmp_path / "results.jsonl").write_bytes(content)
        with pytest.raises(SettingsError, match=message):
            ResultsFolder(tmp_path, {}, resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"per_fact": {}}'])
def test_damaged_details_are_one_line(tmp_path: Path, content: str) -> None:
    folder = ResultsFolder(tmp_path, {}, resume=False)
    folder.create({})
    (tmp_path / "runs" / "a-seed0.json").write_text(content)
    with pytest.raises(SettingsError, match=r"a-seed0\.json cannot be read"):
        folder.details("a", 0)
    folder.close()


# -- one process at a time -------------------------------------------------------------------------


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    first = ResultsFolder(tmp_path, {}, resume=False)
    second = ResultsFolder(tmp_path, {}, resume=True)
    first.create({})
    program = (
        "import sys; from pathlib import Path\n"
        "from hiedit_env.files import lock_folder\n"
        "lock_folder(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "OutputError: another process is writing into" in done.stderr
    with pytest.raises(OutputError, match="wait until it has ended, or give another"):
        second.create({})
    first.add(row("a"), {})
    first.close()
    # What the first one wrote meanwhile is seen, and kept.
    second.create({})
    second.add(row("b"), {})
    second.close()
    assert [found["agent"] for found in read_rows(second.file)] == ["a", "b"]
    assert subprocess.run(command, check=False).returncode == 0


def test_without_resume_the_results_of_another_process_are_not_added_to(tmp_path: Path) -> None:
    late = ResultsFolder(tmp_path, {}, resume=False)
    first = ResultsFolder(tmp_path, {}, resume=False)
    first.create({})
    first.add(row("a"), {})
    first.close()
    with pytest.raises(ResultsExistError, match="exists already"):
        late.create({})
    # The refused one holds no lock.
    lock_folder(tmp_path).release()


def test_the_lock_is_gone_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hiedit_benchmarks.comparison import compare as module

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(module, "play", fail)
    with pytest.raises(RuntimeError, match="no"):
        compare(QUICK, ["all-layers"], [0], tmp_path, progress=False)
    lock_folder(tmp_path).release()


# -- what the disk refuses -------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses to write more than ``size`` bytes into any file."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_line_and_loses_no_finished_run(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, {}, resume=False)
    folder.create({})
    folder.add(row("a"), {})
    before = folder.file.read_bytes()
    with (
        largest_file(len(before) + 20),
        pytest.raises(OutputError, match=r"results\.jsonl cannot be written: .*large"),
    ):
        folder.add(row("b"), {})
    assert folder.file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "results.jsonl", "runs"]
    folder.add(row("b"), {})
    assert [found["agent"] for found in read_rows(folder.file)] == ["a", "b"]
    folder.close()


@pytest.mark.parametrize("name", ["x" * 256, "file/below"])
def test_folders_that_cannot_be_made_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HieditError, match=r"cannot be (made|used)") as raised:
        compare(QUICK, ["all-layers"], [0], tmp_path / name, progress=False)
    assert "\n" not in str(raised.value)


def test_files_appear_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr("hiedit_env.files.os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_plain_values_are_json() -> None:
    value = {"a": (np.float32(0.5), np.inf), "b": Path("x"), "c": np.array([[True]])}
    assert json.loads(json.dumps(plain(value))) == {"a": [0.5, None], "b": "x", "c": [[True]]}


@pytest.mark.parametrize("option", ["model", "dataset"])
def test_names_that_no_file_system_has_are_one_line(tmp_path: Path, option: str) -> None:
    settings = replace(QUICK, **{option: "x" * 300})
    with pytest.raises(HieditError, match=r"'x+'") as raised:
        compare(settings, ["all-layers"], [0], tmp_path / "out", progress=False)
    assert "\n" not in str(raised.value)
