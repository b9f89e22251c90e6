"""A folder of results that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hiedit_env.errors import OutputError, ResultsExistError, SettingsError
from hiedit_env.files import lock_folder

T = TypeVar("T")


class OutFolder:
    """A folder that appears whole or not at all.

    Args:
        out: A folder that does not exist or is empty.

    Raises:
        ResultsExistError: it is not empty.
        SettingsError: it cannot be written.
    """

    def __init__(self, out: Path) -> None:
        _require_writable(out)
        try:
            free = not any(out.iterdir()) if out.is_dir() else not os.path.lexists(out)
            # Above all a name that is too long, which lexists() takes for free.
            out.lstat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise SettingsError(f"{out} cannot be written, give another --out: {error}") from error
        if not free:
            raise ResultsExistError(f"{out} exists and is not an empty folder; give another --out")
        # Of a link to an empty folder, the folder is what is replaced.
        self.out = out = Path(os.path.realpath(out))
        # A name may have 255 bytes.
        self._prefix = f".{out.name[:50]}.hiedit-"
        self._remove_left_behind()

    def fill(self, write: Callable[[Path], T]) -> T:
        """Writes the folder beside ``out`` and moves it there.

        Args:
            write: Fills a folder that does not exist yet; its parent does.

        Returns:
            What ``write`` returns.

        Raises:
            SettingsError: it cannot be written, and nothing is left; or it cannot be moved, and
                the message says where it is.
        """
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.out.parent))
            lock = lock_folder(work)
        except OSError as error:
            raise SettingsError(f"the model cannot be saved to {self.out}: {error}") from error
        folder = work / "model"
        try:
            result = write(folder)
        except BaseException as error:
            lock.release()
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError):
                raise SettingsError(f"the model cannot be saved to {self.out}: {error}") from error
            raise
        try:
            if self.out.exists():
                self.out.rmdir()  # empty: replacing a folder is not possible everywhere
            os.replace(folder, self.out)
        except OSError as error:
            kept = self._kept(folder)
            raise SettingsError(
                f"the edited model is finished but cannot be moved to {self.out} ({error}); it is "
                f"in {kept}"
            ) from error
        finally:
            lock.release()
        shutil.rmtree(work, ignore_errors=True)
        return result

    def _kept(self, folder: Path) -> Path:
        """A finished model that cannot be put in its place, where no later run removes it."""
        name = self.out.name[:50]
        try:
            kept = Path(tempfile.mkdtemp(prefix=f"{name}-finished-", dir=self.out.parent))
            os.replace(folder, kept / "model")
            shutil.rmtree(folder.parent, ignore_errors=True)
        except OSError:
            return folder
        return kept / "model"

    def _remove_left_behind(self) -> None:
        """Removes half-written folders of runs that were killed while they saved."""
        above = self.out.parent
        found = above.glob(f"{_escaped(self._prefix)}*") if above.is_dir() else ()
        for folder in sorted(path for path in found if path.is_dir() and not path.is_symlink()):
            try:
                lock_folder(folder).release()
            except OutputError:  # a run that saves at this moment
                continue
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                print(
                    f"hiedit: removed {folder}, which an interrupted run had left half written",
                    file=sys.stderr,
                )


def _require_writable(out: Path) -> None:
    """Makes a file in what exists of the folders above, where the model will be written."""
    try:
        above = next(path for path in out.absolute().parents if path.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise SettingsError(f"{out} cannot be written, give another --out: {error}") from error


def _escaped(text: str) -> str:
    """A name for ``glob`` that stands for itself."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in text)
