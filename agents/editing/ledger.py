"""The ledger: every edit of a model, appended to a file that survives a kill at any moment.

``DIR/ledger.sqlite`` is an SQLite database with ``synchronous=FULL`` (in WAL mode; a copy beside a
saved model has the rollback journal, so that it is one file): an event that :meth:`Ledger.append`
has returned is on disk, one that was cut off is not there. SQLite finishes or undoes what a killed
process left when the file is opened again.

:mod:`.ledger_format` describes the format. No row is ever changed or removed: taking something back
is an event of its own, so it can be taken back too.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from hiedit_agents.editing.ledger_file import (
    connect,
    connect_to_read,
    copy_to_file,
    is_blank,
    make_tables,
    reading,
    transaction,
)
from hiedit_agents.editing.ledger_format import (
    APPLICATION,
    FILE,
    FORMAT,
    KINDS,
    Base,
    Event,
    Kind,
    base_of,
    digest_of,
    edit_id,
    factors_file,
    fold,
    steps_of,
)
from hiedit_env.errors import LedgerError, OutputError
from hiedit_env.files import lock_folder, make_folder, parse_json
from hiedit_env.resident.low_rank import Updates

if TYPE_CHECKING:
    from filelock import FileLock


class Ledger:
    """The events of one model, open for reading or also for appending.

    Made by :meth:`create`, :meth:`open` and :meth:`in_memory`.
    """

    def __init__(
        self, connection: sqlite3.Connection, place: str, lock: FileLock | None, writable: bool
    ) -> None:
        self._connection, self._place, self._lock = connection, place, lock
        weakref.finalize(self, connection.close)  # of an editor that nobody closed
        self._writable = writable
        self._digest = b""
        self._heads: list[tuple[Kind, int | None]] = []
        self._active: list[int] = []
        with reading(self._place):
            [(text,)] = connection.execute("SELECT record FROM base").fetchall() or [(None,)]
            if text is None:
                raise ValueError("it names no model")
            self.base = base_of(parse_json(text))
            self._digest = hashlib.sha256(text.encode()).digest()
            self._read_events()

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds a ledger; a file whose making was interrupted is none."""
        path = folder / FILE
        return path.is_file() and not is_blank(path)

    # -- opening ----------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, base: Base) -> Self:
        """An empty ledger in a folder, which is made if it does not exist.

        Raises:
            LedgerError: there is a ledger already.
            OutputError: it cannot be written, or another process has locked the folder.
        """
        if cls.is_in(folder):
            raise LedgerError(f"{folder / FILE} exists; open it, or give another folder")
        lock = lock_folder(make_folder(folder))
        try:
            connection = connect(folder / FILE, new=True)
            make_tables(connection, base)
            return cls(connection, str(folder / FILE), lock, True)
        except sqlite3.Error as error:
            lock.release()
            raise OutputError(f"{folder / FILE} cannot be written: {error}") from error
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open_or_create(cls, folder: Path, base: Base, begin: Ledger | None = None) -> Ledger:
        """The ledger of a folder, open for appending, or a new one.

        Args:
            folder: Where it is kept.
            base: The model that it must be of.
            begin: Events that it must begin with, and a new one does.

        Raises:
            LedgerError: it is of another model, begins otherwise, or is damaged.
            OutputError: it cannot be written.
        """
        if not cls.is_in(folder):
            if begin is None:
                return cls.create(folder, base)
            begin.copy_to(make_folder(folder))
        ledger = cls.open(folder, write=True)
        try:
            ledger.base.refuse_other(base)
            if begin is not None and not ledger.begins_with(begin):
                raise LedgerError(
                    f"the ledger in {folder} lacks edits that the model has; give another folder"
                )
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> Self:
        """The ledger of a folder.

        Args:
            folder: Holds ``ledger.sqlite``.
            write: Whether to append; one process at a time may.

        Raises:
            LedgerError: there is none, it is damaged, or of a newer version.
            OutputError: another process has it open for writing.
        """
        path = folder / FILE
        if not path.is_file():
            raise LedgerError(
                f"{folder} holds no ledger ({FILE}); give the folder of an Editor's ledger, or "
                "one that Editor.save has written"
            )
        lock = lock_folder(folder) if write else None
        try:
            connection = connect(path, new=False) if write else connect_to_read(path)
            return cls._checked(connection, path, lock, write)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    @classmethod
    def _checked(
        cls, connection: sqlite3.Connection, path: Path, lock: FileLock | None, write: bool
    ) -> Self:
        try:
            with reading(str(path)):
                [(application,)] = connection.execute("PRAGMA application_id").fetchall()
                [(version,)] = connection.execute("PRAGMA user_version").fetchall()
            if application != APPLICATION:
                raise LedgerError(f"{path} is no ledger of hiedit; give another folder")
            if version != FORMAT:
                raise LedgerError(
                    f"{path} has format {version}; this version of hiedit reads {FORMAT}: update "
                    "hiedit"
                )
            return cls(connection, str(path), lock, write)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def in_memory(cls, base: Base) -> Self:
        """An empty ledger that is gone when it is closed."""
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        make_tables(connection, base)
        return cls(connection, "the ledger", None, True)

    def copy_to(self, folder: Path) -> None:
        """Writes a copy into a folder, as one file that is complete when this returns.

        Raises:
            OutputError: it cannot be written.
        """
        copy_to_file(self._connection, folder / FILE)

    def copy_in_memory(self) -> Ledger:
        """A copy that is gone when it is closed."""
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._connection.backup(connection)
        return Ledger(connection, "the ledger", None, True)

    def begins_with(self, other: Ledger) -> bool:
        """Whether the first events of this ledger are all those of another one."""
        if len(other) > len(self):
            return False
        if not len(other):
            return True
        with reading(self._place):
            [(digest,)] = self._connection.execute(
                "SELECT digest FROM events WHERE id = ?", (len(other),)
            ).fetchall()
        # A digest is one of all events before it and of the base.
        return bool(digest == other._digest)

    def close(self) -> None:
        """Closes the file; nothing can be read or appended afterwards."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- reading ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of events, so the id of the last one."""
        return len(self._heads)

    def __iter__(self) -> Iterator[Event]:
        """The events in order, without their factors."""
        for number in range(1, len(self) + 1):
            yield self[number]

    def __getitem__(self, number: int) -> Event:
        """One event by its id.

        Raises:
            LedgerError: there is no such event.
        """
        self._require(number)
        with reading(self._place):
            row = self._connection.execute(
                "SELECT kind, target, record FROM events WHERE id = ?", (number,)
            ).fetchone()
            return Event(number, row[0], row[1], parse_json(row[2]))

    @property
    def active(self) -> tuple[int, ...]:
        """Ids of the edits that are in place, in the order they were made."""
        return tuple(self._active)

    def active_at(self, number: int) -> tuple[int, ...]:
        """Ids of the edits that were in place right after an event; none for 0.

        Raises:
            LedgerError: there is no such event.
        """
        if isinstance(number, bool) or number != 0:
            self._require(number)
        return tuple(fold(self._heads[:number]))

    def requests(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The requests of all edits in place with the edits' ids, in the order they were made."""
        for number in self._active:
            for fact in self[number].record["facts"]:
                yield number, fact["request"]

    def facts(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """For every prompt with an edit in place the latest one: its id and the request.

        Earliest first.
        """
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        for number, request in self.requests():
            found.pop(request["prompt"], None)
            found[request["prompt"]] = number, request
        return found

    def steps(self, number: int, device: torch.device | None = None) -> list[Updates]:
        """The recorded updates of an edit, one per primitive step.

        Args:
            number: Id of an edit.
            device: Where the factors are wanted.

        Raises:
            LedgerError: there is no such edit, or its factors are damaged.
        """
        self.require_edit(number)
        with reading(self._place):
            data, digest = self._connection.execute(
                "SELECT factors, factors_digest FROM events WHERE id = ?", (number,)
            ).fetchone()
        if not isinstance(data, bytes | None) or hashlib.sha256(data or b"").digest() != digest:
            raise self._damaged(f"the factors of edit {number} are not those that were written")
        if data is None:
            return []
        try:
            return steps_of(load(data), len(self.base.layers), device)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._damaged(f"the factors of edit {number}: {error}") from error

    def require_edit(self, number: object, *, in_place: bool = False) -> int:
        """Checks the id of an edit.

        Raises:
            LedgerError: there is no such edit, or it is not in place; says what there is.
        """
        return edit_id(number, self._heads, self._active if in_place else None)

    # -- appending --------------------------------------------------------------------------------

    def append(
        self,
        kind: Kind,
        target: int | None,
        record: Mapping[str, Any],
        steps: Sequence[Updates] = (),
    ) -> int:
        """Appends an event; when this returns it is on disk.

        Args:
            kind: Its kind.
            target: Its target.
            record: JSON values.
            steps: The updates of an edit, one entry per primitive step.

        Returns:
            Its id.

        Raises:
            OutputError: it cannot be written, for instance because the disk is full; the ledger is
                as it was.
        """
        number = len(self) + 1
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        factors = factors_file(steps)
        own = hashlib.sha256(factors or b"").digest()
        digest = digest_of(self._digest, number, kind, target, text, own)
        try:
            if not self._writable:
                raise sqlite3.OperationalError("it was opened for reading")
            with transaction(self._connection):
                self._connection.execute(
                    "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (number, kind, target, text, factors, own, digest),
                )
        except sqlite3.Error as error:
            raise OutputError(f"{self._place} cannot be written: {error}") from error
        except BaseException:
            # An interruption may come when the commit is done, and then the event is there.
            if self._connection.execute("SELECT 1 FROM events WHERE id = ?", (number,)).fetchone():
                self._enter(number, kind, target, digest)
            raise
        self._enter(number, kind, target, digest)
        return number

    # -- inside -----------------------------------------------------------------------------------

    def _enter(self, number: int, kind: Kind, target: int | None, digest: bytes) -> None:
        """Knows of an event that was appended."""
        self._digest = digest
        self._heads.append((kind, target))
        if kind == "edit":
            self._active.append(number)
        else:
            self._active = fold(self._heads)

    def _read_events(self) -> None:
        rows = self._connection.execute(
            "SELECT id, kind, target, record, factors_digest, digest FROM events ORDER BY id"
        )
        for place, (number, kind, target, text, own, digest) in enumerate(rows):
            self._digest = digest_of(self._digest, number, kind, target, text, own)
            if number != place + 1 or kind not in KINDS or digest != self._digest:
                raise ValueError(f"event {place + 1} is not what was written")
            self._heads.append((kind, target))
        self._active = fold(self._heads)

    def _require(self, number: object) -> None:
        is_number = isinstance(number, int) and not isinstance(number, bool)
        if not is_number or not 1 <= number <= len(self):  # type: ignore[operator]
            ids = f"1 to {len(self)}" if len(self) else "none yet"
            raise LedgerError(f"there is no event {number!r}; the ledger's ids are {ids}")

    def _damaged(self, reason: str) -> LedgerError:
        return LedgerError(f"{self._place} is damaged: {reason}; restore it from a copy")
