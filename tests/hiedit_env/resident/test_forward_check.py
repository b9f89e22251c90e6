"""The way a model is run: its own logits, whatever it does around its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hiedit_env.errors import LayerError, ModelError
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.forward import CappedHead, OwnHead, WholeModel
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.split_model import SplitModel
from tests.support.models import (
    HIDDEN,
    PROMPTS,
    build_random,
    mean_losses,
    prompt,
    random_updates,
    tokenizer,
)
from tests.support.tiny_models import tiny_model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
#: Of 3 and 24 tokens: on both sides of the boundaries below.
MIXED = (prompt([4, 5, 6], [7]), prompt([(7 * i) % 29 + 3 for i in range(23)], [5, 8]))


def own_logits(model: PreTrainedModel, prompts: Sequence[EncodedPrompt]) -> Tensor:
    """The model's own forward on each prompt alone, at the answer positions."""
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=torch.tensor([p.input_ids]), use_cache=False).logits[
                    0, len(p.prompt_ids) - 1 :
                ]
                for p in prompts
            ]
        )


def resident(model: PreTrainedModel, layers: Any = None) -> ResidentLLM:
    return ResidentLLM(model, tokenizer(), find_candidates(model, layers))


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 1.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        (
            "phi3",
            {
                "rope_parameters": LONG_ROPE,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 64,
            },
            8,
        ),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}, 12),
    ],
)
def test_positions_that_depend_on_the_batch(
    kind: str, settings: dict[str, Any], limit: int
) -> None:
    model = build_random(kind, **settings)
    llm = resident(model)
    assert llm._way.alone_beyond == limit
    (note,) = llm.notes
    assert f"longer than {limit} tokens run one by one" in note
    llm.encoder.max_length = None
    expected = own_logits(model, MIXED)
    torch.testing.assert_close(llm.answer_logits(llm.batch(MIXED)), expected, **TOLERANCE)
    # Short prompts still share a batch; in the other order, and from the cache, all is the same.
    torch.testing.assert_close(llm.answer_logits(llm.batch(PROMPTS)), own_logits(model, PROMPTS))
    swapped = llm.answer_logits(llm.batch(MIXED[::-1]))
    torch.testing.assert_close(torch.cat([swapped[2:], swapped[:2]]), expected, **TOLERANCE)


def test_texts_that_grow_past_a_limit_are_generated_alone() -> None:
    """Against whole passes of the model over each text by itself, token after token."""
    model = build_random(
        "phi3",
        rope_parameters=LONG_ROPE,
        original_max_position_embeddings=8,
        max_position_embeddings=64,
    )
    llm = resident(model)
    asked = [
        prompt([(5 * i + length) % 29 + 3 for i in range(length)], [5]) for length in (2, 3, 7, 12)
    ]

    def greedy(start: EncodedPrompt, count: int) -> str:
        ids = list(start.prompt_ids)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in llm.end_ids:
                ids.pop()
                break
        return llm.encoder.decode(ids[len(start.prompt_ids) :])

    for budget in (3, 6):
        expected = [greedy(p, budget) for p in asked]
        assert llm.generate(asked, [budget] * len(asked)) == expected


def test_positions_do_not_remember_a_longer_prompt() -> None:
    """Dynamic positions keep the scale of the longest prompt so far, until one fits the window."""
    make = partial(build_random, "llama", rope_parameters=DYNAMIC, max_position_embeddings=12)
    three, twenty, forty = (
        prompt([(7 * i) % 29 + 3 for i in range(length)], [5, 8]) for length in (3, 20, 40)
    )
    expected = {p: own_logits(make(), [p]) for p in (three, twenty, forty)}
    # In transformers itself a prompt of 20 tokens is another one after one of 40.
    model = make()
    own_logits(model, [forty])
    assert float((own_logits(model, [twenty]) - expected[twenty]).abs().max()) > 0.1
    # A new model each time: one that has read a prompt keeps what is below the candidates.
    llm = without_limit(make())
    llm.read(forty)
    torch.testing.assert_close(llm.read(twenty).logits, expected[twenty], **TOLERANCE)
    for order in ((forty, twenty, three), (twenty, forty, three)):
        llm = without_limit(make())
        together = torch.cat([expected[p] for p in order])
        torch.testing.assert_close(llm.answer_logits(llm.batch(order)), together, **TOLERANCE)
    # Generation too.
    one, two = (without_limit(make()) for _ in range(2))
    texts = ["a b c d e f g h i j k l m n o p", " ".join("abcdefgh" * 5)]
    said = one.generate(texts[:1], [4])
    two.generate(texts[1:], [4])
    assert two.generate(texts[:1], [4]) == said


def without_limit(model: PreTrainedModel) -> ResidentLLM:
    llm = resident(model)
    llm.encoder.max_length = None
    return llm


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text"])
def test_prompts_that_run_alone_have_the_gradients_of_a_batch(kind: str) -> None:
    """In two halves and as a whole: all gradients, readings and overlays, one prompt at a time."""
    shared, alone = (resident(tiny_model(kind)) for _ in range(2))
    alone._way.alone_beyond = -1
    for one, other in zip(
        shared.gradients(PROMPTS, mean_losses).value_gradients,
        alone.gradients(PROMPTS, mean_losses).value_gradients,
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    updates = random_updates(shared, scale=0.1)
    torch.testing.assert_close(
        alone.answer_logits(alone.batch(PROMPTS), updates),
        shared.answer_logits(shared.batch(PROMPTS), updates),
        **TOLERANCE,
    )
    forks = [alone.fork() for _ in PROMPTS]
    forks[1].commit(updates)
    readings = alone.read_forks(PROMPTS, forks, [1, 1, 1])
    shared.commit(updates)
    torch.testing.assert_close(readings[1].logits, shared.read(PROMPTS[1]).logits, **TOLERANCE)


def test_sparse_attention_past_its_size() -> None:
    # DeepSeek's indexer chooses 4 of the tokens before; padding must not be among them.
    model = tiny_model("deepseek_v32", index_topk=4)
    llm = resident(model)
    expected = own_logits(model, MIXED)
    torch.testing.assert_close(llm.answer_logits(llm.batch(MIXED)), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "settings", "halves", "head"),
    [
        ("bloom", {}, SplitModel, CappedHead),
        ("cohere", {}, SplitModel, OwnHead),
        ("granite", {"logits_scaling": 8.0}, SplitModel, OwnHead),
        ("openai-gpt", {}, WholeModel, None),
    ],
)
def test_the_cheapest_right_way_is_taken(
    kind: str, settings: dict[str, Any], halves: type, head: type | None
) -> None:
    llm = resident(tiny_model(kind, **settings))
    assert type(llm.halves) is halves
    assert head is None or type(llm.head) is head


def test_embeddings_and_outputs_of_another_size_than_the_blocks() -> None:
    """OPT-350m projects what goes into its blocks and what comes out."""
    model = tiny_model("opt", word_embed_proj_dim=HIDDEN, do_layer_norm_before=False)
    llm = resident(model, "model.decoder.layers.{2,3}.fc{1,2}")
    assert model.model.decoder.project_out is not None
    expected = own_logits(model, PROMPTS)
    torch.testing.assert_close(llm.answer_logits(llm.batch(PROMPTS)), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "falcon"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind).to(dtype)
    llm = resident(model)
    expected = own_logits(model, PROMPTS).float()
    ours = llm.answer_logits(llm.batch(PROMPTS)).float()
    assert float((ours - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
    assert torch.isfinite(llm.read(PROMPTS[0]).capture().gradient_norms()).all()


def test_logits_that_are_not_finite_are_named() -> None:
    model = build_random("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match=r"not finite.*NaN"):
        resident(model)


def test_a_model_that_differs_from_run_to_run_is_refused() -> None:
    model = build_random("llama")
    model.model.norm.register_forward_hook(lambda _m, _i, out: out + torch.randn_like(out))
    with pytest.raises(ModelError, match=r"cannot be edited.*as a whole, its logits change"):
        resident(model)


def test_why_no_way_works_is_said_in_plain_words() -> None:
    with pytest.raises(ModelError) as caught:
        resident(tiny_model("reformer"))
    assert str(caught.value) == (
        "ReformerModelWithLMHead cannot be edited; in two halves and in two halves with its own "
        "head, its blocks are not called with the hidden states first; as a whole, its logits have "
        "no gradient at its layers, by which they are edited"
    )


def test_what_a_layer_does_not_see_whole_is_refused() -> None:
    with pytest.raises(LayerError, match=r"routed experts fused in 3-D parameters.*gate_up_proj"):
        resident(tiny_model("mixtral"), "model.layers.1.mlp.experts")
    model = build_random("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(mlp.up_proj(x)[..., :HIDDEN]))
    with pytest.raises(LayerError, match="run more than once"):
        resident(model, "model.layers.1.mlp.up_proj")
    with pytest.raises(LayerError, match="not run on text by itself"):
        resident(model, "model.layers.1.mlp.gate_proj")
    mlp.forward = lambda x: nn.functional.pad(mlp.down_proj(mlp.up_proj(x[:, 1:])), (0, 0, 1, 0))
    with pytest.raises(LayerError, match="sees 6 rows for 7 tokens"):
        resident(model, "model.layers.1.mlp.up_proj")


def test_names_in_braces_may_begin_with_a_digit() -> None:
    layers = find_candidates(
        tiny_model("gpt_neox"), "gpt_neox.layers.2.mlp.dense_{h_to_4h,4h_to_h}"
    )
    names = [layer.name.rpartition(".")[2] for layer in layers]
    assert names == ["dense_h_to_4h", "dense_4h_to_h"]
