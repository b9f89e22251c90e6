"""Files that appear complete or not at all.

Also locks of folders, which only one process at a time may write.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiedit_env.errors import OutputError

if TYPE_CHECKING:
    from filelock import FileLock


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or its lists and objects are nested too deep to be read.

    >>> parse_json('{"layers": [1, 2]}')
    {'layers': [1, 2]}
    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: lists or objects are nested too deep
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file that appears complete or not at all.

    Raises:
        OutputError: it cannot be written, for instance because the disk is full; a file that was
            there before is unchanged.
    """
    try:
        _write(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files private; results are as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> Path:
    """A folder, made if it does not exist.

    Raises:
        OutputError: it cannot be made, for instance because a file is there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{folder} is a file; give the name of a folder") from error
    except OSError as error:
        raise OutputError(
            f"folder {folder} cannot be made: {error.strerror or error}; give another one"
        ) from error
    return folder


def lock_folder(folder: Path) -> FileLock:
    """Locks a folder for this process, by a file ``.lock`` in it.

    Args:
        folder: An existing folder.

    Returns:
        The lock, held; ``release()`` it at the end. The system releases it when the process ends,
        however it ends.

    Raises:
        OutputError: another process holds the lock, or the file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"another process is writing into {folder}; wait until it has ended, or give another "
            "folder"
        ) from error
    except OSError as error:
        raise OutputError(f"{folder / '.lock'} cannot be written: {error}") from error
    return lock
