"""Text to tokens, against ids written down by hand from small literal vocabularies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Base
from transformers import PreTrainedTokenizerFast as Fast

from hiedit_env.datasets.writing import MAX_CHARACTERS, space_between
from hiedit_env.errors import ModelError, PromptError, SettingsError
from hiedit_env.model import tokenization
from hiedit_env.model.batches import length_buckets, make_batch
from hiedit_env.model.tokenization import EncodedPrompt, PromptEncoder

Ids = tuple[int, ...]

# Byte-level BPE: id 0 is special, byte b is id b + 1, merged tokens follow from 257.
BYTE_MERGES = [("Ġ", "i"), ("Ġi", "s"), ("Ġ", "L"), ("ĠL", "y"), ("o", "n"), ("ĠLy", "on")]
G_I, G_IS, G_L, G_LY, ON, G_LYON, S_G = range(257, 264)


def byte_symbol(byte: int) -> str:
    """GPT-2's stand-in for a byte: itself if printable, else the next character from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def byte_level(straddling: bool = False) -> Fast:
    """GPT-2's kind; ``straddling`` lets the token "s␣" run across the end of a prompt."""
    vocabulary = {"<|endoftext|>": 0, **{byte_symbol(b): b + 1 for b in range(256)}}
    for left, right in BYTE_MERGES:
        vocabulary[left + right] = len(vocabulary)
    vocabulary["sĠ"] = len(vocabulary)
    merges = [("s", "Ġ"), *BYTE_MERGES] if straddling else BYTE_MERGES
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=not straddling)
    backend.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=backend, eos_token="<|endoftext|>")


# SentencePiece-style BPE: ids 0 to 2 are special, byte b is id b + 3, pieces follow from 259.
PIECES = ["▁", "I", "t", "i", "s", "L", "y", "o", "n", "?"]
PIECE_MERGES = [("▁", "I"), ("▁I", "t"), ("▁", "i"), ("▁i", "s"), ("▁", "L"), ("▁L", "y")]
PIECE_MERGES += [("o", "n"), ("▁Ly", "on")]
SPACE, S, Y, QUESTION = 259, 263, 265, 268
M_I, M_IT, M_II, M_IS, M_L, M_LY, M_ON, M_LYON, S_M = range(269, 278)


def wrap(backend: Tokenizer, template: str) -> Fast:
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return Fast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(kind: str, template: str = "<s> $A", straddling: bool = False) -> Fast:
    """Llama-2's kind. ``kind`` says who puts the marker "▁" in front of a text.

    "always" and "first" are the schemes of Metaspace, "normalizer" is the older Prepend, which
    adds a marker even where there is one, and "none" is Gemma's kind without such a marker.
    """
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    names += [left + right for left, right in PIECE_MERGES] + ["s▁"]
    merges = [("s", "▁"), *PIECE_MERGES] if straddling else PIECE_MERGES
    vocabulary = {name: i for i, name in enumerate(names)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(bpe)
    if kind in ("always", "first"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", kind, split=not straddling)
    else:
        prepend = [normalizers.Prepend("▁")] if kind == "normalizer" else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if kind != "none" else []
    backend.decoder = decoders.Sequence(steps + strip)
    return wrap(backend, template)


def unigram(template: str) -> Fast:
    """T5's kind: Unigram pieces, no byte fallback."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [("▁It", -1.0), ("▁is", -1.0), ("▁Lyon", -1.0), ("▁", -2.0), ("?", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return wrap(backend, template)


def ids_of(tokenizer: Base, prompt: str, answer: str) -> tuple[Ids, ...]:
    """(prompt_ids, answer_ids), after checking that free generation starts from the same ids."""
    encoder = PromptEncoder(tokenizer, max_length=None)
    encoded = encoder.encode(prompt, answer)
    assert encoder.encode_prompt(prompt) == encoded.prompt_ids
    return encoded.prompt_ids, encoded.answer_ids


@pytest.mark.parametrize(
    ("prompt", "answer", "prompt_ids", "answer_ids"),
    [
        ("It is", "Lyon", (74, 117, G_IS), (G_LYON,)),
        # White space at the end of a prompt belongs to it, and no space follows: L, y, "on".
        ("It is ", "Lyon", (74, 117, G_IS, 33), (77, 122, ON)),
        ("It is\n\t", "  Lyon", (74, 117, G_IS, 11, 10), (77, 122, ON)),
        ("It is\n", "Lyon", (74, 117, G_IS, 11), (77, 122, ON)),
        ("It is", "  Lyon", (74, 117, G_IS), (G_LYON,)),
        # Elsewhere it stays: a space in front, two spaces inside.
        (" It is", "Lyon", (33, 74, 117, G_IS), (G_LYON,)),
        ("It", "is  Lyon", (74, 117), (G_IS, 33, G_LYON)),
        ("Is it?", "Lyon", (74, 116, G_I, 117, 64), (G_LYON,)),  # I, s, " i", t, "?"
        ("It is", "Lyons", (74, 117, G_IS), (G_LYON, 116)),  # " Lyon", s
        # UTF-8: 東 is E6 9D B1, 京 is E4 BA AC, é is C3 A9. The space is there all the same.
        ("It is", "東京", (74, 117, G_IS), (33, 231, 158, 178, 229, 187, 173)),
        ("東", "é", (231, 158, 178), (33, 196, 170)),
        # No space where both meet in a script without spaces.
        ("東", "京", (231, 158, 178), (229, 187, 173)),
    ],
)
def test_byte_level_ids(prompt: str, answer: str, prompt_ids: Ids, answer_ids: Ids) -> None:
    assert ids_of(byte_level(), prompt, answer) == (prompt_ids, answer_ids)


@pytest.mark.parametrize("kind", ["always", "first", "normalizer"])
@pytest.mark.parametrize(
    ("prompt", "answer", "prompt_ids", "answer_ids"),
    [
        ("It is", "Lyon", (1, M_IT, M_IS), (M_LYON,)),
        ("It is", " Lyon", (1, M_IT, M_IS), (M_LYON,)),
        ("It?", "Lyon", (1, M_IT, QUESTION), (M_LYON,)),
        ("It is", "Lys on", (1, M_IT, M_IS), (M_LY, S, SPACE, M_ON)),  # "▁Ly", s, "▁", on
        ("It is", "東", (1, M_IT, M_IS), (SPACE, 233, 160, 180)),  # its bytes plus 3
    ],
)
def test_sentencepiece_ids(
    kind: str, prompt: str, answer: str, prompt_ids: Ids, answer_ids: Ids
) -> None:
    assert ids_of(sentencepiece(kind), prompt, answer) == (prompt_ids, answer_ids)


@pytest.mark.parametrize("kind", ["always", "first", "normalizer", "none"])
def test_sentencepiece_prompts_that_end_in_white_space(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    start = (1, 260, 261, M_IS) if kind == "none" else (1, M_IT, M_IS)
    # The marker of the space belongs to the prompt, and the answer has none: L, y, o, n merged.
    assert ids_of(tokenizer, "It is ", "Lyon") == ((*start, SPACE), (264, Y, M_ON))
    # Byte 10 plus 3.
    assert ids_of(tokenizer, "It is\n", "Lyon") == ((*start, 13), (264, Y, M_ON))


def with_chat_template(tokenizer: Fast) -> Fast:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    return tokenizer


@pytest.mark.parametrize("end", ["\n", "\n\n", " ", ""])
@pytest.mark.parametrize("answer", ["Lyon", "on Lyon", "東京"])
@pytest.mark.parametrize("kind", ["byte-level", "straddling", "always", "first", "normalizer"])
def test_a_prompt_in_chat_form_has_the_tokens_of_its_template(
    kind: str, answer: str, end: str
) -> None:
    """Against ``apply_chat_template``: same prompt ids, and the whole reads prompt + answer."""
    if kind in ("byte-level", "straddling"):
        tokenizer = with_chat_template(byte_level(straddling=kind == "straddling"))
    else:
        tokenizer = with_chat_template(sentencepiece(kind))
        end = end.replace(" ", "\n")
    begin = tokenizer.bos_token or ""
    tokenizer.chat_template = (
        f"{begin}{{% for m in messages %}}<|user|>{{{{ m['content'] }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|bot|>{{ '" + end.replace("\n", "\\n") + "' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "It is?"}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    prompt_ids, answer_ids = ids_of(tokenizer, given, answer)
    assert list(prompt_ids) == ids["input_ids"]
    both = tokenizer.decode([*prompt_ids, *answer_ids], clean_up_tokenization_spaces=False)
    alone = tokenizer.decode(list(prompt_ids), clean_up_tokenization_spaces=False)
    assert both.removeprefix(alone).removeprefix(" ") == answer  # a marker may bring its own space


def test_no_space_behind_a_marker_token_but_behind_an_added_word() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|bot|>"]})
    tokenizer.add_tokens(["Velmora"])
    marker, word = tokenizer.convert_tokens_to_ids(["<|bot|>", "Velmora"])
    assert ids_of(tokenizer, "It<|bot|>", "Lyon") == ((74, 117, marker), (77, 122, ON))
    assert ids_of(tokenizer, "It Velmora", "Lyon") == ((74, 117, 33, word), (G_LYON,))


def test_a_prompt_that_brings_the_first_special_token_has_it_once() -> None:
    tokenizer = sentencepiece("first")
    assert ids_of(tokenizer, "<s>It is", "Lyon")[0].count(1) == 1
    assert ids_of(tokenizer, "<s>It is", "Lyon")[1] == (M_LYON,)


def test_answer_is_encoded_apart_when_a_token_straddles_the_space() -> None:
    tokenizer = byte_level(straddling=True)
    # Jointly: I, t, " i", "s␣", L, y, on. The prompt alone ends in " is".
    assert tokenizer.encode("It is Lyon") == [74, 117, G_I, S_G, 77, 122, ON]
    assert ids_of(tokenizer, "It is", "Lyon") == ((74, 117, G_IS), (G_LYON,))


@pytest.mark.parametrize("kind", ["always", "first", "normalizer", "none"])
def test_answer_encoded_apart_has_one_space_marker(kind: str) -> None:
    tokenizer = sentencepiece(kind, straddling=True)
    joined = tokenizer.encode("It is Lyon", add_special_tokens=False)
    assert joined[-4:] == [S_M, 264, Y, M_ON]  # "s▁", L, y, on
    if kind == "normalizer":  # it really doubles the marker, or this would prove nothing
        assert tokenizer.encode(" Lyon", add_special_tokens=False) == [SPACE, M_LYON]
    first = (260, 261) if kind == "none" else (M_IT,)
    assert ids_of(tokenizer, "It is", "Lyon") == ((1, *first, M_IS), (M_LYON,))


@pytest.mark.parametrize(
    ("template", "leading"), [("$A", ()), ("<s> $A", (1,)), ("$A </s>", ()), ("<s> $A </s>", (1,))]
)
def test_special_tokens_are_kept_in_front_and_dropped_behind(template: str, leading: Ids) -> None:
    bpe = sentencepiece("always", template)
    assert ids_of(bpe, "It is", "Lyon") == ((*leading, M_IT, M_IS), (M_LYON,))
    # Unigram ids: ▁It 3, ▁is 4, ▁Lyon 5, ▁ 6, ? 7, and 0 for the unknown 東.
    assert ids_of(unigram(template), "It is?", "Lyon Lyon") == ((*leading, 3, 4, 7), (5, 5))
    assert ids_of(unigram(template), "It", "東") == ((*leading, 3), (6, 0))


def test_slow_tokenizer_with_end_token() -> None:
    """ByT5 is plain Python: byte b is id b + 3, and a 1 ends every text."""
    tokenizer = ByT5Tokenizer()
    assert tokenizer.encode("It") == [76, 119, 1]
    assert ids_of(tokenizer, "It", "a") == ((76, 119), (35, 100))


def test_padding_and_truncation_stored_with_a_tokenizer_have_no_effect() -> None:
    tokenizer = byte_level()
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.enable_padding(length=9, direction="left")
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert ids_of(tokenizer, "It is", "Lyon") == ((74, 117, G_IS), (G_LYON,))


def test_decode_skips_special_tokens_and_keeps_spaces() -> None:
    encoder = PromptEncoder(sentencepiece("always"), None)
    assert encoder.decode([1, M_IT, M_IS, SPACE, QUESTION, 2]) == "It is ?"
    assert PromptEncoder(unigram("$A"), None).decode((3, 6, 7)) == "It ?"
    assert encoder.decode(()) == ""


ENCODERS = {flag: PromptEncoder(byte_level(straddling=flag), None) for flag in (False, True)}
ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
MERGED = st.lists(st.sampled_from("Iits Lyon?"), min_size=1, max_size=8).map("".join)
TEXTS = (ANY | MERGED).filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("straddling", [False, True])
@given(prompt=TEXTS, answer=TEXTS)
def test_byte_level_round_trip(straddling: bool, prompt: str, answer: str) -> None:
    encoder = ENCODERS[straddling]
    encoded = encoder.encode(prompt, answer)
    text = encoder.decode(encoded.prompt_ids + encoded.answer_ids)
    assert text == prompt + space_between(prompt, answer.lstrip()) + answer.lstrip()
    assert (encoded.prompt, encoded.answer) == (prompt, answer.lstrip())


def test_encodings_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_REMEMBERED", 2)
    encoder = PromptEncoder(byte_level(), None)
    first = encoder.encode("It", "is")
    assert encoder.encode("It", " is") is first
    encoder.encode("It", "Lyon")
    encoder.encode("It", "on")
    assert encoder.encode("It", "is") is not first
    assert encoder.encode("It", "is") == first


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        ("", "Lyon", "prompt is blank"),
        (" \n\u3000", "Lyon", "prompt is blank"),
        ("It is", "", "answer is blank"),
        ("It is", " \t", "answer is blank"),
        (None, "Lyon", "prompt must be text, got NoneType"),
        (["It is"], "Lyon", "prompt must be text, got list"),
        ("It is", 7, "answer must be text, got int: 7"),
        ("It is", "a\ud83d", "answer .* half of a surrogate pair at character 1"),
    ],
)
def test_bad_texts(prompt: object, answer: object, words: str) -> None:
    encoder = PromptEncoder(byte_level(), None)
    with pytest.raises(PromptError, match=words):
        encoder.encode(prompt, answer)  # type: ignore[arg-type]
    alone = prompt if words.startswith("prompt") else answer
    with pytest.raises(PromptError, match=words.removeprefix("prompt").removeprefix("answer")):
        encoder.encode_prompt(alone)  # type: ignore[arg-type]


def test_texts_of_many_characters_are_refused_before_they_are_tokenised() -> None:
    encoder = PromptEncoder(byte_level(), None)
    long = "a" * (MAX_CHARACTERS + 1)
    with pytest.raises(PromptError, match=r"prompt 'aaa.*' has 200001 characters; at most 200000"):
        encoder.encode(long, "b")
    with pytest.raises(PromptError, match=r"answer 'aaa.*' has 200001 characters"):
        encoder.encode("b", long)


def test_text_without_tokens() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "It": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace("\u200b", "")  # a zero-width space is not blank
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = PromptEncoder(Fast(tokenizer_object=backend), None)
    for prompt, answer, culprit in (("It", "\u200b", "answer"), ("\u200b", "It", "prompt")):
        with pytest.raises(PromptError, match=f"{culprit} .* yields no tokens"):
            encoder.encode(prompt, answer)
    with pytest.raises(PromptError, match=r"prompt .* yields no tokens"):
        encoder.encode_prompt("\u200b")
    for prompt_ids, answer_ids, culprit in (((1,), (), "answer 'b'"), ((), (1,), "prompt 'a'")):
        with pytest.raises(PromptError, match=f"{culprit} yields no tokens"):
            EncodedPrompt("a", "b", prompt_ids, answer_ids)


def test_tokens_that_the_model_has_no_vector_for() -> None:
    tokenizer = byte_level()
    count = len(tokenizer)
    tokenizer.add_tokens(["Velmora"])
    encoder = PromptEncoder(tokenizer, max_length=None, vocabulary=count)
    assert encoder.encode("It is", "Lyon").answer_ids
    said = rf"'Velmora', number {count}, but the model has vectors for {count} tokens only"
    with pytest.raises(PromptError, match=rf"answer 'Velmora' has the token {said}.*resize_token"):
        encoder.encode("It is", "Velmora")
    with pytest.raises(PromptError, match=rf"prompt 'Velmora is' has the token {said}"):
        encoder.encode_prompt("Velmora is")


def test_context_length() -> None:
    tokenizer = byte_level()  # "It is" has 3 tokens, " Lyons" has 2
    assert PromptEncoder(tokenizer, 5).encode("It is", "Lyons").length == 4
    with pytest.raises(PromptError, match=r"'It is' has 3 tokens and its answer 2, .* holds 4"):
        PromptEncoder(tokenizer, 4).encode("It is", "Lyons")
    assert len(PromptEncoder(tokenizer, 4).encode_prompt("It is")) == 3
    with pytest.raises(PromptError, match=r"'It is' has 3 tokens and leaves no room .* of 3"):
        PromptEncoder(tokenizer, 3).encode_prompt("It is")
    with pytest.raises(PromptError, match=r"'a a a a a a a a\.\.\.' has 19 tokens"):
        PromptEncoder(tokenizer, 8).encode("a " * 9 + "a", "b")


@pytest.mark.parametrize("max_length", [0, -1, True, 8.0, "8"])
def test_bad_context_length(max_length: object) -> None:
    with pytest.raises(SettingsError, match="max_length must be a positive int"):
        PromptEncoder(byte_level(), max_length)  # type: ignore[arg-type]


def test_tokenizer_with_special_tokens_inside_is_refused() -> None:
    class Interleaving(ByT5Tokenizer):
        def build_inputs_with_special_tokens(self, ids: list[int], *_: object) -> list[int]:
            return [new for old in ids for new in (old, 1)]

    with pytest.raises(ModelError, match="special tokens inside ordinary text"):
        PromptEncoder(Interleaving(), None)


THREE = (
    EncodedPrompt("a", "x", (1, 10, 11), (20, 21)),
    EncodedPrompt("b", "y", (1, 12), (22,)),
    EncodedPrompt("c", "z", (13,), (23, 24, 25)),
)


def test_batch_tensors_by_hand() -> None:
    batch = make_batch(THREE, "cpu", pad_id=9)
    assert batch.prompts == THREE
    assert batch.input_ids.tolist() == [[1, 10, 11, 20], [1, 12, 9, 9], [13, 23, 24, 9]]
    assert batch.lengths.tolist() == [4, 2, 3]
    assert batch.rows.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.positions.tolist() == [2, 3, 1, 0, 1, 2]
    assert batch.labels.tolist() == [20, 21, 22, 23, 24, 25]
    assert batch.answer_lengths.tolist() == [2, 1, 3]
    for tensor in (batch.input_ids, batch.rows, batch.positions, batch.labels, batch.lengths):
        assert tensor.dtype == torch.int64
    assert make_batch(THREE, torch.device("meta")).labels.device.type == "meta"


def test_empty_batch_and_empty_bucket_are_refused() -> None:
    with pytest.raises(PromptError, match="at least one prompt"):
        make_batch([], "cpu")
    with pytest.raises(SettingsError, match="max_tokens must be at least 1, got 0"):
        length_buckets(THREE, 0)


def test_mean_per_prompt_and_its_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0, 8.0], requires_grad=True)
    means = make_batch(THREE, "cpu").column_means(values[:, None])[:, 0]
    assert means.tolist() == [1.5, 5.0, 5.0]
    (means * torch.tensor([2.0, 7.0, 6.0])).sum().backward()
    assert values.grad is not None  # weight of the row over its number of tokens
    assert values.grad.tolist() == [1.0, 1.0, 7.0, 2.0, 2.0, 2.0]


def test_all_per_prompt() -> None:
    batch = make_batch(THREE, "cpu")
    for correct, expected in [
        ([1, 1, 1, 1, 1, 1], [True, True, True]),
        ([1, 1, 0, 1, 1, 1], [True, False, True]),
        ([0, 1, 1, 1, 1, 0], [False, True, False]),
    ]:
        result = batch.to_rows(torch.tensor(correct, dtype=torch.bool), fill=True).all(dim=1)
        assert result.dtype == torch.bool
        assert result.tolist() == expected


@pytest.mark.parametrize("shape", [(), (1,), (5,), (6, 1)])
def test_wrong_shape_is_refused(shape: Ids) -> None:
    with pytest.raises(SettingsError, match=r"shape must be \(6,\)"):
        make_batch(THREE, "cpu").to_rows(torch.ones(shape), fill=0.0)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random Llama that attends widely: its weights are ten times the usual size."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


PAIRS = [("It is", "Lyon"), ("Is it? Is it?", "東京"), ("L", "on"), ("Lyon is", "Lyons is")]


@pytest.mark.parametrize("pad_id", [0, 200])
def test_padding_never_changes_a_real_position(model: LlamaForCausalLM, pad_id: int) -> None:
    encoder = PromptEncoder(byte_level(), 64)
    batch = make_batch([encoder.encode(*pair) for pair in PAIRS], "cpu", pad_id=pad_id)
    with torch.inference_mode():
        together = model(input_ids=batch.input_ids, use_cache=False).logits
        for row, prompt in enumerate(batch.prompts):
            alone = model(input_ids=torch.tensor([prompt.input_ids]), use_cache=False).logits[0]
            assert alone.std() > 0.1
            torch.testing.assert_close(together[row, : prompt.length], alone, rtol=1e-5, atol=1e-5)


def test_loss_agrees_with_the_library(model: LlamaForCausalLM) -> None:
    """Mean answer loss, against transformers' own with -100 on everything but the answer."""
    encoder = PromptEncoder(byte_level(), 64)
    batch = make_batch([encoder.encode(*pair) for pair in PAIRS], "cpu")
    with torch.inference_mode():
        picked = model(input_ids=batch.input_ids).logits[batch.rows, batch.positions]
        losses = torch.nn.functional.cross_entropy(picked, batch.labels, reduction="none")
        ours = batch.column_means(losses[:, None])[:, 0]
        theirs = []
        for prompt in batch.prompts:
            ids = torch.tensor([prompt.prompt_ids + prompt.answer_ids])
            labels = ids.clone()
            labels[:, : len(prompt.prompt_ids)] = -100
            theirs.append(model(input_ids=ids, labels=labels, use_cache=False).loss)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-5)


def of_length(length: int) -> EncodedPrompt:
    return EncodedPrompt("a", "b", (1,) * length, (2,))


def test_buckets_by_hand() -> None:
    prompts = [of_length(n) for n in (5, 2, 3, 5, 30, 2)]
    # Sorted: 2 2 3 5 5 30. Padded to 3 the first three make 9; with a 5 they would make 20.
    assert length_buckets(prompts, 10) == [[1, 5, 2], [0, 3], [4]]
    assert length_buckets(prompts, 9) == [[1, 5, 2], [0], [3], [4]]
    assert length_buckets(prompts, 1) == [[1], [5], [2], [0], [3], [4]]
    assert length_buckets(prompts, 180) == [[1, 5, 2, 0, 3, 4]]
    assert length_buckets([], 10) == []


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 60))
def test_buckets_hold_what_they_promise(lengths: list[int], max_tokens: int) -> None:
    buckets = length_buckets([of_length(n) for n in lengths], max_tokens)
    flat = [index for bucket in buckets for index in bucket]
    assert flat == sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for bucket in buckets:
        size = len(bucket) * max(lengths[i] for i in bucket)
        assert len(bucket) == 1 or size <= max_tokens
