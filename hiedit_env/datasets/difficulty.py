"""How hard a planted world is, and the names of worlds: ``planted:DIFFICULTY:SEED``. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Literal

from hiedit_env.errors import SettingsError, as_float, whole_number

Split = Literal["train", "test"]

#: What the name of a world begins with.
PREFIX = "planted:"
#: Seeds from here on are of worlds to test on, those below of worlds to train on.
FIRST_TEST_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Difficulty:
    """What decides how hard it is to choose the layers of a fact.

    A *home* of a relation is a layer in which each of its facts has a key of its own, so that a
    fact can be changed there alone. A *decoy* is a layer in which all facts of the relation have
    one key: a write there answers the fact too, and changes all others. In any other layer the
    relation has no key, and a write changes nothing.

    Args:
        layers: L, candidate layers.
        relations: Relations, each of which has homes and decoys.
        subjects: Facts of a relation; four of them are unrelated prompts of other facts, four are
            controls, and the others can be edited.
        homes: Homes of a relation.
        needed: How many homes have to be written so that one step answers a fact.
        decoys: Decoys of a relation, drawn among the layers that are not its homes.
        home_layers: Layers that can be homes; with few of them relations share layers.
        capacity: Different keys that a home can tell apart, for all relations that share it; None
            for one per fact. With more facts than that their keys overlap, so that a layer in
            which much was written forgets.
        wording: How far the key of a paraphrase differs from that of the prompt, relative to its
            length.

    Raises:
        SettingsError: a value out of its range, or too few layers for homes and decoys.
    """

    layers: int = 6
    relations: int = 5
    subjects: int = 24
    homes: int = 1
    needed: int = 1
    decoys: int = 1
    home_layers: int = 6
    capacity: int | None = None
    wording: float = 0.1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            whole_number(getattr(self, name), name, least)
        if self.capacity is not None:
            whole_number(self.capacity, "capacity", 1)
        if not 0 <= as_float(self.wording) <= 1:
            raise SettingsError(f"wording must be a number from 0 to 1, got {self.wording!r}")
        for name, most, what in (
            ("needed", self.homes, "homes"),
            ("homes", self.home_layers, "home_layers"),
            ("home_layers", self.layers, "layers"),
            ("decoys", self.layers - self.homes, "layers that are no home"),
        ):
            value = getattr(self, name)
            if value > most:
                raise SettingsError(
                    f"{name} is {value}, but there are only {most} {what}; lower it"
                )

    @property
    def words(self) -> str:
        """Its name, or the fields that differ from those of ``plain``."""
        for name, level in LEVELS.items():
            if level == self:
                return name
        plain = Difficulty()
        given = (
            f"{field.name}={_word(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        )
        return ",".join(("plain", *given))


_LEAST: Mapping[str, int] = MappingProxyType(
    {
        "layers": 1,
        "relations": 1,
        "subjects": 10,
        "homes": 1,
        "needed": 1,
        "decoys": 0,
        "home_layers": 1,
    }
)

#: Difficulties that have a name; docs/planted-world.md has the headroom that was measured of each.
LEVELS: Mapping[str, Difficulty] = MappingProxyType(
    {
        # The same home for all relations, so one set of layers is best for all facts.
        "flat": Difficulty(home_layers=1, decoys=0),
        "plain": Difficulty(),
        # Two layers hold a fact, and both have to be written.
        "pairs": Difficulty(homes=2, needed=2),
        # Half of the layers look right and are not.
        "decoys": Difficulty(decoys=3),
        # Either of two homes would do, and both fill up.
        "crowded": Difficulty(homes=2, home_layers=3, decoys=1, capacity=12),
        "hard": Difficulty(layers=7, homes=3, needed=2, home_layers=5, decoys=2, capacity=16),
    }
)


def read_difficulty(text: str) -> Difficulty:
    """A difficulty from its name, with fields that differ behind it.

    Args:
        text: A name of :data:`LEVELS`, then ``,field=value`` as often as wanted.

    Raises:
        SettingsError: unknown name or field, or a value out of its range.

    >>> read_difficulty("crowded,layers=4").layers
    4
    >>> read_difficulty("plain,homes=2,needed=2").words
    'pairs'
    """
    if not isinstance(text, str):
        raise SettingsError(f"a difficulty must be text such as 'plain', got {text!r:.200}")
    name, *changes = text.split(",")
    if name not in LEVELS:
        raise SettingsError(
            f"there is no difficulty {name!r}; there are {', '.join(LEVELS)}, and fields that "
            "differ may follow, as in 'plain,layers=4'"
        )
    values: dict[str, float | int | None] = {}
    known = [field.name for field in fields(Difficulty)]
    for change in changes:
        field, _, value = change.partition("=")
        if field not in known:
            raise SettingsError(f"a difficulty has no field {field!r}; it has {', '.join(known)}")
        values[field] = _number(field, value)
    return replace(LEVELS[name], **values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class WorldName:
    """Which planted world: a difficulty and a seed.

    Args:
        difficulty: Its difficulty.
        seed: From 0; decides which layers hold what, all facts and all weights.

    Raises:
        SettingsError: a seed that is no whole number from 0 on.

    >>> str(WorldName(LEVELS["plain"], 3)), WorldName.read("planted:plain:3").seed
    ('planted:plain:3', 3)
    """

    difficulty: Difficulty
    seed: int

    def __post_init__(self) -> None:
        whole_number(self.seed, "world_seed", 0)

    def __str__(self) -> str:
        return f"{PREFIX}{self.difficulty.words}:{self.seed}"

    @property
    def split(self) -> Split:
        """Whether it is to be trained or tested on."""
        return "test" if self.seed >= FIRST_TEST_SEED else "train"

    @classmethod
    def read(cls, name: str) -> WorldName:
        """The world of a name.

        Raises:
            SettingsError: a name of another form, an unknown difficulty, or no seed.
        """
        difficulty, _, seed = name.removeprefix(PREFIX).rpartition(":")
        if not name.startswith(PREFIX) or not (seed.isascii() and seed.isdigit()):
            raise SettingsError(
                f"a planted world is named planted:DIFFICULTY:SEED, such as planted:plain:3; got "
                f"{name!r:.200}"
            )
        return cls(read_difficulty(difficulty), int(seed))


def is_world(name: object) -> bool:
    """Whether a model or data set is named as a planted world that is made on demand.

    >>> is_world("planted:plain:0"), is_world("planted")
    (True, False)
    """
    return isinstance(name, str) and name.startswith(PREFIX)


def world_seeds(split: Split, count: int, first: int = 0) -> range:
    """Seeds of worlds to train on or to test on; the two never meet.

    Args:
        split: Which of them.
        count: How many, at least 1.
        first: Place of the first one within its split.

    Raises:
        SettingsError: an unknown split, or more seeds than are kept for training.

    >>> world_seeds("train", 2), world_seeds("test", 2, first=5)
    (range(0, 2), range(1000005, 1000007))
    """
    if split not in ("train", "test"):
        raise SettingsError(f"split must be 'train' or 'test', got {split!r:.200}")
    whole_number(count, "the number of worlds", 1)
    whole_number(first, "the first world", 0)
    if split == "train" and first + count > FIRST_TEST_SEED:
        raise SettingsError(
            f"worlds {first} to {first + count - 1} are asked for to train on, but from "
            f"{FIRST_TEST_SEED} on they are kept for tests; take smaller seeds"
        )
    start = first + (FIRST_TEST_SEED if split == "test" else 0)
    return range(start, start + count)


def require_apart(train: Iterable[int], test: Sequence[int]) -> None:
    """Refuses worlds that are trained on and tested on.

    Raises:
        SettingsError: names the first seed that is in both.
    """
    both = sorted(set(train) & set(test))
    if both:
        raise SettingsError(
            f"world {both[0]} is trained on and tested on ({len(both)} in all); take other seeds, "
            f"for tests from {FIRST_TEST_SEED} on"
        )


def _number(field: str, value: str) -> float | int | None:
    if value == "None":
        return None
    try:
        return float(value) if field == "wording" else int(value)
    except ValueError:
        raise SettingsError(
            f"field {field!r} of a difficulty must be a number, got {value!r:.200}"
        ) from None


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
