"""What a ledger costs: an append after many edits, and taking back one of many.

The updates are random, of the shapes of a real model's candidate layers; no model is run. Prints
JSON::

    python -m hiedit_benchmarks.studies.ledger_cost --edits 1000 --layers 8 --rank 18
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE, Base, BaseLayer
from hiedit_agents.editing.undo import replay
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from hiedit_env.resident.weights import EditableWeights

PROGRAM = "python -m hiedit_benchmarks.studies.ledger_cost"


@settings
class Options:
    """What is written."""

    edits: AtLeast1 = 1000
    """edits in the ledger of which one is taken back"""
    layers: AtLeast1 = 1
    """matrices that an edit changes"""
    rank: AtLeast1 = 2
    """rank of each update"""
    d_in: AtLeast1 = 1536
    """size of a matrix, as that of SmolLM2-135M's down_proj"""
    d_out: AtLeast1 = 576
    """the other size"""
    late: AtLeast1 = 10_000
    """edits before the appends that are compared with those after 10"""


def updates(given: Options, generator: torch.Generator) -> Updates:
    """Random updates of all layers."""

    def factor(size: int) -> torch.Tensor:
        return 0.01 * torch.randn(given.rank, size, generator=generator)

    return [LowRankUpdate(factor(given.d_in), factor(given.d_out)) for _ in range(given.layers)]


def base_of(given: Options) -> Base:
    """A model of these layers."""
    layers = [BaseLayer(f"layer.{i}", given.d_in, given.d_out, True) for i in range(given.layers)]
    return Base("random", "", "float32", "0" * 16, tuple(layers))


def measure_appends(given: Options, folder: Path) -> dict[str, float]:
    """Median milliseconds of an append after 10 edits and after many."""
    generator = torch.Generator().manual_seed(0)
    step = updates(given, generator)
    found: dict[str, float] = {}
    with Ledger.create(folder, base_of(given)) as ledger:
        for count in (10, given.late):
            while len(ledger) < count:
                ledger.append("edit", None, {"facts": []}, [step])
            times = []
            for _ in range(101):
                start = time.perf_counter()
                ledger.append("edit", None, {"facts": []}, [step])
                times.append(1000 * (time.perf_counter() - start))
            found[f"append_ms_after_{count}"] = statistics.median(times)
        found["ratio"] = found[f"append_ms_after_{given.late}"] / found["append_ms_after_10"]
    found["bytes_per_edit"] = (folder / FILE).stat().st_size / (given.late + 101)
    return found


def measure_revoke(given: Options, folder: Path) -> dict[str, float]:
    """Seconds until the weights are those without one edit of many, the ledger opened anew."""
    generator = torch.Generator().manual_seed(0)
    with Ledger.create(folder, base_of(given)) as ledger:
        for _ in range(given.edits):
            ledger.append("edit", None, {"facts": []}, [updates(given, generator)])
    layers = [
        CandidateLayer(f"layer.{i}", nn.Linear(given.d_in, given.d_out), 0, *size, True)
        for i, size in enumerate([(given.d_in, given.d_out)] * given.layers)
    ]
    for layer in layers:
        layer.module.requires_grad_(False)
    weights = EditableWeights(layers)
    start = time.perf_counter()
    with Ledger.open(folder) as ledger:
        left = [number for number in ledger.active if number != given.edits // 2]
        replay(weights, ledger, left)
    return {"revoke_seconds": time.perf_counter() - start, "edits": given.edits}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements and prints them as JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    with tempfile.TemporaryDirectory() as place:
        result = {
            "appends": measure_appends(given, Path(place, "appends")),
            "revoke": measure_revoke(given, Path(place, "revoke")),
            "threads": torch.get_num_threads(),
        }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
