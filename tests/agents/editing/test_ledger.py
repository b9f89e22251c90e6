"""The ledger: what is appended is there, whatever happens to the process or the file."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE, Base, BaseLayer
from hiedit_env.errors import LedgerError, OutputError
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from tests.support.killed import run_until_killed

BASE = Base(
    "tiny", "", "float32", "00" * 8, (BaseLayer("a", 4, 3, True), BaseLayer("b", 3, 5, False))
)


def steps(seed: int, count: int = 2) -> list[Updates]:
    """Some steps that change both layers, or one of them."""
    generator = torch.Generator().manual_seed(seed)

    def update(d_in: int, d_out: int) -> LowRankUpdate:
        left = torch.randn(2, d_in, generator=generator)
        return LowRankUpdate(left, torch.randn(2, d_out, generator=generator))

    return [(update(4, 3), update(3, 5) if i else None) for i in range(count)]


def record(number: int) -> dict[str, object]:
    request = {"prompt": f"p{number}", "answer": "a", "subject": "s"}
    return {"facts": [{"request": request}], "é": "日本"}


def fill(ledger: Ledger, count: int) -> None:
    for number in range(len(ledger) + 1, len(ledger) + count + 1):
        assert ledger.append("edit", None, record(number), steps(number)) == number


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "new" / "folder", BASE) as ledger:
        fill(ledger, 3)
        ledger.append("revoke", 2, {"time": "now"})
    with Ledger.open(tmp_path / "new" / "folder") as ledger:
        assert ledger.base == BASE
        assert [event.kind for event in ledger] == ["edit", "edit", "edit", "revoke"]
        assert ledger[2].record == record(2)
        assert ledger[4].target == 2
        assert ledger.active == (1, 3)
        for number in (1, 2, 3):
            for found, made in zip(ledger.steps(number), steps(number), strict=True):
                for one, two in zip(found, made, strict=True):
                    if two is None:
                        assert one is None
                    else:
                        assert one is not None
                        assert torch.equal(one.left, two.left)
                        assert torch.equal(one.right, two.right)


def test_edits_in_place_by_hand() -> None:
    ledger = Ledger.in_memory(BASE)
    fill(ledger, 3)  # 1 2 3
    ledger.append("revoke", 2, {})  # 4: 1 3
    ledger.append("rewind", 3, {})  # 5: 1 2 3
    fill(ledger, 1)  # 6: 1 2 3 6
    ledger.append("rewind", 4, {})  # 7: 1 3
    ledger.append("rewind", 0, {})  # 8: none
    assert [ledger.active_at(n) for n in range(9)] == [
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 3),
        (1, 2, 3),
        (1, 2, 3, 6),
        (1, 3),
        (),
    ]
    assert ledger.active == ()


def test_the_latest_edit_of_a_prompt_is_its_fact() -> None:
    ledger = Ledger.in_memory(BASE)
    fill(ledger, 2)
    ledger.append("edit", None, record(1), steps(9))
    assert {prompt: number for prompt, (number, _) in ledger.facts().items()} == {"p2": 2, "p1": 3}
    ledger.append("revoke", 3, {})
    assert {prompt: number for prompt, (number, _) in ledger.facts().items()} == {"p1": 1, "p2": 2}


@pytest.mark.parametrize("number", [0, -1, 5, 4, "1", True, None])
def test_an_edit_that_is_not_there_is_named(number: object) -> None:
    ledger = Ledger.in_memory(BASE)
    fill(ledger, 3)
    ledger.append("revoke", 3, {})
    with pytest.raises(LedgerError, match=r"there is no edit .*; the edits are 1, 2, 3"):
        ledger.require_edit(number)
    with pytest.raises(LedgerError, match=r"edit 3 is not in place any more; .* are 1, 2"):
        ledger.require_edit(3, in_place=True)
    with pytest.raises(LedgerError, match="there is no event 5; the ledger's ids are 1 to 4"):
        ledger[5]


def test_a_copy_is_one_file_with_all_events(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "a", BASE) as ledger:
        fill(ledger, 2)
        (tmp_path / "b").mkdir()
        ledger.copy_to(tmp_path / "b")
        fill(ledger, 1)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [FILE]
    with Ledger.open(tmp_path / "b") as copied:
        assert len(copied) == 2
        assert torch.equal(copied.steps(2)[0][0].left, steps(2)[0][0].left)  # type: ignore[union-attr]
    with Ledger.open(tmp_path / "b", write=True) as copied:
        fill(copied, 1)
    with Ledger.open(tmp_path / "b") as copied:
        assert len(copied) == 3


def test_one_process_at_a_time_writes_and_others_read(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, BASE) as ledger:
        fill(ledger, 1)
        with Ledger.open(tmp_path) as reader:
            assert len(reader) == 1
            with pytest.raises(OutputError, match="opened for reading"):
                reader.append("edit", None, {}, [])
        with pytest.raises(LedgerError, match="exists"):
            Ledger.create(tmp_path, BASE)
        script = (
            "import sys; from pathlib import Path; from hiedit_env.errors import OutputError\n"
            "from hiedit_agents.editing.ledger import Ledger\n"
            "try: Ledger.open(Path(sys.argv[1]), write=True)\n"
            "except OutputError as error: print(error, flush=True)\n"
            "import time; time.sleep(60)"
        )
        [line] = run_until_killed(script, str(tmp_path), after=0.0)
        assert "another process is writing" in line


# -- kills and damage -----------------------------------------------------------------------------

APPEND = """
import sys
from pathlib import Path
from hiedit_agents.editing.ledger import Ledger
from tests.agents.editing.test_ledger import record, steps
ledger = Ledger.open(Path(sys.argv[1]), write=True)
while True:
    number = len(ledger) + 1
    print(ledger.append("edit", None, record(number), steps(number)), flush=True)
"""


def test_a_killed_process_leaves_every_edit_that_it_reported(tmp_path: Path) -> None:
    Ledger.create(tmp_path, BASE).close()
    chance = random.Random(0)
    reported = 0
    for _ in range(5):
        lines = run_until_killed(APPEND, str(tmp_path), after=chance.random() / 20)
        assert [int(line) for line in lines] == list(
            range(int(lines[0]), int(lines[0]) + len(lines))
        )
        with Ledger.open(tmp_path) as ledger:
            # One more may be on disk than was reported.
            assert int(lines[-1]) <= len(ledger) <= int(lines[-1]) + 1
            assert int(lines[0]) >= reported + 1
            reported = len(ledger)
            for number in range(1, reported + 1):
                assert ledger[number].record == record(number)
                [first, _] = ledger.steps(number)
                assert torch.equal(first[0].left, steps(number)[0][0].left)  # type: ignore[union-attr]
    assert reported >= 5


def test_a_file_that_was_cut_off_at_any_byte_holds_the_edits_before(tmp_path: Path) -> None:
    """The write-ahead file of a killed process may end anywhere; what is whole is found."""
    with Ledger.create(tmp_path / "a", BASE) as ledger:
        fill(ledger, 2)
        sizes = []
        for _ in range(4):
            fill(ledger, 1)
            sizes.append((tmp_path / "a" / f"{FILE}-wal").stat().st_size)
        # As it lies on disk while the process lives.
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = (tmp_path / "b" / f"{FILE}-wal").read_bytes()
    assert len(whole) == sizes[-1]
    chance = random.Random(1)
    cuts = {0, 1, 31, 32, len(whole)} | {chance.randrange(len(whole)) for _ in range(40)}
    for cut in sorted(cuts | {size + d for size in sizes[:-1] for d in (-1, 0, 1)}):
        place = tmp_path / f"cut-{cut}"
        place.mkdir()
        shutil.copy(tmp_path / "b" / FILE, place)
        (place / f"{FILE}-wal").write_bytes(whole[:cut])
        complete = sum(size <= cut for size in sizes)
        try:
            with Ledger.open(place, write=True) as ledger:
                assert len(ledger) >= 2 + complete if complete else True
                for number in range(1, len(ledger) + 1):
                    assert ledger[number].record == record(number)
                    assert ledger.steps(number)
                fill(ledger, 1)
        except LedgerError:
            # Only where not even the tables were written yet.
            assert not complete
            continue


def test_a_flipped_bit_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "a", BASE) as ledger:
        fill(ledger, 4)
        (tmp_path / "b").mkdir()
        ledger.copy_to(tmp_path / "b")
    whole = (tmp_path / "b" / FILE).read_bytes()
    chance = random.Random(2)
    noticed = 0
    for _ in range(120):
        place = chance.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "b" / FILE).write_bytes(damaged)
        try:
            with Ledger.open(tmp_path / "b") as ledger:
                assert len(ledger) == 4
                for number in range(1, 5):
                    assert ledger[number].record == record(number)
                    for found, made in zip(ledger.steps(number), steps(number), strict=True):
                        assert torch.equal(found[0].right, made[0].right)  # type: ignore[union-attr]
        except LedgerError:
            noticed += 1
    assert noticed > 20


def test_a_cut_or_foreign_or_newer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="holds no ledger"):
        Ledger.open(tmp_path)
    (tmp_path / FILE).write_text("no database" * 100)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(tmp_path)
    (tmp_path / FILE).unlink()
    sqlite3.connect(tmp_path / FILE).execute("CREATE TABLE x (y)").connection.close()
    with pytest.raises(LedgerError, match="no ledger of hiedit"):
        Ledger.open(tmp_path)
    (tmp_path / FILE).unlink()
    with Ledger.create(tmp_path, BASE) as ledger:
        fill(ledger, 2)
    size = (tmp_path / FILE).stat().st_size
    shutil.copy(tmp_path / FILE, tmp_path / "whole")
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(tmp_path)
    shutil.copy(tmp_path / "whole", tmp_path / FILE)
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(LedgerError, match="format 2; this version of hiedit reads 1: update"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET record = '{}' WHERE id = 2",
        "UPDATE events SET target = 1 WHERE id = 2",
        "DELETE FROM events WHERE id = 1",
        "DELETE FROM base",
        "UPDATE base SET record = '[]'",
    ],
)
def test_a_changed_or_missing_row_is_noticed(tmp_path: Path, change: str) -> None:
    with Ledger.create(tmp_path, BASE) as ledger:
        fill(ledger, 3)
    connection = sqlite3.connect(tmp_path / FILE)
    with connection:
        connection.execute(change)
    connection.close()
    with pytest.raises(LedgerError, match=r"is damaged: .*; restore it from a copy"):
        Ledger.open(tmp_path)


def test_changed_factors_are_noticed_when_they_are_read(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, BASE) as ledger:
        fill(ledger, 2)
    connection = sqlite3.connect(tmp_path / FILE)
    [(data,)] = connection.execute("SELECT factors FROM events WHERE id = 2").fetchall()
    damaged = bytearray(data)
    damaged[-1] ^= 1  # the sign of a number
    with connection:
        connection.execute("UPDATE events SET factors = ? WHERE id = 2", (bytes(damaged),))
    connection.close()
    with Ledger.open(tmp_path) as ledger:
        assert ledger.steps(1)
        with pytest.raises(LedgerError, match="the factors of edit 2 are not those"):
            ledger.steps(2)


def test_what_an_append_writes_does_not_grow(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, BASE) as ledger:
        wal = tmp_path / f"{FILE}-wal"

        def written() -> int:
            """Bytes of one append, in a write-ahead file that was emptied before."""
            ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            fill(ledger, 1)
            return wal.stat().st_size

        fill(ledger, 10)
        early = max(written() for _ in range(5))
        with_synchronous_off = "PRAGMA synchronous=OFF"  # of the test alone, which fills it
        ledger._connection.execute(with_synchronous_off)
        fill(ledger, 2000)
        late = max(written() for _ in range(5))
    assert late <= early + 2 * 4120  # at most two more pages: a deeper tree


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, BASE) as ledger:
        fill(ledger, 2)
        [(pages,)] = ledger._connection.execute("PRAGMA page_count").fetchall()
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutputError, match="cannot be written: database or disk is full"):
            ledger.append("edit", None, {"long": "x" * 100_000}, steps(3))
        assert ledger.active == (1, 2)
        ledger._connection.execute("PRAGMA max_page_count = 100000")
        fill(ledger, 1)
    with Ledger.open(tmp_path) as ledger:
        assert ledger.active == (1, 2, 3)


@pytest.mark.parametrize("mode", ["", "PRAGMA journal_mode=WAL"])
def test_a_ledger_whose_making_was_interrupted_is_made_anew(tmp_path: Path, mode: str) -> None:
    if mode:
        blank = sqlite3.connect(tmp_path / FILE)
        blank.execute(mode)
        blank.close()
    else:
        (tmp_path / FILE).touch()
    assert not Ledger.is_in(tmp_path)
    with Ledger.open_or_create(tmp_path, BASE) as ledger:
        assert len(ledger) == 0
    # What holds something is not taken for one.
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("DELETE FROM base")
    other.commit()
    other.close()
    assert Ledger.is_in(tmp_path)
    with pytest.raises(LedgerError, match="names no model"):
        Ledger.open_or_create(tmp_path, BASE)


def base_of(*layers: BaseLayer, fingerprint: str = "00" * 8) -> Base:
    return Base("tiny", "", "float32", fingerprint, layers)


MANY = tuple(BaseLayer(f"block.{i}", 4, 3, False) for i in range(40))


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            base_of(*MANY),
            base_of(*MANY[:39], BaseLayer("last", 4, 3, False)),
            r"layers block\.39, block\.0, block\.1, … \(40\), this model has last, block\.0, ",
        ),
        (base_of(*MANY[:2]), base_of(MANY[0]), r"layers block\.1, block\.0, this model has block"),
        (
            base_of(*MANY[:2]),
            base_of(MANY[0], BaseLayer("block.1", 8, 3, True)),
            r"whose block\.1 is 4 × 3, this model's is 8 × 3, stored transposed; give the model",
        ),
        (base_of(*MANY), base_of(*MANY, fingerprint="ff" * 8), "belongs to another model"),
    ],
)
def test_another_model_is_refused_with_what_differs(one: Base, other: Base, message: str) -> None:
    one.refuse_other(one)
    with pytest.raises(LedgerError, match=message) as caught:
        one.refuse_other(other)
    assert "'tiny'" in str(caught.value)
    assert len(str(caught.value)) < 300
