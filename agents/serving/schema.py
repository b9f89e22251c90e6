"""What clients may send, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hiedit_env.errors import shown

#: New tokens where a client names no number, as in OpenAI's completions, and longer in a chat.
PLAIN_TOKENS, CHAT_TOKENS = 16, 256
#: Prompts of one request, and facts.
MOST_PROMPTS, MOST_FACTS = 64, 256
#: Below, the likeliest token is taken: divided by less, logits overflow.
COLDEST = 1e-3

#: Fields that OpenAI's clients send and that are read here with one value only.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
#: Fields that change no answer.
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
_MESSAGE = '{"role": "user", "content": "TEXT"}'
_PART = '{"type": "text", "text": "TEXT"}'
_FACT = '{"prompt": "TEXT", "answer": "TEXT"}'
_NO_TOKENS = "(token ids are not read here)"
#: What a field must be, for messages. No two requests mean different things by one name.
ALLOWED: Mapping[str, str] = {
    "model": "the name of a model, as GET /v1/models lists them",
    "prompt": f"a text, or a list of 1 to {MOST_PROMPTS} texts, none of them empty {_NO_TOKENS}",
    "messages": f"a list of messages, at least one, each such as {_MESSAGE}",
    "role": "system, developer, user or assistant",
    "content": f"a text, or a list of parts such as {_PART}",
    "type": "'text', the only kind that is read",
    "text": "a text",
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0 and at most 1",
    "seed": "a whole number of 64 bits",
    "stop": "a text, or a list of texts, none of them empty",
    "stream": "true or false",
    "stream_options": 'an object such as {"include_usage": true}',
    "include_usage": "true or false",
    "max_tokens": "a whole number ≥ 1",
    "max_completion_tokens": "a whole number ≥ 1",
    "facts": f"a list of 1 to {MOST_FACTS} facts",
    "together": "a whole number ≥ 1",
    "limit": "a whole number from 1 to 1000",
    "before": "a whole number ≥ 1",
    "id": "the number of an edit",
}
#: What an item of a list must be.
ITEMS: Mapping[str, str] = {
    "prompt": f"a text that is not empty {_NO_TOKENS}",
    "messages": f"an object such as {_MESSAGE}",
    "content": f"an object such as {_PART}",
    "stop": "a text that is not empty",
    "facts": f"an object such as {_FACT}",
}
#: The least that a request to a path holds.
EXAMPLES: Mapping[str, str] = {
    "/v1/completions": '{"model": "NAME", "prompt": "TEXT"}',
    "/v1/chat/completions": f'{{"model": "NAME", "messages": [{_MESSAGE}]}}',
    "/edits": _FACT,
}
Text = Annotated[str, Field(min_length=1)]


def not_known(name: str) -> str:
    r"""The complaint about a field that there is not; its name may hold anything.

    >>> not_known("tempreature"), not_known("\x1b")
    ('tempreature is not known here; leave it out', "'\\x1b' is not known here; leave it out")
    """
    plain = name.isidentifier() and shown(name) == repr(name)
    return f"{name if plain else shown(name)} is not known here; leave it out"


class StreamOptions(BaseModel):
    """``stream_options`` of a request.

    Attributes:
        include_usage: Whether a last piece tells the numbers of tokens.
    """

    include_usage: bool = False


class Asking(BaseModel):
    """What requests for text have in common.

    Attributes:
        model: The served model's name, or with ``:unedited`` behind it.
        temperature: 0, the default, takes the likeliest token each time.
        top_p: Probability of the likeliest tokens that are drawn from.
        seed: Of the draws.
        stop: Texts that end the answer.
        stream: Whether the answer comes in pieces, as server-sent events.
        stream_options: See :class:`StreamOptions`.
    """

    model_config = ConfigDict(extra="allow")

    model: Text
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Asking:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name not in _ONLY:
                raise ValueError(not_known(name))
            if value not in _ONLY[name]:
                only, given = _ONLY[name][0], shown(value)
                raise ValueError(f"{name} can only be {only!r} here; leave it out (got {given})")
        return self

    @property
    def heat(self) -> float:
        """The temperature; 0 where it is too low to divide by."""
        given = self.temperature or 0.0
        return given if given >= COLDEST else 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Asking):
    """``POST /v1/completions``.

    Attributes:
        prompt: A text to continue, or several.
        max_tokens: Largest number of new tokens.
    """

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: int | None = Field(None, ge=1)

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def budget(self) -> int:
        """Largest number of new tokens."""
        return PLAIN_TOKENS if self.max_tokens is None else self.max_tokens


class TextPart(BaseModel):
    """A part of a message; only texts are read.

    Attributes:
        type: ``"text"``.
        text: The text.
    """

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation.

    Attributes:
        role: Whose it is; ``"developer"`` is read as ``"system"``.
        content: A text, or parts of one.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates read them."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Asking):
    """``POST /v1/chat/completions``.

    Attributes:
        messages: The conversation.
        max_tokens: Largest number of new tokens.
        max_completion_tokens: The same by its newer name, which goes first.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def budget(self) -> int:
        """Largest number of new tokens."""
        given = (self.max_completion_tokens, self.max_tokens, CHAT_TOKENS)
        return next(number for number in given if number is not None)


class EditsRequest(BaseModel):
    """``POST /edits`` with several facts; a request without ``facts`` is one fact.

    Attributes:
        facts: In any row format of a data file; ``prompt`` and ``answer`` are enough.
        together: Facts that are written by one edit.
    """

    model_config = ConfigDict(extra="forbid")

    facts: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_FACTS)]
    together: int | None = Field(None, ge=1)
