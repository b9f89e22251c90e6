"""How a prompt is asked (plain or in chat), and where its subject stands among the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

from jinja2 import TemplateError

from hiedit_env.datasets.requests import PromptForm as PromptForm  # where callers look for it
from hiedit_env.datasets.writing import Span, mentions
from hiedit_env.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Literal["answer", "all", "last", "subject"]
"""Which tokens of a request count: those that predict the answer, all that are read, the prompt's
last, or the last of the subject."""

# An answer that no template contains.
_REPLY = "Lyon it is, says hiedit"


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """Write a prompt as the user's message, up to where the assistant's answer begins.

    Args:
        tokenizer: A tokenizer with a chat template.
        prompt: The user's message.
        system: The system message. ``None`` gives none, so the template writes its own default
            if it has one; an empty text replaces that default by an empty message.

    Raises:
        PromptError: if the tokenizer has no chat template, or the template refuses the messages
            (some know no system message).
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return messages_text(tokenizer, messages)


def messages_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation up to where the assistant's next answer begins.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: ``role`` and ``content`` of each.

    Raises:
        PromptError: as :func:`chat_text`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "the chat form needs a chat template and this tokenizer has none; ask in the plain "
            "form (prompt_form='plain') or use an instruct model"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"the chat template refuses this message ({first}); leave out the system message or "
            "ask in the plain form"
        ) from error
    return cast(str, text)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends the model's turn; None if there is none.

    The one that the chat template puts right behind an assistant's message, if that is a token of
    its own; else the tokenizer's end token.
    """
    text = ""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _REPLY}]
        try:
            text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            text = ""
    rest = text.rpartition(_REPLY)[2].lstrip()
    behind = tokenizer.encode(rest, add_special_tokens=False, verbose=False) if rest else []
    added = tokenizer.added_tokens_decoder.get(behind[0]) if behind else None
    # Spelled out: a tokenizer may put a space marker in front of the rest.
    if added is not None and rest.startswith(added.content) and not added.content.isspace():
        return int(behind[0])
    end: int | None = tokenizer.eos_token_id
    return end


def has_markers(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether a prompt holds special tokens, as one that a chat template has written does.

    Such a prompt is asked as it is, whatever form is wanted: a template around a template is not
    what anybody asks.
    """
    return any(len(token) > 2 and token in prompt for token in tokenizer.all_special_tokens)


def token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], spans: Sequence[Span]
) -> tuple[Span, ...]:
    """Turn spans of characters into spans of the tokens that hold any of these characters.

    Args:
        tokenizer: Fast tokenizers say themselves where a token stands; for others, the text is
            followed by decoding one more token at a time.
        text: The text.
        ids: Its tokens, perhaps behind special tokens put in front.
        spans: Spans of characters in ``text``.

    Returns:
        One span of positions in ``ids`` per span of characters; left out where the tokens of the
        text cannot be followed that far.
    """
    places = _fast_places(tokenizer, text, ids) if tokenizer.is_fast else None
    if places is None:
        places = _decoded_places(tokenizer, text, ids)
    found = []
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(places) if a < end and b > start and a < b]
        if inside:
            found.append((inside[0], inside[-1] + 1))
    return tuple(found)


def subject_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], prompt: str, subject: str
) -> tuple[Span, ...]:
    """Find the tokens of every mention of the subject in the prompt; empty if there is none.

    Only the prompt's own part of ``text`` counts, since a template's system message may happen to
    name the subject as well.

    Args:
        tokenizer: The tokenizer that made ``ids``.
        text: The prompt as it is asked, so with the chat template in the chat form.
        ids: Its tokens.
        prompt: The prompt itself.
        subject: The subject as the request has it.
    """
    asked = prompt.strip()
    start = text.rfind(asked)
    if start < 0:
        start, asked = 0, text
    spans = [(start + a, start + b) for a, b in mentions(asked, subject)]
    return token_spans(tokenizer, text, ids, spans)


def _fast_places(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]
) -> list[Span] | None:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    front = len(ids) - len(encoded["input_ids"])
    if front < 0 or list(ids[front:]) != list(encoded["input_ids"]):
        return None
    return [(0, 0)] * front + [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _decoded_places(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]
) -> list[Span]:
    own = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    front = max(len(ids) - len(own), 0)
    places, before = [(0, 0)] * front, 0
    for count in range(1, len(ids) - front + 1):
        read = tokenizer.decode(
            list(ids[front : front + count]),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        end = before
        while end < min(len(read), len(text)) and read[end] == text[end]:
            end += 1
        # A token that is a part of a character belongs to this character.
        places.append((before, max(end, before + 1)))
        before = end
    return places
