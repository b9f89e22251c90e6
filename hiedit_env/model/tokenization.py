"""The one place where text becomes tokens.

A fact is a prompt and an answer. The model reads the prompt's tokens followed by the answer's
tokens and is judged only on predicting the answer's. The field's convention, as in
``data/zsre.py`` of ``yangfanww/hiedit`` (commit 1d76ab4), is kept: one space stands between prompt
and answer, special tokens come only in front, and the last answer token is predicted but never
read. Four details are settled here:

- A prompt is the text it is, to its very end: the line break or space that a chat template ends in
  is part of it. No space follows a prompt that ends in white space, in a marker token of the
  tokenizer (such as ``<|assistant|>``), or in a script without spaces where the answer goes on in
  one (:func:`~hiedit_env.datasets.writing.space_between`). So the tokens of a prompt written with
  ``apply_chat_template`` are the ones the template itself gives.
- A prompt that already begins with the special tokens the tokenizer puts in front of any text does
  not get them twice.
- The prompt's tokens are always the ones the model sees when it answers by itself, so that
  teacher forcing and free generation start from the same activations.
- SentencePiece tokenizers that put their own space marker in front of any text do not get a
  second one from the space before the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from hiedit_env.datasets.writing import MAX_CHARACTERS, space_between
from hiedit_env.errors import ModelError, PromptError, SettingsError
from hiedit_env.model.asking import (
    PromptForm,
    chat_text,
    has_markers,
    messages_text,
    subject_spans,
)
from hiedit_env.model.encoded import AskedForm, first_words, no_tokens
from hiedit_env.model.encoded import EncodedFact as EncodedFact  # where callers look for them
from hiedit_env.model.encoded import EncodedPrompt as EncodedPrompt
from hiedit_env.model.likely_subjects import settled_subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Remembered encodings per encoder: about 2 kB each, and more than an episode of editing asks for.
_REMEMBERED = 16_384

# Ordinary text that shows which special tokens a tokenizer adds, and on which side.
_ORDINARY_TEXT = "The capital of France is Paris"


class PromptEncoder:
    """Turns prompts and answers into token ids with one tokenizer.

    The text ``prompt + space + answer`` is split into tokens as a whole, ``space`` being one space
    or nothing (see the module). When the prompt's own tokens are a prefix of the result, the rest
    is the answer; otherwise (a token straddles the seam) the answer is encoded by itself, with the
    space that belongs to it, if any.

    White space at the start of an answer is dropped; all other white space is kept. Special tokens
    the tokenizer adds at the end of a text (an end-of-text token) are never used. Encodings are
    remembered, the least recently used are forgotten first.

    Args:
        tokenizer: Any tokenizer of ``transformers``, fast or slow. Its settings are not changed.
        max_length: The model's context length in tokens; ``None`` for no limit.
        end_id: The token that ends the model's turn, put behind every answer's tokens (so it is
            predicted like them); ``None`` for none. An answer whose text ends in it gets no second.
        vocabulary: How many tokens the model has a vector for, see :func:`vocabulary_size`;
            ``None`` for no limit.

    Raises:
        SettingsError: if ``max_length`` is neither ``None`` nor a positive integer, or if
            ``end_id`` is no id of the tokenizer.
        ModelError: if the tokenizer puts special tokens in the middle of ordinary text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        end_id: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise SettingsError(f"max_length must be a positive int or None, got {max_length!r}")
        if end_id is not None and (type(end_id) is not int or not 0 <= end_id < len(tokenizer)):
            raise SettingsError(
                f"end_id must be None or a token id from 0 to {len(tokenizer) - 1}, got {end_id!r}"
            )
        self.end_id = end_id
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary
        self._leading = _leading_special_ids(tokenizer)
        self._markers = _marker_ids(tokenizer)
        # Per instance, because the same text has other tokens under another tokenizer.
        self._remembered_prompt = lru_cache(maxsize=_REMEMBERED)(self._encode_prompt)
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._encode)
        self._remembered_subject = lru_cache(maxsize=_REMEMBERED)(self._find_subject)

    def encode(self, prompt: str, answer: str) -> EncodedPrompt:
        """Encode a prompt together with its answer.

        Args:
            prompt: Text the model is asked to continue.
            answer: The continuation, with or without its leading space.

        Raises:
            PromptError: if either text is not a string, is blank, cannot be written as UTF-8 or
                yields no tokens, or if both together are longer than ``max_length``.
        """
        return self._remembered(_checked(prompt, "prompt"), _checked(answer, "answer").lstrip())

    def encode_chat(self, prompt: str, answer: str, system: str | None = None) -> EncodedPrompt:
        """Encode a prompt as the user's message in the tokenizer's chat template.

        The ``prompt_ids`` are those of ``apply_chat_template(..., add_generation_prompt=True)``,
        whatever the tokenizer puts in front of other texts; the answer follows as in
        :meth:`encode`. The encoded prompt's ``prompt`` is the text the template writes.

        Args:
            prompt: The user's message.
            answer: The assistant's answer.
            system: The system message; ``None`` leaves it to the template.

        Raises:
            PromptError: as in :meth:`encode`, or if the tokenizer has no chat template.
        """
        text = chat_text(self.tokenizer, _checked(prompt, "prompt"), system)
        return self._remembered(text, _checked(answer, "answer").lstrip(), True)

    def encode_forms(
        self, prompt: str, answer: str, form: PromptForm, system: str | None = None
    ) -> tuple[EncodedPrompt, ...]:
        """Encode a prompt in every form asked: plain, chat, or first plain and then chat.

        A prompt that a chat template has written already (it holds special tokens) has one form
        only: as it is.

        Args:
            prompt: The prompt.
            answer: Its answer.
            form: The form or forms.
            system: The system message of the chat form; ``None`` leaves it to the template.

        Raises:
            PromptError: as in :meth:`encode` and :meth:`encode_chat`.
        """
        if form == "plain" or has_markers(self.tokenizer, _checked(prompt, "prompt")):
            return (self.encode(prompt, answer),)
        chat = self.encode_chat(prompt, answer, system)
        return (chat,) if form == "chat" else (self.encode(prompt, answer), chat)

    def with_subject(self, encoded: EncodedPrompt, prompt: str, subject: str) -> EncodedPrompt:
        """Add where the subject stands; see :class:`EncodedPrompt` for a prompt without it.

        Args:
            encoded: The prompt as encoded in either form.
            prompt: The prompt as the request has it, without a template around it.
            subject: The request's subject; where it is the prompt itself or a whole question,
                :func:`.likely_subjects.settled_subject` looks for a name in it.
        """
        return self._remembered_subject(encoded, encoded.form, prompt, subject)

    def encode_prompt(self, prompt: str, *, remember: bool = True) -> tuple[int, ...]:
        """Encode a prompt for free generation: the ``prompt_ids`` of every ``encode(prompt, ...)``.

        Args:
            prompt: The prompt.
            remember: Whether its tokens are remembered, for prompts that are met again.

        Raises:
            PromptError: as in :meth:`encode`, or if the prompt leaves no room for an answer token.
        """
        text = _checked(prompt, "prompt")
        ids = self._remembered_prompt(text) if remember else self._encode_prompt(text)
        return self._with_room(ids, text)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Encode a conversation for free generation, up to where the assistant's answer begins.

        Args:
            messages: ``role`` and ``content`` of each; the tokens are those of
                ``apply_chat_template(..., add_generation_prompt=True)``, and not remembered.

        Raises:
            PromptError: if the tokenizer has no chat template, or the template refuses the
                messages, or they leave no room for an answer token.
        """
        text = _checked(messages_text(self.tokenizer, messages), "conversation")
        return self._with_room(_plain_ids(self.tokenizer, text), text)

    def _with_room(self, ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """Checks that the model knows all tokens, and that an answer token fits behind them."""
        self._require_known(ids, "prompt", text)
        if self.max_length is not None and len(ids) >= self.max_length:
            raise PromptError(
                f"prompt {first_words(text)!r} has {len(ids)} tokens and leaves no room for an "
                f"answer in the model's context of {self.max_length}; shorten it"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, leaving out special tokens and changing no spaces."""
        return _decode(self.tokenizer, ids, skip_special_tokens=True)

    def _encode_prompt(self, prompt: str) -> tuple[int, ...]:
        own_ids = _plain_ids(self.tokenizer, prompt)
        if not own_ids:
            raise no_tokens("prompt", prompt)
        return own_ids if self._begins(own_ids) else self._leading + own_ids

    def _find_subject(
        self, encoded: EncodedPrompt, form: AskedForm, prompt: str, subject: str
    ) -> EncodedPrompt:
        # The form is there to be remembered: equal prompts may differ in it.
        subject = settled_subject(prompt, subject, self.tokenizer.all_special_tokens)
        spans = subject_spans(self.tokenizer, encoded.prompt, encoded.prompt_ids, prompt, subject)
        last = len(encoded.prompt_ids)
        return replace(
            encoded, subject_spans=spans or ((last - 1, last),), subject_missing=not spans
        )

    def _begins(self, own_ids: tuple[int, ...]) -> bool:
        """Whether a prompt brings the special tokens in front itself, as chat templates do."""
        count = len(self._leading)
        return len(own_ids) > count > 0 and own_ids[:count] == self._leading

    def _encode(self, prompt: str, answer: str, in_template: bool = False) -> EncodedPrompt:
        # A template writes all special tokens itself.
        own = _plain_ids(self.tokenizer, prompt) if in_template else ()
        prompt_ids = own or self._remembered_prompt(prompt)
        space = "" if prompt_ids[-1] in self._markers else space_between(prompt, answer)
        joined_ids = _plain_ids(self.tokenizer, f"{prompt}{space}{answer}")
        whole = in_template or self._begins(joined_ids)
        own_ids = prompt_ids if whole else prompt_ids[len(self._leading) :]
        if joined_ids[: len(own_ids)] == own_ids:
            answer_ids = joined_ids[len(own_ids) :]
        else:
            answer_ids = self._separate_answer_ids(own_ids, joined_ids, space, answer)
        if self.end_id is not None and answer_ids and answer_ids[-1] != self.end_id:
            answer_ids += (self.end_id,)
        self._require_known(prompt_ids, "prompt", prompt)
        self._require_known(answer_ids, "answer", answer)
        if self.max_length is not None and len(prompt_ids) + len(answer_ids) > self.max_length:
            raise PromptError(
                f"prompt {first_words(prompt)!r} has {len(prompt_ids)} tokens and its answer "
                f"{len(answer_ids)}, but the model's context holds {self.max_length}; shorten them"
            )
        form: AskedForm = "chat" if in_template else "plain"
        return EncodedPrompt(prompt, answer, prompt_ids, answer_ids, form)

    def _require_known(self, ids: tuple[int, ...], name: str, text: str) -> None:
        """Refuses tokens that were added to the tokenizer and not to the model."""
        if self.vocabulary is None or max(ids, default=0) < self.vocabulary:
            return
        token = _decode(self.tokenizer, [max(ids)], skip_special_tokens=False)
        raise PromptError(
            f"{name} {first_words(text)!r} has the token {token!r}, number {max(ids)}, but the "
            f"model has vectors for {self.vocabulary} tokens only: call "
            "model.resize_token_embeddings(len(tokenizer)) and save both, or take the model's own "
            "tokenizer"
        )

    def _separate_answer_ids(
        self, own_ids: tuple[int, ...], joined_ids: tuple[int, ...], space: str, answer: str
    ) -> tuple[int, ...]:
        """Encode the answer by itself so that, after the prompt, it reads as in the joined text.

        Whether the tokenizer supplies the space or we have to is settled by decoding, not by
        looking for a space marker, because markers differ between tokenizers.
        """
        wanted = _decode(self.tokenizer, joined_ids, skip_special_tokens=False)
        likeliest = _plain_ids(self.tokenizer, f"{space}{answer}")
        candidates = [likeliest, _plain_ids(self.tokenizer, answer)]
        if not space:
            candidates += self._behind_an_anchor(answer)
        for ids in candidates:
            if ids and _decode(self.tokenizer, own_ids + ids, skip_special_tokens=False) == wanted:
                return ids
        return likeliest

    def _behind_an_anchor(self, answer: str) -> Iterator[tuple[int, ...]]:
        """The answer's ids in the middle of a text, where no space marker is put in front."""
        for anchor in ("\n", ":", "a"):
            before = _plain_ids(self.tokenizer, anchor)
            both = _plain_ids(self.tokenizer, anchor + answer)
            if both[: len(before)] == before:
                yield both[len(before) :]


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """How many tokens a model has a vector for; None if it does not say."""
    vectors = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return vectors if isinstance(vectors, int) else None


def _checked(text: object, name: str) -> str:
    """Return ``text`` if it is a string with something in it that can be encoded."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be text, got {type(text).__name__}: {text!r:.60}")
    if len(text) > MAX_CHARACTERS:
        raise PromptError(
            f"{name} {first_words(text[:200])!r} has {len(text)} characters; at most "
            f"{MAX_CHARACTERS} are tokenised: shorten it"
        )
    if not text.strip():
        raise PromptError(f"{name} is blank ({text!r:.60}); give it at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} {first_words(text)!r} has half of a surrogate pair at character "
            f"{error.start}; repair the text, it is not valid Unicode"
        ) from error
    return text


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of the text alone. Too long a text is our error, not the tokenizer's warning."""
    return tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool
) -> str:
    # The clean-up would eat the space in front of punctuation. A list comes back for lists only.
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return cast(str, tokenizer.decode(list(ids), **options))


def _marker_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of added tokens that are marks and not words: special, or neither side a letter."""
    return frozenset(
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or not (token.content[:1].isalnum() or token.content[-1:].isalnum())
        if not token.content.isspace()
    )


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids the tokenizer puts in front of ordinary text, found by encoding such a text."""
    plain = _plain_ids(tokenizer, _ORDINARY_TEXT)
    full = tuple(tokenizer.encode(_ORDINARY_TEXT, verbose=False))
    # From the right: if the text were all unknown tokens and these also served as special token,
    # a special token in front is likelier than one behind.
    for start in range(len(full) - len(plain), -1, -1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ModelError(
        f"tokenizer {type(tokenizer).__name__} puts special tokens inside ordinary text "
        f"({list(plain)} became {list(full)}); use one that adds them only at the ends"
    )
