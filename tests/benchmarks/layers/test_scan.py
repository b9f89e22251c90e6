"""Trials of layers against the same edit made by hand, on the tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hiedit_benchmarks.layers.facts import FactPrompts, prompts_of
from hiedit_benchmarks.layers.scan import (
    WORST,
    Answers,
    directional,
    divergence,
    judge,
    not_given,
    scan,
    write_all,
)
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import LayerError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.architectures import CandidateLayer, find_candidates
from hiedit_env.model.loading import LoadedModel, load_model
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.closed_form import GradientRule
from hiedit_env.rules.names import make_rule
from tests.support.models import all_bits, normal

PATTERNS = ["model.layers.{1-2}.mlp.{up_proj,down_proj}"]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("tiny", progress=False)


@pytest.fixture(scope="module")
def layers(loaded: LoadedModel) -> tuple[CandidateLayer, ...]:
    return find_candidates(loaded.model, PATTERNS)


@pytest.fixture(scope="module")
def llm(loaded: LoadedModel, layers: tuple[CandidateLayer, ...]) -> ResidentLLM:
    return ResidentLLM(loaded.model, loaded.tokenizer, layers)


@pytest.fixture(scope="module")
def facts(llm: ResidentLLM) -> list[FactPrompts]:
    requests = load_requests("tiny-facts")
    prompts = prompts_of(requests[:3], requests, llm.encoder, np.random.default_rng(0))
    return list(not_given(UneditedModel(llm), prompts))


def make(llm: ResidentLLM) -> UpdateRule:
    return make_rule("gradient", llm.shapes, llm.device)


def losses(llm: ResidentLLM, prompt: EncodedPrompt) -> tuple[float, bool]:
    """By the model itself, in one plain forward pass."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.answer_ids]])
        rows = llm.model(ids).logits[0, len(prompt.prompt_ids) - 1 : -1].log_softmax(-1)
    labels = torch.tensor(prompt.answer_ids)
    return float(F.nll_loss(rows, labels)), bool((rows.argmax(-1) == labels).all())


def test_a_trial_is_the_edit_made_by_hand(llm: ResidentLLM, facts: list[FactPrompts]) -> None:
    layer, rule = 3, make(llm)
    prompts = [fact.prompt for fact in facts]
    captures = [llm.read(prompt).capture() for prompt in prompts]
    forks = [llm.fork() for _ in facts]
    befores = [Answers.of(llm, fact) for fact in facts]
    given = write_all(forks, layer, prompts, captures, rule, 10)
    found = [
        judge(fork, layer, fact, before, right, 1.5)
        for fork, fact, before, right in zip(forks, facts, befores, given, strict=True)
    ]
    steps = []
    for fact, trial in zip(facts, found, strict=True):
        # The same with the model's own weight: dense gradients, each step to half of the loss.
        own = (fact.prompt, *fact.paraphrases)
        start, count = [losses(llm, p) for p in own], 0
        while not losses(llm, fact.prompt)[1]:
            capture = llm.read(fact.prompt).capture()
            gradient = capture.keys[layer].mT @ capture.value_gradients[layer]
            size = 0.5 * capture.loss / float((gradient**2).sum())
            updates: list[LowRankUpdate | None] = [None] * 4
            updates[layer] = LowRankUpdate(torch.eye(len(gradient)), -size * gradient)
            llm.commit(updates)
            count += 1
        now = [losses(llm, p) for p in own]
        norm = float(torch.linalg.vector_norm(llm.change(layer))) / llm.base_norm(layer)
        llm.restore_unedited()
        steps.append(count)
        assert trial.given
        assert trial.seconds == 1.5
        assert trial.size == pytest.approx(norm, rel=1e-3)
        assert trial.gain == pytest.approx(start[0][0] - now[0][0], abs=1e-2)
        gained = [before[0] - after[0] for before, after in zip(start[1:], now[1:], strict=True)]
        assert trial.paraphrase_gain == pytest.approx(np.mean(gained), abs=1e-2)
        assert trial.paraphrases_given == np.mean([right for _, right in now[1:]])
    assert max(steps) > 1, "a single step alone would test little"
    # The forks hold the edits, and nothing else does.
    assert all(fork.change(layer) is not None for fork in forks)


def test_a_fact_gets_no_more_steps_than_there_are(
    llm: ResidentLLM, facts: list[FactPrompts]
) -> None:
    prompts = [fact.prompt for fact in facts]
    captures = [llm.read(prompt).capture() for prompt in prompts]
    assert write_all([llm.fork() for _ in facts], 3, prompts, captures, make(llm), 1) != [True] * 3
    forks = [llm.fork() for _ in facts]
    assert write_all(forks, 3, prompts, captures, make(llm), 0) == [False] * 3
    assert all(fork.change(3) is None for fork in forks)


class Uphill(GradientRule):
    """Raises the loss."""

    def compute(self, *given: Any, **named: Any) -> tuple[LowRankUpdate | None, ...]:
        return tuple(u and u.scaled(-1.0) for u in super().compute(*given, **named))


class Broken(GradientRule):
    """Proposes what is not finite."""

    def compute(self, *given: Any, **named: Any) -> tuple[LowRankUpdate | None, ...]:
        return tuple(u and u.scaled(float("nan")) for u in super().compute(*given, **named))


@pytest.mark.parametrize("kind", [Uphill, Broken])
def test_a_rule_without_a_way_down_writes_nothing(
    kind: type[GradientRule], llm: ResidentLLM, facts: list[FactPrompts]
) -> None:
    fork, fact = llm.fork(), facts[0]
    capture = llm.read(fact.prompt).capture()
    rule = kind(llm.shapes, llm.device)
    assert write_all([fork], 0, [fact.prompt], [capture], rule, 5) == [False]
    assert fork.change(0) is None
    # Nothing written is no damage and no good.
    found = judge(fork, 0, fact, Answers.of(llm, fact), False, 0.0)
    assert (found.unrelated, found.swapped, found.agreement) == (0.0, 0.0, 1.0)
    assert (found.gain, found.effect, found.damage, found.size) == (0.0, 0.0, 0.0, 0.0)


def test_what_the_gradient_predicts(llm: ResidentLLM, facts: list[FactPrompts]) -> None:
    capture = llm.read(facts[0].prompt).capture()
    for layer, (d_in, d_out) in enumerate(llm.shapes):
        update = LowRankUpdate(normal(layer, 3, d_in), normal(layer + 9, 3, d_out))
        gradient = capture.keys[layer].mT @ capture.value_gradients[layer]
        by_hand = float((gradient * update.dense()).sum())
        assert directional(capture, layer, update) == pytest.approx(by_hand, rel=1e-3, abs=1e-5)


def test_the_divergence_by_hand() -> None:
    old, new = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    # Only the first of the two tokens changed: ½ (½ ln 2 + ½ ln ⅔).
    assert divergence(old.log(), new.log()) == pytest.approx(0.25 * np.log(4 / 3), rel=1e-5)
    assert divergence(old.log(), old.log()) == 0.0
    assert divergence(old.log(), new.log() * float("nan")) == WORST


def test_a_scan_leaves_every_bit_of_the_model(
    loaded: LoadedModel, layers: tuple[CandidateLayer, ...], facts: list[FactPrompts]
) -> None:
    before, done = all_bits(loaded.model), []
    scores = scan(loaded, layers, facts, make, progress=done.append)
    assert all_bits(loaded.model) == before
    assert [score.name for score in scores] == [layer.name for layer in layers]
    assert sum(done) == len(layers) * len(facts)
    assert all(score.seconds > 0 for score in scores)
    # The same once more.
    again = scan(loaded, layers, facts, make)
    assert [s.score for s in again] == [s.score for s in scores]


def test_facts_that_the_model_gives_are_left_out(llm: ResidentLLM) -> None:
    requests = load_requests("tiny-facts")
    prompt = llm.encode(requests[0].prompt, requests[0].answer)
    greedy = UneditedModel(llm).answers([prompt])[0]
    known = FactPrompts(greedy, (), (prompt,), ())
    new = FactPrompts(prompt, (), (prompt,), ())
    (left,) = not_given(UneditedModel(llm), [known, new])
    assert left.prompt == prompt
    # Prompts that shall stay get the model's own answers.
    assert left.unrelated == (greedy,)


def test_layers_that_cannot_be_edited_are_named_and_left_out(
    loaded: LoadedModel, layers: tuple[CandidateLayer, ...], facts: list[FactPrompts]
) -> None:
    stranger = torch.nn.Linear(4, 4)
    idle = CandidateLayer("model.layers.1.idle", stranger, 1, 4, 4, True)
    reasons: list[str] = []
    scores = scan(loaded, [idle, layers[0]], facts[:1], make, skipped=reasons.append)
    assert [score.name for score in scores] == [layers[0].name]
    assert len(reasons) == 1
    assert "model.layers.1.idle" in reasons[0]
    with pytest.raises(LayerError, match="none of the layers can be edited"):
        scan(loaded, [idle], facts[:1], make)
