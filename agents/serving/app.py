"""The server: an edited model behind OpenAI's interface, its edits, and a page.

=================================  ================================================================
``GET /``                          the page
``GET /v1/models``                 the edited model, and the unedited one (``NAME:unedited``)
``POST /v1/chat/completions``      a chat is answered, whole or streamed
``POST /v1/completions``           a text is continued, whole or streamed
``POST /edits``                    writes a fact, or several
``GET /edits``                     the edits in place, the latest first
``GET /edits/{id}``                all that the ledger says of one
``DELETE /edits/{id}``             takes one back
``GET /openapi.json``              these routes, for programs
=================================  ================================================================

Edits need the token; where questions need it, the description of the routes does too. Errors are
one line in OpenAI's shape.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import Response

from hiedit_agents.serving.ask_routes import ask_routes
from hiedit_agents.serving.edit_routes import edit_routes
from hiedit_agents.serving.errors import answer_errors
from hiedit_agents.serving.guards import MAX_REQUEST_BYTES, Limits, TokenCheck
from hiedit_agents.serving.served_model import ServedModel
from hiedit_agents.serving.workers import Workers
from hiedit_env import __version__

PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    # Nothing but the page's own files is loaded or run.
    "Content-Security-Policy": (
        "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(
    model: ServedModel,
    token: str,
    *,
    ask_with_token: bool = False,
    together: int = 1,
    answers_at_once: int = 4,
    hosts: Collection[str] | None = None,
    max_bytes: int = MAX_REQUEST_BYTES,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        model: What is served.
        token: What edits need.
        ask_with_token: Whether questions need it too.
        together: Facts that one edit writes where a request does not say.
        answers_at_once: Answers that are generated at the same time.
        hosts: Names under which it may be asked; None for any.
        max_bytes: Largest size of a request.
    """
    workers = Workers(model, answers_at_once)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()

    # The documentation pages of FastAPI load scripts from another host, and its own description of
    # the routes is given to everyone.
    app = FastAPI(
        title="hiedit",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Limits, max_bytes=max_bytes, hosts=hosts)
    answer_errors(app)
    check = Depends(TokenCheck(token))
    asking = [check] if ask_with_token else []
    app.include_router(ask_routes(model, workers), dependencies=asking)
    app.include_router(edit_routes(model, workers, together), dependencies=[check])
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file(PAGE / name, kind), include_in_schema=False)
    app.add_api_route(
        "/openapi.json", lambda: app.openapi(), dependencies=asking, include_in_schema=False
    )
    return app


def _file(path: Path, kind: str) -> Any:
    data = path.read_bytes()

    async def answer() -> Response:
        return Response(data, media_type=kind, headers=_HEADERS)

    return answer
