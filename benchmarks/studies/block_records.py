"""Recorded choices of a block: every option of a fact tried, and what was seen before it.

A file holds one JSON object a line: first what it is and the settings, then one fact a line, which
is written at once. A line that a killed process left half is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from filelock import FileLock, Timeout

from hiedit_env.errors import OutputError, SettingsError

FORMAT = "hiedit-block-choices"
VERSION = 1
_HEADING = json.dumps({"format": FORMAT}).encode()[:-1]
#: What a fact is there for.
Role = Literal["train", "evaluate"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the model gives in one state, about one fact, asked in F forms.

    Args:
        fact: Per form (nats, generated): −log p per token of the answer's text, and whether the
            greedy continuation is the answer, 0 or 1.
        paraphrases: The same for every paraphrase.
        neighbours: Per unrelated prompt and form (nats, agreement): by how much the log-probability
            per token of the unedited model's own answer fell, and the share of its tokens that are
            still the argmax.
    """

    fact: Sequence[Sequence[float]]
    paraphrases: Sequence[Sequence[Sequence[float]]]
    neighbours: Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Tried:
    """One option of a fact, tried from the unedited model.

    Args:
        measured: What the model gives afterwards.
        steps: Number of primitive steps; 0 where nothing was written.
        fires: Share of the control prompts at which what was written fires.
        seconds: Of writing it.
    """

    measured: Measured
    steps: int
    fires: float
    seconds: float


@dataclass(frozen=True, slots=True)
class FactRecord:
    """A fact with all its options.

    Args:
        role: Whether it is there to learn from or to evaluate on.
        prompt, answer, subject, relation: The fact; the relation may be empty.
        seen: Of the fact, before a choice: name → number.
        seen_of_options: The same of every option; equal names.
        before: What the unedited model gives.
        options: One per block.
    """

    role: Role
    prompt: str
    answer: str
    subject: str
    relation: str
    seen: Mapping[str, float]
    seen_of_options: Sequence[Mapping[str, float]]
    before: Measured
    options: Sequence[Tried]

    @property
    def key(self) -> tuple[str, str]:
        """What the fact is known by."""
        return self.prompt, self.answer

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self:
        """A record from a line.

        Raises:
            TypeError, KeyError: it is none.
        """
        tried = [
            Tried(**{**option, "measured": Measured(**option["measured"])})
            for option in line["options"]
        ]
        found = cls(**{**line, "before": Measured(**line["before"]), "options": tried})
        if found.role not in get_args(Role):
            raise KeyError(found.role)
        return found


class RecordFile:
    """A file of records that one process appends to.

    Args:
        path: The file; made where it is missing, with its folder.
        settings: What all its records were made with, as JSON.

    Raises:
        OutputError: it cannot be written, or another process writes to it.
        SettingsError: its records were made with other settings, or it is no such file; it is
            unchanged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path.with_name(f".{path.name}.lock"))
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"another process records into {path}; give another --part, or wait"
            ) from error
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}") from error
        try:
            settings = json.loads(json.dumps(settings))  # as they are read again
            self.records, whole = _read(path, settings) if path.exists() else ([], 0)
            self._file = path.open("ab")
            self._file.truncate(whole)
            if not whole:
                self._append({"format": FORMAT, "version": VERSION, "settings": dict(settings)})
        except BaseException:
            self._lock.release()
            raise

    def append(self, record: FactRecord) -> None:
        """Adds a record; it is on the disk when this returns.

        Raises:
            OutputError: it cannot be written.
        """
        self._append(asdict(record))
        self.records.append(record)

    def close(self) -> None:
        """Ends the writing."""
        self._file.close()
        self._lock.release()

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}") from error


def read_records(paths: Sequence[Path]) -> tuple[dict[str, Any], list[FactRecord]]:
    """The records of files that were made with the same settings, and these settings.

    A fact that is in several files counts once.

    Raises:
        SettingsError: no files, one that cannot be read, or settings that differ; names the file.
    """
    if not paths:
        raise SettingsError("give at least one file of records")
    settings = _settings_of(paths[0])
    found: dict[tuple[str, str], FactRecord] = {}
    for path in paths:
        for record in _read(path, settings)[0]:
            found.setdefault(record.key, record)
    return settings, list(found.values())


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read as records: {error}") from error
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise SettingsError(f"{path} holds no recorded choices of blocks")
    if first.get("version") != VERSION:
        raise SettingsError(f"{path} has version {first.get('version')!r}, this reads {VERSION}")
    return dict(first["settings"])


def _read(path: Path, settings: Mapping[str, Any]) -> tuple[list[FactRecord], int]:
    """The whole records of a file, and where they end, in bytes; 0 for a file without a heading."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if not whole:
        if data[: len(_HEADING)] != _HEADING[: len(data)]:
            raise SettingsError(f"{path} holds no recorded choices of blocks")
        return [], 0
    known = _settings_of(path)
    for name in {**known, **settings}:
        if known.get(name) != settings.get(name):
            raise SettingsError(
                f"{path} was recorded with {name}={known.get(name)!r}, not "
                f"{settings.get(name)!r}; give another file or folder"
            )
    records = []
    for number, line in enumerate(data[:whole].splitlines()[1:], 2):
        try:
            records.append(FactRecord.read(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise SettingsError(f"{path}, line {number}, is no record of a fact") from error
    return records, whole
