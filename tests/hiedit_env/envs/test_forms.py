"""Facts asked through a chat template, and answers that end: in environments, rules and rewards."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.evaluation.reward_terms import MEASURED
from hiedit_env.model.asking import end_of_turn
from hiedit_env.resident.capture import GradientRows
from hiedit_env.rules.names import RULES
from tests.hiedit_env.envs.test_info import form
from tests.hiedit_env.model.test_tokenization import byte_level
from tests.support.episodes import (
    KINDS,
    SELECTION,
    TINY,
    L,
    PlainModel,
    bits,
    make,
    plain_levels,
    same_bits,
)

ALL = np.ones(L, np.int8)
#: A sentence before the message, so that other tokens are asked than in the plain form.
TEMPLATE = (
    "It is black. {% for m in messages %}{{ m.content }}"
    "{{ '<eos>' if m.role == 'assistant' else '' }}{{ ' ' if not loop.last else '' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(TINY, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


def chat_env(folder: Path, prompt_form: str = "both", **settings: Any) -> EditingEnv:
    own = {"model": str(folder), "dataset": "tiny-facts", "max_steps_per_edit": 1}
    return make(SELECTION, **own, prompt_form=prompt_form, **settings)


def in_chat(request: Request) -> Request:
    """The request as the template writes it."""

    def written(text: str) -> str:
        return f"It is black. {request.system + ' ' if request.system else ''}{text}"

    return replace(
        request,
        prompt=written(request.prompt),
        paraphrases=tuple(map(written, request.paraphrases)),
        locality=tuple(replace(p, prompt=written(p.prompt)) for p in request.locality),
    )


# -- prompts ------------------------------------------------------------------------------------


def test_a_fact_has_its_prompts_in_every_form_asked(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for wanted, forms in (("plain", ["plain"]), ("chat", ["chat"]), ("both", ["plain", "chat"])):
        env = chat_env(folder, wanted)
        env.reset(seed=0)
        fact, request = env.fact, env.fact.request
        assert request.paraphrases
        assert request.locality
        for prompts, texts in (
            (fact.prompts, [request.prompt]),
            (fact.paraphrases, request.paraphrases),
            (fact.probes, [probe.prompt for probe in request.locality]),
        ):
            assert [p.form for p in prompts] == forms * len(texts)
            pairs = [(text, form) for text in texts for form in forms]
            for prompt, (text, asked) in zip(prompts, pairs, strict=True):
                chat = [{"role": "user", "content": text}]
                ids = tokenizer(text)["input_ids"]
                if asked == "chat":
                    made = tokenizer.apply_chat_template(
                        chat, add_generation_prompt=True, return_dict=True
                    )
                    ids = made["input_ids"]
                assert list(prompt.prompt_ids) == list(ids)
        assert env.capture.prompts == fact.prompts


def test_the_subject_is_known_in_every_form(folder: Path) -> None:
    env = chat_env(folder, num_edits=8)
    env.reset(seed=0)
    decode = env.llm.tokenizer.decode
    for fact in env.episode.facts:
        for prompt in (*fact.prompts, *fact.paraphrases):
            start, stop = prompt.subject_spans[-1]
            assert not prompt.subject_missing
            assert decode(prompt.prompt_ids[start:stop]).strip() == fact.request.subject
        assert all(probe.subject_spans == () for probe in fact.probes)
        # The same place, counted from the end of the prompt.
        plain, chat = (p.first_position - p.positions("subject")[0] for p in fact.prompts)
        assert plain == chat > 0
    env.reset(options={"requests": [Request("Belka lives in", "Istrand", "somebody")]})
    for prompt in env.fact.prompts:
        assert prompt.subject_missing
        assert prompt.positions("subject") == prompt.positions("last")


def test_a_request_goes_before_the_environment(folder: Path) -> None:
    request = Request("Belka lives in", "Istrand", "Belka")
    system = "Corrin works as a tanner."
    for own, wanted in (
        (replace(request, prompt_form="plain"), [request]),
        (replace(request, prompt_form="chat"), [in_chat(request)]),
        (
            replace(request, prompt_form="chat", system=system),
            [in_chat(replace(request, system=system))],
        ),
        (request, [request, in_chat(request)]),
    ):
        env = chat_env(folder)
        env.reset(options={"requests": [own]})
        assert [p.prompt for p in env.fact.prompts] == [one.prompt for one in wanted]


def test_a_chat_form_without_a_template_is_refused_before_anything_changes() -> None:
    for prompt_form in ("chat", "both"):
        with pytest.raises(SettingsError, match=r"chat template.*'tiny' has none; set prompt_form"):
            make(SELECTION, prompt_form=prompt_form)
    with pytest.raises(SettingsError, match="prompt_form must be one of 'plain', 'chat', 'both'"):
        make(SELECTION, prompt_form="html")
    env = make(SELECTION)
    env.reset(seed=0)
    env.step(ALL)
    before = bits(env)
    request = Request("Belka lives in", "Istrand", "Belka", prompt_form="both", source="a row 3")
    with pytest.raises(PromptError, match=r"a row 3: .*has none"):
        env.reset(options={"requests": [request]})
    assert same_bits(bits(env), before)


# -- rewards and information ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_count_half(folder: Path, kind: Any) -> None:
    plain = PlainModel()
    settings = {"reward": kind, "retention_decay": 0.7, "step_size": 3e-3}
    env = chat_env(folder, **settings)
    env.reset(seed=0)
    for i in range(3):
        *_, info = env.step(ALL)
        now, facts = PlainModel(bits(env)), list(env.stream)
        levels = []
        for ask in (lambda request: request, in_chat):
            fact, *old = [ask(f) for f in facts[i::-1]]
            levels.append(plain_levels(plain, now, fact, old, kind, 0.7))
            share = plain_levels(plain, now, fact, old, "token_accuracy", 0.7)
            metrics = info["form_metrics"][("plain", "chat")[len(levels) - 1]]
            assert metrics["argmax_match"] == pytest.approx(share["locality"])
            assert metrics["efficacy"] == pytest.approx(now.accuracy(fact.prompt, fact.answer))
            edit = (metrics["efficacy"] + metrics["generalization"]) / 2
            assert edit == pytest.approx(share["edit"])
            if old:
                assert metrics["recent_retention"] == pytest.approx(share["recent_retention"])
        for term in MEASURED:
            wanted = sum(level[term] for level in levels) / 2
            assert info["reward_terms"][term] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        for name in ("efficacy", "generalization", "agreement", "argmax_match"):
            both = [found[name] for found in info["form_metrics"].values()]
            assert info["metrics"][name] == pytest.approx(sum(both) / 2)


def test_the_form_of_info_with_both_forms_never_varies(folder: Path) -> None:
    env = chat_env(folder, edits_per_step=2, num_edits=3)
    _, info = env.reset(seed=0)
    wanted, ended = form(info), False
    assert set(info["form_metrics"]) == {"plain", "chat"}
    while not ended:
        _, _, ended, _, info = env.step(ALL)
        assert form(info) == wanted
    # A fact that asks for one form has nothing in the other.
    request = Request("Belka lives in", "Istrand", "Belka", prompt_form="plain")
    _, info = env.reset(options={"requests": [request]})
    assert form(info) == wanted
    *_, info = env.step(ALL)
    assert form(info) == wanted
    assert info["form_metrics"]["plain"] == info["metrics"]
    assert np.isnan(info["form_metrics"]["chat"]["efficacy"])
    plain = chat_env(folder, "plain")
    assert "form_metrics" not in plain.reset(seed=0)[1]


def test_vector_environments_and_copies_ask_in_the_same_form(folder: Path) -> None:
    settings = {
        "model": str(folder),
        "dataset": "tiny-facts",
        "num_edits": 3,
        "prompt_form": "both",
        "end_token": True,
    }
    envs: Any = gym.make_vec(SELECTION, 2, vectorization_mode="vector_entry_point", **settings)
    singles = [gym.make(SELECTION, **settings).unwrapped for _ in range(2)]
    observations, _ = envs.reset(seed=0)
    first = [env.reset(seed=i)[0] for i, env in enumerate(singles)]
    np.testing.assert_allclose(observations, first, atol=1e-3)
    _, rewards, *_, info = envs.step(np.ones((2, L), np.int8))
    for i, env in enumerate(singles):
        twin: Any = copy.deepcopy(env)
        assert twin.llm.encoder.end_id == env.llm.encoder.end_id is not None  # type: ignore[attr-defined]
        result, copied = env.step(ALL), twin.step(ALL)
        assert copied[1] == result[1]
        assert rewards[i] == pytest.approx(result[1], abs=2e-3)
        told = {f: result[4]["form_metrics"][f]["efficacy"] for f in ("plain", "chat")}
        assert told == {f: info["form_metrics"][f]["efficacy"][i] for f in told}


# -- the end token ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, 0),  # "<|endoftext|>", the tokenizer's own
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}", 264),
        ("{% for m in messages %}{{ m.content }} <|end|>{% endfor %}", 264),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", 0),  # no token of its own
        ("{% for m in messages %}{{ m.content }} Lyon{% endfor %}", 0),
        ("{{ raise_exception('never an assistant') }}", 0),
    ],
)
def test_the_token_that_ends_a_turn(template: str | None, end: int) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_the_reward_see_the_end_token(folder: Path, rule: str) -> None:
    env, without = (chat_env(folder, update_rule=rule, end_token=e) for e in (True, False))
    end = env.llm.tokenizer.eos_token_id
    for one in (env, without):
        one.reset(seed=0)
    for prompts, others in zip(
        (env.fact.prompts, env.fact.paraphrases, env.fact.probes),
        (without.fact.prompts, without.fact.paraphrases, without.fact.probes),
        strict=True,
    ):
        for prompt, other in zip(prompts, others, strict=True):
            assert prompt.prompt_ids == other.prompt_ids
            assert prompt.answer_ids == (*other.answer_ids, end)
            assert other.answer_ids[-1] != end
    assert end in env.llm.end_ids
    capture = env.capture
    assert len(capture.keys[0]) == sum(p.length for p in env.fact.prompts)
    assert len(capture.correct) == len(without.capture.correct) + 2
    for one in (env, without):
        one.step(ALL)
    assert not torch.equal(*(one.llm.change(0) for one in (env, without)))  # type: ignore[arg-type]


def test_rehearsal_adds_no_second_end_token(folder: Path) -> None:
    env = chat_env(folder, "plain", end_token=True, num_edits=4)
    low = Rehearsal(env.llm, facts=2, probes=0, end_answers=True, step_size=1e-3)
    env.use_low_level(low)
    env.reset(seed=0)
    asked: list[Sequence[Any]] = []
    own = env.llm.gradients

    def noted(prompts: Any, loss: Any) -> GradientRows:
        asked.append(prompts)
        return own(prompts, loss)

    env.llm.gradients = noted  # type: ignore[method-assign]
    for _ in range(2):
        env.step(ALL)
    end = env.llm.tokenizer.eos_token_id
    assert [len(prompts) for prompts in asked] == [1, 2]
    assert all(p.answer_ids.count(end) == 1 for prompts in asked for p in prompts)


def test_an_end_token_of_a_tokenizer_without_one_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    path = tmp_path / "tiny" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    with pytest.raises(SettingsError, match="end_token=True needs an end token"):
        chat_env(tmp_path / "tiny", "plain", end_token=True)
