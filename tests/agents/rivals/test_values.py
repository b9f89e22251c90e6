"""The vectors of MEMIT and AlphaEdit: when the search ends, how long they get, what holds them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.rivals.spread import looked_up
from hiedit_agents.rivals.values import Place, ValueSearch, essence
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM
from tests.agents.rivals.test_spread import fact, model, place

SEARCH = ValueSearch(0.1, 0.5, 60, 0.2, 5.0, 0.0, 0.0)
LAYER = 0


def losses(llm: ResidentLLM, places: list[Place], vectors: Tensor) -> Tensor:
    nudges = Nudges(llm, [p for p, _ in places], [at for _, at in places], [LAYER])
    return nudges.losses([vectors])


def seek(llm: ResidentLLM, search: ValueSearch, numbers: list[int]) -> tuple[list[Place], Tensor]:
    places = [place(llm, number) for number in numbers]
    return places, search.seek(llm, LAYER, places, torch.arange(len(numbers)), sizes(llm, places))


def sizes(llm: ResidentLLM, places: list[Place]) -> Tensor:
    return looked_up(llm, [LAYER], places)[1].norm(dim=1)


def test_every_fact_is_sought_until_it_is_answered_well_enough() -> None:
    llm = model()
    places, vectors = seek(llm, SEARCH, [0, 1, 2])
    found = losses(llm, places, vectors)
    assert bool((found < 0.2).all())
    assert not bool((losses(llm, places, torch.zeros_like(vectors)) < 0.2).any())
    # A fact rests once it is good enough, so the others change nothing about it.
    for i, number in enumerate((0, 1, 2)):
        _, alone = seek(llm, SEARCH, [number])
        torch.testing.assert_close(alone[0], vectors[i], atol=1e-3, rtol=1e-3)


def test_a_first_step_has_the_length_and_the_direction_by_hand() -> None:
    llm = model()
    places, vectors = seek(llm, replace(SEARCH, steps=1), [0])
    start = torch.zeros_like(vectors, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses(llm, places, start).sum(), start)
    wanted = -0.1 * sizes(llm, places) * gradient / gradient.norm()
    torch.testing.assert_close(vectors, wanted, atol=1e-5, rtol=1e-4)


def test_vectors_are_no_longer_than_their_share_of_the_hidden_state() -> None:
    llm = model()
    places, free = seek(llm, SEARCH, [0, 1])
    _, held = seek(llm, replace(SEARCH, clamp=0.15), [0, 1])
    limits = 0.15 * sizes(llm, places)
    assert bool((free.norm(dim=1) > 1.1 * limits).all())
    torch.testing.assert_close(held.norm(dim=1), limits)


def test_weight_decay_shortens_the_vectors() -> None:
    llm = model()
    _, free = seek(llm, replace(SEARCH, steps=20, enough=1e-3), [0])
    _, light = seek(llm, replace(SEARCH, steps=20, enough=1e-3, weight_decay=100.0), [0])
    assert float(light.norm()) < 0.8 * float(free.norm())


def test_the_essence_is_the_subject_alone_with_one_answer_token() -> None:
    llm = model()
    tokens = llm.tokenizer
    tokens.add_tokens(["is", "a"])
    # The model is not asked, so only the tokens are looked at.
    llm.encoder.vocabulary = len(tokens)
    ((asked, at),) = essence(llm, fact(llm, 0))
    assert [tokens.decode([i]) for i in asked.prompt_ids] == ["w9", "is", "a"]
    assert (at, len(asked.answer_ids)) == (0, 1)


def test_a_prompt_without_its_subject_is_held_to_nothing() -> None:
    llm = model()
    encoded = llm.encode("w5 w9 w4", "w7")
    assert essence(llm, encoded) == []
    missing = llm.encoder.with_subject(encoded, "w5 w9 w4", "w22")
    assert missing.subject_missing
    assert essence(llm, missing) == []


def test_the_divergence_holds_what_is_said_about_the_subject(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    kind = llm.encode("w9 w13 w14", "w3")

    def other_words(_llm: ResidentLLM, _prompt: EncodedPrompt) -> list[Place]:
        # The tiny vocabulary has no "is a".
        return [(replace(kind, answer_ids=kind.answer_ids[:1]), 0)]

    monkeypatch.setattr("hiedit_agents.rivals.values.essence", other_words)

    def divergence(vectors: Tensor) -> float:
        nudges = Nudges(llm, [kind], [0], [LAYER])
        before = nudges.logits([torch.zeros_like(vectors)]).log_softmax(-1)
        after = nudges.logits([vectors]).log_softmax(-1)
        return float(F.kl_div(after, before, reduction="batchmean", log_target=True))

    search = replace(SEARCH, steps=30, enough=1e-3)
    _, free = seek(llm, search, [0])
    _, held = seek(llm, replace(search, kl_factor=20.0), [0])
    assert divergence(held) < 0.2 * divergence(free)
