"""Errors as clients see them: one line in OpenAI's shape, and the status that fits."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from hiedit_agents.serving.replies import problem
from hiedit_env.errors import HieditError, LedgerError, OutputError

_KINDS = {401: "authentication_error", 404: "not_found_error"}


def answer_errors(app: FastAPI) -> None:
    """Makes an application answer every error in the same shape."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HieditError, _own)
    app.add_exception_handler(Exception, _unexpected)


def reply_of(error: BaseException) -> tuple[int, dict[str, object]]:
    """Status and body for an error that the server did not expect, or that is the client's."""
    if isinstance(error, OutputError):
        return 507, problem(str(error), "server_error")
    if isinstance(error, LedgerError):
        return 404, problem(str(error), "not_found_error")
    if isinstance(error, HieditError):
        return 400, problem(str(error), "invalid_request_error")
    text = f"the server failed: {type(error).__name__}: {error}; its log says where"
    return 500, problem(text, "server_error")


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KINDS.get(error.status_code, "invalid_request_error")
    code = "model_not_found" if "has no model" in str(error.detail) else None
    return JSONResponse(problem(str(error.detail), kind, code), error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(problem(first_complaint(error), "invalid_request_error"), 400)


async def _own(_: Request, error: Exception) -> Response:
    status, body = reply_of(error)
    return JSONResponse(body, status)


async def _unexpected(_: Request, error: Exception) -> Response:
    status, body = reply_of(error)
    return JSONResponse(body, status)


def first_complaint(error: RequestValidationError) -> str:
    """The first thing that is wrong with a request, and how many others."""
    found = error.errors()
    first = found[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    text = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place}: {text}{more}" if place else f"{text}{more}"
