"""What the values of neurons are sought for: rewordings, and vectors that facts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy.fact_memory import units_of
from hiedit_agents.hierarchy.neuron_plan import Target
from hiedit_agents.hierarchy.neuron_search import SearchForm
from hiedit_env.model.encoded import AskedForm
from hiedit_env.model.tokenization import EncodedPrompt
from tests.agents.hierarchy.test_neuron import FACTS, FIRST, HIDDEN, SAME, model, neuron, unit


@pytest.mark.parametrize("forms", [("plain",), ("plain", "chat")])
def test_values_are_sought_for_a_rewording_in_every_form_in_which_facts_are_asked(
    forms: Sequence[AskedForm], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = model()
    prompts = [replace(unit(llm, FACTS[0]).prompt, form=form) for form in forms]
    extra = unit(llm, SAME).prompt
    asked: list[object] = []
    sought: list[Target] = []

    def made(*args: Any) -> list[EncodedPrompt]:
        asked.append((args[0], tuple(args[1]), tuple(args[2])))
        return [extra]

    def noted(*args: Any) -> Tensor:
        sought.extend(args[2])
        return torch.zeros(len(args[2]), HIDDEN)

    monkeypatch.setattr("hiedit_agents.hierarchy.neuron_plan.rewordings", made)
    monkeypatch.setattr("hiedit_agents.hierarchy.neuron.seek", noted)
    for reworded in (True, False):
        neuron(llm, reworded=reworded).propose(llm.read(*prompts).capture(), FIRST)
    assert asked == [(llm.encoder, tuple(prompts), tuple(forms))]
    assert [target.prompts for target in sought] == [(*prompts, extra), tuple(prompts)]


def test_the_words_of_a_prompt_that_another_neuron_answers_are_reworded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    plain = unit(llm, ("w9 w4 w8", "w13", "w9")).prompt
    chat = replace(unit(llm, ("w5 w9 w4 w8", "w13", "w9")).prompt, form="chat")
    asked: list[tuple[EncodedPrompt, ...]] = []

    def noted(_encoder: object, prompts: Sequence[EncodedPrompt], _forms: object) -> list[Any]:
        asked.append(tuple(prompts))
        return []

    monkeypatch.setattr("hiedit_agents.hierarchy.neuron_plan.rewordings", noted)
    low = neuron(llm, widest=13.5)
    capture = llm.read(plain, chat).capture()
    monkeypatch.setattr("hiedit_agents.hierarchy.neuron.units_of", lambda _, prompts: [prompts])
    in_chat, moved = low.plan(capture, FIRST)
    # The plain prompt begins with its subject, so another neuron reads it behind.
    assert in_chat.prompts == (chat,)
    assert moved.prompts[0].prompt_ids == plain.prompt_ids
    assert asked == [(plain, chat), (chat, *moved.prompts)]
    # So it is where every prompt has a neuron of its own.
    del asked[:]
    monkeypatch.setattr("hiedit_agents.hierarchy.neuron_plan.Planner._firm", lambda *_: None)
    assert [t.fact for t in low.plan(capture, FIRST)] == [plain.prompt_ids, chat.prompt_ids]
    assert asked == [(plain, chat), (chat, *moved.prompts), (plain, chat)]


def test_the_words_of_another_fact_are_not_reworded(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    plain = unit(llm, ("w9 w4 w8", "w13", "w9")).prompt
    other = replace(unit(llm, ("w5 w9 w10", "w12", "w9")).prompt, form="chat")
    capture = llm.read(plain, other).capture()
    asked: list[tuple[EncodedPrompt, ...]] = []

    def noted(_encoder: object, prompts: Sequence[EncodedPrompt], _forms: object) -> list[Any]:
        asked.append(tuple(prompts))
        return []

    monkeypatch.setattr("hiedit_agents.hierarchy.neuron_plan.rewordings", noted)
    in_chat, moved = neuron(llm, widest=13.5).plan(capture, FIRST)
    assert len(units_of(llm, capture.prompts)) == 2
    assert asked == [in_chat.prompts, moved.prompts]


def test_a_vector_that_facts_share_is_sought_without_noise_and_rewordings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    extra = unit(llm, ("w3 w21 w8", "w5", "w21")).prompt
    calls: list[tuple[list[str], float, bool]] = []
    given: list[list[float]] = []

    def noted(
        _llm: object, _mlps: object, targets: Sequence[Target], form: SearchForm, without: Tensor
    ) -> Tensor:
        given.append(without[:, 0].tolist())
        for target in targets:
            answers = [prompt.answer for prompt in target.prompts if prompt is not extra]
            calls.append((answers, form.noise, extra in target.prompts))
        return torch.arange(1.0, len(targets) + 1)[:, None] * (1 + form.noise) * torch.ones(HIDDEN)

    monkeypatch.setattr("hiedit_agents.hierarchy.neuron_plan.rewordings", lambda *_: [extra])
    monkeypatch.setattr("hiedit_agents.hierarchy.neuron.seek", noted)
    low = neuron(llm, noise=0.5)
    capture = unit(llm, FACTS[0], FACTS[1], SAME, FACTS[2])
    targets = low.plan(capture, FIRST)
    found = low._search(targets, torch.arange(10.0, 13.0)[:, None].expand(3, HIDDEN))
    # Two facts share a subject; they stand where the first of them stood.
    assert calls == [(["w12"], 0.5, True), (["w30"], 0.5, True), (["w7 w3", "w13"], 0.0, False)]
    assert given == [[11.0, 12.0], [10.0]]
    assert found[:, 0].tolist() == [1.0, 1.5, 3.0]
