"""Trials of layers against the same edit made by hand, on the tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hiedit_benchmarks.layers.facts import FactPrompts, prompts_of
from hiedit_benchmarks.layers.scan import (
    BETWEEN,
    SIZES,
    WORST,
    Answers,
    _try,
    directional,
    divergence,
    not_given,
    scan,
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
from hiedit_env.rules.names import make_rule
from tests.support.models import all_bits

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
    fact, layer = facts[0], 3
    capture = llm.read(fact.prompt).capture()
    update = make(llm).propose(capture, np.arange(4) == layer)[layer]
    assert update is not None
    before = Answers.of(llm, fact)
    forks = [llm.fork() for _ in SIZES]
    found = _try(llm, forks, layer, fact, capture, update, before, 1.5)
    assert found.given
    assert found.seconds == 1.5

    # The gradient step's predicted decrease is −‖G‖²·step, from the dense gradient.
    gradient = capture.keys[layer].mT @ capture.value_gradients[layer]
    step = make(llm).step_size
    rise = directional(capture, layer, update)
    assert rise == pytest.approx(-step * float((gradient**2).sum()), rel=1e-4)

    # The sizes one after another, written into the model itself.
    start = losses(llm, fact.prompt)[0]
    unit = start / -rise
    multiples = sorted({*SIZES, *(s * part for s in SIZES for part in BETWEEN)})
    given = {}
    own = (fact.prompt, *fact.paraphrases)
    for multiple in multiples:
        updates: list[LowRankUpdate | None] = [None] * 4
        updates[layer] = update.scaled(unit * multiple)
        unedited = llm.commit(updates)
        given[multiple] = [losses(llm, p) for p in own]
        size = float(torch.linalg.vector_norm(llm.change(layer))) / llm.base_norm(layer)
        llm.restore(unedited)
        if given[multiple][0][1]:
            break
    assert len(given) > 2, "the smallest size alone would test nothing"
    now = given[multiple]
    assert found.size == pytest.approx(size, rel=1e-4)
    assert found.gain == pytest.approx(start - now[0][0], abs=1e-3)
    pairs = zip(fact.paraphrases, now[1:], strict=True)
    gained = [losses(llm, p)[0] - after for p, (after, _) in pairs]
    assert found.paraphrase_gain == pytest.approx(np.mean(gained), abs=1e-3)
    assert found.paraphrases_given == np.mean([right for _, right in now[1:]])
    assert all(fork.change(i) is None for fork in forks for i in range(4))


def test_the_divergence_by_hand() -> None:
    old, new = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    # Only the first of the two tokens changed: ½ (½ ln 2 + ½ ln ⅔).
    assert divergence(old.log(), new.log()) == pytest.approx(0.25 * np.log(4 / 3), rel=1e-5)
    assert divergence(old.log(), old.log()) == 0.0
    assert divergence(old.log(), new.log() * float("nan")) == WORST


def test_unedited_weights_do_no_damage_and_no_good(
    llm: ResidentLLM, facts: list[FactPrompts]
) -> None:
    nothing = LowRankUpdate(torch.zeros(1, llm.shapes[0][0]), torch.zeros(1, llm.shapes[0][1]))
    capture = llm.read(facts[0].prompt).capture()
    before = Answers.of(llm, facts[0])
    found = _try(llm, [llm.fork() for _ in SIZES], 0, facts[0], capture, nothing, before, 0.0)
    assert not found.given
    assert (found.unrelated, found.swapped, found.agreement) == (0.0, 0.0, 1.0)
    assert (found.effect, found.damage, found.size) == (0.0, 0.0, 0.0)


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
