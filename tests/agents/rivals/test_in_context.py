"""The fact in the prompt: what is asked, what it is compared with, and its row of a comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch

from hiedit_agents.protocol import begin_episode
from hiedit_agents.registry import make_agent
from hiedit_agents.rivals.in_context import InContext
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.requests import NEIGHBOUR, Probe, Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.evaluation.questions import questions_about
from hiedit_env.evaluation.unedited import UneditedModel

ONE = Request(
    prompt="Belka lives in",
    answer="Averlund",
    subject="Belka",
    paraphrases=("The house of Belka stands in",),
    locality=(Probe("Vasnik works as a", "tanner"),),
    portability=(Probe("Averlund is home of", "Belka", "reversed"),),
)
TWO = Request(prompt="Corrin lives in", answer="Istrand", subject="Corrin")


@pytest.fixture(scope="module")
def env() -> EditingEnv:
    made = gymnasium.make("hiedit/LayerSelection-v1", num_edits=2).unwrapped
    assert isinstance(made, EditingEnv)
    return made


def test_the_facts_stand_in_front_of_every_prompt(env: EditingEnv) -> None:
    reference = UneditedModel(env.llm)
    (first, second), _ = InContext(template="{fact}. ").judged([ONE, TWO], reference)
    before = "Belka lives in Averlund. "
    assert first.prompt == before + "Belka lives in"
    assert first.paraphrases == (before + "The house of Belka stands in",)
    assert first.locality == (Probe(before + "Vasnik works as a", "tanner"),)
    assert first.portability == (Probe(before + "Averlund is home of", "Belka", "reversed"),)
    assert (first.answer, first.subject) == ("Averlund", "Belka")
    assert second.prompt == "Corrin lives in Istrand. Corrin lives in"
    both, _ = InContext(facts="all", template="{fact}. ").judged([ONE, TWO], reference)
    assert both[0].prompt == before + "Corrin lives in Istrand. Belka lives in"


def test_neighbours_and_other_names_stay_what_they_are(env: EditingEnv) -> None:
    fact = replace(
        ONE, locality=(*ONE.locality, Probe("Corrin lives in", "Istrand")), subject_aliases=("Bel",)
    )
    (asked,), _ = InContext(template="{fact}. ").judged([fact], UneditedModel(env.llm))
    before = "Belka lives in Averlund. "
    assert [probe.kind for probe in asked.locality] == ["", NEIGHBOUR]
    # The fact in front keeps the subject's own name.
    assert asked.portability[1] == Probe(before + "Bel lives in", "Averlund", "alias")
    own, longer = (questions_about(env.llm, [r], ["plain"]).groups for r in (fact, asked))
    for name in own:
        prompts = [p.prompt for p in own[name].facts[0]]
        assert [p.prompt for p in longer[name].facts[0]] == [before + text for text in prompts]
    assert set(longer) == set(own)


def test_agreement_compares_with_the_model_asked_without_the_facts(env: EditingEnv) -> None:
    llm = env.llm
    plain = UneditedModel(llm)
    asked, reference = InContext().judged([ONE], plain)
    found = evaluate(llm, asked, reference, generation=()).per_fact["specificity"]["agreement"][0]
    # By hand: the tokens that the model gives to the bare prompt, at the longer prompt.
    bare = plain.answers([llm.encode("Vasnik works as a", "tanner")])[0]
    before = llm.encoder.encode_prompt("New fact: Belka lives in Averlund.\nVasnik works as a")
    with torch.no_grad():
        ids = torch.tensor([[*before, *bare.answer_ids]])
        guesses = llm.model(ids).logits[0, len(before) - 1 : -1].argmax(-1)
    kept = (guesses == torch.tensor(bare.answer_ids)).float().mean()
    assert found == pytest.approx(100 * float(kept))


def test_in_chat_the_facts_stand_in_the_message(env: EditingEnv) -> None:
    llm, tokenizer = env.llm, env.llm.tokenizer
    tokenizer.chat_template = "It is black. {% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        asked, reference = InContext(template="{fact}. ").judged([ONE], UneditedModel(llm))
        found = evaluate(llm, asked, reference, forms=("chat",), generation=())
    finally:
        tokenizer.chat_template = None

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(f"It is black. {text}", add_special_tokens=False))

    bare = UneditedModel(llm).answers([llm.encode("It is black. Vasnik works as a", "tanner")])[0]
    assert list(bare.prompt_ids) == ids("Vasnik works as a")
    before = ids("Belka lives in Averlund. Vasnik works as a")
    with torch.no_grad():
        logits = llm.model(torch.tensor([[*before, *bare.answer_ids]])).logits[0]
    kept = (logits[len(before) - 1 : -1].argmax(-1) == torch.tensor(bare.answer_ids)).float()
    agreement = found.per_fact["chat_specificity"]["agreement"][0]
    assert agreement == pytest.approx(100 * float(kept.mean()))


def test_nothing_is_written(env: EditingEnv) -> None:
    agent = make_agent("in-context")
    observation, info = begin_episode(env, agent, 0)
    before, ended = env.llm.weights_fingerprint(), False
    while not ended:
        observation, _, ended, _, info = env.step(agent.select_action(observation, info))
        assert not info["layers"].any()
    assert env.llm.weights_fingerprint() == before


def test_a_row_of_a_comparison(tmp_path: Path) -> None:
    settings = CompareSettings(model="tiny", num_edits=3, generation=())
    outcome = compare(settings, ["in-context"], [0], tmp_path / "out", progress=False)
    rows = {row["agent"]: row for row in outcome.rows}
    # The unedited model's row is of the bare prompts; the facts in front change the numbers.
    assert rows["in-context"]["metrics"]["specificity"]["agreement"] < 100.0
    assert rows["no-edit"]["metrics"]["specificity"]["agreement"] == 100.0
    assert rows["in-context"]["stream_fingerprint"] == rows["no-edit"]["stream_fingerprint"]
    details = json.loads((tmp_path / "out" / "runs" / "in-context-seed0.json").read_text())
    assert not any("New fact" in prompt for prompt in details["prompts"])


def test_mistakes() -> None:
    for name, message in (
        ("in-context,facts=some", "facts must be 'own' or 'all'"),
        ("in-context,template=x", "template must hold {fact}"),
    ):
        with pytest.raises(SettingsError, match=message):
            make_agent(name)
