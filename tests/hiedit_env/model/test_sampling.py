"""Texts that a model writes itself, against drawing token by token from full forward passes."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hiedit_env.errors import PromptError
from hiedit_env.model.sampling import chat_beginning, sampled_texts, text_beginning
from tests.support.models import resident

TEMPLATE = "{% for m in messages %}w5 {{ m['content'] }} w2 {% endfor %}"


def test_draws_are_those_of_the_models_own_distribution() -> None:
    llm = resident("llama", (1, 2))
    texts = sampled_texts(llm.model, [(3,)] * 4000, 3, 0, max_batch=500)
    with torch.no_grad():
        first = torch.softmax(llm.model(input_ids=torch.tensor([[3]])).logits[0, -1], -1)
    drawn = torch.bincount(torch.tensor([t.prompt_ids[1] for t in texts]), minlength=len(first))
    # Five standard errors of a share.
    bound = 5 * (first * (1 - first) / 4000).sqrt() + 1e-3
    assert ((drawn / 4000 - first).abs() <= bound).all()
    most = int(drawn.argmax())
    rows = [t.answer_ids[0] for t in texts if t.prompt_ids[1] == most]
    with torch.no_grad():
        second = torch.softmax(llm.model(input_ids=torch.tensor([[3, most]])).logits[0, -1], -1)
    shares = torch.bincount(torch.tensor(rows), minlength=len(second)) / len(rows)
    assert ((shares - second).abs() <= 5 * (second / len(rows)).sqrt() + 1e-3).all()


def test_beginnings_of_several_lengths_in_order_and_the_same_for_a_seed() -> None:
    llm = resident("llama", (1, 2))
    beginnings = [(3, 4, 5), (6,), (7, 8), (9,), (10, 11, 12)]
    before = torch.random.get_rng_state()
    seen: list[int] = []
    texts = sampled_texts(llm.model, beginnings, 9, 1, max_batch=2, on_texts=seen.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    for beginning, text in zip(beginnings, texts, strict=True):
        assert text.prompt_ids[: len(beginning)] == beginning
        # An end token ends nothing.
        assert len(text.prompt_ids) + len(text.answer_ids) == 9
    assert sum(seen) == 5
    assert sampled_texts(llm.model, beginnings, 9, 1, max_batch=2) == texts
    assert sampled_texts(llm.model, beginnings, 9, 2, max_batch=2) != texts


def test_without_a_cache_the_draws_are_of_the_same_distribution() -> None:
    llm = resident("llama", (1, 2))
    texts = sampled_texts(llm.model, [(3, 4)] * 600, 3, 0, use_cache=False)
    with torch.no_grad():
        wanted = torch.softmax(llm.model(input_ids=torch.tensor([[3, 4]])).logits[0, -1], -1)
    shares = torch.bincount(torch.tensor([t.answer_ids[0] for t in texts]), minlength=len(wanted))
    bound = 5 * (wanted * (1 - wanted) / 600).sqrt() + 1e-3
    assert ((shares / 600 - wanted).abs() <= bound).all()


def test_a_model_without_a_cache_writes_one_at_a_time() -> None:
    llm = resident("llama", (1, 2))
    seen: list[int] = []
    texts = sampled_texts(llm.model, [(3,), (4,)], 6, 1, use_cache=False, on_texts=seen.append)
    assert [len(t.prompt_ids) for t in texts] == [5, 5]
    assert seen == [1, 1]


def test_a_text_that_is_too_short_has_one_new_token() -> None:
    llm = resident("llama", (1, 2))
    (text,) = sampled_texts(llm.model, [(3, 4, 5)], 2, 0)
    assert text.prompt_ids == (3, 4, 5)


def test_where_texts_and_chats_begin() -> None:
    llm = resident("llama", (1, 2))
    tokenizer = llm.encoder.tokenizer
    assert text_beginning(llm.encoder) == (tokenizer.bos_token_id,)
    assert chat_beginning(llm.encoder) is None
    tokenizer.chat_template = TEMPLATE
    assert chat_beginning(llm.encoder) == (tokenizer.convert_tokens_to_ids("w5"),)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert text_beginning(llm.encoder) == (tokenizer.convert_tokens_to_ids("<|endoftext|>"),)
    # What the tokenizer itself begins with goes before.
    tokenizer._tokenizer.post_processor = TemplateProcessing("<e> $A", None, [("<e>", 2)])
    assert tokenizer("w5")["input_ids"][0] == tokenizer.eos_token_id == 2
    assert text_beginning(llm.encoder) == (2,)


def test_a_template_that_does_not_write_the_message_begins_nothing() -> None:
    llm = resident("llama", (1, 2))
    llm.encoder.tokenizer.chat_template = "w5"
    assert chat_beginning(llm.encoder) is None


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    llm = resident("llama", (1, 2))
    tokenizer = llm.encoder.tokenizer
    for name in ("bos_token", "eos_token"):
        setattr(tokenizer, name, None)
    with pytest.raises(PromptError, match="no token"):
        text_beginning(llm.encoder)
