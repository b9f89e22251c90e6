"""Threads that answer and edit, in the order of the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from hiedit_agents.serving.answering import Answered, Question
from hiedit_agents.serving.served_model import ServedModel
from hiedit_agents.serving.snapshots import Snapshot

T = TypeVar("T")
#: Seconds between two looks whether a client still waits.
_LOOK = 0.5


class Workers:
    """A few threads for answers, one for edits.

    Args:
        model: What they work on.
        answers_at_once: Answers that are generated at the same time; others wait in order.
    """

    def __init__(self, model: ServedModel, answers_at_once: int) -> None:
        self._model = model
        self._answering = ThreadPoolExecutor(answers_at_once, "answer")
        self._editing = ThreadPoolExecutor(1, "edit")

    async def edit(self, work: Callable[[], T]) -> T:
        """Runs something that edits, after the edits that were asked for before.

        It is finished even if the client goes away.
        """
        return await asyncio.get_running_loop().run_in_executor(self._editing, work)

    async def pieces(self, snapshot: Snapshot, question: Question) -> AsyncIterator[str | Answered]:
        """The pieces of an answer as they come, and its end.

        Where the iteration stops earlier, so does the generation.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | Answered | BaseException] = asyncio.Queue()

        def send(item: str | Answered | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                end: Answered | BaseException = self._model.answer(snapshot, question, send)
            except BaseException as error:
                end = error
            send(end)

        running = self._answering.submit(work)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Answered):
                    return
        finally:
            question.gone.set()
            running.cancel()

    async def whole(self, snapshot: Snapshot, question: Question) -> tuple[str, Answered]:
        """A whole answer."""
        text = ""
        async for item in self.pieces(snapshot, question):
            if isinstance(item, Answered):
                return text, item
            text += item
        raise AssertionError("an answer ends with its end")

    def close(self) -> None:
        """Waits for the edit that is being written; drops everything that has not begun."""
        self._answering.shutdown(wait=False, cancel_futures=True)
        self._editing.shutdown(wait=True, cancel_futures=True)


async def unless_gone(
    request: Request, questions: Sequence[Question], work: Coroutine[Any, Any, T]
) -> T:
    """Waits for answers, and lets them end early when their client has gone away."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK)
            if not task.done() and await request.is_disconnected():
                for question in questions:
                    question.gone.set()
        return await task
    finally:
        task.cancel()
