"""Files of recorded choices: gone on with after a kill, and never of mixed settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hiedit_benchmarks.studies.block_records import RecordFile, read_records
from hiedit_env.errors import OutputError, SettingsError
from tests.benchmarks.studies.block_worlds import by_number, records

SETTINGS = {"blocks": (3, 5, 7, 9), "seed": 0}


def write(path: Path, count: int, first: int = 0) -> None:
    file = RecordFile(path, SETTINGS)
    for record in records(by_number, first + count)[first:]:
        file.append(record)
    file.close()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    settings, found = read_records([tmp_path / "a.jsonl"])
    assert settings == {"blocks": [3, 5, 7, 9], "seed": 0}
    assert found == records(by_number, 3)


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_line_left_half_is_lost_and_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_records([path])[1]) == 2
    file = RecordFile(path, SETTINGS)
    assert [record.prompt for record in file.records] == ["p0", "p1"]
    file.append(records(by_number, 3)[2])
    file.close()
    assert read_records([path])[1] == records(by_number, 3)


def test_a_heading_left_half_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 1)
    path.write_bytes(path.read_bytes()[:20])
    write(path, 2)
    assert len(read_records([path])[1]) == 2


def test_settings_are_never_mixed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=r"seed=0, not 1; give another"):
        RecordFile(path, {**SETTINGS, "seed": 1})
    with pytest.raises(SettingsError, match=r"extra=None, not True"):
        RecordFile(path, {**SETTINGS, "extra": True})
    assert path.read_bytes() == before
    # The refused openings have let go of the file.
    RecordFile(path, SETTINGS).close()
    RecordFile(other, {**SETTINGS, "seed": 1}).close()
    with pytest.raises(SettingsError, match=r"b\.jsonl was recorded with seed=1"):
        read_records([path, other])


def test_parts_are_read_together_and_a_fact_counts_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 3)
    write(tmp_path / "b.jsonl", 3, first=2)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert [record.prompt for record in read_records(paths)[1]] == ["p0", "p1", "p2", "p3", "p4"]


def test_one_process_writes_to_a_file(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "a.jsonl", SETTINGS)
    with pytest.raises(OutputError, match="another process"):
        RecordFile(tmp_path / "a.jsonl", SETTINGS)
    file.close()


def test_other_files_are_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ("hello", "hello\n", '{"format": "other"}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(SettingsError, match=r"a\.jsonl"):
            RecordFile(path, SETTINGS)
        assert path.read_text() == text
    heading = {"format": "hiedit-block-choices", "version": 9, "settings": {}}
    path.write_text(json.dumps(heading) + "\n")
    with pytest.raises(SettingsError, match="version 9"):
        read_records([path])
    write(tmp_path / "b.jsonl", 1)
    damaged = (tmp_path / "b.jsonl").read_text().replace('"options"', '"opinions"')
    (tmp_path / "b.jsonl").write_text(damaged)
    with pytest.raises(SettingsError, match="line 2, is no record"):
        read_records([tmp_path / "b.jsonl"])
    with pytest.raises(SettingsError, match="at least one file"):
        read_records([])
    with pytest.raises(SettingsError, match="cannot be read"):
        read_records([tmp_path / "missing.jsonl"])
