"""Texts that a model writes itself, by sampling: what it reads when nobody asks about a fact.

A few hundred prompts of one kind show little of what a model reads elsewhere. Its own texts need no
data: begun from nothing they are plain text, and begun where a chat template expects the user's
message they are chats, the user's turn included (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hiedit_env.errors import PromptError
from hiedit_env.model.asking import chat_text
from hiedit_env.model.encoded import EncodedPrompt
from hiedit_env.model.tokenization import PromptEncoder

#: What stands for the user's message in a template.
_MESSAGE = "What is a fact?"

#: Tokens that a text of a model's training stands behind, where the tokenizer has one.
_BETWEEN = ("<|begin_of_text|>", "<|endoftext|>", "<|end_of_text|>", "<s>")


def text_beginning(encoder: PromptEncoder) -> tuple[int, ...]:
    """The token that a plain text is begun behind.

    The one that the tokenizer puts in front of every text, else one that stands between texts in
    training, else its token for the beginning or the end.

    Raises:
        PromptError: the tokenizer has none of these.
    """
    tokenizer = encoder.tokenizer
    whole, own = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    if len(whole) > len(own) and whole[:1] != own[:1]:
        return (int(whole[0]),)
    known = tokenizer.get_added_vocab()
    for token in _BETWEEN:
        if token in known:
            return (int(known[token]),)
    for last in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if last is not None:
            return (int(last),)
    raise PromptError("the tokenizer has no token that a text begins or ends with")


def chat_beginning(encoder: PromptEncoder) -> tuple[int, ...] | None:
    """The tokens of a chat up to the user's message; None without a template."""
    if not getattr(encoder.tokenizer, "chat_template", None):
        return None
    before, found, _ = chat_text(encoder.tokenizer, _MESSAGE).partition(_MESSAGE)
    if not found:
        return None
    return tuple(encoder.tokenizer(before, add_special_tokens=False)["input_ids"]) or None


def beginnings(encoder: PromptEncoder, number: int) -> list[tuple[int, ...]]:
    """What N texts begin with: nothing, and where there is a template a user's turn, in turns.

    Raises:
        PromptError: as :func:`text_beginning`; not for no texts.
    """
    if not number:
        return []
    plain, chat = text_beginning(encoder), chat_beginning(encoder)
    forms = [plain] if chat is None else [plain, chat]
    return [forms[i % len(forms)] for i in range(number)]


@torch.inference_mode()
def sampled_texts(
    model: PreTrainedModel,
    beginnings: Sequence[Sequence[int]],
    length: int,
    seed: int,
    *,
    max_batch: int = 32,
    use_cache: bool = True,
    on_texts: Callable[[int], None] | None = None,
) -> list[EncodedPrompt]:
    """Texts drawn from the model's own distribution, token by token, whatever ends come in between.

    The same seed gives the same texts on the same machine; torch's own random state is left alone.

    Args:
        model: Causal LM.
        beginnings: Tokens that each text begins with, at least one.
        length: Number of tokens of every text, its beginning included.
        seed: Of the draws.
        max_batch: Most texts that are written at once.
        use_cache: Whether keys and values of earlier tokens are kept; slower, but right, without,
            where a model's cache does not work.
        on_texts: Called with the number of texts after every few of them.

    Returns:
        One per beginning, in order, whose last token counts as its answer.
    """
    device = model.device
    texts: dict[int, list[int]] = {}
    like = sorted(range(len(beginnings)), key=lambda i: len(beginnings[i]))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        # Texts of one batch begin with as many tokens, so that nothing has to be padded.
        for size, same in itertools.groupby(like, key=lambda i: len(beginnings[i])):
            places, new = list(same), max(length - size, 1)
            batch = max_batch if use_cache else 1
            for start in range(0, len(places), batch):
                part = places[start : start + batch]
                ids = torch.tensor([list(beginnings[i]) for i in part], device=device)
                output = _with_cache(model, ids, new) if use_cache else _without(model, ids, new)
                texts.update(zip(part, output.tolist(), strict=True))
                if on_texts is not None:
                    on_texts(len(part))
    return [
        EncodedPrompt("", "", tuple(texts[i][:-1]), (texts[i][-1],)) for i in range(len(beginnings))
    ]


def _with_cache(model: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
    """B × (T + new) tokens; the model's own generation settings are in place again afterwards."""
    make_config = cast(Any, GenerationConfig)  # untyped in transformers
    config = make_config(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new, pad_token_id=0
    )
    own, model.generation_config = model.generation_config, make_config()
    try:
        generate = cast(Any, model).generate
        output: Tensor = generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    finally:
        model.generation_config = own
    return output


def _without(model: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
    """The same by whole passes."""
    for _ in range(new):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), 1)
    return ids
