"""Planted worlds made on demand: their facts, and which layers hold them. No torch.

:mod:`hiedit_env.model.planted_world` makes the model of a world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_env.datasets.difficulty import Difficulty, WorldName
from hiedit_env.datasets.requests import Probe

#: What can be true of a subject; the same words in all worlds.
ANSWERS = (
    "amber",
    "birch",
    "cobalt",
    "dune",
    "ember",
    "fern",
    "granite",
    "hazel",
    "iris",
    "juniper",
    "kelp",
    "linen",
)
#: First word and preposition of a prompt and of its paraphrases.
WORDINGS = (("the", "of"), ("our", "for"), ("some", "near"), ("that", "by"))
#: The last subjects of each relation: unrelated prompts of other facts, then controls.
WITNESSES, CONTROLS = 4, 4

_TOPICS = (
    "home",
    "craft",
    "river",
    "market",
    "master",
    "colour",
    "guild",
    "song",
    "stone",
    "herb",
    "saint",
    "tower",
)
_SYLLABLES = tuple(c + v for c in "bdfghjklmnprstvwzcqx" for v in "aeiou")


@dataclass(frozen=True, slots=True)
class World:
    """What a planted world consists of; R relations of N subjects each.

    Args:
        name: Difficulty and seed.
        homes: R × homes int64, the layers in which facts of a relation have keys of their own.
        decoys: R × decoys int64, the layers in which all of them have one key.
        answers: R × N int64, index into :data:`ANSWERS` of what is true.
        targets: R × N int64, the same of what a fact is changed to.
    """

    name: WorldName
    homes: NDArray[np.int64]
    decoys: NDArray[np.int64]
    answers: NDArray[np.int64]
    targets: NDArray[np.int64]

    @property
    def difficulty(self) -> Difficulty:
        """How hard it is."""
        return self.name.difficulty

    @property
    def topics(self) -> tuple[str, ...]:
        """A word for each relation."""
        count = self.difficulty.relations
        more = tuple(f"topic{i}" for i in range(len(_TOPICS), count))
        return (*_TOPICS, *more)[:count]

    def subject(self, relation: int, place: int) -> str:
        """Name of a subject; the same in all worlds, whatever is true of it."""
        return subject_name(relation * self.difficulty.subjects + place)

    def prompts(self, relation: int, place: int) -> list[str]:
        """The prompt about a subject, then its paraphrases."""
        topic, subject = self.topics[relation], self.subject(relation, place)
        return [f"{first} {topic} {middle} {subject}" for first, middle in WORDINGS]

    def probe(self, relation: int, place: int) -> dict[str, str]:
        """Prompt and true answer."""
        answer = ANSWERS[self.answers[relation, place]]
        return {"prompt": self.prompts(relation, place)[0], "answer": answer}

    @property
    def editable(self) -> range:
        """Places of the subjects whose facts are edited."""
        return range(self.difficulty.subjects - WITNESSES - CONTROLS)

    def controls(self) -> tuple[Probe, ...]:
        """Prompts that are never edited and that no reward asks, with their true answers."""
        places = range(self.difficulty.subjects - CONTROLS, self.difficulty.subjects)
        return tuple(
            Probe(probe["prompt"], probe["answer"])
            for relation in range(self.difficulty.relations)
            for probe in (self.probe(relation, place) for place in places)
        )

    def records(self) -> list[dict[str, Any]]:
        """A row of a data set for each fact that can be edited, relation by relation."""
        return [
            self._record(relation, place)
            for relation in range(self.difficulty.relations)
            for place in self.editable
        ]

    def _record(self, relation: int, place: int) -> dict[str, Any]:
        prompt, *paraphrases = self.prompts(relation, place)
        target = self.targets[relation, place]
        del paraphrases[place % len(paraphrases)]
        return {
            "subject": self.subject(relation, place),
            "relation": self.topics[relation],
            "prompt": prompt,
            "answer": ANSWERS[self.answers[relation, place]],
            "target": ANSWERS[target],
            "paraphrases": paraphrases,
            "locality": [self.probe(*probe) for probe in self._probes(relation, place, target)],
            "true_layers": [layer_name(layer) for layer in sorted(self.homes[relation])],
        }

    def _probes(self, relation: int, place: int, target: int) -> list[tuple[int, int]]:
        """A witness of the same relation, and one of another if there is one.

        Neither is answered by what the fact is changed to, where that can be avoided.
        """
        first, count = len(self.editable), self.difficulty.relations
        others = [relation, *((relation + 1 + place) % (count - 1) for _ in range(count > 1))]
        # Of the other relations, taken in turn.
        if count > 1:
            others[1] += others[1] >= relation
        found = []
        for kind in others:
            turns = [first + (place + turn) % WITNESSES for turn in range(WITNESSES)]
            found.append(
                (kind, next((p for p in turns if self.answers[kind, p] != target), turns[0]))
            )
        return found


@lru_cache(maxsize=256)
def make_world(name: WorldName) -> World:
    """The world of a name; the same for the same name.

    >>> world = make_world(WorldName.read("planted:plain:0"))
    >>> len(world.records()), len(world.controls()), world.records()[0]["prompt"]
    (80, 20, 'the home of Bababan')
    """
    difficulty = name.difficulty
    generator = np.random.default_rng([name.seed, 1])
    pool = generator.permutation(difficulty.layers)[: difficulty.home_layers]
    homes = _dealt(pool, difficulty.relations, difficulty.homes, generator)
    decoys = np.zeros((difficulty.relations, difficulty.decoys), np.int64)
    for relation, own in enumerate(homes):
        rest = np.setdiff1d(np.arange(difficulty.layers), own)
        decoys[relation] = np.sort(generator.permutation(rest)[: difficulty.decoys])
    shape = (difficulty.relations, difficulty.subjects)
    answers = generator.integers(len(ANSWERS), size=shape)
    targets = (answers + generator.integers(1, len(ANSWERS), size=shape)) % len(ANSWERS)
    return World(name, homes, decoys, answers, targets)


def layer_name(layer: int) -> str:
    """Name of a candidate layer, counted from 0; block 0 has none."""
    return f"model.layers.{layer + 1}.mlp.down_proj"


def subject_name(number: int) -> str:
    """A word for the subject of a number; no two are equal.

    >>> subject_name(0), subject_name(101)
    ('Bababan', 'Bedoban')
    """
    size = len(_SYLLABLES)
    places = (number % size, (7 * number + number // size) % size, number // size // size)
    return "".join(_SYLLABLES[place % size] for place in places).capitalize() + "n"


def _dealt(
    pool: NDArray[np.int64], hands: int, size: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Hands of different layers, all dealt about equally often; hands × size, sorted."""
    used: Mapping[int, int] = dict.fromkeys(pool.tolist(), 0)
    counts = dict(used)
    rows: list[Sequence[int]] = []
    for _ in range(hands):
        order = generator.permutation(pool).tolist()
        chosen = sorted(order, key=counts.__getitem__)[:size]
        for layer in chosen:
            counts[layer] += 1
        rows.append(sorted(chosen))
    return np.array(rows, np.int64)
