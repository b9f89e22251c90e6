"""Streams that hold no rows or never end: refused at once, with little memory."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from hiedit_env.datasets import files, named_pipes
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import DatasetError

FACT = {"prompt": "My dog is called", "answer": "Rex"}


class Counted(io.BytesIO):
    """Bytes that count how many of them were read, and repeat for ever."""

    def __init__(self, pattern: bytes) -> None:
        super().__init__()
        self.pattern, self.taken = pattern, 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "all of an endless stream was asked for"
        start = self.taken % len(self.pattern)
        self.taken += size
        repeats = size // len(self.pattern) + 2
        return (self.pattern * repeats)[start : start + size]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (b"\0", r"- holds bytes that are no text \(byte 0 is 0\)"),
        (b'[{"prompt": "\0', r"\(byte 13 is 0\)"),
        (b"\xff\xfe\xfd", "- is UTF-16 or UTF-32 text"),
        (b"[\xc3(", r"- is not UTF-8 text \(byte 1\)"),
        (b"\x1f\x8b\x08", "- is compressed"),
        (b"y\n", r"- is not JSON at line 1, column 1.*begins with 'y\\ny"),
        ("月湖".encode(), r"- is not JSON at line 1, column 1.*begins with '月湖月"),
    ],
)
def test_an_endless_stream_of_no_rows_is_refused_at_its_beginning(
    monkeypatch: pytest.MonkeyPatch, pattern: bytes, message: str
) -> None:
    source = Counted(pattern)
    monkeypatch.setattr(files, "standard_input", lambda: source)
    with pytest.raises(DatasetError, match=message):
        load_requests("-")
    assert source.taken <= 2 * 2**20


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs the devices of a Unix system")
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full"])
def test_devices_without_end_are_refused_at_once(device: str) -> None:
    begun = time.monotonic()
    with pytest.raises(DatasetError, match=f"{device} holds bytes that are no text"):
        load_requests(device)
    assert time.monotonic() - begun < 5


def test_a_stream_in_many_pieces_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE_BYTES", 3)
    text = "\ufeff \n" + json.dumps([FACT | {"answer": "月湖城"}], ensure_ascii=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    (request,) = load_requests("-")
    assert request.answer == "月湖城"


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    for name in ("facts", "facts.json", "facts.csv"):
        (tmp_path / name).mkdir()
        with pytest.raises(DatasetError, match=rf"{name} cannot be read: it is a folder; give"):
            load_requests(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_writes_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_pipes, "WAIT", 0.2)
    path = tmp_path / "facts.json"
    os.mkfifo(path)
    running = threading.active_count()
    with pytest.raises(DatasetError, match="is a pipe, and nobody opened it for writing within"):
        load_requests(path)
    assert threading.active_count() == running


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_whose_writer_takes_its_time_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_pipes, "WAIT", 0.3)
    path = tmp_path / "facts"
    os.mkfifo(path)

    def feed() -> None:
        with path.open("w", encoding="utf-8") as file:
            time.sleep(0.8)
            file.write(json.dumps([FACT]))

    writer = threading.Thread(target=feed)
    writer.start()
    assert [request.answer for request in load_requests(path)] == ["Rex"]
    writer.join()
