"""Which sentences a planned neuron reads, is sought for, and keeps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hiedit_agents.hierarchy import other_sentences as other_sentences_module
from hiedit_agents.hierarchy.neuron_plan import (
    NeuronShape,
    Planner,
    ShapeForm,
    Target,
)
from hiedit_agents.hierarchy.other_sentences import other_sentences
from hiedit_agents.hierarchy.rewordings import LEADS, behind_leads
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM
from tests.agents.hierarchy.test_neuron import model, neuron, unit
from tests.agents.hierarchy.test_neuron_plan import LATER, at_subject
from tests.hiedit_env.model.test_asking import encoder_of
from tests.hiedit_env.model.test_tokenization import byte_level


def test_a_neuron_fires_in_the_sentences_that_its_value_is_sought_for() -> None:
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)

    def shape(reworded: bool) -> Target:
        form = ShapeForm(0.5, 60.0, 0, 4.0, reworded)
        planner = Planner(llm, low.mlps, low._readings, form)
        (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
        return target

    aware, plain = shape(True), shape(False)
    assert plain.rewordings == ()
    assert aware.prompts == plain.prompts == capture.prompts
    (sentence,) = aware.rewordings
    assert sentence.positions("subject")[0] > 0
    read = llm.read(sentence).capture()
    for one in (capture, read):
        assert float(at_subject(llm, aware.shape, one)) == pytest.approx(1, abs=0.02)
    assert float(at_subject(llm, plain.shape, capture)) == pytest.approx(1, abs=1e-3)
    assert abs(float(at_subject(llm, plain.shape, read)) - 1) > 0.5


def test_a_neuron_fires_behind_the_leads_which_are_not_sought_for() -> None:
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.5, 60.0, 0, 4.0))
    (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
    leads = behind_leads(llm.encoder, capture.prompts)
    assert leads
    assert not set(leads) & {*target.prompts, *target.rewordings}
    read = planner._ends(low.mlps[0], leads)
    strengths = target.shape.firing(read)
    torch.testing.assert_close(strengths, torch.ones(len(leads)), atol=0.05, rtol=0)


@pytest.mark.parametrize("turned", [False, True])
def test_leads_do_not_depend_on_the_order_of_facts_about_one_subject(turned: bool) -> None:
    encoder = encoder_of(byte_level())

    def fact(text: str) -> tuple[EncodedPrompt, ...]:
        return (encoder.with_subject(encoder.encode(text, "A"), text, "Lyon"),)

    # At its beginning a text writes the name in other tokens, and gives no leads.
    facts = [fact("Lyon has the name of"), fact("the name of Lyon is")]
    facts = facts[::-1] if turned else facts
    form = ShapeForm(0.5, 60.0, 0, 4.0)
    planner = Planner(cast(ResidentLLM, SimpleNamespace(encoder=encoder)), [], [], form)
    found = planner._behind_leads(facts, [prompt for one in facts for prompt in one])
    assert [p.prompt for p in found] == [f"{lead} Lyon" for lead in LEADS]
    assert planner._behind_leads(facts, []) == ()
    never = Planner(planner._llm, [], [], replace(form, reworded=False))
    assert never._behind_leads(facts, facts[0] + facts[1]) == ()


def test_other_sentences_are_of_the_subject_and_of_no_fact_about_it() -> None:
    encoder = encoder_of(byte_level())

    def fact(text: str) -> tuple[EncodedPrompt, ...]:
        asked = encoder.encode_forms(text, "A", "both")
        return tuple(encoder.with_subject(p, text, "Lyon") for p in asked)

    size, name = fact("The size of Lyon is"), fact("the name of Lyon is")
    form = ShapeForm(0.5, 60.0, 0, 4.0)
    planner = Planner(cast(ResidentLLM, SimpleNamespace(encoder=encoder)), [], [], form)
    texts = [p.prompt for p in planner._others([name], name)]
    assert len(texts) == len(set(zip(texts, planner._others([name], name), strict=True)))
    both = planner._others([name, size], (*name, *size))
    # Once for both, without what one of them asks.
    assert {p.prompt for p in both} == set(texts) - {"The size of Lyon is"}
    assert len(both) == len(texts) - 1
    assert {p.form for p in planner._others([name], name[1:])} == {"chat"}
    never = Planner(planner._llm, [], [], replace(form, kept=False))
    assert never._others([name], name) == ()


def test_what_is_kept_is_planned_with_a_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    # The words of this tokenizer.
    monkeypatch.setattr(other_sentences_module, "STATEMENTS", ("w5 {} w13", "w3 w8 {}"))
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    for kept in (True, False):
        form = ShapeForm(0.5, 60.0, 0, 4.0, kept=kept)
        planner = Planner(llm, low.mlps, low._readings, form)
        (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
        wanted = other_sentences(llm.encoder, capture.prompts, ("plain",)) if kept else []
        assert target.kept == tuple(wanted)
    assert len(other_sentences(llm.encoder, capture.prompts, ("plain",))) == 2


def test_a_neuron_made_without_another_sentence_fires_from_a_lower_score_on() -> None:
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    found = []
    for reworded in (True, False):
        form = ShapeForm(0.75, 60.0, 0, 6.0, reworded)
        planner = Planner(llm, low.mlps, low._readings, form)
        (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
        found.append(target.shape.threshold)
    assert found == pytest.approx([0.75, 0.5])


def test_a_sentence_in_which_the_subject_reads_too_differently_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    low, capture = neuron(llm), unit(llm, LATER)
    own, seen = Planner._firm, []

    def firm(planner: Planner, home: int, rows: Any) -> NeuronShape | None:
        seen.append(len(rows.own))
        return own(planner, home, rows) if len(rows.own) == 1 else None

    monkeypatch.setattr(Planner, "_firm", firm)
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.75, 60.0, 0, 6))
    (target,) = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
    # The prompt, the sentence, and two of the leads (two have the same tokens here); then fewer.
    assert seen == [4, 2, 3, 1]
    torch.testing.assert_close(
        target.shape.reading[None],
        planner._rows(capture, 0, [capture.prompt], {capture.prompt: 0}).own,
    )
    # The value is sought for it all the same; where the neuron is silent, the search leaves it out.
    assert len(target.rewordings) == 1
