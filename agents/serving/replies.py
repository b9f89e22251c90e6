"""Answers in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hiedit_agents.serving.answering import Answered
from hiedit_env.errors import one_line


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, whole or in pieces.

    Args:
        kind: ``"text_completion"`` or ``"chat.completion"``.
        model: Name of the model that answers.
        fingerprint: Of its weights, so that a client can tell before an edit from after it.
    """

    kind: Literal["text_completion", "chat.completion"]
    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"hiedit-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def _chats(self) -> bool:
        return self.kind == "chat.completion"

    def whole(
        self, texts: Sequence[str], ends: Sequence[Answered], prompt_tokens: int
    ) -> dict[str, Any]:
        """The whole reply.

        Args:
            texts: The answers.
            ends: How each ended.
            prompt_tokens: Of all prompts.
        """
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            content: dict[str, Any] = {"text": text}
            if self._chats:
                content = {"message": {"role": "assistant", "content": text}}
            choices.append(
                {"index": index, **content, "logprobs": None, "finish_reason": end.reason}
            )
        return {**self._head(self.kind), "choices": choices, "usage": usage(ends, prompt_tokens)}

    def piece(self, index: int, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer.

        Args:
            index: Of the answer.
            text: What is new; None in the last piece.
            reason: Why it ended, in the last piece.
        """
        content: dict[str, Any] = {"text": text or ""}
        if self._chats:
            content = {"delta": {} if text is None else {"content": text}}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self._head(self._piece_kind), "choices": [choice]}

    def first(self) -> dict[str, Any]:
        """The first piece of a chat, which names the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head(self._piece_kind), "choices": [choice]}

    def last(self, ends: Sequence[Answered], prompt_tokens: int) -> dict[str, Any]:
        """The piece behind the answers that tells the numbers of tokens."""
        head = self._head(self._piece_kind)
        return {**head, "choices": [], "usage": usage(ends, prompt_tokens)}

    @property
    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self._chats else self.kind

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(ends: Sequence[Answered], prompt_tokens: int) -> dict[str, int]:
    """Numbers of tokens.

    >>> usage([Answered(3, "stop"), Answered(2, "length")], 10)
    {'prompt_tokens': 10, 'completion_tokens': 5, 'total_tokens': 15}
    """
    new = sum(end.tokens for end in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }


def problem(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape.

    Args:
        message: Becomes one line, with escapes for what would steer a client's terminal.
        kind: Such as ``"invalid_request_error"``.
        code: Such as ``"model_not_found"``.
        param: The field that is wrong.
    """
    line = one_line(" ".join(message.split()))
    return {"error": {"message": line, "type": kind, "param": param, "code": code}}


def sent(value: Any) -> str:
    r"""One server-sent event.

    >>> sent({"a": "é"})
    'data: {"a": "é"}\n\n'
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n"
