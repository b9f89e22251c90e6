"""Files that appear complete or not at all.

Also locks of folders, which only one process at a time may write.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hiedit_env.errors import OutputError

if TYPE_CHECKING:
    from filelock import FileLock


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
