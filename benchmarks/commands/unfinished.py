"""What an interrupted ``hiedit edit`` leaves, and how the same command goes on from it.

While a command edits, its ledger is in the folder ``OUT.unfinished`` beside ``--out``, so every
edit is on disk as soon as it is made. When the model is saved, the folder is removed. After a kill
it is there, and the same command takes it up: with the same settings, and with facts among which
are all those that were written. Any other command with this ``--out`` is refused, so that no edit
gets into a model unasked. The facts of a stream are not known before they come, so a stream says at
its end which edits no line asked for.

With ``--ledger`` the ledger is in the folder named there and stays. The same command goes on in the
same way, and is refused where one of its facts is missing. A command with another ``--out`` or
other settings begins with the edits that the ledger holds.

``command.json`` in the folder has the fields ``format`` (1), ``begins`` (number of events that the
ledger had when the command began) and ``settings``. It is removed when the model is saved, since
the same command is a new one then. A command that is killed before that moment is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE as LEDGER
from hiedit_agents.editing.ledger_format import Event
from hiedit_agents.editing.results import EditResult, recorded
from hiedit_benchmarks.comparison.results import plain, write_json
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import LedgerError, ResultsExistError, SettingsError
from hiedit_env.files import lock_folder, parse_json

#: Prompt and answer of a fact.
Pair = tuple[str, str]
FORMAT = 1
FILE = "command.json"
#: A name may have 255 bytes.
_LONGEST = 255


class Unfinished:
    """The ledger of a command that has not ended.

    Args:
        out: Where the model will be saved.
        ledger: Folder of the ledger, which stays; None for one beside ``out``.
        settings: What the command was given, as JSON values.
        facts: Those that it writes; None where they are not known before.

    Raises:
        SettingsError: a run with other settings or other facts was interrupted, or the folder is
            somebody else's. Nothing has changed.
        LedgerError: its ledger is damaged.
        OutputError: a command is at work in it, or it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        ledger: Path | None,
        settings: Mapping[str, Any],
        facts: Iterable[Request] | None = None,
    ) -> None:
        #: Whether the folder was named by the user, and stays.
        self.is_named = ledger is not None
        #: Where the ledger is.
        self.folder = folder_of(out) if ledger is None else ledger
        self._settings = json.loads(json.dumps(plain({**settings, "out": str(out)})))
        self._begins: int | None = None
        if not self.is_named:
            self._refuse_foreign_files()
        found = self._command()
        if found is None:
            return
        # The edits of a command that is at work are not those of an interrupted one.
        lock_folder(self.folder).release()
        try:
            self._begins = found["begins"]
            self._refuse_other_settings(found["settings"])
        except SettingsError:
            if not self.is_named:
                raise
            self._begins = None  # another command, which begins now
            return
        if facts is not None:
            self._refuse_other_facts({(fact.prompt, fact.answer) for fact in facts})

    def begin(self, ledger: Ledger) -> None:
        """Notes the command beside its ledger, or says what was taken up.

        Args:
            ledger: The one in the folder, open for appending.

        Raises:
            OutputError: it cannot be written.
        """
        if self._begins is None:
            self._begins = len(ledger)
            command = {"format": FORMAT, "begins": self._begins, "settings": self._settings}
            write_json(self.folder / FILE, command)
        elif count := len(self._own(ledger)):
            print(
                f"hiedit: goes on after {_edits(count)} of an interrupted run ({self.folder})",
                file=sys.stderr,
            )

    def written(self, ledger: Ledger) -> dict[Pair, list[EditResult]]:
        """What became of the facts that the command has written so far, in order."""
        found: dict[Pair, list[EditResult]] = {}
        for event in self._own(ledger):
            for result in recorded(event):
                found.setdefault((result.prompt, result.answer), []).append(result)
        return found

    def end(self, ledger: Ledger | None, saved: bool) -> None:
        """Closes the ledger, and removes the folder where nothing is lost with it.

        Of a named folder only the record of the command is removed.

        Args:
            ledger: The one in the folder; None where it could not be opened.
            saved: Whether the edits are somewhere else. If they are not, a line says where they
                are.
        """
        count = 0
        if ledger is not None:
            count = 0 if saved else len(self._own(ledger))
            if self.is_named and not count:
                # While the folder is locked: later it may be the record of another process.
                _forget(self.folder)
            ledger.close()
        elif self._begins is not None:
            return  # of an earlier run
        if self.is_named:
            return
        if not count:
            _remove(self.folder)
            return
        print(
            f"hiedit: {_edits(count)} so far are kept in {self.folder}: the same command goes on "
            f"after them, and 'hiedit export {self.folder} --as folder --out DIR' saves a model "
            "with them",
            file=sys.stderr,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _own(self, ledger: Ledger) -> list[Event]:
        """The edits in place that the command has made."""
        begins = self._begins or 0
        return [ledger[number] for number in ledger.active if number > begins]

    def _command(self) -> dict[str, Any] | None:
        file = self.folder / FILE
        if not (file.is_file() and Ledger.is_in(self.folder)):
            return None
        try:
            return _read(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{file} cannot be read ({type(error).__name__}: {error}); "
                + ("remove this file" if self.is_named else self._remedy())
            ) from error

    def _refuse_other_settings(self, then: Mapping[str, Any]) -> None:
        now = self._settings
        names = [n for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
        if names:
            told = ", ".join(f"{n} {then.get(n)!r}, now {now.get(n)!r}" for n in names[:3])
            raise SettingsError(
                f"{self.folder} holds edits of an interrupted run with other settings ({told:.300})"
                f"; repeat that command, {self._remedy()}"
            )

    def _refuse_other_facts(self, facts: set[tuple[str, str]]) -> None:
        with Ledger.open(self.folder) as ledger:
            others = [pair for pair in self.written(ledger) if pair not in facts]
        if others:
            told = " → ".join(repr(text)[:100] for text in others[0])
            remedy = self._remedy()
            if self.is_named:
                # It may hold edits from before the command, so it is not to be removed.
                remedy = (
                    "or another --ledger, or another --out to begin with its edits in the model"
                )
            raise SettingsError(
                f"{self.folder} holds an edit of an interrupted run that is not among the facts "
                f"({told}); give the facts of that run, {remedy}"
            )

    def _refuse_foreign_files(self) -> None:
        try:
            names = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return
        except OSError as error:
            raise SettingsError(f"{self.folder} cannot be read: {error}") from error
        others = sorted(name for name in names if not _is_own(name))
        if others:
            raise SettingsError(
                f"{self.folder} is needed while editing and holds {others[0]!r}, which is none of "
                "its files; move it away, or give another --out"
            )

    def _remedy(self) -> str:
        return f"remove it to begin anew (rm -r {self.folder}), or give another --out"


def folder_of(out: Path) -> Path:
    """Where the ledger of a command is while it edits.

    >>> folder_of(Path("models/edited")).as_posix()
    'models/edited.unfinished'
    """
    name = f"{out.name}.unfinished"
    if len(os.fsencode(name)) > _LONGEST:
        digest = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
        name = f"{out.name[:50]}-{digest}.unfinished"
    return out.with_name(name)


def refuse_overlap(out: Path, ledger: Path | None) -> None:
    """Refuses a ledger in the folder that must be empty when the model is saved.

    A ledger in a folder above ``out`` is in nobody's way, unless ``out`` has the name of one of its
    files.

    Args:
        out: Where the model will be saved.
        ledger: The folder that was named for the ledger, if any.

    Raises:
        SettingsError: the ledger's folder is ``out`` or in it, or a file of it is.
    """
    if ledger is None:
        return
    one, other = Path(os.path.realpath(ledger)), Path(os.path.realpath(out))
    if one.is_relative_to(other):
        raise SettingsError(
            f"--ledger {ledger} and --out {out} must be folders beside each other, or --out in "
            "--ledger; give another --ledger"
        )
    if other.is_relative_to(one) and _is_own(name := other.relative_to(one).parts[0]):
        raise SettingsError(
            f"--out {out} would take the place of {name!r} of the ledger; give another --out"
        )


@contextmanager
def tidied(out: Path, ledger: Path | None) -> Iterator[None]:
    """Tidies up behind an earlier command where the body finds ``out`` to be there already."""
    try:
        yield
    except ResultsExistError:
        _tidy(Path(os.path.realpath(out)), ledger)
        raise


def _tidy(out: Path, named: Path | None) -> None:
    """Removes what a command left that was killed after its model had been saved.

    Args:
        out: The saved model; where its ledger does not hold all edits of the folder, nothing is
            done.
        named: The folder of the ledger, of which only the command's record is removed; None for
            the one beside ``out``.
    """
    folder = folder_of(out) if named is None else named
    if not (Ledger.is_in(folder) and Ledger.is_in(out)):
        return
    try:
        with Ledger.open(folder) as one, Ledger.open(out) as whole:
            is_saved = whole.begins_with(one)
    except LedgerError:
        return
    if is_saved and named is None:
        _remove(folder)
    elif is_saved:
        _end_record(folder, out)


def _end_record(folder: Path, out: Path) -> None:
    """Removes the record of the command with this ``out``, if no other process is using it."""
    try:
        lock = lock_folder(folder)
    except OSError:
        return
    try:
        if _read(folder / FILE)["settings"].get("out") == str(out):
            _forget(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is none, or none that can be read
    finally:
        lock.release()


def _read(file: Path) -> dict[str, Any]:
    """The record of a command.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read, or is none.
    """
    found: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']!r}; this version reads {FORMAT}")
    if not isinstance(found["begins"], int) or not isinstance(found["settings"], dict):
        raise TypeError("its fields are of other kinds")
    return found


def _forget(folder: Path) -> None:
    """Removes the record of a command that has ended, at once and as a whole.

    What the command has made is there in any case, so a record that stays is only warned of.
    """
    file = folder / FILE
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        print(
            f"hiedit: warning: {file} cannot be removed ({error}); remove it, or the next command "
            "like this one takes this one for interrupted",
            file=sys.stderr,
        )


def _remove(folder: Path) -> None:
    """Removes the folder with its own files, if no other process is using it."""
    if not folder.is_dir():
        return
    try:
        lock_folder(folder).release()
        for path in folder.iterdir():
            if _is_own(path.name):
                path.unlink()
        folder.rmdir()
    except OSError:  # another process uses it, or it cannot be removed
        return


def _is_own(name: str) -> bool:
    return name in (FILE, ".lock") or name.startswith((LEDGER, f".{FILE}.", f".{LEDGER}."))


def _edits(count: int) -> str:
    return "1 edit" if count == 1 else f"{count} edits"
