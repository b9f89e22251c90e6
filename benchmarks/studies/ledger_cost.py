"""What a ledger costs: an append after many edits, and taking back one of many.

The updates are random, of the shapes that an agent writes; by default those of the trained
``hiedit`` on SmolLM2-135M. No fact is written, so no model is run. Prints JSON::

    python -m hiedit_benchmarks.studies.ledger_cost --edits 1000 --model smollm2-135m
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE, Base, BaseLayer
from hiedit_agents.editing.saved_folder import SavedFolder
from hiedit_agents.editing.undo import replay
from hiedit_benchmarks.comparison.results import versions
from hiedit_env.envs.settings import AtLeast1, Name, settings
from hiedit_env.errors import SettingsError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from hiedit_env.resident.weights import EditableWeights

PROGRAM = "python -m hiedit_benchmarks.studies.ledger_cost"
#: Edits before the appends that later ones are compared with.
EARLY = 10
#: Appends that are timed.
_TIMED = 101


@settings
class Options:
    """What is written."""

    edits: AtLeast1 = 1000
    """edits in the ledger of which one is taken back"""
    updates: tuple[str, ...] = ("576x1536x1", "576x1536x1", "1536x576x2")
    """matrices that an edit changes, as inputs x outputs x rank; by default those of the trained
    hiedit on SmolLM2-135M"""
    late: AtLeast1 = 10_000
    """edits before the appends that are compared with those after 10"""
    model: Name | None = None
    """a model whose saved folder is undone as well, with these updates of its first candidate
    layers, such as smollm2-135m; by default none"""


@dataclass(frozen=True, slots=True)
class Shape:
    """One update: a matrix and a rank."""

    d_in: int
    d_out: int
    rank: int


def shapes_of(given: Options) -> list[Shape]:
    """The updates of an edit.

    Raises:
        SettingsError: a text that is no such shape.
    """
    found = []
    for text in given.updates:
        numbers = text.split("x")
        if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
            raise SettingsError(
                f"updates must be like 576x1536x1 (inputs x outputs x rank), got {text!r}"
            )
        found.append(Shape(*map(int, numbers)))
    return found


def random_updates(shapes: Sequence[Shape], generator: torch.Generator) -> Updates:
    """Random updates of all layers, too small to change what a model says."""

    def factor(rank: int, size: int) -> torch.Tensor:
        return 1e-3 * torch.randn(rank, size, generator=generator)

    return [LowRankUpdate(factor(s.rank, s.d_in), factor(s.rank, s.d_out)) for s in shapes]


def base_of(shapes: Sequence[Shape]) -> Base:
    """A model of these layers."""
    layers = [BaseLayer(f"layer.{i}", s.d_in, s.d_out, True) for i, s in enumerate(shapes)]
    return Base("random", "", "float32", "0" * 16, tuple(layers))


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Fills a mapping with what the body takes: ``seconds`` and ``processor_seconds``.

    The second of them says the same on a machine that does other work beside it.
    """
    found: dict[str, float] = {}
    start, spent = time.perf_counter(), time.process_time()
    yield found
    found["seconds"] = time.perf_counter() - start
    found["processor_seconds"] = time.process_time() - spent


def measure_appends(shapes: Sequence[Shape], late: int, folder: Path) -> dict[str, float]:
    """Median milliseconds of an append after few and after many edits, one of each in turn."""
    step = random_updates(shapes, torch.Generator().manual_seed(0))
    times: dict[int, list[float]] = {EARLY: [], late: []}
    with (
        Ledger.create(folder / "early", base_of(shapes)) as short,
        Ledger.create(folder / "late", base_of(shapes)) as long,
    ):
        for ledger, count in ((short, EARLY), (long, late)):
            while len(ledger) < count:
                ledger.append("edit", None, {"facts": []}, [step])
        for _ in range(_TIMED):
            for ledger, count in ((short, EARLY), (long, late)):
                start = time.perf_counter()
                ledger.append("edit", None, {"facts": []}, [step])
                times[count].append(1000 * (time.perf_counter() - start))
    found = {f"append_ms_after_{n}": statistics.median(times[n]) for n in (EARLY, late)}
    found["ratio"] = found[f"append_ms_after_{late}"] / found[f"append_ms_after_{EARLY}"]
    found["bytes_per_edit"] = (folder / "late" / FILE).stat().st_size / (late + _TIMED)
    return found


def measure_revoke(shapes: Sequence[Shape], edits: int, folder: Path) -> dict[str, float]:
    """Time until the weights are those without one edit of many, the ledger opened anew."""
    generator = torch.Generator().manual_seed(0)
    with Ledger.create(folder, base_of(shapes)) as ledger:
        for _ in range(edits):
            ledger.append("edit", None, {"facts": []}, [random_updates(shapes, generator)])
    layers = [
        CandidateLayer(f"layer.{i}", nn.Linear(s.d_in, s.d_out), 0, s.d_in, s.d_out, True)
        for i, s in enumerate(shapes)
    ]
    for layer in layers:
        layer.module.requires_grad_(False)
    weights = EditableWeights(layers)
    with timed() as taken, Ledger.open(folder) as ledger:
        left = [number for number in ledger.active if number != edits // 2]
        replay(weights, ledger, left)
    return {"edits": edits, **taken}


def measure_folder(model: str, shapes: Sequence[Shape], edits: int, folder: Path) -> dict[str, Any]:
    """Time of taking back one of many edits: in a saved folder, and in a live editor."""
    generator = torch.Generator().manual_seed(0)
    checks = Checks(target=False, min_agreement=None, earlier=0)
    with Editor.from_pretrained(model, ledger=folder / "ledger", checks=checks) as editor:
        sizes = [(s.d_in, s.d_out) for s in shapes]
        candidates = list(editor.llm.shapes)
        if candidates[: len(sizes)] != sizes:
            raise SettingsError(
                f"--updates are of matrices {sizes}, the candidates of {model} begin with "
                f"{candidates[:3]}"
            )
        rest = [None] * (len(candidates) - len(sizes))
        ledger = editor.ledger
        for number in range(1, edits + 1):
            step = [*random_updates(shapes, generator), *rest]
            editor.llm.commit(step)
            record: dict[str, Any] = {
                "facts": [],
                "agent": "random",
                "layers": list(editor.llm.names[: len(sizes)]),
                "steps": 1,
                "time": "",
            }
            if number == edits:
                record["fingerprint_after"] = editor.llm.weights_fingerprint()
            ledger.append("edit", None, record, [step])
        # Opened anew, so that the editor knows of these edits.
    with Editor.from_pretrained(model, ledger=folder / "ledger", checks=checks) as editor:
        editor.save(folder / "saved")
        with timed() as live:
            editor.undo(edits // 2)
        wanted = editor.llm.weights_fingerprint()
    with timed() as stored, SavedFolder(folder / "saved") as saved:
        saved.revoke(edits // 2)
        last = saved.ledger[len(saved.ledger)].record
    same = last["fingerprint_after"] == wanted
    return {"editor": live, "folder": stored, "same_weights": same}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements and prints them as JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    shapes = shapes_of(given)
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        result: dict[str, Any] = {
            "appends": measure_appends(shapes, given.late, place),
            "revoke": measure_revoke(shapes, given.edits, place / "revoke"),
        }
        if given.model is not None:
            result["model"] = measure_folder(given.model, shapes, given.edits, place)
    result |= {"threads": torch.get_num_threads(), "versions": versions()}
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
