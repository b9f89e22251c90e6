"""What a choice of the block per fact brings on a real model, and who takes how much of it.

Reads what :mod:`.record_blocks` recorded, and writes ``results.json``, ``table.md`` and
``blocks.png``::

    python -m hiedit_benchmarks.studies.block_regret runs/blocks/part-*.jsonl --out runs/regret

Agents that learn do so from the recorded facts of one file and are evaluated on those of the other;
with ``--folds 10``, on all facts, each by agents that learned from other ones. Differences are
paired and to the block that is best, in hindsight, on the very facts that are evaluated on; a block
found on few other facts may be a bad one by chance, and whatever is compared with it look good.
Intervals are of resampled facts (what was learned stays).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from hiedit_agents.command_line import parse, run_script
from hiedit_benchmarks.studies.block_agents import AGENTS, HINDSIGHT, ORACLE, REFERENCE, Agent, play
from hiedit_benchmarks.studies.block_outcomes import (
    PARTS,
    READINGS,
    OutcomeTable,
    Reading,
    harmonic,
    interaction,
    outcome_table,
)
from hiedit_benchmarks.studies.block_records import FactRecord, read_records
from hiedit_benchmarks.studies.block_report import draw, report
from hiedit_env.envs.settings import AtLeast0, settings
from hiedit_env.files import write_bytes

PROGRAM = "python -m hiedit_benchmarks.studies.block_regret"
RESAMPLES = 4000
#: Facts of a relation without which nothing is said about it alone.
FEWEST = 4

_Files = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint=""),
]


@settings
class Options:
    """Tables of recorded choices of a block."""

    files: _Files
    """what was recorded, with the same settings"""
    out: Path
    """folder of the results"""
    folds: AtLeast0 = 0
    """evaluate on all facts, in so many parts; 0 for those recorded to evaluate on"""
    seed: AtLeast0 = 0
    """of folds, of learning and of resampling"""


def resampled(count: int, seed: int) -> NDArray[np.float64]:
    """``RESAMPLES`` × N weights of N facts drawn with replacement; each row sums to 1."""
    generator = np.random.default_rng([seed, 29])
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count


def interval(value: float, drawn: NDArray[np.float64]) -> dict[str, float]:
    """A number with the 95 % percentile interval of its resamples."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"mean": float(value), "low": float(low), "high": float(high)}


def scores(
    parts: NDArray[np.float64], outcomes: NDArray[np.float64], drawn: NDArray[np.float64]
) -> dict[str, tuple[float, NDArray[np.float64]]]:
    """Two scores of what an agent chose, with their resamples.

    Args:
        parts: E × 3, of the choices, means of both halves.
        outcomes: E.
        drawn: Resamples × E weights.

    Returns:
        ``outcome``, the mean over facts of their harmonic means; ``of_means``, the harmonic mean of
        the three means over facts.
    """
    return {
        "outcome": (float(outcomes.mean()), drawn @ outcomes),
        "of_means": (float(harmonic(parts.mean(0))), harmonic(drawn @ parts)),
    }


def compare(
    table: OutcomeTable, folds: int, seed: int, agents: Mapping[str, Agent] = AGENTS
) -> dict[str, Any]:
    """All agents on one reading of the outcomes.

    Args:
        table: The recorded facts.
        folds: As of :class:`Options`.
        seed: The same.
        agents: Who chooses; the best constant and two oracles among them.

    Returns:
        ``agents``: name → parts, costs, both scores, both paired differences to the best constant,
        and the ``share`` of the headroom, None where there is none; ``headroom`` and ``at_most``:
        by the oracle on other and on the same prompts; ``blocks``: per option and score an
        interval, with median seconds; ``relations``: as of :func:`by_relation`; ``interaction``.

    Raises:
        SettingsError: too few facts.
    """
    found: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, tuple[float, NDArray[np.float64]]]] = {}
    earned: dict[str, NDArray[np.float64]] = {}
    drawn: NDArray[np.float64] | None = None
    for name, agent in agents.items():
        test, weights = play(table, agent, folds, seed)
        drawn = resampled(len(test), seed) if drawn is None else drawn
        parts = np.einsum("nhm,nhmp->np", weights, table.parts[test]) / 2
        outcomes = np.einsum("nhm,nhm->n", weights, table.outcomes[test]) / 2
        costs = np.einsum("nhm,nmc->c", weights, table.costs[test]) / 2 / len(test)
        own[name] = scores(parts, outcomes, drawn)
        earned[name] = outcomes
        found[name] = {
            "parts": dict(zip(PARTS, parts.mean(0).tolist(), strict=True)),
            "fires": float(costs[0]),
            "seconds": float(costs[1]),
            "chosen": weights.mean((0, 1)).tolist(),
        }
    assert drawn is not None
    for name, entry in found.items():
        for score, (value, resamples) in own[name].items():
            reference = own[REFERENCE][score]
            entry[score] = interval(value, resamples)
            entry[f"{score}_over_constant"] = interval(
                value - reference[0], resamples - reference[1]
            )
    headroom = found[ORACLE]["outcome_over_constant"]
    for entry in found.values():
        more = entry["outcome_over_constant"]["mean"]
        entry["share"] = more / headroom["mean"] if headroom["low"] > 0 else None
    blocks = []
    for option in range(table.outcomes.shape[2] - 1):
        parts, outcomes = table.parts[test, :, option].mean(1), table.outcomes[test, :, option]
        means = scores(parts, outcomes.mean(1), drawn)
        blocks.append(
            {
                "parts": dict(zip(PARTS, parts.mean(0).tolist(), strict=True)),
                "fires": float(table.costs[test, option, 0].mean()),
                "seconds": float(np.median(table.costs[test, option, 1])),
                **{score: interval(*pair) for score, pair in means.items()},
            }
        )
    return {
        "facts": len(test),
        "learned_from": int(table.is_train.sum()) if not folds else len(table),
        "agents": found,
        "headroom": headroom,
        "at_most": found[HINDSIGHT]["outcome_over_constant"],
        "blocks": blocks,
        "relations": by_relation(table, test, earned, seed),
        "interaction": asdict(interaction(table.outcomes[:, :, :-1])),
    }


def by_relation(
    table: OutcomeTable,
    test: NDArray[np.int64],
    earned: Mapping[str, NDArray[np.float64]],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What the blocks and three agents bring, relation by relation.

    Args:
        table: The recorded facts.
        test: E facts that were evaluated on.
        earned: Agent → E outcomes; the best constant and two oracles among them.
        seed: Of the resampling.

    Returns:
        Relation → ``facts``; ``blocks``, the mean outcome of each option; ``headroom``, the
        interval of the oracle on other prompts over the best constant, which is that of all
        relations; ``at_most``, the same of the oracle on the same prompts. Relations of fewer than
        ``FEWEST`` facts are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    outcomes = table.outcomes[test][:, :, :-1].mean(1)
    for relation in sorted(set(table.relations[test].tolist())):
        own = table.relations[test] == relation
        if own.sum() < FEWEST:
            continue
        drawn = resampled(int(own.sum()), seed)
        entry: dict[str, Any] = {
            "facts": int(own.sum()),
            "blocks": outcomes[own].mean(0).tolist(),
        }
        for key, agent in (("headroom", ORACLE), ("at_most", HINDSIGHT)):
            more = (earned[agent] - earned[REFERENCE])[own]
            entry[key] = interval(float(more.mean()), drawn @ more)
        found[relation] = entry
    return found


def study(
    recorded: Mapping[str, Any], records: Sequence[FactRecord], folds: int, seed: int
) -> dict[str, Any]:
    """The results of some records, as they are written to JSON.

    Args:
        recorded: The settings they were recorded with.
        records: The records.
        folds: As of :class:`Options`.
        seed: The same.

    Raises:
        SettingsError: too few facts, or facts without prompts for two halves.
    """
    readings: dict[Reading, Any] = {
        reading: compare(outcome_table(records, reading), folds, seed) for reading in READINGS
    }
    return {
        "recorded": dict(recorded),
        "folds": folds,
        "seed": seed,
        "readings": readings,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the results and prints the tables; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    recorded, records = read_records(given.files)
    results = study(recorded, records, given.folds, given.seed)
    shown = report(results)
    picture = draw(results)
    given.out.mkdir(parents=True, exist_ok=True)
    write_bytes(given.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_bytes(given.out / "table.md", (shown + "\n").encode())
    write_bytes(given.out / "blocks.png", picture)
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
