"""Errors as clients see them: one line in OpenAI's shape, and the status that fits.

A line about a request names the field, its value, and what is right. Pydantic's own words name
neither the value nor, where a field has several forms, the form that was meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from hiedit_agents.serving.replies import problem
from hiedit_agents.serving.schema import ALLOWED, EXAMPLES, ITEMS, not_known
from hiedit_env.errors import HieditError, LedgerError, OutputError, shown

_KINDS = {401: "authentication_error", 404: "not_found_error"}
Place = tuple[str | int, ...]


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


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, text, code = error.status_code, str(error.detail), None
    if text == HTTPStatus(status).phrase:  # said by Starlette, which names nothing
        text = _no_route(request, error)
    elif status == 404:
        code = "model_not_found"
    elif status == 400 and error.__cause__ is not None:
        text = f"{_unreadable(error.__cause__)}; {_send(request)}"
    kind = _KINDS.get(status, "invalid_request_error")
    return JSONResponse(problem(text, kind, code), status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    field, text = complaint(error, request)
    return JSONResponse(problem(text, "invalid_request_error", param=field), 400)


async def _own(_: Request, error: Exception) -> Response:
    status, body = reply_of(error)
    return JSONResponse(body, status)


async def _unexpected(_: Request, error: Exception) -> Response:
    status, body = reply_of(error)
    return JSONResponse(body, status)


# -- paths -----------------------------------------------------------------------------------------


def _no_route(request: Request, error: HTTPException) -> str:
    """What to say of a path that there is not, or of a method that a path does not take."""
    paths: Mapping[str, Mapping[str, Any]] = request.app.openapi()["paths"]
    there: str = request.scope["path"]
    if error.status_code == 405:
        templates = [t for t in paths if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", t), there)]
        methods = [m for template in templates for m in paths[template]]
        takes = _methods(methods) or (error.headers or {}).get("Allow", "GET")
        return f"{shown(there)} takes {takes}, not {request.method}"
    if error.status_code == 404:
        known = ", ".join(f"{_methods(list(paths[path]))} {path}" for path in paths)
        return f"there is nothing at {shown(there)}; there are {known}, and the page at /"
    return str(error.detail)


def _methods(names: Sequence[str]) -> str:
    """HTTP methods in a sentence.

    >>> _methods(["get", "post"])
    'GET and POST'
    """
    return " and ".join(name.upper() for name in names)


# -- bodies ----------------------------------------------------------------------------------------


def _send(request: Request) -> str:
    return f"send a JSON object such as {_example(request)}"


def _example(request: Request) -> str:
    return EXAMPLES.get(request.scope["path"].rstrip("/"), "{}")


def _unreadable(cause: BaseException) -> str:
    """Why a body could not be parsed."""
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not in UTF-8: {cause}"
    # Behind a semicolon Python says how a program raises its limit, which no client can.
    return f"the body cannot be read: {str(cause).partition(';')[0]}"


def complaint(error: RequestValidationError, request: Request) -> tuple[str | None, str]:
    """The first thing that is wrong with a request: its field, if any, and a line about it."""
    found = error.errors()
    first, place = found[0], _place(found[0]["loc"])
    if first["type"] == "json_invalid":
        return None, _no_json(error, request)
    if first["type"] == "value_error":
        return None, str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return None, not_known(str(first["loc"][-1]))
    if not place and first["type"] == "string_unicode":  # a field's name that is no text
        return None, not_known(str(first["input"]))
    if not place:
        return None, _no_object(first, request)
    others = len({_place(e["loc"])[:1] for e in found} - {place[:1]})
    # Of a field with several forms, the form that fits furthest is the one that was meant.
    same = [e for e in found if _place(e["loc"])[:1] == place[:1]]
    first = max(same, key=lambda e: len(_place(e["loc"])))
    more = f"; {others} other field{' is' if others == 1 else 's are'} wrong too"
    place = _place(first["loc"])
    return ".".join(map(str, place)), _about(place, first) + (more if others else "")


def _place(loc: Sequence[str | int]) -> Place:
    """The part of a location that names fields and items, without what Pydantic adds.

    >>> _place(("body", "prompt", "list[constrained-str]", 1)), _place(("query", "limit"))
    (('prompt', 1), ('limit',))
    """
    return tuple(part for part in loc if isinstance(part, int) or part in ALLOWED)


def _about(place: Place, error: Mapping[str, Any]) -> str:
    """One line about a field or an item."""
    name = ".".join(map(str, place))
    words = ITEMS[str(place[-2])] if isinstance(place[-1], int) else ALLOWED[place[-1]]
    if error["type"] == "missing":
        return f"{name} is missing; it must be {words}"
    if error["type"] == "string_unicode":
        return f"{name} must be without halves of surrogate pairs, got {_given(error['input'])}"
    return f"{name} must be {words}, got {_given(error['input'])}"


def _given(value: Any) -> str:
    """A value for a message; of a long list its length too."""
    text = shown(value)
    is_cut = isinstance(value, list) and text.endswith("…")
    return f"a list of {len(value)}: {text}" if is_cut else text


def _no_json(error: RequestValidationError, request: Request) -> str:
    first, text = error.errors()[0], str(error.body)
    place: int = first["loc"][-1]
    rest = text[place:]
    where = f"character {place}, got {shown(rest)}" if rest else f"its end (character {place})"
    said = first["ctx"]["error"]
    return f"the body is no JSON: {said} at {where}; send an object such as {_example(request)}"


def _no_object(error: Mapping[str, Any], request: Request) -> str:
    given = error["input"]
    if given is None:
        return f"the body is empty; {_send(request)}"
    if isinstance(given, bytes):
        kind = request.headers.get("content-type")
        named = "none" if kind is None else shown(kind)
        return f"the body needs the header 'Content-Type: application/json', got {named}"
    return f"the body must be a JSON object such as {_example(request)}, got {_given(given)}"
