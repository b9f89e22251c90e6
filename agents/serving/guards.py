"""What is refused before a request is read: its size, its host, a missing token."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from fastapi import HTTPException, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hiedit_agents.serving.replies import problem
from hiedit_env.errors import shown

#: Bytes of a request.
MAX_REQUEST_BYTES = 2**20
#: Names of this machine itself.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Limits:
    """Refuses requests that are too large, and those that name another host.

    A page of another site can make a browser ask a server on its user's machine; such a request
    names that site as its host once the site's name points here.

    Args:
        app: What answers the other requests.
        max_bytes: Largest size of a body.
        hosts: Names under which the server may be asked; None for any.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, hosts: Collection[str] | None) -> None:
        self._app, self._max_bytes, self._hosts = app, max_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = host_of(headers.get(b"host", ""))
        if self._hosts is not None and host not in self._hosts:
            text = f"this server is not {shown(host)}; ask {' or '.join(sorted(self._hosts))}"
            await _refusal(421, text)(scope, receive, send)
            return
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self._max_bytes:
            await _refusal(413, self._too_large)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:  # sent in chunks, without a length
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, counted, send)

    @property
    def _too_large(self) -> str:
        return f"a request may have {self._max_bytes} bytes; send less at once"


def host_of(header: str) -> str:
    """The name in a ``Host`` header, without the port.

    >>> host_of("localhost:8000"), host_of("[::1]:8000"), host_of("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


class TokenCheck:
    """Lets requests pass that carry the token.

    Args:
        token: The right one.
    """

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()

    def __call__(self, request: Request) -> None:
        """Checks one request.

        Raises:
            HTTPException: (401) no token, or another one.
        """
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), self._wanted):
            what = "the token is wrong" if given else "a token is needed"
            raise HTTPException(
                401,
                f"{what}; send the header 'Authorization: Bearer TOKEN' with the token that hiedit "
                "serve was started with or has printed",
                {"WWW-Authenticate": "Bearer"},
            )


def _refusal(status: int, text: str) -> JSONResponse:
    return JSONResponse(problem(text, "invalid_request_error"), status)
