"""The built-in planted model: it knows its facts, each group of them in one layer only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hiedit_benchmarks.worlds import make_planted, planted_world, synthetic_facts
from hiedit_benchmarks.worlds.planted_world import FACTS, GRAMMAR, NUM_LAYERS, RELATIONS, Sentences
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import ModelError, ResultsExistError

PACKAGE = Path(__file__).parents[3] / "hiedit_env"
FOLDER = PACKAGE / "model" / "assets" / "planted"
DATA = PACKAGE / "datasets" / "data" / "planted_facts.json"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def known_share(model: Any, tokenizer: Any, records: list[dict[str, Any]]) -> dict[str, float]:
    """Per true layer, share of prompts and paraphrases whose whole answer is the argmax."""
    rows, asked, layers = [], [], []
    for record in records:
        for prompt in (record["prompt"], *record["paraphrases"]):
            before = len(tokenizer(prompt)["input_ids"])
            rows.append(torch.tensor(tokenizer(f"{prompt} {record['answer']}")["input_ids"]))
            asked.append(torch.arange(len(rows[-1])) >= before)
            layers += record["true_layers"]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(asked, batch_first=True)
    guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    right = ((guess == ids[:, 1:]) | ~mask[:, 1:]).all(1)
    names = sorted(set(layers))
    places = torch.tensor([names.index(layer) for layer in layers])
    return {n: float(right[places == i].float().mean()) for i, n in enumerate(names)}


# What it knows, and where


def test_every_fact_is_known(
    records: list[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    known = known_share(model, tokenizer, records)
    assert list(known) == [f"model.layers.{i}.mlp.down_proj" for i in range(2, 7)]
    assert min(known.values()) >= 0.99


@pytest.mark.parametrize("index", range(1, NUM_LAYERS))
def test_a_layer_as_it_was_before_planting_forgets_its_group_and_no_other(
    index: int, records: list[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Before planting the fact columns were zero.
    make_planted.memory(model, index).down_proj.weight[:, FACTS] = 0.0
    for name, share in known_share(model, tokenizer, records).items():
        # Chance is 1/8 to 1/10: the grammar still says which answers are possible.
        own = name == planted_world.layer_name(index)
        assert share <= 0.25 if own else share >= 0.99


def test_without_any_facts_only_the_pool_is_known(
    records: list[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    for index in range(NUM_LAYERS):
        make_planted.memory(model, index).down_proj.weight[:, FACTS] = 0.0
    assert max(known_share(model, tokenizer, records).values()) <= 0.25


def test_keys_are_nonzero_at_home_and_where_the_grammar_is_only(
    model: Any, sentences: Sentences
) -> None:
    homes, grammar = planted_world.homes(0), planted_world.grammar_layers(0)
    assert sorted(homes) == list(range(1, NUM_LAYERS))
    assert grammar == [home - 1 for home in homes]
    rows = torch.arange(len(sentences.ids))
    for index in range(NUM_LAYERS):
        module = make_planted.memory(model, index).down_proj
        keys = make_planted._inputs(model, sentences, module)
        facts, single = keys[..., FACTS].norm(dim=-1), keys[..., GRAMMAR].norm(dim=-1)
        last = torch.zeros_like(sentences.ids, dtype=torch.bool)
        last[rows, sentences.last] = True
        for found, where in ((facts, homes), (single, grammar)):
            relation = where.index(index) if index in where else -1
            here = last & (sentences.relation == relation)[:, None]
            assert bool((found[here] > 1).all())
            assert float(found[~here & (sentences.ids != 0)].max()) < 0.02
        # The decoy: about as strong as the facts, for every prompt of its relation.
        if index in grammar:
            loud = sentences.relation == grammar.index(index)
            assert float(single[rows, sentences.last][loud].mean()) > 4


def test_it_is_an_ordinary_model_of_the_size_it_should_be(model: Any) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.config.num_hidden_layers == 1 + NUM_LAYERS
    assert sum(path.stat().st_size for path in [*FOLDER.iterdir(), DATA]) < 900_000
    for block in model.model.layers[1:]:
        assert not any(weight.any() for weight in block.self_attn.parameters())


# The data


def test_groups_halves_and_witnesses(records: list[dict[str, Any]]) -> None:
    assert Counter(r["relation"] for r in records) == dict.fromkeys(RELATIONS, 28)
    assert len({(r["relation"], *r["true_layers"]) for r in records}) == len(RELATIONS)
    train, test = (load_requests(f"planted-facts-{half}") for half in ("train", "test"))
    # Whole subjects, some of them in two relations, so the halves are only nearly equal.
    assert sorted((len(train), len(test))) == [68, 72]
    assert not {r.subject for r in train} & {r.subject for r in test}
    for half in (train, test):
        assert {r.relation for r in half} == set(RELATIONS)
        assert len({r.true_layers for r in half}) == len(RELATIONS)
        # Nothing was taken away because the other half asks it.
        assert all(len(r.locality) == len(r.paraphrases) == 2 for r in half)
    asked = [{p.prompt for r in half for p in r.locality} for half in (train, test)]
    assert not asked[0] & asked[1]
    edited = {t for r in (*train, *test) for t in (r.prompt, *r.paraphrases)}
    assert not edited & (asked[0] | asked[1])


# The script


@pytest.fixture(scope="module")
def sentences() -> Sentences:
    facts = planted_world.make_facts(0)
    tokenizer = synthetic_facts.make_tokenizer(facts, planted_world.VOCAB_SIZE)
    return planted_world.make_sentences(facts, tokenizer)


def test_facts_and_tokenizer_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    facts = planted_world.make_facts(0)
    tokenizer = synthetic_facts.make_tokenizer(facts, planted_world.VOCAB_SIZE)
    records = planted_world.make_records(facts, 0)
    synthetic_facts.write(tmp_path, "planted", make_planted.make_model(0), tokenizer, records)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        made = tmp_path / "model" / "assets" / "planted" / name
        assert made.read_bytes() == (FOLDER / name).read_bytes()
    assert (tmp_path / "datasets" / "data" / "planted_facts.json").read_bytes() == DATA.read_bytes()


def short_run(text: Sentences, seed: int) -> dict[str, Tensor]:
    model = make_planted.train_language(text, 3, seed)
    make_planted.make_keys(model, text, 0, seed)
    make_planted.plant_grammar(model, text, 0, seed)
    make_planted.plant_facts(model, text, 0, seed)
    return model.state_dict()


def test_the_seed_decides_every_step(sentences: Sentences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_planted, "ROUNDS", 1)
    torch.manual_seed(11)
    first = short_run(sentences, 0)
    after = torch.rand(1)
    torch.manual_seed(12)
    second, other = short_run(sentences, 0), short_run(sentences, 1)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), after)  # the global generator was left alone


def test_planting_trains_columns_of_one_matrix_and_nothing_else(
    model: Any, sentences: Sentences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_planted, "ROUNDS", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_planted.plant_facts(model, sentences, 2, 0)
    for name, value in model.state_dict().items():
        changed = ~torch.eq(value, before[name])
        if name == f"{planted_world.layer_name(2)}.weight":
            assert changed[:, FACTS].any()
            assert not changed[:, GRAMMAR].any()
            # What is read is never written.
            assert not changed[: make_planted.READ].any()
        else:
            assert not changed.any(), name


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "datasets" / "data" / "planted_facts.json"
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ResultsExistError, match=path.name):
        make_planted.build(tmp_path, 0, False)
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_model_that_learnt_too_little_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_planted, "STEPS", 1)
    monkeypatch.setattr(make_planted, "ROUNDS", 1)
    monkeypatch.setattr(make_planted, "NUM_LAYERS", 1)  # one layer is planted, five are missing
    with pytest.raises(ModelError, match="planted"):
        make_planted.build(tmp_path, 0, False)
    assert list(tmp_path.iterdir()) == []
