"""``hiedit edit --facts -``: facts as they come, one JSON a line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents import Checks, Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_benchmarks.commands import edit_stream
from hiedit_benchmarks.commands.cli import main
from hiedit_benchmarks.commands.edit_stream import Stream
from hiedit_benchmarks.commands.stream_settings import StreamSettings
from hiedit_env.errors import NotEnoughMemoryError
from hiedit_env.model import memory_budget
from tests.support.editors import FACTS, NONE
from tests.support.models import all_bits

AUTO: Any = AutoModelForCausalLM
LINES = [{"prompt": f.prompt, "answer": f.answer, "subject": f.subject} for f in FACTS[:6]]


def streamed(
    editor: Editor, lines: list[object], *, batch: int = 1, **settings: Any
) -> tuple[bool, list[dict[str, Any]]]:
    """What a stream answers, in process; texts among the lines are sent as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    answers = io.StringIO()
    source = io.BytesIO("\n".join(texts).encode(errors="surrogateescape"))
    reached = Stream(editor, StreamSettings(**settings), batch, source, answers).run()
    return reached, [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_line_without_a_fact_is_answered_too() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        _, answers = streamed(editor, ["[]", "[" * 100_000])
    told = {answer.get("line"): str(answer) for answer in answers}
    assert "the line holds no fact" in told[1]
    assert "nested too deep" in told[2]


class Endless(io.BytesIO):
    """One line of letters, or of zero bytes, that never ends."""

    def __init__(self, letter: bytes) -> None:
        super().__init__()
        self.letter, self.taken = letter, 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        self.taken += size
        assert self.taken < 10_000, "a line without end was read on and on"
        return self.letter * size


@pytest.mark.parametrize(("letter", "most"), [(b"a", 700), (b"\0", 200)])
def test_a_line_without_end_ends_the_stream(
    monkeypatch: pytest.MonkeyPatch, letter: bytes, most: int
) -> None:
    monkeypatch.setattr(edit_stream, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(edit_stream, "MAX_FILE_BYTES", 500)
    source, answers = Endless(letter), io.StringIO()
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        Stream(editor, StreamSettings(), 1, source, answers).run()
    assert "seems to have no end; nothing more is read" in answers.getvalue()
    assert source.taken <= most


def test_every_line_gets_its_answer_in_order() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        reached, answers = streamed(
            editor,
            [
                LINES[0],
                "no json",
                "",
                LINES[0],
                {**LINES[0], "answer": "Istrand"},
                {"prompt": "x"},
                "\udcff",
                ["Dasmo lives in", "Istrand"],
                {"prompt": "long " * 5000, "answer": "x"},
            ],
        )
    assert reached
    assert [(a.get("line"), a.get("status")) for a in answers] == [
        (1, "written"),
        (2, "refused"),
        (4, "known"),
        (5, "written"),
        (6, "refused"),
        (7, "refused"),
        (8, "written"),
        (9, "refused"),
        (None, None),
    ]
    assert answers[3]["replaces"] == answers[0]["id"] == 1
    assert "no JSON" in answers[1]["problems"][0]
    assert answers[-1]["health"]["edits"] == 3


def test_an_edit_that_fails_is_rolled_back_and_the_stream_goes_on() -> None:
    # One step is enough for some facts only.
    checks = Checks(min_agreement=None, earlier=0)
    with Editor.from_pretrained("tiny", checks=checks, max_steps_per_edit=1) as editor:
        reached, answers = streamed(editor, list(LINES))
        assert reached
        found = [a["status"] for a in answers[:-1]]
        assert set(found) == {"written", "rolled back"}
        assert len(editor.ledger) == found.count("written")
        assert all(a["problems"] for a in answers[:-1] if a["status"] == "rolled back")


def test_batches_are_written_together_and_the_rest_at_the_end() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        _, answers = streamed(editor, [*LINES[:3], "x", *LINES[3:6]], batch=2)
    assert [(a.get("line"), a.get("id")) for a in answers[:-1]] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, None),
        (5, 3),
        (6, 3),
        (7, 4),
    ]


def test_health_every_so_many_edits_by_hand() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        _, answers = streamed(editor, list(LINES[:5]), health_every=2)
        health = [a["health"] for a in answers if "health" in a]
        assert [h["edits"] for h in health] == [2, 4, 5]
        texts = editor.ask([line["prompt"] for line in LINES[:5]])
        given = [t.startswith(f" {line['answer']}") for t, line in zip(texts, LINES, strict=False)]
        assert (health[-1]["asked"], health[-1]["given"]) == (5, sum(given))
        assert health[-1]["agreement"] == editor.measure().agreement


def test_it_stops_when_the_model_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with Editor.from_pretrained("tiny", checks=NONE, step_size=0.5) as editor:
        reached, answers = streamed(editor, list(LINES), health_every=1, stop_below=0.9)
    assert not reached
    assert len([a for a in answers if "line" in a]) < len(LINES)
    error = capsys.readouterr().err
    assert "stopped after" in error
    assert "under --stop-below 0.9" in error


def test_a_fact_too_long_for_the_memory_is_refused_and_the_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        # The toy's context holds no prompt that a machine could not.
        monkeypatch.setattr(memory_budget, "TOKENS", 30)
        monkeypatch.setattr(memory_budget, "available_memory", lambda _: 1)
        long = {**LINES[1], "prompt": "and " * 60 + LINES[1]["prompt"]}
        reached, answers = streamed(editor, [LINES[0], long, LINES[2]])
        with pytest.raises(NotEnoughMemoryError):
            editor.edit(long)
        assert len(editor.ledger.active) == 2
    assert reached
    statuses = [answer.get("status") for answer in answers[:3]]
    assert statuses == ["written", "refused", "written"]
    assert "--memory-check warn" in answers[1]["problems"][0]


def test_the_memory_check_that_was_asked_for_is_the_one_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: 1)
    words = ["edit", "--facts", "-", "--model", "tiny", "--out", str(tmp_path / "out")]

    def run(*more: str) -> int:
        line = io.BytesIO(json.dumps(LINES[0]).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(line))
        return main([*words, *more])

    assert run() == 2
    assert "needs about" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("--memory-check", "off") == 0
    assert '"status": "written"' in capsys.readouterr().out


def test_the_command_saves_and_its_folder_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(json.dumps(line) for line in LINES[:3])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    words = ["edit", "--facts", "-", "--model", "tiny", "--out", str(tmp_path / "out")]
    assert main([*words, "--ledger", str(tmp_path / "ledger"), "--max-lost", "1"]) == 0
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [a.get("status") for a in answers] == ["written"] * 3 + [None]
    assert "saved to" in captured.err
    model, tokens = AUTO.from_pretrained(tmp_path / "out"), None
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokens(LINES[2]["prompt"], return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.decode(out[0, ids.shape[1] :]).startswith(f" {LINES[2]['answer']}")
    with Ledger.open(tmp_path / "ledger") as ledger, Ledger.open(tmp_path / "out") as copied:
        assert ledger.active == copied.active == (1, 2, 3)


def test_options_of_streams_are_refused_for_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["edit", "--facts", "tiny-facts", "--out", str(tmp_path / "out")]
    words += ["--health-every", "3"]
    assert main([*words, "--stop-below", "0.5"]) == 2
    assert (
        "--health-every, --stop-below: for facts as they come (--facts -)"
        in capsys.readouterr().err
    )
    assert main(["edit", "--facts", "-", "--out", str(tmp_path), "--stop-below", "2"]) == 2
    assert "a number from 0 to 1" in capsys.readouterr().err


def start(tmp_path: Path, out: str) -> subprocess.Popen[str]:
    paths = [str(Path(__file__).resolve().parents[3]), *(path for path in sys.path if path)]
    script = "import sys; from hiedit_benchmarks.commands.cli import main; sys.exit(main())"
    words = ["edit", "--facts", "-", "--model", "tiny", "--max-lost", "1"]
    places = ["--out", str(tmp_path / out), "--ledger", str(tmp_path / "ledger")]
    return subprocess.Popen(
        [sys.executable, "-c", script, *words, *places],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def test_a_killed_stream_is_gone_on_with_and_nothing_is_applied_twice(tmp_path: Path) -> None:
    process = start(tmp_path, "never")
    assert process.stdin is not None
    assert process.stdout is not None
    for line in LINES[:3]:
        # Each answer comes before the next line is sent.
        process.stdin.write(json.dumps(line) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["status"] == "written"
    process.stdin.write(json.dumps(LINES[3]) + "\n")
    process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "never").exists()
    process = start(tmp_path, "out")
    text, _ = process.communicate("\n".join(json.dumps(line) for line in LINES[:4]))
    assert process.returncode == 0
    answers = [json.loads(line) for line in text.splitlines()]
    assert [a["status"] for a in answers[:3]] == ["known"] * 3
    assert answers[3]["status"] in ("written", "known")  # its edit may have been on disk already
    with Ledger.open(tmp_path / "ledger") as ledger:
        assert ledger.active == (1, 2, 3, 4)
    with Editor.from_pretrained("tiny", ledger=tmp_path / "ledger") as editor:
        assert all_bits(editor.model) == all_bits(AUTO.from_pretrained(tmp_path / "out"))
