"""Routes that answer: OpenAI's models, completions and chat completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hiedit_agents.serving.answering import Answered, Question
from hiedit_agents.serving.errors import reply_of
from hiedit_agents.serving.replies import Reply, sent
from hiedit_agents.serving.schema import ChatRequest, CompletionRequest
from hiedit_agents.serving.served_model import UNEDITED, ServedModel
from hiedit_agents.serving.snapshots import Snapshot
from hiedit_agents.serving.workers import Workers, unless_gone
from hiedit_env.errors import shown

Kind = Literal["text_completion", "chat.completion"]
Tokens = tuple[int, ...]


def ask_routes(model: ServedModel, workers: Workers) -> APIRouter:
    """The routes below ``/v1``.

    Args:
        model: What is asked.
        workers: Who answers.
    """
    asker = _Asker(model, workers)
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        names = (model.name, model.name + UNEDITED)
        return {"object": "list", "data": [asker.about(name) for name in names]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return asker.about(name)

    @routes.post("/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        prompts = [model.tokens(prompt) for prompt in asked.prompts]
        return await asker.answered(asked, prompts, "text_completion", request)

    @routes.post("/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        if not model.chats:
            raise HTTPException(
                400,
                f"{model.name} has no chat template; use /v1/completions, or serve an instruct "
                "model",
            )
        prompts = [model.tokens([message.plain for message in asked.messages])]
        return await asker.answered(asked, prompts, "chat.completion", request)

    return routes


class _Asker:
    """Asks a served model and shapes what it says."""

    def __init__(self, model: ServedModel, workers: Workers) -> None:
        self._model, self._workers = model, workers

    async def answered(
        self,
        asked: CompletionRequest | ChatRequest,
        prompts: Sequence[Tokens],
        kind: Kind,
        request: Request,
    ) -> Response:
        """The response to a request, all of it by one snapshot."""
        snapshot = self._snapshot(asked.model)
        questions = [self._question(asked, ids) for ids in prompts]
        reply = Reply(kind, asked.model, snapshot.fingerprint)
        read = sum(map(len, prompts))
        if asked.stream:
            events = self._events(asked, snapshot, questions, reply, read)
            return StreamingResponse(events, media_type="text/event-stream")
        found = await unless_gone(request, questions, self._all(snapshot, questions))
        texts, ends = [text for text, _ in found], [end for _, end in found]
        return JSONResponse(reply.whole(texts, ends, read))

    async def _all(
        self, snapshot: Snapshot, questions: Sequence[Question]
    ) -> list[tuple[str, Answered]]:
        return await asyncio.gather(*(self._workers.whole(snapshot, q) for q in questions))

    async def _events(
        self,
        asked: CompletionRequest | ChatRequest,
        snapshot: Snapshot,
        questions: Sequence[Question],
        reply: Reply,
        read: int,
    ) -> AsyncIterator[str]:
        ends: list[Answered] = []
        try:
            if reply.kind == "chat.completion":
                yield sent(reply.first())
            for index, question in enumerate(questions):
                async for item in self._workers.pieces(snapshot, question):
                    if isinstance(item, Answered):
                        ends.append(item)
                        yield sent(reply.piece(index, None, item.reason))
                    else:
                        yield sent(reply.piece(index, item))
            if asked.tells_usage:
                yield sent(reply.last(ends, read))
            yield sent("[DONE]")
        except Exception as error:  # the status has been sent already
            yield sent(reply_of(error)[1])

    def about(self, name: str) -> dict[str, Any]:
        """A model as OpenAI's clients list it, and a little more."""
        snapshot = self._snapshot(name)
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "hiedit",
            "chats": self._model.chats,
            "edits": len(snapshot.active),
            "fingerprint": snapshot.fingerprint,
        }

    def _snapshot(self, name: str) -> Snapshot:
        found = self._model.snapshot(name)
        if found is None:
            own = self._model.name
            raise HTTPException(
                404,
                f"this server has no model {shown(name)}; it has {own!r} and {own + UNEDITED!r}",
            )
        return found

    def _question(self, asked: CompletionRequest | ChatRequest, ids: Tokens) -> Question:
        room = self._model.room(ids)
        return Question(
            ids,
            asked.budget if room is None else min(asked.budget, room),
            asked.heat,
            1.0 if asked.top_p is None else asked.top_p,
            asked.seed,
            asked.stops,
        )
