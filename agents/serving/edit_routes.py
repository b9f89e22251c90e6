"""Routes that edit: facts are written, listed and taken back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from hiedit_agents.serving.schema import EditsRequest
from hiedit_agents.serving.served_model import ServedModel, described
from hiedit_agents.serving.workers import Workers


def edit_routes(model: ServedModel, workers: Workers, together: int) -> APIRouter:
    """The routes below ``/edits``.

    Args:
        model: What is edited.
        workers: Who edits.
        together: Facts that one edit writes where a request does not say.
    """
    routes = APIRouter(prefix="/edits")

    @routes.get("")
    async def edits(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=1)] = None,
    ) -> dict[str, Any]:
        active = model.present.active
        found = model.edits(active, limit, before)
        return {
            "object": "list",
            "data": [described(event, active) for event in found],
            "has_more": bool(found) and found[-1].id != active[0],
            "total": len(active),
        }

    @routes.post("")
    async def write(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        facts, many = [body], together
        if "facts" in body:
            given = _checked(body)
            facts, many = given.facts, given.together or together
        results, fingerprint = await workers.edit(lambda: model.edit(facts, many))
        data = [result.to_json() for result in results]
        return {"object": "list", "data": data, "fingerprint": fingerprint}

    @routes.get("/{id}")
    async def one_edit(id: int) -> dict[str, Any]:
        return described(model.event(id), model.present.active)

    @routes.delete("/{id}")
    async def take_back(id: int) -> dict[str, Any]:
        event = await workers.edit(lambda: model.undo(id))
        fingerprint = event.record["fingerprint_after"]
        return {
            "id": id,
            "object": "edit",
            "deleted": True,
            "event": event.id,
            "fingerprint": fingerprint,
        }

    return routes


def _checked(body: dict[str, Any]) -> EditsRequest:
    try:
        return EditsRequest.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
