"""Greedy generation, against a loop of full forward passes over one prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from hiedit_env.model.generation import generate
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import all_bits, build_random, random_updates, resident, tokenizer

TEXTS = ("w5 w9 w4 w30 w12 w7", "w6", "w3 w3 w11", "w8 w9")


def greedy(
    model: PreTrainedModel, ids: Sequence[int], budget: int, ends: Collection[int] = (2,)
) -> list[int]:
    """New ids, without the first end token and what follows it."""
    new: list[int] = []
    for _ in range(budget):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] in ends:
            return new[:-1]
    return new


def expected(llm: ResidentLLM, texts: Sequence[str], budgets: Sequence[int]) -> list[str]:
    words = llm.tokenizer.convert_ids_to_tokens(list(range(32)))
    special = llm.tokenizer.all_special_tokens
    own = llm.model.generation_config.eos_token_id
    ends = {llm.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return [
        " ".join(
            words[i]
            for i in greedy(llm.model, [words.index(w) for w in text.split()], budget, ends)
            if words[i] not in special
        )
        for text, budget in zip(texts, budgets, strict=True)
    ]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gptj", "phi"])
def test_equals_a_loop_of_full_forwards(model_type: str) -> None:
    llm = resident(model_type, (1, 2))
    # Different prompt lengths and budgets in one batch, then in batches of two and of one.
    for budgets in ([6, 6, 6, 6], [3, 1, 6, 2]):
        wanted = expected(llm, TEXTS, budgets)
        assert len(set(wanted)) > 1
        assert llm.generate(TEXTS, budgets) == wanted
    llm.max_batch_tokens = 128
    assert llm.generate(TEXTS, budgets) == wanted
    assert llm.generate(TEXTS[:1], [4]) == expected(llm, TEXTS[:1], [4])


def test_shows_the_present_weights_and_changes_none() -> None:
    llm = resident("llama", (1, 2))
    budgets = [4] * len(TEXTS)
    before = llm.generate(TEXTS, budgets)
    llm.commit(random_updates(llm))
    bits = all_bits(llm.model)
    after = llm.generate(TEXTS, budgets)
    assert after == expected(llm, TEXTS, budgets) != before
    with llm.unedited():
        assert llm.generate(TEXTS, budgets) == before
    assert all_bits(llm.model) == bits


@pytest.mark.parametrize("pad", ["<p>", None])
def test_ends_at_the_end_of_sequence_token_whatever_pads_the_batch(pad: str | None) -> None:
    """Without a padding token something else fills the rows that ended; it must not be read."""
    model = build_random("llama")
    # The end-of-sequence token is one that the first prompt's continuation meets early.
    ids = [5, 9, 4, 30, 12, 7]
    free = greedy(model, ids, 6)
    eos = next(t for place, t in enumerate(free) if 0 < place < 4 and t not in free[:place])
    llm = resident("llama", model=model, tokens=tokenizer(eos=f"w{eos}", pad=pad))
    wanted = expected(llm, TEXTS, [6] * 4)
    lengths = [len(text.split()) for text in wanted]
    assert min(lengths) < 4
    assert max(lengths) == 6
    assert llm.generate(TEXTS, [6] * 4) == wanted


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("pad", ["<p>", None])
def test_ends_at_the_end_tokens_of_tokenizer_and_model(pad: str | None, several: bool) -> None:
    """Chat models often have more of them than their tokenizer knows."""
    model = build_random("llama")
    free = greedy(model, [6], 6)  # of TEXTS[1]
    first, second = free[1], free[3]
    assert len(set(free)) == 6
    llm = resident("llama", model=model, tokens=tokenizer(eos=f"w{second}", pad=pad))
    for own, ends in ((None, {second}), (2, {2, second}), (first, {first, second})):
        model.generation_config.eos_token_id = [own, 31] if several and own is not None else own
        assert llm.end_ids == ends | ({31} if several and own is not None else set())
        wanted = expected(llm, TEXTS, [6] * 4)
        assert llm.generate(TEXTS, [6] * 4) == wanted
    # By the tokenizer's token alone it has three words.
    assert len(wanted[1].split()) == 1


def test_a_model_without_any_end_token_uses_its_budget() -> None:
    llm = resident("llama", (1, 2))
    llm.tokenizer.eos_token = None
    llm.model.generation_config.eos_token_id = None
    assert llm.end_ids == frozenset()
    assert llm.generate(TEXTS, [6] * 4) == expected(llm, TEXTS, [6] * 4)


def test_settings_that_come_with_a_model_do_not_change_greedy_decoding() -> None:
    """Chat models bring sampling settings and penalties; Qwen2.5 a repetition penalty of 1.05."""
    llm = resident("llama", (1, 2))
    wanted = expected(llm, TEXTS, [6] * 4)
    own = llm.model.generation_config
    own.do_sample, own.temperature, own.top_k = True, 0.6, 1
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 6
    own.suppress_tokens = [int(word[1:]) for word in wanted[0].split()]
    kept = copy.deepcopy(own)
    assert llm.generate(TEXTS, [6] * 4) == wanted
    assert llm.model.generation_config is own
    assert own.to_dict() == kept.to_dict()


def test_stops_at_the_end_of_the_context() -> None:
    """GPT-2 has 32 positions here; a text may end there, but nothing may fail."""
    llm = resident("gpt2", (1, 2))
    long = " ".join(["w5"] * 30)
    # 30 tokens are read, so position 31 is the last to be read and predicts a third new token.
    (text,) = llm.generate([long], [8])
    assert text == expected(llm, [long], [3])[0]
    texts = llm.generate([long, "w6"], [8, 8])
    assert texts[0] == text
    assert texts[1] == expected(llm, ["w6"], [8])[0]


def test_no_prompts_give_no_texts() -> None:
    assert resident().generate([], []) == []


def test_encoded_prompts_are_continued_by_their_own_tokens() -> None:
    """Ids 9 4 and a text that names others: the text plays no part."""
    llm = resident("llama", (1, 2))
    encoded = EncodedPrompt("w30 w12", "w3", prompt_ids=(9, 4), answer_ids=(3,))
    wanted = expected(llm, ["w9 w4", "w6"], [5, 3])
    assert llm.generate([encoded, "w6"], [5, 3]) == wanted
    assert llm.generate(["w30 w12"], [5]) != wanted[:1]


def test_a_pass_holds_a_bounded_number_of_tokens() -> None:
    llm = resident("llama", model=build_random("llama", max_position_embeddings=512))
    texts = [" ".join([f"w{3 + i}"] * length) for i, length in enumerate((40, 5, 40, 6, 200, 40))]
    sizes: list[tuple[int, int]] = []
    hook = llm.model.register_forward_pre_hook(
        lambda _, __, named: sizes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    found = generate(llm.model, llm.encoder, texts, [3] * len(texts), 16, 100)
    hook.remove()
    begun = [size for size in sizes if size[1] > 1]
    # Padded to the longest, with three new tokens; what is longer goes alone.
    assert all(count * (length + 3) <= 100 or count == 1 for count, length in begun)
    assert sum(count for count, _ in begun) == len(texts)
    assert len(begun) < len(texts)
    alone = [generate(llm.model, llm.encoder, [text], [3], 1)[0] for text in texts]
    assert found == alone
