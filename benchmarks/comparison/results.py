"""The results folder of a comparison: written row by row, never overwritten silently."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from filelock import FileLock

from hiedit_env import __version__
from hiedit_env.errors import HieditError, ResultsExistError, SettingsError
from hiedit_env.files import lock_folder, make_folder, parse_json, write_bytes

Row = dict[str, Any]
#: The agent of the unedited model, whose rows every comparison has.
UNEDITED = "no-edit"
#: Format of ``results.jsonl``, ``runs/`` and ``summary.json``. Version 1 had none; its agreement
#: after each edit and the keys of its summary meant something else. Version 2 knew one form of
#: prompts, and neither neighbours nor portability.
FORMAT_VERSION = 3
#: What every row has, and its types.
ROW: Mapping[str, type | tuple[type, ...]] = {
    "agent": str,
    "seed": int,
    "num_edits": int,
    "error_type": (str, type(None)),
    "metrics": dict,
    "layers_per_edit": (float, int),
    "steps_per_edit": (float, int),
    "seconds_per_edit": (float, int),
    "stream_fingerprint": str,
    "settings": dict,
}
#: What the details of every run have.
DETAILS = ("layer_names", "prompts", "wanted", "answers", "per_fact", "edits")

_LONGEST_NAME, _DIGEST = 180, 16


class ResultsFolder:
    """``results.jsonl`` with one row per agent and seed, and ``runs/`` with the details of each.

    Args:
        path: The folder; made by :meth:`create`.
        settings: What every row must have been measured with.
        resume: Whether the folder may hold rows already.

    Raises:
        ResultsExistError: the folder holds results and ``resume`` is False.
        SettingsError: its rows were measured with other settings, have an older format, or cannot
            be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self._resume = path, resume
        self._lock: FileLock | None = None
        self.rows = self._present_rows()
        self.check(settings)

    def create(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder and locks it until :meth:`close`.

        Call it once everything that can be wrong has been checked. The rows are read again: another
        process may have written some since.

        Args:
            settings: As at the beginning, or more of them.

        Raises:
            OutputError: it cannot be made, or another process writes into it.
            ResultsExistError, SettingsError: as at the beginning.
        """
        make_folder(make_folder(self.path) / "runs")
        self._lock = lock_folder(self.path)
        try:
            self.rows = self._present_rows()
            self.check(settings)
        except HieditError:
            self.close()
            raise

    def close(self) -> None:
        """Releases the lock, if there is one."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def file(self) -> Path:
        """The table of all rows."""
        return self.path / "results.jsonl"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compares settings with those of the rows, so far as both name them.

        Raises:
            SettingsError: names the setting that differs and both values.
        """
        wanted = plain(settings)
        for row in self.rows:
            for name, value in wanted.items():
                if name in row["settings"] and row["settings"][name] != value:
                    raise SettingsError(
                        f"cannot resume {self.path}: setting {name!r} was "
                        f"{row['settings'][name]!r} and is now {value!r}; give another folder"
                    )

    def find(self, agent: str, seed: int) -> Row | None:
        """The finished row of an agent and a seed, if there is one."""
        for row in self.rows:
            if (row["agent"], row["seed"]) == (agent, seed):
                return row
        return None

    def details(self, agent: str, seed: int) -> dict[str, Any]:
        """The details written with a row.

        Raises:
            SettingsError: they are missing or unreadable.
        """
        path = self._details_path(agent, seed)
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
            for name in DETAILS:
                found[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{path} cannot be read, rerun into a new folder: {error!r}"
            ) from error
        return dict(found)

    def add(self, row: Row, details: Mapping[str, Any]) -> None:
        """Writes one finished run; the table changes as a whole, after its details exist.

        Raises:
            OutputError: a file cannot be written, for instance because the disk is full; the runs
                finished before are kept.
        """
        write_json(self._details_path(row["agent"], row["seed"]), details)
        rows = [*self.rows, plain({"format_version": FORMAT_VERSION, **row})]
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)
        write_text(self.file, "".join(lines))
        self.rows = rows

    def _details_path(self, agent: str, seed: int) -> Path:
        return self.path / "runs" / f"{file_name(agent)}-seed{seed}.json"

    def _present_rows(self) -> list[Row]:
        try:
            exists = self.file.exists()
        except OSError as error:  # a name that is too long
            raise SettingsError(f"folder {self.path} cannot be used: {error}") from error
        if not exists:
            return []
        if not self._resume:
            raise ResultsExistError(
                f"{self.file} exists already; give another folder, or --resume to add to it"
            )
        return read_rows(self.file)


def read_rows(file: Path) -> list[Row]:
    """The rows of a ``results.jsonl``.

    Raises:
        SettingsError: it cannot be read, a row lacks something, or was written by a hiedit whose
            results have another format; names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file.parent} holds no results: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file.parent} holds no results of a comparison: line {number} of {file.name}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise SettingsError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise SettingsError(f"{where} is {row!r} and not a row")
        version = row.get("format_version", 1)
        if version != FORMAT_VERSION and {"agent", "seed"} <= set(row):
            raise SettingsError(
                f"{file} has results in format {version!r}, and this hiedit writes and reads "
                f"format {FORMAT_VERSION}; run the comparison again with another --out, or delete "
                "this folder first"
            )
        for name, kind in ROW.items():
            if not isinstance(row.get(name), kind):
                found = f"{row[name]!r:.60}" if name in row else "missing"
                raise SettingsError(f"{where}: {name!r} is {found}")
        rows.append(row)
    return rows


def file_name(label: str) -> str:
    """A file name that no other label has, on any file system, of at most 180 bytes.

    Letters, digits and ``-_.+=,@`` stay; other characters are percent-encoded. A long name is cut,
    and ends with a digest of the whole label.

    >>> file_name("random-layers+ridge"), file_name("runs/a b")
    ('random-layers+ridge', 'runs%2Fa%20b')
    """
    name = quote(label, safe="-_.+=,@").replace("~", "%7E")
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(label.encode()).hexdigest()[:_DIGEST]
    return f"{name[: _LONGEST_NAME - _DIGEST - 1]}~{digest}"


def check_file_names(labels: Iterable[str]) -> None:
    """Checks that every label has a file of its own, also where file names ignore case.

    Raises:
        SettingsError: names two labels that differ in upper and lower case only.
    """
    found: dict[str, str] = {}
    for label in labels:
        other = found.setdefault(file_name(label).casefold(), label)
        if other != label:
            raise SettingsError(
                f"agents {other!r} and {label!r} differ in upper and lower case only, which some "
                "file systems ignore; give one of them another label: LABEL=NAME"
            )


def plain(value: Any) -> Any:
    """The same as JSON knows it: lists for arrays and tuples, None for what is not finite.

    >>> plain({"a": np.array([1.0, np.nan]), "b": (np.int64(2), True)})
    {'a': [1.0, None], 'b': [2, True]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears complete or not at all."""
    write_bytes(path, text.encode("utf-8"))


def versions() -> dict[str, Any]:
    """What the results were made with."""
    import torch  # late: reading and printing results needs no model

    packages = {name: version(name) for name in ("torch", "transformers", "gymnasium", "numpy")}
    return {
        "python": platform.python_version(),
        **packages,
        "hiedit": __version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
