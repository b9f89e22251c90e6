"""The SQLite file of a ledger: opening it, its tables, and what a damaged one raises."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hiedit_agents.editing.ledger_format import APPLICATION, FORMAT, TABLES, Base
from hiedit_env.errors import LedgerError, OutputError


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turns what a damaged file raises into an error of its own."""
    try:
        yield
    except (sqlite3.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, LedgerError):
            raise
        if isinstance(error, sqlite3.ProgrammingError) and "closed" in str(error):
            raise LedgerError(f"{place} is closed; open it again, or read it before") from error
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise LedgerError(f"{place} is locked by another process; try again") from error
        raise LedgerError(f"{place} is damaged: {error}; restore it from a copy") from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Everything in the body, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def connect(path: Path, *, new: bool) -> sqlite3.Connection:
    """Open for appending. No thread is checked: an editor is used by one at a time.

    Args:
        path: The file.
        new: Whether it is made here. One that is there keeps its journal mode, so that a file to
            which nothing is appended stays as it is.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with suppress(sqlite3.DatabaseError):  # what is no database is refused where it is read
        if new:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open for reading, beside a process that writes and in folders that cannot be written."""
    where = path.resolve().as_uri()
    # No thread is checked: undo reads in one and adds in another.
    options: Any = {"uri": True, "isolation_level": None, "check_same_thread": False}
    connection: sqlite3.Connection = sqlite3.connect(f"{where}?mode=ro", **options)
    try:
        connection.execute("PRAGMA user_version").fetchall()
    except sqlite3.OperationalError:
        # In a folder that cannot be written, WAL mode has nowhere to put its shared memory.
        connection.close()
        connection = sqlite3.connect(f"{where}?immutable=1", **options)
    except sqlite3.DatabaseError:
        pass  # refused where it is read
    return connection


def is_blank(path: Path) -> bool:
    """Whether a file is a database without anything in it, as a killed process leaves it."""
    try:
        connection = connect_to_read(path)
        try:
            [(tables,)] = connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchall()
            [(version,)] = connection.execute("PRAGMA user_version").fetchall()
        finally:
            connection.close()
    except sqlite3.Error:  # damaged, which is said where it is opened
        return False
    return bool(tables == 0 and version == 0)


def make_tables(connection: sqlite3.Connection, base: Base) -> None:
    """The tables of an empty ledger, all or none."""
    with transaction(connection):
        for table in TABLES:
            connection.execute(table)
        connection.execute("INSERT INTO base VALUES (?)", (json.dumps(asdict(base)),))
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")


def copy_to_file(connection: sqlite3.Connection, path: Path) -> None:
    """Writes a copy of a database as one file, which appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    work = path.with_name(f".{path.name}.hiedit-new")
    try:
        work.unlink(missing_ok=True)
        target = sqlite3.connect(work, isolation_level=None)
        try:
            connection.backup(target)
            # One file, which opens from a medium that cannot be written, too.
            target.execute("PRAGMA journal_mode=DELETE")
        finally:
            target.close()
        os.replace(work, path)
    except (sqlite3.Error, OSError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
