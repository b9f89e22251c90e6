"""Evaluation, compared with plain transformers forward passes on whole texts, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match, starts_with
from hiedit_env.evaluation.metrics import Evaluation, evaluate, retention_size
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM


def resident() -> ResidentLLM:
    loaded = load_model("tiny", progress=False)
    return ResidentLLM(loaded.model, loaded.tokenizer, find_candidates(loaded.model, None, "tiny"))


def damage(llm: ResidentLLM, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    llm.commit(
        [
            LowRankUpdate(
                torch.randn(2, d_in, generator=generator) * size,
                torch.randn(2, d_out, generator=generator) * size,
            )
            for d_in, d_out in llm.shapes
        ]
    )


def plain_ids(model: Any, tokenizer: Any, ids: Sequence[int], count: int) -> list[int]:
    """Greedy tokens by the argmax of whole forward passes."""
    made: list[int] = []
    while len(made) < count and tokenizer.eos_token_id not in made:
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *made]])).logits
        made.append(int(logits[0, -1].argmax()))
    return made


class Plain:
    """The slow and obvious way."""

    def __init__(self, llm: ResidentLLM) -> None:
        self.model: Any = copy.deepcopy(llm.model)
        self.tokenizer: Any = llm.tokenizer

    def correct(self, prompt: str, answer: str) -> list[bool]:
        start = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(f"{prompt} {answer}")["input_ids"]
        assert whole[: len(start)] == start
        return self.forced(start, whole[len(start) :])

    def forced(self, start: list[int], answer: list[int]) -> list[bool]:
        with torch.no_grad():
            logits = self.model(torch.tensor([[*start, *answer]])).logits[0]
        guesses = logits.argmax(-1)[len(start) - 1 : -1].tolist()
        return [guess == token for guess, token in zip(guesses, answer, strict=True)]

    def greedy(self, prompt: str, answer: str) -> str:
        start = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(f"{prompt} {answer}")["input_ids"]
        ids = plain_ids(self.model, self.tokenizer, start, len(whole) - len(start) + EXTRA_TOKENS)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def readings(self, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        """In percent, mean over one fact's prompts."""
        correct = [self.correct(*pair) for pair in pairs]
        texts = [self.greedy(*pair) for pair in pairs]
        answers = [answer for _, answer in pairs]
        values = {
            "token_accuracy": [np.mean(c) for c in correct],
            "exact_match": [all(c) for c in correct],
            "generation": [is_match(t, a) for t, a in zip(texts, answers, strict=True)],
            "generation_prefix": [starts_with(t, a) for t, a in zip(texts, answers, strict=True)],
        }
        return {name: 100.0 * float(np.mean(v)) for name, v in values.items()}


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    facts = load_requests("tiny-facts")[::23]
    # One paraphrase less in every other fact, so that means over facts and over prompts differ.
    return [
        Request(
            prompt=fact.prompt,
            # Every third fact is true, so that not everything is wrong.
            answer=fact.answer if i % 3 else (fact.old_answer or fact.answer),
            subject=fact.subject,
            paraphrases=fact.paraphrases[: 1 + i % 2],
            locality=fact.locality[: 1 + (i + 1) % 2],
        )
        for i, fact in enumerate(facts)
    ]


@pytest.fixture(scope="module")
def measured(requests: list[Request]) -> tuple[ResidentLLM, Evaluation, Plain, Plain]:
    llm = resident()
    unedited = Plain(llm)
    damage(llm, 0.23)
    return llm, evaluate(llm, requests, UneditedModel(llm)), Plain(llm), unedited


def check(values: NDArray[np.float64], wanted: Sequence[float]) -> None:
    np.testing.assert_allclose(values, wanted, rtol=1e-6)


def test_every_number_equals_the_plain_one(
    measured: tuple[ResidentLLM, Evaluation, Plain, Plain], requests: list[Request]
) -> None:
    _, evaluation, plain, _ = measured
    groups = {
        "efficacy": [[(r.prompt, r.answer)] for r in requests],
        "generalization": [[(text, r.answer) for text in r.paraphrases] for r in requests],
        "specificity": [[(p.prompt, p.answer) for p in r.locality] for r in requests],
    }
    for metric, facts in groups.items():
        wanted = [plain.readings(pairs) for pairs in facts]
        for reading in ("token_accuracy", "exact_match", "generation", "generation_prefix"):
            column = [one[reading] for one in wanted]
            check(evaluation.per_fact[metric][reading], column)
            assert evaluation.metrics[metric][reading] == pytest.approx(np.mean(column))
    accuracy = evaluation.per_fact["generalization"]["token_accuracy"]
    assert len(set(accuracy)) > 2, "the damage must leave some answers right and some wrong"
    assert evaluation.answers == tuple(plain.greedy(r.prompt, r.answer) for r in requests)


def test_agreement_is_with_the_unedited_models_own_tokens(
    measured: tuple[ResidentLLM, Evaluation, Plain, Plain], requests: list[Request]
) -> None:
    llm, evaluation, plain, unedited = measured
    wanted = []
    for request in requests:
        shares = []
        for probe in request.locality:
            start = plain.tokenizer(probe.prompt)["input_ids"]
            own = plain_ids(unedited.model, plain.tokenizer, start, 5)
            shares.append(np.mean(plain.forced(start, own)))
        wanted.append(100.0 * float(np.mean(shares)))
    check(evaluation.per_fact["specificity"]["agreement"], wanted)
    assert 0 < evaluation.metrics["specificity"]["agreement"] < 100
    llm_unedited = resident()
    clean = evaluate(llm_unedited, requests, UneditedModel(llm_unedited), generation=())
    assert clean.metrics["specificity"]["agreement"] == 100.0


def test_retention_is_efficacy_on_the_first_third(
    measured: tuple[ResidentLLM, Evaluation, Plain, Plain], requests: list[Request]
) -> None:
    _, evaluation, _, _ = measured
    assert len(requests) == 7
    for reading, values in evaluation.per_fact["efficacy"].items():
        retention = evaluation.per_fact["retention"][reading]
        assert retention[:2].tolist() == values[:2].tolist()
        assert np.isnan(retention[2:]).all()
        assert evaluation.metrics["retention"][reading] == pytest.approx(values[:2].mean())
    assert [retention_size(n) for n in (1, 3, 8, 1500, 1503, 6000)] == [1, 1, 2, 500, 500, 500]


def test_means_are_per_fact_first() -> None:
    llm = resident()
    facts = load_requests("tiny-facts")
    plain = Plain(llm)

    def known(text: str, answer: str) -> bool:
        return all(plain.correct(text, answer))

    right = next(f for f in facts if f.old_answer and known(f.paraphrases[0], f.old_answer))
    wrong = next(f for f in facts if not any(any(plain.correct(p, f.answer))
                                             for p in f.paraphrases))  # fmt: skip
    stream = [
        Request(right.prompt, str(right.old_answer), "a", paraphrases=right.paraphrases[:1]),
        Request(wrong.prompt, wrong.answer, "b", paraphrases=wrong.paraphrases[:2]),
    ]
    found = evaluate(llm, stream, None, generation=()).metrics["generalization"]
    assert found == {"token_accuracy": 50.0, "exact_match": 50.0}  # not a third: 1 of 3 prompts


def test_what_cannot_be_measured_is_nan() -> None:
    llm = resident()
    stream = [Request("Belka lives in", "Cindrath", "Belka")]
    found = evaluate(llm, stream, UneditedModel(llm))
    assert all(np.isnan(v) for v in found.metrics["generalization"].values())
    assert all(np.isnan(v) for v in found.metrics["specificity"].values())
    assert np.isfinite(found.metrics["efficacy"]["generation"])
    silent = evaluate(llm, stream, None, generation=())
    assert set(silent.metrics["efficacy"]) == {"token_accuracy", "exact_match"}
    partly = evaluate(llm, stream, None, generation=["efficacy"])
    assert "generation" in partly.metrics["retention"]
    assert "generation" not in partly.metrics["specificity"]
    assert partly.answers == found.answers
    assert "agreement" not in silent.metrics["specificity"]
    assert silent.answers == ()


def test_nothing_is_run_twice_and_no_weight_changes(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = resident()
    damage(llm, 0.05)
    fingerprint = llm.weights_fingerprint()
    rows: list[Any] = []
    remembered: list[bool] = []
    generated: list[str] = []
    inner_logits, inner_generate = llm.answer_logits, llm.generate

    def logits(batch: Any, *args: Any, **settings: Any) -> Any:
        remembered.append(not settings)
        rows.extend(batch.prompts)
        return inner_logits(batch, *args, **settings)

    def generate(prompts: Sequence[str], budgets: Sequence[int]) -> list[str]:
        generated.extend(prompts)
        return inner_generate(prompts, budgets)

    monkeypatch.setattr(llm, "answer_logits", logits)
    monkeypatch.setattr(llm, "generate", generate)
    reference = UneditedModel(llm)
    stages: list[tuple[str, int, int]] = []
    twice = [*requests, *requests]
    evaluate(llm, twice, reference, progress=lambda *stage: stages.append(stage))
    first = len(rows)
    assert len(set(rows)) == first
    assert len(set(generated)) == len(generated)
    assert {stage for stage, _, _ in stages} == {"reference", "teacher forcing", "generation"}
    assert all(done <= total for _, done, total in stages)
    known = len(reference)
    evaluate(llm, requests, reference, generation=())
    # The second time only teacher forcing: the unedited answers are known.
    assert len(reference) == known
    prompts = {p.prompt for p in rows[first:]}
    assert len(rows) - first == len(set(rows[first:]))
    assert prompts == {p.prompt for p in rows[:first]}
    # Activations below the first candidate are taken from memory where they come again.
    assert remembered[-1]
    assert not remembered[0]
    assert llm.weights_fingerprint() == fingerprint


def test_unedited_answers_end_at_the_models_own_end_tokens(requests: list[Request]) -> None:
    """Chat models often have more of them than their tokenizer knows."""
    llm = resident()
    prompt = llm.encode(requests[0].prompt, requests[0].answer)
    (own,) = UneditedModel(llm).answers([prompt])
    assert len(set(own.answer_ids[:3])) == 3
    llm.model.generation_config.eos_token_id = [llm.tokenizer.eos_token_id, own.answer_ids[1]]
    (shorter,) = UneditedModel(llm).answers([prompt])
    assert shorter.answer_ids == own.answer_ids[:2]


def test_no_float64_is_needed(requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices (MPS) have none."""
    llm = resident()
    monkeypatch.setattr(torch.Tensor, "double", lambda self: 1 / 0)
    evaluate(llm, requests[:2], UneditedModel(llm))


def test_errors(requests: list[Request]) -> None:
    llm = resident()
    with pytest.raises(SettingsError, match="at least one request"):
        evaluate(llm, [], None)
    with pytest.raises(SettingsError, match="another ResidentLLM"):
        evaluate(llm, requests, UneditedModel(resident()))
    with pytest.raises(SettingsError, match="unknown metrics \\['accuracy'\\]"):
        evaluate(llm, requests, None, generation=["accuracy"])
    with pytest.raises(SettingsError, match="max_tokens"):
        UneditedModel(llm, max_tokens=0)
    long = Request("Belka " * 400, "Cindrath", "Belka", source="facts.json row 7")
    with pytest.raises(PromptError, match=r"facts.json row 7: "):
        evaluate(llm, [long], None)
