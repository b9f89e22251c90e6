"""Chat form, neighbours, portability and the end token, against transformers used by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import NEIGHBOUR, Probe, Request
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match, starts_with
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.evaluation.questions import is_neighbour, portability_probes
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import PromptEncoder
from hiedit_env.resident.resident import ResidentLLM
from tests.hiedit_env.evaluation.test_metrics import Plain, check, damage, plain_ids, resident

#: A sentence before the message, so that other tokens are asked than in the plain form.
TEMPLATE = (
    "It is black. {% for m in messages %}{{ m.content }}"
    "{{ ' ' if not loop.last else '' }}{% endfor %}"
)


def in_chat(llm: ResidentLLM, template: str = TEMPLATE) -> ResidentLLM:
    llm.tokenizer.chat_template = template
    return llm


@pytest.fixture(scope="module")
def facts() -> list[Request]:
    """Every third fact is true, so that not everything is wrong; one has a system message."""
    found = [
        replace(fact, answer=fact.answer if i % 3 else (fact.old_answer or fact.answer))
        for i, fact in enumerate(load_requests("tiny-facts")[::17])
    ]
    return [found[0], replace(found[1], system="Belka lives in Grelmouth."), *found[2:]]


class Asked:
    """A saved folder, opened and asked with transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def template(self, prompt: str, system: str | None) -> list[int]:
        chat = [] if system is None else [{"role": "system", "content": system}]
        chat.append({"role": "user", "content": prompt})
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        return list(ids["input_ids"])

    def text(self, prompt: str, answer: str, system: str | None) -> str:
        ids = self.template(prompt, system)
        count = len(self.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
        made = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=count + EXTRA_TOKENS,
        )
        return str(self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))

    def right(self, start: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = self.model(torch.tensor([[*start, *answer]])).logits[0]
        guesses = logits.argmax(-1)[len(start) - 1 : -1].tolist()
        return 100.0 * float(np.mean([a == b for a, b in zip(guesses, answer, strict=True)]))


def test_chat_form_equals_asking_the_saved_model_in_transformers(
    facts: list[Request], tmp_path: Path
) -> None:
    llm = in_chat(resident())
    unedited = Plain(llm)
    damage(llm, 0.25)
    found = evaluate(llm, facts, UneditedModel(llm), forms=("plain", "chat"))
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    asked = Asked(tmp_path)
    texts = [asked.text(r.prompt, r.answer, r.system) for r in facts]
    assert found.chat_answers == tuple(texts)
    assert len(set(texts)) > 3
    chat = found.per_fact["chat_efficacy"]
    given = [100.0 * is_match(t, r.answer) for t, r in zip(texts, facts, strict=True)]
    check(chat["generation"], given)
    begun = [100.0 * starts_with(t, r.answer) for t, r in zip(texts, facts, strict=True)]
    check(chat["generation_prefix"], begun)

    def ids(text: str) -> list[int]:
        return list(asked.tokenizer(f" {text}", add_special_tokens=False)["input_ids"])

    forced = [asked.right(asked.template(r.prompt, r.system), ids(r.answer)) for r in facts]
    check(chat["token_accuracy"], forced)
    assert 0 < np.mean(forced) < 100
    check(found.per_fact["chat_retention"]["token_accuracy"][:3], forced[:3])
    assert np.isnan(found.per_fact["chat_retention"]["token_accuracy"][3:]).all()
    rewordings = [
        np.mean([asked.right(asked.template(t, r.system), ids(r.answer)) for t in r.paraphrases])
        for r in facts
    ]
    check(found.per_fact["chat_generalization"]["token_accuracy"], rewordings)
    shares = []
    for r in facts:
        starts = [asked.template(p.prompt, r.system) for p in r.locality]
        own = [plain_ids(unedited.model, asked.tokenizer, start, 5) for start in starts]
        shares.append(np.mean([asked.right(s, o) for s, o in zip(starts, own, strict=True)]))
    check(found.per_fact["chat_specificity"]["agreement"], shares)
    assert 0 < np.mean(shares) < 100


def test_the_plain_form_beside_the_chat_form_is_the_plain_form_alone(facts: list[Request]) -> None:
    llm = in_chat(resident())
    damage(llm, 0.25)
    both = evaluate(llm, facts, UneditedModel(llm), forms=("plain", "chat"))
    plain = evaluate(llm, facts, UneditedModel(llm))
    chat = evaluate(llm, facts, UneditedModel(llm), forms=("chat",))
    assert set(both.per_fact) == {*plain.per_fact, *chat.per_fact}
    assert not set(plain.per_fact) & set(chat.per_fact)
    for name, scores in {**plain.per_fact, **chat.per_fact}.items():
        for reading, values in scores.items():
            np.testing.assert_array_equal(both.per_fact[name][reading], values)
    assert (both.answers, both.chat_answers) == (plain.answers, chat.chat_answers)
    assert plain.chat_answers == chat.answers == ()


def test_a_prompt_that_a_template_wrote_is_asked_as_it_is(facts: list[Request]) -> None:
    llm = in_chat(resident())
    written = replace(facts[0], prompt=f"<bos>It is black. {facts[0].prompt}")
    found = evaluate(llm, [written, facts[2]], None, forms=("plain", "chat"))
    assert np.isfinite(found.per_fact["efficacy"]["generation"]).all()
    assert np.isnan(found.per_fact["chat_efficacy"]["generation"]).tolist() == [True, False]
    assert found.chat_answers[0] == ""
    # Its paraphrases are plain texts.
    assert np.isfinite(found.per_fact["chat_generalization"]["token_accuracy"]).all()


def test_chat_without_a_template_and_unknown_forms_are_refused(facts: list[Request]) -> None:
    llm = resident()
    llm.tokenizer.chat_template = None
    with pytest.raises(PromptError, match="this tokenizer has none") as caught:
        evaluate(llm, facts, None, forms=("chat",))
    assert "\n" not in str(caught.value)
    forms: list[Any] = [(), ("both",), ("plain", "spoken")]
    for wrong in forms:
        with pytest.raises(SettingsError, match="forms must be some of plain, chat"):
            evaluate(llm, facts, None, forms=wrong)


# Neighbours.


@pytest.mark.parametrize(
    ("prompt", "near"),
    [
        ("The capital of Chile is", True),
        ("The capital of the Republic of Chile is", True),
        ("The capital of Peru is", False),  # the fact itself
        ("The capital of old Peru is", False),  # about the same subject
        ("The capital of is", False),  # nobody
        ("The currency of Chile is", False),
        ("Lima is the capital of", False),
    ],
)
def test_the_same_sentence_about_another_subject_is_a_neighbour(prompt: str, near: bool) -> None:
    fact = Request("The capital of Peru is", "Cusco", "Peru")
    assert is_neighbour(fact, Probe(prompt, "x")) is near
    assert is_neighbour(fact, Probe(prompt, "x", NEIGHBOUR))


def test_a_prompt_that_is_nothing_but_its_subject_has_no_neighbours() -> None:
    fact = Request("Who is it?", "Ann", "Who is it?")
    assert not is_neighbour(fact, Probe("Who was it?", "Bob"))
    assert not is_neighbour(Request("Peru:", "x", "Chile"), Probe("Chile:", "y"))


def test_neighbours_and_unrelated_prompts_are_measured_apart(facts: list[Request]) -> None:
    llm = resident()
    damage(llm, 0.26)
    near, far = Probe("Belka lives in", "Cindrath", NEIGHBOUR), Probe("Cats and", "dogs")
    several = replace(facts[0], locality=(near, far, near))
    alone = replace(facts[2], locality=(far,))
    found = evaluate(llm, [several, alone], UneditedModel(llm), generation=())
    single = {
        name: evaluate(
            llm, [replace(facts[0], locality=(probe,))], UneditedModel(llm), generation=()
        ).metrics["specificity"]
        for name, probe in (("near", near), ("far", far))
    }
    for reading in ("token_accuracy", "exact_match", "agreement"):
        a, b = single["near"][reading], single["far"][reading]
        check(found.per_fact["specificity"][reading], [(a + b + a) / 3, b])
        check(found.per_fact["neighbours"][reading], [a, np.nan])
        check(found.per_fact["unrelated"][reading], [b, b])
    assert single["near"]["agreement"] != single["far"]["agreement"]
    only_far = evaluate(llm, [alone], UneditedModel(llm), generation=())
    assert not {"neighbours", "unrelated"} & set(only_far.per_fact)
    only_near = evaluate(
        llm, [replace(facts[0], locality=(near,))], UneditedModel(llm), generation=()
    )
    assert set(only_near.per_fact) >= {"neighbours"}
    assert "unrelated" not in only_near.per_fact


# Portability.


def test_portability_by_kind_and_in_all(facts: list[Request]) -> None:
    llm = in_chat(resident())
    damage(llm, 0.1)
    said = [evaluate(llm, [fact], None).answers[0] for fact in facts[:2]]
    # What the model says counts as right for one prompt, and by an alias for another.
    asked = (
        Probe(facts[0].prompt, said[0].strip(), "reasoning"),
        Probe(facts[1].prompt, "Nobody", "multi-hop", ("Somebody", said[1].strip())),
        Probe(facts[1].prompt, "Nothing", "multi-hop"),
    )
    stream = [replace(facts[0], portability=asked), facts[2]]
    found = evaluate(llm, stream, None, forms=("plain", "chat"))
    got = {name: scores["generation"] for name, scores in found.per_fact.items()}
    check(got["portability"], [100 * 2 / 3, np.nan])
    check(got["portability/reasoning"], [100, np.nan])
    check(got["portability/multi-hop"], [50, np.nan])
    assert {"chat_portability", "chat_portability/reasoning"} <= set(got)
    assert found.metrics["portability"]["generation"] == pytest.approx(200 / 3)
    silent = evaluate(llm, stream, None, generation=["efficacy"])
    assert set(silent.per_fact["portability"]) == {"token_accuracy", "exact_match"}
    assert not [name for name in evaluate(llm, facts, None).per_fact if "portab" in name]


def test_other_names_of_the_subject_ask_the_fact() -> None:
    fact = Request(
        "Is Peru in Peru? Peru is in",
        "Asia",
        "Peru",
        portability=(Probe("Is PE in PE? PE is in", "Asia", "alias"),),
        subject_aliases=("PE", "the Republic", "the Republic"),
    )
    assert portability_probes(fact) == (
        *fact.portability,
        Probe("Is the Republic in the Republic? the Republic is in", "Asia", "alias"),
    )
    # A subject that is not in the prompt has no place for another name.
    assert portability_probes(replace(fact, prompt="It is in", portability=())) == ()


# End token.


def test_the_end_token_is_seen_in_teacher_forcing_only(facts: list[Request]) -> None:
    llm = resident()
    damage(llm, 0.25)
    before = evaluate(llm, facts, UneditedModel(llm))
    end = llm.tokenizer.eos_token_id
    assert isinstance(end, int)
    llm.encoder = PromptEncoder(llm.tokenizer, llm.encoder.max_length, end)
    after = evaluate(llm, facts, UneditedModel(llm))
    plain = Plain(llm)
    wanted = []
    for r in facts:
        start = plain.tokenizer(r.prompt)["input_ids"]
        whole = plain.tokenizer(f"{r.prompt} {r.answer}")["input_ids"]
        wanted.append(100 * np.mean(plain.forced(start, [*whole[len(start) :], end])))
    check(after.per_fact["efficacy"]["token_accuracy"], wanted)
    assert not np.array_equal(wanted, before.per_fact["efficacy"]["token_accuracy"])
    # What is generated is judged as before, token budgets included.
    assert after.answers == before.answers
    for name in ("efficacy", "generalization", "specificity"):
        for reading in ("generation", "generation_prefix"):
            np.testing.assert_array_equal(
                after.per_fact[name][reading], before.per_fact[name][reading]
            )
