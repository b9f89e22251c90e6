"""Made-up records of choices of a block, whose best option is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hiedit_benchmarks.studies.block_records import FactRecord, Measured, Role, Tried

OPTIONS = 4
FORMS = 2
PROMPTS = 4
#: ``(fact, generator) → probability of every option``; the fact's number is in [−1, 1].
World = Callable[[float, np.random.Generator], NDArray[np.float64]]


def measured(probability: float, noise: float, generator: np.random.Generator) -> Measured:
    """Prompts whose nats scatter around a probability's, and are generated above one half."""

    def asked() -> list[float]:
        nats = float(max(0.0, -np.log(probability) + noise * generator.normal()))
        return [nats, float(nats < np.log(2))]

    kept = [[0.0, 1.0]] * FORMS
    return Measured(
        [asked() for _ in range(FORMS)],
        [[asked() for _ in range(FORMS)] for _ in range(PROMPTS)],
        [kept for _ in range(PROMPTS)],
    )


def by_number(x: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """The first option is best where the fact's number is negative, else the last one."""
    good, bad = 0.9, 0.3
    return np.array([good, 0.6, 0.55, bad] if x < 0 else [bad, 0.6, 0.55, good])


def all_alike(x: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Every option is the same for every fact."""
    return np.full(OPTIONS, 0.5)


def one_better(x: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """The second option is better for every fact."""
    return np.array([0.5, 0.7, 0.5, 0.5])


def hidden(x: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Another option is best for every fact, and nothing that is seen says which."""
    found = np.full(OPTIONS, 0.4)
    found[generator.integers(OPTIONS)] = 0.9
    return found


def records(
    world: World, count: int, *, noise: float = 0.0, seed: int = 0, relations: int = 2
) -> list[FactRecord]:
    """Facts of a world, of both roles in turn; a relation is a range of the fact's number.

    Options show a random number, and the fact's with the sign of the end that they are near.
    """
    generator = np.random.default_rng(seed)
    found = []
    for i in range(count):
        x = float(generator.uniform(-1, 1))
        role: Role = "evaluate" if i % 2 else "train"
        seen = [
            {
                "weight_gradient": float(generator.normal()),
                "push": float(generator.normal()),
                "fit": x * (2 * option / (OPTIONS - 1) - 1),
            }
            for option in range(OPTIONS)
        ]
        tried = [
            Tried(measured(float(p), noise, generator), 1, 0.01 * option, 2.0)
            for option, p in enumerate(world(x, generator))
        ]
        relation = f"r{min(int((x + 1) / 2 * relations), relations - 1)}"
        before = measured(0.01, 0.0, generator)
        found.append(FactRecord(role, f"p{i}", "a", "s", relation, {"x": x}, seen, before, tried))
    return found
