"""Work that is killed by :mod:`.kills`: what is done, and how what is left is compared.

Every piece is a command on the toy model that is started again with the same words after a kill. A
check compares what is there at the end with an uninterrupted run.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import MARKER
from hiedit_agents.editing.saved_folder import SavedFolder
from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import HieditError

FACTS = 5
_WEIGHTS = "model.safetensors"
#: What an interruption must not change in ``edits.json``.
_OF_A_FACT = ("prompt", "answer", "before", "answered_right_after")
#: What differs from run to run: times, and what follows from them.
_TIMES = ("seconds", "seconds_per_edit", "time", "versions")

#: Status of a command that says what is wrong.
ERROR = 2


@dataclass(frozen=True, slots=True)
class Work:
    """Something that is interrupted and gone on with.

    Args:
        name: How it is called.
        prepare: Makes what is needed in an empty folder.
        run: Does the work in the folder, from the beginning or from where it was interrupted;
            returns the exit status.
        check: Compares a folder with one of an uninterrupted run; one line per fault.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path], int]
    check: Callable[[Path, Path], list[str]]


# -- editing --------------------------------------------------------------------------------------


def _lines() -> list[str]:
    facts = load_requests("tiny-facts")[:FACTS]
    return [
        json.dumps({"prompt": f.prompt, "answer": f.answer, "subject": f.subject}) for f in facts
    ]


def _write_facts(folder: Path) -> None:
    (folder / "facts.jsonl").write_text("\n".join(_lines()) + "\n", encoding="utf-8")


def _places(folder: Path, ledger: bool) -> list[str]:
    named = ["--ledger", str(folder / "ledger")] if ledger else []
    return ["--out", str(folder / "out"), "--model", "tiny", *named]


def _is_done(folder: Path) -> bool:
    """Whether it was killed after it had saved; the same command says so then."""
    out = folder / "out"
    if not out.exists():
        return False
    status = hiedit(["edit", "--facts", str(folder / "facts.jsonl"), *_places(folder, False)])
    if status != ERROR:
        raise AssertionError(f"status {status} where {out} exists")
    return True


def _edit_stream(folder: Path, ledger: bool = True) -> int:
    if _is_done(folder):
        return 0
    sys.stdin = io.TextIOWrapper(io.BytesIO((folder / "facts.jsonl").read_bytes()))
    with (folder / "said.jsonl").open("a", encoding="utf-8", buffering=1) as said:
        sys.stdout = said
        checks = ["--max-lost", "1", "--min-agreement", "0"]
        return hiedit(["edit", "--facts", "-", *_places(folder, ledger), *checks])


def _edit_file(folder: Path, ledger: bool = True) -> int:
    if _is_done(folder):
        return 0
    return hiedit(["edit", "--facts", str(folder / "facts.jsonl"), *_places(folder, ledger)])


def _ledger_of(folder: Path) -> Ledger:
    """The one that was named, else that of the saved model."""
    named = folder / "ledger"
    return Ledger.open(named if named.exists() else folder / "out")


def _check_ledger(folder: Path, whole: Path) -> list[str]:
    """Every fact once, and weights that are those of the ledger."""
    faults = []
    with _ledger_of(folder) as ledger, _ledger_of(whole) as other:
        written, wanted = (
            Counter(f["request"]["prompt"] for e in one for f in e.record["facts"])
            for one in (ledger, other)
        )
        if written != wanted:
            faults.append(f"edits {sorted(written.items())}, uninterrupted {sorted(wanted)}")
        if ledger.active != tuple(range(1, len(ledger) + 1)):
            faults.append(f"in place are {ledger.active}")
        reported = folder / "said.jsonl"
        for line in reported.read_text().split("\n")[:-1] if reported.exists() else []:
            answer = _answer(line)
            if answer.get("status") == "written":
                record = ledger[answer["id"]].record
                if record["facts"][0]["request"]["prompt"] != answer["prompt"]:
                    faults.append(f"edit {answer['id']} was reported and is another one")
    return faults + _check_saved(folder / "out")


def _answer(line: str) -> dict[str, Any]:
    """A line of the answers; empty where it was cut off by a kill."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found


def _check_saved(out: Path) -> list[str]:
    try:
        SavedFolder(out).close()  # compares the weights with the ledger, bit for bit
    except HieditError as error:
        return [str(error)]
    left = [*out.parent.glob(".*.hiedit-*"), *out.parent.glob("*.unfinished")]
    return [f"{path.name} is left behind" for path in left]


def _check_file(folder: Path, whole: Path) -> list[str]:
    found, wanted = (
        [[f[key] for key in _OF_A_FACT] for f in json.loads(_bytes(place))["facts"]]
        for place in (folder / "out" / "edits.json", whole / "out" / "edits.json")
    )
    faults = [] if found == wanted else [f"edits.json says {found}"]
    return faults + _check_ledger(folder, whole)


# -- undoing --------------------------------------------------------------------------------------


def _save_edited(folder: Path) -> None:
    checks = Checks(target=False, min_agreement=None, earlier=0)
    with Editor.from_pretrained("tiny", checks=checks) as editor:
        editor.edit(load_requests("tiny-facts")[:FACTS])
        editor.save(folder / "out")


def _undo(folder: Path) -> int:
    out = str(folder / "out")
    return max(hiedit(["rewind", out, str(number)]) for number in (0, 2, 1, FACTS))


def _check_undone(folder: Path, whole: Path) -> list[str]:
    faults = _check_saved(folder / "out")
    if _bytes(folder / "out" / _WEIGHTS) != _bytes(whole / "out" / _WEIGHTS):
        faults.append("other weights than without an interruption")
    if (folder / "out" / MARKER).exists() or list((folder / "out").glob(".*.hiedit-new")):
        faults.append("something is left behind")
    return faults


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


# -- training and comparing -----------------------------------------------------------------------

_TRAIN = [
    *("train", "policy+hypernetwork", "--model", "tiny", "--dataset", "tiny-facts", "--resume"),
    *("--episodes", "4", "--edits-per-episode", "3", "--held-out", "0.5", "--no-tensorboard"),
    *("--evaluation-edits", "2", "--samples-per-fact", "2", "--max-steps-per-edit", "2"),
]
_COMPARE = [
    *("compare", "--model", "tiny", "--num-edits", "3", "--no-generation", "--resume"),
    *("--agents", "all-layers", "--seeds", "0", "1"),
]


def _train(folder: Path) -> int:
    return hiedit([*_TRAIN, "--out", str(folder / "out")])


def _check_trained(folder: Path, whole: Path) -> list[str]:
    faults = []
    one, two = folder / "out", whole / "out"
    if _bytes(one / "agent.safetensors") != _bytes(two / "agent.safetensors"):
        faults.append("agent.safetensors differs")
    for name in ("agent.json", "evaluation.json"):
        if _timeless(json.loads(_bytes(one / name))) != _timeless(json.loads(_bytes(two / name))):
            faults.append(f"{name} differs")
    rows, wanted = (_rows(out / "train.jsonl") for out in (one, two))
    faults += [] if rows == wanted else ["train.jsonl differs"]
    return faults + [f"{path.name} is left behind" for path in one.glob("checkpoint-*")]


def _compare(folder: Path) -> int:
    return hiedit([*_COMPARE, "--out", str(folder / "out")])


def _check_compared(folder: Path, whole: Path) -> list[str]:
    def key(row: Mapping[str, Any]) -> str:
        return json.dumps([row.get("agent"), row.get("seed")])

    rows, wanted = (
        sorted(_rows(place / "out" / "results.jsonl"), key=key) for place in (folder, whole)
    )
    faults = [] if rows == wanted else [f"{len(rows)} rows that are not the {len(wanted)} wanted"]
    runs, others = (
        {f.name: _timeless(json.loads(_bytes(f))) for f in (place / "out" / "runs").glob("*.json")}
        for place in (folder, whole)
    )
    return faults if runs == others else [*faults, "runs/ differs"]


def _rows(file: Path) -> list[Any]:
    return [_timeless(json.loads(line)) for line in _bytes(file).decode().splitlines()]


def _timeless(value: Any) -> Any:
    """JSON values without what differs from run to run."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _TIMES and "second" not in k}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


#: What is killed.
WORKS: Sequence[Work] = (
    Work("edit a stream", _write_facts, _edit_stream, _check_ledger),
    Work("edit a file", _write_facts, _edit_file, _check_file),
    Work(
        "edit a stream without --ledger",
        _write_facts,
        partial(_edit_stream, ledger=False),
        _check_ledger,
    ),
    Work(
        "edit a file without --ledger", _write_facts, partial(_edit_file, ledger=False), _check_file
    ),
    Work("take edits back", _save_edited, _undo, _check_undone),
    Work("train", Path.iterdir, _train, _check_trained),
    Work("compare", Path.iterdir, _compare, _check_compared),
)
