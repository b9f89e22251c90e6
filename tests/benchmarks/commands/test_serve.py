"""``hiedit serve`` as a process, and what it refuses before it serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hiedit_agents import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.serving.run import take_port
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.serve import model_name
from tests.support.editors import FACTS, NONE
from tests.support.models import build_random, tokenizer

ROOT = Path(__file__).parents[3]
FACT = {"prompt": FACTS[0].prompt, "answer": FACTS[0].answer}


@contextmanager
def running(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The command as a process, and what it says until it serves."""
    paths = [str(ROOT), *(path for path in sys.path if path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "hiedit_benchmarks.commands.cli", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        yield process, said
    finally:
        process.kill()
        process.communicate()


def call(address: str, path: str, token: str | None, body: Any = None, method: str = "POST") -> Any:
    request = urllib.request.Request(
        address + path,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def ask(address: str) -> str:
    body = {"model": "tiny", "prompt": FACT["prompt"], "max_tokens": 4}
    return str(call(address, "/v1/completions", None, body)["choices"][0]["text"])


def test_it_serves_edits_and_stops(tmp_path: Path) -> None:
    words = ["--model", "tiny", "--port", "0", "--ledger", str(tmp_path / "ledger")]
    with running(*words, HIEDIT_TOKEN="secret") as (process, said):
        assert said[0].startswith("hiedit: agent ")
        assert said[1].startswith("hiedit: tiny with 0 edits")
        address = said[2].split()[-1].removesuffix("/v1")
        was = ask(address)
        [result] = call(address, "/edits", "secret", FACT)["data"]
        assert result["status"] == "written"
        assert ask(address) != was
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "secret" not in "".join(said) + out + err
        assert err == f"\nhiedit: stopped; 1 edits are in {tmp_path / 'ledger'}\n"
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.active == (1,)


def test_a_token_is_made_and_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HIEDIT_TOKEN", raising=False)
    monkeypatch.setattr("hiedit_benchmarks.commands.serve.serve", lambda app, taken: None)
    assert main(["serve", "--model", "tiny", "--port", "0"]) == 0
    captured = capsys.readouterr()
    [line] = [line for line in captured.out.splitlines() if "token for edits" in line]
    token = line.split()[-1]
    assert len(token) >= 32
    assert f"/#token={token}\n" in captured.out
    assert "edits are lost when it stops; --ledger DIR keeps them" in captured.out
    assert main(["serve", "--model", "tiny", "--port", "0", "--token", "mine"]) == 0
    assert "mine" not in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """One line on standard error and status 2."""
    assert main(["serve", "--model", "tiny", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with take_port("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        line = refused(capsys, "--port", port, "--ledger", str(tmp_path / "ledger"))
    assert line.startswith(f"hiedit: error: port {port} of 127.0.0.1 cannot be used: ")
    assert line.endswith("; give another --port, or 0 for one that is free")
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("host", ["8.8.8.8", "192.0.2.1", "ff02::1"])
def test_a_host_that_is_no_address_of_this_machine(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "--host", host, "--port", "0")
    assert line.startswith(f"hiedit: error: host '{host}' ")
    assert "; give another --host" in line
    assert "--port" not in line


@pytest.mark.parametrize("host", ["a" * 70, "", "no.such.host.invalid", "\x1b[31m"])
def test_a_host_that_is_no_name(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--host", host, "--port", "0")
    assert line.startswith("hiedit: error: host '")
    assert line.endswith("; give another --host")
    assert line.isprintable()


def test_a_ledger_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Editor(build_random("llama"), tokenizer(), checks=NONE, ledger=tmp_path, name="").close()
    before = (tmp_path / "ledger.sqlite").read_bytes()
    line = refused(capsys, "--port", "0", "--ledger", str(tmp_path))
    assert "the ledger is of a model with the candidate layers" in line
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


@pytest.mark.parametrize("token", ["", "two words", "ü"])
def test_a_token_that_cannot_be_sent(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--token must be ASCII characters without spaces" in refused(capsys, "--token", token)


def test_the_name_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "my:model").mkdir()
    assert model_name(str(tmp_path / "my:model")) == "my-model"
