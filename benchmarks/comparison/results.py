"""The results folder of a comparison: written row by row, never overwritten silently."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiedit_env import __version__
from hiedit_env.errors import ResultsExistError, SettingsError
from hiedit_env.files import write_bytes

Row = dict[str, Any]
#: The agent of the unedited model, whose rows every comparison has.
UNEDITED = "no-edit"


class ResultsFolder:
    """``results.jsonl`` with one row per agent and seed, and ``runs/`` with the details of each.

    Args:
        path: The folder; made by :meth:`create`.
        settings: What every row must have been measured with.
        resume: Whether the folder may hold rows already.

    Raises:
        ResultsExistError: the folder holds results and ``resume`` is False.
        SettingsError: its rows were measured with other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.rows: list[Row] = []
        if self.file.exists():
            if not resume:
                raise ResultsExistError(
                    f"{self.file} exists already; give another folder, or --resume to add to it"
                )
            self.rows = self._read()
            self.check(settings)

    def create(self) -> None:
        """Makes the folder; called once everything that can be wrong has been checked.

        Raises:
            SettingsError: it cannot be made.
        """
        try:
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"folder {self.path} cannot be made: {error}") from error

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
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{path} cannot be read, rerun into a new folder: {error}"
            ) from error
        return found

    def add(self, row: Row, details: Mapping[str, Any]) -> None:
        """Writes one finished run; the table changes as a whole, after its details exist."""
        write_json(self._details_path(row["agent"], row["seed"]), details)
        self.rows.append(plain(row))
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in self.rows)
        write_text(self.file, "".join(lines))

    def _details_path(self, agent: str, seed: int) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else "." for c in agent)
        return self.path / "runs" / f"{safe}-seed{seed}.json"

    def _read(self) -> list[Row]:
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
            rows: list[Row] = [json.loads(line) for line in lines if line.strip()]
            for row in rows:
                row["agent"], row["seed"], row["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{self.file} is no table of results: {error!r}") from error
        return rows


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
    packages = {name: version(name) for name in ("torch", "transformers", "gymnasium", "numpy")}
    return {
        "python": platform.python_version(),
        **packages,
        "hiedit": __version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
