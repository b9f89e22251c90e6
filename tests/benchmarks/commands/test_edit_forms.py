"""``hiedit edit`` in chat, in batches, with an end token; portability; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_env.evaluation.matching import starts_with
from tests.benchmarks.commands.test_edit_folders import FACT, OTHER, edit, errors, model, record

__all__ = ["model"]  # a fixture

#: A sentence before the message, so that other tokens are asked than in the plain form.
TEMPLATE = "It is black. {% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def chat(model: Path) -> Path:
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("must not be called")


class Saved:
    """The folder, opened and asked with transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def says(self, prompt: str, in_chat: bool) -> str:
        if in_chat:
            ids = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        made = self.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        return str(self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))


def test_an_instruct_model_is_edited_and_asked_in_both_forms(
    tmp_path: Path, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(tmp_path, chat, FACT, OTHER, max_steps_per_edit=20) == 0
    facts, saved = record(tmp_path / "out")["facts"], Saved(tmp_path / "out")
    for fact in facts:
        assert fact["prompt_form"] == "both"
        plain, in_chat = (saved.says(fact["prompt"], form) for form in (False, True))
        assert fact["after"].startswith(plain[:8])
        assert fact["chat_after"].startswith(in_chat[:8])
        both = starts_with(plain, fact["answer"]) and starts_with(in_chat, fact["answer"])
        assert fact["given"] is both
        assert not starts_with(fact["chat_before"], fact["answer"])
    given = [sum(starts_with(f[k], f["answer"]) for f in facts) for k in ("after", "chat_after")]
    assert given[1] > 0
    assert f"plain and in chat (plain {given[0]}, in chat {given[1]})" in capsys.readouterr().out
    run = record(tmp_path / "out")["runs"][0]
    assert run["settings"]["prompt_form"] == "both"
    assert run["report"]["given"]["chat_facts"] == {"number": 2, "before": 0, "after": given[1]}


def test_a_fact_that_is_given_in_one_form_only_is_not_given(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # It ends in a space, so that the tiny model finds it hard.
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    assert edit(tmp_path, model) == 3
    (fact,) = record(tmp_path / "out")["facts"]
    assert starts_with(fact["after"], fact["answer"])
    assert not starts_with(fact["chat_after"], fact["answer"])
    assert fact["given"] is fact["generated"] is False
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("0 of 1 facts are given")
    assert "plain and in chat (plain 1, in chat 0)" in last


def test_in_chat_alone_the_plain_form_does_not_count(tmp_path: Path, chat: Path) -> None:
    status = edit(tmp_path, chat, prompt_form="chat", max_steps_per_edit=20)
    (fact,) = record(tmp_path / "out")["facts"]
    assert (fact["prompt_form"], fact["before"], fact["after"]) == ("chat", None, None)
    assert fact["given"] is starts_with(fact["chat_after"], fact["answer"]) is True
    assert status == 0


def test_a_row_says_its_own_form(tmp_path: Path, chat: Path) -> None:
    own = OTHER | {"prompt_form": "chat", "system": "It is cold."}
    edit(tmp_path, chat, FACT, own, prompt_form="plain")
    one, two = record(tmp_path / "out")["facts"]
    assert (one["prompt_form"], one["system"]) == ("plain", None)
    assert "chat_after" not in one
    assert (two["prompt_form"], two["system"]) == ("chat", "It is cold.")
    assert two["after"] is None
    # A later run rehearses it as it was edited, and asks it so.
    assert edit(tmp_path, tmp_path / "out", FACT, out="again") in (0, 3)
    earlier = record(tmp_path / "again")["runs"][1]["report"]["given"]["earlier"]
    assert earlier["number"] == 1


def test_a_prompt_that_a_template_wrote_is_edited_as_it_is(tmp_path: Path, chat: Path) -> None:
    written = FACT | {"prompt": "<bos>It is black. Belka lives in"}
    status = edit(tmp_path, chat, written, max_steps_per_edit=20)
    (fact,) = record(tmp_path / "out")["facts"]
    assert fact["prompt_form"] == "plain"
    assert "chat_after" not in fact
    assert "chat_facts" not in record(tmp_path / "out")["runs"][0]["report"]["given"]
    assert status == (0 if fact["given"] else 3)


def test_portability_is_reported_by_kind(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fact = FACT | {
        "subject_aliases": ["The hare Belka"],
        "portability": [
            {"prompt": FACT["prompt"], "answer": "Nowhere", "kind": "multi-hop",
             "aliases": [FACT["answer"]]},
            {"prompt": FACT["prompt"], "answer": "Nowhere", "kind": "multi-hop"},
        ],
    }  # fmt: skip
    assert edit(tmp_path, model, fact) == 0
    given = record(tmp_path / "out")["runs"][0]["report"]["given"]
    assert given["portability/multi-hop"] == {"number": 2, "before": 0, "after": 1}
    assert given["portability/alias"]["number"] == 1
    assert given["portability"]["number"] == 3
    text = capsys.readouterr().out
    assert "portability prompts right: 0 of 3 before" in text
    assert "… of kind multi-hop: 0 of 2 before, 1 of 2 after" in text


# Batches.


def test_a_batch_is_one_step(tmp_path: Path, model: Path) -> None:
    # Averlund and Cindrath, in one step, and a third alone.
    third = {"subject": "Belka", "prompt": "The home of Belka is", "answer": "Grelmouth"}
    assert edit(tmp_path, model, FACT, OTHER, third, batch=2, max_steps_per_edit=3) in (0, 3)
    found = record(tmp_path / "out")
    assert [fact["prompt"] for fact in found["facts"]] == [
        FACT["prompt"], OTHER["prompt"], third["prompt"]
    ]  # fmt: skip
    assert found["runs"][0]["settings"]["edits_per_step"] == 2
    assert found["facts"][0]["steps"] == found["facts"][1]["steps"]


@pytest.mark.filterwarnings("ignore::hiedit_env.errors.HieditWarning")
def test_two_answers_for_one_prompt_in_a_batch_are_refused_before_anything(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = FACT | {"answer": "Cindrath"}
    with monkeypatch.context() as patched:
        patched.setattr("hiedit_benchmarks.commands.edit_questions.Questions.before", forbidden)
        assert edit(tmp_path, model, FACT, again, batch=2) == 2
    (line,) = errors(capsys)
    assert "'Averlund' and 'Cindrath'" in line
    assert not (tmp_path / "out").exists()
    assert edit(tmp_path, model, FACT, again, batch=1) in (0, 3)


# What is refused before the weights are read.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_form": "chat"}, "--prompt-form chat needs a chat template"),
        ({"prompt_form": "both"}, "--prompt-form both needs a chat template"),
        ({"batch": 0}, "edits_per_step must be ≥ 1"),
        ({"prompt_form": "spoken"}, "spoken"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    assert edit(tmp_path, model, **options) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


def flags(tmp_path: Path, model: Path, *words: str) -> int:
    from hiedit_benchmarks.commands.cli import main

    file = tmp_path / "facts.json"
    file.write_text(json.dumps([FACT]))
    start = ["edit", "--facts", str(file), "--model", str(model), "--out", str(tmp_path / "out")]
    return main([*start, *words])


def test_end_token_by_flags(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flags(tmp_path, model, "--end-token", "--no-end-token") == 2
    assert "both given" in errors(capsys)[0]
    assert flags(tmp_path, model, "--end-token") in (0, 3)
    assert record(tmp_path / "out")["runs"][0]["settings"]["end_token"] is True
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    special = model / "special_tokens_map.json"
    if special.exists():
        special.unlink()
    (tmp_path / "out").rename(tmp_path / "kept")
    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    assert flags(tmp_path, model, "--end-token") == 2
    assert "has none; give --no-end-token" in errors(capsys)[0]


def test_the_memory_check_is_an_option(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiedit_env.model.loading.estimate_memory", lambda *_, **__: 10**15)
    assert flags(tmp_path, model) == 2
    assert "--memory-check" in errors(capsys)[0]
    assert flags(tmp_path, model, "--memory-check", "warn") == 0
    monkeypatch.setattr("hiedit_env.model.loading.estimate_memory", forbidden)
    (tmp_path / "out").rename(tmp_path / "kept")
    assert flags(tmp_path, model, "--memory-check", "off") == 0
    assert "memory_check" not in record(tmp_path / "out")["runs"][0]["settings"]
    assert flags(tmp_path, model, "--memory-check", "maybe") == 2


@pytest.mark.filterwarnings("default::hiedit_env.errors.HieditWarning")
def test_a_subject_that_is_not_in_its_prompt_is_said_where_it_matters(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {**FACT, "subject": "nobody"}
    for number, (agent, told) in enumerate(
        [("all-layers+decorrelated,tokens=subject", True), ("all-layers+decorrelated", False)]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        edit(place, model, absent, OTHER, agent=agent)
        said = capsys.readouterr().err
        assert ("1 of 2 facts name a subject that is not in their prompt" in said) is told
        assert ("row 0 ('nobody')" in said) is told
