"""Starts the server: takes the port first, then loads the model, then answers."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from hiedit_agents.serving.guards import LOOPBACK
from hiedit_env.errors import SettingsError, shown

_BACKLOG = 128
#: Seconds that answers in progress have at the end; an edit in progress is finished in any case.
_PATIENCE = 10
#: Errors of a port that another program has, or that only the system may take.
_OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES, errno.EPERM)


def take_port(host: str, port: int) -> socket.socket:
    """Binds a port, before anything that takes long.

    Args:
        host: Name or address of this machine.
        port: The port; 0 for one that is free.

    Raises:
        SettingsError: another program has it, or the address is not of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"host {shown(host)} is not known: {error}; give another --host"
        ) from error
    try:
        if sys.platform != "win32":
            # A port whose last connections are still being closed is free.
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Others are refused from now on; the first questions wait until the model is loaded.
        taken.listen(_BACKLOG)
    except OSError as error:
        taken.close()
        why = error.strerror or error
        if error.errno not in _OF_THE_PORT:
            raise SettingsError(
                f"host {shown(host)} is no address of this machine that can be listened on: {why}; "
                "give another --host, such as 127.0.0.1 or, for all addresses, 0.0.0.0"
            ) from error
        raise SettingsError(
            f"port {port} of {host} cannot be used: {why}; give another --port, or 0 for one that "
            "is free"
        ) from error
    return taken


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host in LOOPBACK or host.startswith("127.")


def address_of(host: str, taken: socket.socket) -> str:
    """The address for a browser of this machine."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{near}]' if ':' in near else near}:{taken.getsockname()[1]}"


def serve(app: FastAPI, taken: socket.socket) -> None:
    """Answers until the process is interrupted or told to end."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_PATIENCE,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[taken])
