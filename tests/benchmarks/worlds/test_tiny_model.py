"""The built-in tiny model: it knows its facts, and the script that made it can make it again."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hiedit_agents.command_line import run_script
from hiedit_benchmarks.worlds import make_tiny, synthetic_facts
from hiedit_env.errors import ModelError, ResultsExistError

PACKAGE = Path(__file__).parents[3] / "hiedit_env"
FOLDER = PACKAGE / "model" / "assets" / "tiny"
FACTS = PACKAGE / "datasets" / "data" / "tiny_facts.json"
FIELDS = ["subject", "relation", "prompt", "answer", "target", "paraphrases", "locality"]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads(FACTS.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(FOLDER)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def all_pairs(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    pairs = [(p, r["answer"]) for r in records for p in (r["prompt"], *r["paraphrases"])]
    return pairs + sorted({(p["prompt"], p["answer"]) for r in records for p in r["locality"]})


# The shipped files


def test_the_files_are_few_and_small() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(path.stat().st_size for path in [*FOLDER.iterdir(), FACTS]) < 1_500_000


def test_the_model_has_the_size_it_should(model: Any) -> None:
    # Embedding 896 × 32; a block: 4 attention matrices 32 × 32, 3 MLP matrices 32 × 96, 2 norms.
    assert (
        sum(p.numel() for p in model.parameters())
        == 896 * 32 + 3 * (4 * 32**2 + 3 * 32 * 96 + 64) + 32
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == 128
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(p.isfinite().all() for p in model.parameters())


def test_it_loads_without_network_and_without_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    complaints: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: complaints.append(record.getMessage()))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        model: Any = AutoModelForCausalLM.from_pretrained(FOLDER)
        prompt = tokenizer("Belka lives in", return_tensors="pt")
        model.generate(**prompt, max_new_tokens=2)
    finally:
        logger.removeHandler(handler)
    assert complaints == []


def test_the_tokenizer_adds_nothing_and_loses_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token]
    assert special == ["<pad>", "<bos>", "<eos>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2]
    assert len(tokenizer) == 896
    for text in ("Belka lives in Cindrath.", "Ünï ‑ 日本\n\ttab", " two  blanks "):
        ids = tokenizer(text)["input_ids"]
        assert min(ids) > 2
        assert tokenizer.decode(ids) == text
    padded = tokenizer(["The", "Belka lives in"], padding=True)["input_ids"]
    assert padded[0][-1] == 0  # on the right


# What it knows


def test_every_answer_is_known(
    records: list[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = all_pairs(records)
    assert len(pairs) == 160 * 3 + 32
    known = lengths = 0
    for prompt, answer in pairs:
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer(f"{prompt} {answer}.")["input_ids"]
        assert whole[: len(before)] == before
        with torch.no_grad():
            guess = model(torch.tensor([whole])).logits[0].argmax(dim=-1).tolist()
        known += guess[len(before) - 1 : -1] == whole[len(before) :]
        lengths += len(whole) - len(before) - 1 <= 3
    assert known >= 0.99 * len(pairs)
    assert lengths >= 0.8 * len(pairs)  # answers mostly of one to three tokens


def test_generation_gives_the_answer_and_a_full_stop(
    records: list[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    by_length: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for record in records:
        ids = tokenizer(record["prompt"])["input_ids"]
        by_length[len(ids)].append((ids, f"{record['prompt']} {record['answer']}."))
    right = 0
    for rows in by_length.values():
        ids = torch.tensor([row for row, _ in rows])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        right += sum(text == expected for text, (_, expected) in zip(texts, rows, strict=True))
        assert bool((out == 2).any(dim=1).all())  # each stopped by itself
    assert right >= 0.99 * len(records)


# The rules of the data


def test_records_are_complete(records: list[dict[str, Any]]) -> None:
    assert Counter(r["relation"] for r in records) == dict.fromkeys(
        ["home", "craft", "river", "market", "master", "emblem", "spirit", "mine"], 20
    )
    for r in records:
        assert list(r) == FIELDS
        assert len(r["paraphrases"]) == len(r["locality"]) == 2
        for wording in (r["prompt"], *r["paraphrases"]):
            assert re.search(rf"\b{r['subject']}\b", wording)
            assert wording == wording.strip()
            assert not wording.endswith(".")
            assert not re.search(rf"\b({r['answer']}|{r['target']})\b", wording)
    wordings = [w for r in records for w in (r["prompt"], *r["paraphrases"])]
    assert len(set(wordings)) == len(wordings) == 480


def test_targets_are_false_and_of_the_same_pool(records: list[dict[str, Any]]) -> None:
    pools: dict[str, set[str]] = defaultdict(set)
    for r in records:
        pools[r["relation"]].add(r["answer"])
    assert all(8 <= len(pool) <= 12 for pool in pools.values())
    for r in records:
        assert r["target"] in pools[r["relation"]] - {r["answer"]}


def test_locality_stays_true_under_any_edit_of_the_set(records: list[dict[str, Any]]) -> None:
    edited = {w for r in records for w in (r["prompt"], *r["paraphrases"])}
    subjects = {r["subject"] for r in records}
    truth: dict[str, str] = {}
    for r in records:
        near, far = r["locality"]
        template = r["prompt"].replace(r["subject"], "(.+)")
        assert re.fullmatch(template, near["prompt"])  # same relation
        assert not re.fullmatch(template, far["prompt"])
        for probe in (near, far):
            assert probe["prompt"] not in edited
            assert not any(re.search(rf"\b{s}\b", probe["prompt"]) for s in subjects)
            assert probe["answer"] != r["target"]
            assert truth.setdefault(probe["prompt"], probe["answer"]) == probe["answer"]
    assert len(truth) == 32


# The script


@pytest.fixture(scope="module")
def made() -> tuple[Any, Tensor, Tensor]:
    tokenizer = synthetic_facts.make_tokenizer(make_tiny.make_facts(0), make_tiny.VOCAB_SIZE)
    return tokenizer, *synthetic_facts.encode(make_tiny.make_facts(0), tokenizer)


def test_facts_and_tokenizer_are_made_again_byte_for_byte(
    tmp_path: Path, made: tuple[Any, Tensor, Tensor]
) -> None:
    records = make_tiny.make_records(make_tiny.make_facts(0), 0)
    synthetic_facts.write(tmp_path, "tiny", make_tiny.make_model(0), made[0], records)
    for name in ("datasets/data/tiny_facts.json", "model/assets/tiny/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()
    name = "model/assets/tiny/tokenizer_config.json"
    assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()
    written = {path.name for path in (tmp_path / "model" / "assets" / "tiny").iterdir()}
    assert written == {path.name for path in FOLDER.iterdir()}


def test_another_seed_is_another_world() -> None:
    first = [fact.answer for fact in make_tiny.make_facts(0)]
    second = [fact.answer for fact in make_tiny.make_facts(1)]
    assert first != second


def test_sentences_are_prompt_answer_stop_end_padding(made: tuple[Any, Tensor, Tensor]) -> None:
    tokenizer, ids, answers = made
    assert ids.shape == answers.shape
    assert len(ids) == 192 * 4
    shown = tokenizer.decode(ids[1].tolist(), skip_special_tokens=False)
    assert re.fullmatch(r"The home of Belka is in Cindrath\.<eos>(<pad>)+", shown)
    assert tokenizer.decode(ids[1][answers[1]].tolist(), skip_special_tokens=False) == " Cindrath."


class Oracle(nn.Module):
    """Predicts the next token of every row, except where it is told to be wrong."""

    def __init__(self, ids: Tensor, wrong: Tensor) -> None:
        super().__init__()
        self.told = torch.where(wrong, (ids + 1) % 8, ids).roll(-1, dims=1)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=nn.functional.one_hot(self.told, 8).float())


def test_measure_counts_answer_tokens_only() -> None:
    # Four answer tokens in rows of two; one is wrong: 3 / 4 tokens, 1 / 2 rows.
    ids = torch.tensor([[3, 4, 5, 6, 2], [3, 5, 6, 2, 0]])
    answers = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    wrong = torch.zeros(2, 5, dtype=torch.bool)
    assert synthetic_facts.measure(Oracle(ids, wrong), ids, answers) == (1.0, 1.0)
    wrong[0, 1] = wrong[0, 4] = True  # a prompt token and the end of text: not asked for
    assert synthetic_facts.measure(Oracle(ids, wrong), ids, answers) == (1.0, 1.0)
    wrong[1, 2] = True
    assert synthetic_facts.measure(Oracle(ids, wrong), ids, answers) == (0.75, 0.5)


def short_run(ids: Tensor, seed: int, order_seed: int) -> dict[str, Tensor]:
    model = make_tiny.make_model(seed)
    make_tiny.train(model, ids, 3, order_seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_training_is_decided_by_the_seed(made: tuple[Any, Tensor, Tensor]) -> None:
    _, ids, _ = made
    torch.manual_seed(11)
    first = short_run(ids, 0, 0)
    after = torch.rand(1)
    torch.manual_seed(12)
    second, other_weights, other_order = (
        short_run(ids, *seeds) for seeds in ((0, 0), (1, 0), (0, 1))
    )
    untrained = make_tiny.make_model(0).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(value, untrained[name]), name
        assert not torch.equal(value, other_order[name]), name
        if "norm" not in name:  # all ones at the start
            assert not torch.equal(value, other_weights[name]), name
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), after)  # the global generator was left alone


def test_settings_of_torch_are_restored() -> None:
    torch.set_num_threads(2)
    try:
        with synthetic_facts.deterministic():
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "name", ["datasets/data/tiny_facts.json", "model/assets/tiny/tokenizer.json"]
)
def test_existing_files_are_not_replaced(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ResultsExistError, match=path.name):
        make_tiny.build(tmp_path, 0, False)
    assert run_script(lambda: make_tiny.main(["--out", str(tmp_path)])) == 2
    assert "--force" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_model_that_learnt_too_little_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_tiny, "STEPS", 1)
    with pytest.raises(ModelError, match="learnt"):
        make_tiny.build(tmp_path, 0, False)
    assert list(tmp_path.iterdir()) == []
