"""Streams that are opened by a path: a named pipe that nobody writes to is refused."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO

from hiedit_env.errors import DatasetError

#: Seconds within which somebody has to open a named pipe for writing.
WAIT = 5.0


def open_stream(path: Path) -> IO[bytes]:
    """Opens a pipe, a device or a file descriptor for reading.

    Opening a named pipe waits until somebody opens its other end, for ever if nobody does. Here it
    waits :data:`WAIT` seconds. Whoever has opened the pipe may take any time to write.

    Raises:
        DatasetError: nobody opened the pipe for writing.
        OSError: it cannot be opened.
    """
    if not path.is_fifo():
        return path.open("rb")
    found: list[IO[bytes] | OSError] = []

    def attempt() -> None:
        try:
            found.append(path.open("rb"))
        except OSError as error:
            found.append(error)

    thread = Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(WAIT)
    if thread.is_alive():
        with suppress(OSError):  # lets the thread go on, which then has a pipe that is at its end
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        thread.join(WAIT)
        for end in found:
            if not isinstance(end, OSError):
                end.close()
        raise DatasetError(
            f"{path} is a pipe, and nobody opened it for writing within {WAIT:g} s; start the "
            "program that writes to it first, or give a .json or .jsonl file"
        )
    (opened,) = found
    if isinstance(opened, OSError):
        raise opened
    return opened
