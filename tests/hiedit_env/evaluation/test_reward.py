"""Quality levels and the differentiable loss, against a plain model and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import PromptError
from hiedit_env.evaluation import scores as scoring
from hiedit_env.evaluation.reward import Evaluator, prepare_together
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedFact
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from hiedit_env.testing import assert_no_hooks_left
from tests.support import models
from tests.support.episodes import (
    KINDS,
    LIFELONG,
    SELECTION,
    PlainModel,
    act,
    bits,
    judged,
    make,
    plain_levels,
    quality,
    same_bits,
)
from tests.support.models import random_updates


@pytest.fixture(scope="module")
def plain() -> PlainModel:
    return PlainModel()


@pytest.fixture(scope="module")
def edited() -> EditingEnv:
    """On its third fact, after two edits strong enough to harm."""
    env = make(SELECTION, step_size=1e-2, max_steps_per_edit=1)
    env.reset(seed=0)
    for _ in range(2):
        env.step(act(SELECTION))
    return env


def requests_of(facts: tuple[EncodedFact, ...]) -> list[Request]:
    return [fact.request for fact in facts]


# Terms


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_those_of_a_plain_model(edited: EditingEnv, plain: PlainModel, kind: Any) -> None:
    evaluator = Evaluator(edited.llm, kind=kind, decay=0.7)
    fact, remembered = edited.episode.fact, edited.episode.remembered
    assert len(remembered) == 2
    prepare_together([(evaluator, [fact], remembered)])
    found = judged(evaluator, fact, remembered)
    now = PlainModel(bits(edited))
    wanted = plain_levels(plain, now, fact.request, requests_of(remembered), kind, 0.7)
    assert found.terms == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert found.finite
    # The accuracies are measured whatever the kind.
    share = plain_levels(plain, now, fact.request, requests_of(remembered), "token_accuracy", 0.7)
    metrics = found.metrics
    assert metrics["argmax_match"] == pytest.approx(share["locality"])
    assert metrics["recent_retention"] == pytest.approx(share["recent_retention"])
    assert (metrics["efficacy"] + metrics["generalization"]) / 2 == pytest.approx(share["edit"])
    # A reading of the fact replaces one forward pass and nothing else.
    again = judged(evaluator, fact, remembered, edited.llm.read(fact.prompt))
    assert again.terms == pytest.approx(found.terms, rel=1e-5)
    assert again.metrics == pytest.approx(found.metrics)


def test_the_edits_have_done_harm(edited: EditingEnv, plain: PlainModel) -> None:
    # Otherwise the tests above and below would compare zeros.
    episode, now = edited.episode, PlainModel(bits(edited))
    levels = plain_levels(plain, now, episode.fact.request, requests_of(episode.remembered))
    assert levels["locality"] < -0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_unedited_model_agrees_with_itself(kind: Any) -> None:
    env = make(LIFELONG, num_edits=2, reward=kind)
    env.reset(seed=0)
    found = quality(env)
    assert found.terms["locality"] == pytest.approx(0.0 if kind == "loss" else 1.0, abs=1e-5)
    assert found.metrics["agreement"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_measure_is_perfect(kind: Any, plain: PlainModel) -> None:
    env = make(LIFELONG, reward=kind)
    request = Request("Belka lives in", "Istrand", "Belka")
    env.reset(options={"requests": [request]})
    found = quality(env)
    perfect = 0.0 if kind == "loss" else 1.0
    assert found.terms == pytest.approx(
        {
            **plain_levels(plain, plain, request, [], kind),
            "locality": perfect,
            "recent_retention": perfect,
        },
        abs=1e-5,
    )
    assert found.finite
    missing = {name for name, value in found.metrics.items() if value != value}
    assert missing == {"generalization", "agreement", "argmax_match", "recent_retention"}


def test_only_remembered_facts_may_have_unrelated_prompts(plain: PlainModel) -> None:
    env = make(LIFELONG, step_size=3e-3, max_steps_per_edit=1)
    probes = (Probe("Zorbel lives in", "Cindrath"), Probe("Vasnik works as a", "tanner"))
    stream = [
        Request("Belka lives in", "Istrand", "Belka", locality=probes),
        Request("Corrin lives in", "Kessford", "Corrin", paraphrases=("Go to",)),
    ]
    env.reset(options={"requests": stream})
    env.step(act(LIFELONG))
    now = PlainModel(bits(env))
    wanted = plain_levels(plain, now, stream[1], stream[:1])
    assert quality(env).terms == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    # One prompt has all the weight: the first of the remembered fact.
    only = plain_levels(plain, now, Request("a", "b", "c", locality=probes[:1]), [])
    assert wanted["locality"] == pytest.approx(only["locality"])
    assert wanted["locality"] < -1e-4


def test_a_prompt_that_serves_twice_counts_twice(plain: PlainModel) -> None:
    # The second fact's unrelated prompt is the first fact's own, and the same answer is wanted.
    stream = [
        Request("Belka lives in", "Istrand", "Belka", locality=(Probe("Corrin lives in", "x"),)),
        Request("Corrin lives in", "Kessford", "Corrin", locality=(Probe("Belka lives in", "y"),)),
        Request(
            "Dasmo lives in", "Istrand", "Dasmo", locality=(Probe("Belka lives in", "Istrand"),)
        ),
    ]
    env = make(LIFELONG, step_size=3e-3, max_steps_per_edit=1)
    env.reset(options={"requests": stream})
    for _ in range(2):
        env.step(act(LIFELONG))
    wanted = plain_levels(plain, PlainModel(bits(env)), stream[2], stream[1::-1])
    assert quality(env).terms == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_long_answers_are_exactly_answered() -> None:
    # A mean of n ones by quotients of n would miss 1 for most n from 10 on.
    llm = models.resident()
    evaluator = Evaluator(llm)
    ids = [5, 9, 4]
    for _ in range(14):
        with torch.no_grad():
            ids.append(int(llm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    request = Request("prompt", "answer", "subject")
    for n in range(1, 15):
        prompt = models.prompt(ids[:3], ids[3 : 3 + n])
        found = judged(evaluator, EncodedFact(request, (prompt,), (), ()), ())
        assert found.metrics["efficacy"] == 1.0, n


def test_references_are_taken_from_the_right_model(edited: EditingEnv) -> None:
    before, fact = bits(edited), edited.episode.fact
    for reference, same in (("unedited", False), ("previous", True)):
        evaluator = Evaluator(edited.llm, reference=reference)  # type: ignore[arg-type]
        prepare_together([(evaluator, [fact], ())])
        level = judged(evaluator, fact, ()).terms["locality"]
        assert (level > -1e-5) == same
        # Reading the unedited model has left the edited weights in place.
        assert same_bits(bits(edited), before)


def test_a_text_that_is_too_long_names_its_source() -> None:
    env = make(LIFELONG)
    long = "Belka " * 200
    for request in (
        Request(long, "Istrand", "Belka", source="facts.json row 3"),
        Request("Belka", "Istrand", "Belka", (long,), source="facts.json row 3"),
        Request("Belka", "Istrand", "B", (), (Probe(long, "x"),), source="facts.json row 3"),
    ):
        with pytest.raises(PromptError, match=r"facts\.json row 3: .*128"):
            env.episode.evaluator.encode(request)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", range(5))
def test_a_quality_that_is_not_finite_says_so(
    monkeypatch: pytest.MonkeyPatch, place: int, value: float, kind: Any
) -> None:
    """One bad number is enough: of the fact, a paraphrase, a probe, or of what is remembered."""
    llm = models.resident()
    evaluator = Evaluator(llm, kind=kind)
    request = Request("w5", "w6", "w5")
    prompts = tuple(llm.encode(f"w{i} w9", "w4") for i in range(3, 8))
    fact = EncodedFact(request, prompts[:1], (prompts[1],), (prompts[2],))
    old = [EncodedFact(request, prompts[3:4], (), (prompts[4],))]
    prepare_together([(evaluator, [fact], old)])
    assert judged(evaluator, fact, old).finite
    inner = scoring._scores

    def spoiled(batch: PromptBatch, references: Any, logits: Tensor) -> tuple[Tensor, ...]:
        losses, correct, kl, agree = inner(batch, references, logits)
        row = [p for p in batch.prompts for _ in p.answer_ids].index(prompts[place])
        (kl if place in (2, 4) else losses)[row] = value
        return losses, correct, kl, agree

    monkeypatch.setattr(scoring, "_scores", spoiled)
    assert not judged(evaluator, fact, old).finite


def test_float64_is_used_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices (MPS) have none."""
    env = make(LIFELONG)
    env.reset(seed=0)
    cpu, double = Tensor.cpu, Tensor.double
    moved: list[Tensor] = []

    def noted(self: Tensor) -> Tensor:
        moved.append(cpu(self).clone())
        return moved[-1]

    def checked(self: Tensor) -> Tensor:
        assert any(self is copy for copy in moved)
        return double(self)

    monkeypatch.setattr(Tensor, "cpu", noted)
    monkeypatch.setattr(Tensor, "double", checked)
    quality(env)
    assert len(moved) == 1


# The differentiable loss

WEIGHTS = {"edit": 1.5, "locality": 2.0, "recent_retention": 0.5}


@pytest.fixture(scope="module")
def weighted() -> EditingEnv:
    """As ``edited``, with other weights of the terms and another decay."""
    env = make(
        SELECTION,
        step_size=1e-2,
        max_steps_per_edit=1,
        reward_weights=WEIGHTS,
        retention_decay=0.7,
        reward="token_accuracy",  # The loss is in nats whatever the reward.
    )
    env.reset(seed=0)
    for _ in range(2):
        env.step(act(SELECTION))
    return env


def plain_loss(env: EditingEnv, plain: PlainModel, weights: Mapping[str, Tensor]) -> float:
    episode = env.episode
    levels = plain_levels(
        plain, PlainModel(weights), episode.fact.request, requests_of(episode.remembered), decay=0.7
    )
    return -sum(weight * levels[term] for term, weight in WEIGHTS.items())


def test_without_updates_the_loss_is_minus_the_weighted_terms(
    weighted: EditingEnv, plain: PlainModel
) -> None:
    wanted = plain_loss(weighted, plain, bits(weighted))
    zeros = [LowRankUpdate(u.left, 0 * u.right) for u in random_updates(weighted.llm) if u]
    nothing: list[Updates] = [zeros, (None,) * 6]
    for updates in nothing:
        for l2 in (0.0, 1.0):
            loss = weighted.loss(updates, l2=l2)
            assert loss.shape == ()
            assert float(loss) == pytest.approx(wanted, rel=1e-5)


def written(env: EditingEnv, updates: Updates) -> dict[str, Tensor]:
    """The weights in float64 with the updates added by hand."""
    weights = {name: value.double() for name, value in bits(env).items()}
    for name, update in zip(env.llm.names, updates, strict=True):
        if update is not None:
            change = torch.einsum("ri,ro->oi", update.left.double(), update.right.double())
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + change
    return weights


def some_updates(env: EditingEnv) -> list[LowRankUpdate | None]:
    updates = random_updates(env.llm, scale=0.1)
    updates[2] = None
    return [u and LowRankUpdate(u.left.requires_grad_(), u.right.requires_grad_()) for u in updates]


def test_the_loss_is_that_of_the_written_updates(weighted: EditingEnv, plain: PlainModel) -> None:
    before, updates = bits(weighted), some_updates(weighted)
    loss = weighted.loss(updates).detach()
    assert float(loss) == pytest.approx(
        plain_loss(weighted, plain, written(weighted, updates)), rel=1e-4
    )
    assert abs(float(loss) - plain_loss(weighted, plain, before)) > 0.01
    penalised = weighted.loss(updates, l2=0.5).detach()
    squares = sum(float(u.detach().dense().square().sum()) for u in updates if u)
    assert float(penalised - loss) == pytest.approx(0.5 * squares, rel=1e-3)
    assert same_bits(bits(weighted), before)
    assert_no_hooks_left(weighted)


def test_the_gradient_is_that_of_finite_differences(
    weighted: EditingEnv, plain: PlainModel
) -> None:
    updates = some_updates(weighted)
    weighted.loss(updates, l2=0.5).backward()  # type: ignore[no-untyped-call]
    eps = 1e-4
    for layer in (0, 5):
        update = updates[layer]
        assert update is not None
        for side in ("left", "right"):
            factor = getattr(update, side)
            direction = factors_direction(layer, factor)
            values = []
            for sign in (1, -1):
                moved = list(updates)
                parts = {"left": update.left.detach(), "right": update.right.detach()}
                parts[side] = parts[side].double() + sign * eps * direction
                moved[layer] = LowRankUpdate(parts["left"].double(), parts["right"].double())
                squares = sum(float(u.detach().dense().square().sum()) for u in moved if u)
                values.append(plain_loss(weighted, plain, written(weighted, moved)) + 0.5 * squares)
            slope = (values[0] - values[1]) / (2 * eps)
            ours = float((factor.grad.double() * direction).sum())
            assert abs(slope) > 1e-3
            assert ours == pytest.approx(slope, rel=1e-2), (layer, side)


def factors_direction(layer: int, factor: Tensor) -> Tensor:
    return models.normal(100 + layer, *factor.shape, dtype=torch.float64)
