"""Comparisons in chat, in batches and with an end token; what is refused before the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_agents.registry import make_agent
from hiedit_benchmarks.comparison.asking import settle_asking
from hiedit_benchmarks.comparison.compare import compare, make_env
from hiedit_benchmarks.comparison.episode import play, unwrapped
from hiedit_benchmarks.comparison.settings import CompareSettings, Ending
from hiedit_env.errors import SettingsError
from hiedit_env.model.saving import find_folder

TEMPLATE = "It is black. {% for m in messages %}{{ m['content'] }}{% endfor %}"
QUICK = CompareSettings(
    num_edits=3, max_steps_per_edit=2, update_rule="outer-product", dataset="tiny-facts"
)


@pytest.fixture
def chat(tmp_path: Path) -> str:
    """The tiny model with a chat template."""
    source = find_folder("tiny")
    assert source is not None
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def test_what_is_not_given_depends_on_the_tokenizer(
    chat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(both: bool, **given: Any) -> tuple[Any, Any]:
        found = settle_asking(CompareSettings(model=chat, **given), both=both)
        return found.prompt_form, found.end_token

    # A folder of the tiny model's weights is the toy model.
    assert asked(False) == ("plain", False)
    assert asked(True) == ("both", False)
    assert asked(True, prompt_form="plain", end_token=True) == ("plain", True)
    monkeypatch.setattr("hiedit_benchmarks.comparison.asking.known_as", lambda name: name)
    assert asked(False) == ("plain", True)
    assert asked(True) == ("both", True)
    assert asked(False, prompt_form="chat", end_token=False) == ("chat", False)
    Path(chat, "chat_template.jinja").unlink()
    assert asked(True) == ("plain", True)
    for given in ({"prompt_form": "chat"}, {"prompt_form": "both"}):
        with pytest.raises(SettingsError, match=f"--prompt-form {given['prompt_form']} needs"):
            asked(False, **given)
    with pytest.raises(SettingsError, match="--ask-in-chat needs a chat template"):
        settle_asking(CompareSettings(model=chat), in_chat=True)


def test_flags_of_the_end_token() -> None:
    assert Ending().chosen is None
    assert Ending(end_token=True).chosen is True
    assert Ending(no_end_token=True).chosen is False
    with pytest.raises(SettingsError, match="leave one out"):
        Ending(end_token=True, no_end_token=True)


def test_rows_tell_the_forms_apart(chat: str, tmp_path: Path) -> None:
    settings = replace(QUICK, model=chat, prompt_form="both", generation=("efficacy",))
    found = compare(settings, ["all-layers"], [0], tmp_path / "out", progress=False)
    unedited, edited = found.rows
    assert edited["settings"]["prompt_form"] == "both"
    assert edited["settings"]["end_token"] is False
    for name in ("efficacy", "generalization", "specificity", "retention", "neighbours"):
        assert f"chat_{name}" in edited["metrics"]
    assert unedited["metrics"]["chat_specificity"]["agreement"] == 100
    run = found.details["all-layers", 0]
    assert len(run["chat_answers"]) == 3
    before = found.details["no-edit", 0]
    assert before["chat_answers"] != run["chat_answers"]
    ends = [
        np.mean(
            [run["per_fact"][name]["token_accuracy"][i] for name in ("efficacy", "chat_efficacy")]
        )
        for i in range(3)
    ]
    after = [100 * edit["metrics"]["efficacy"] for edit in run["edits"]]
    assert edited["metrics"]["forgetting"] == pytest.approx(np.mean(after) - np.mean(ends))
    assert "Asked in chat" in found.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"chat_generated", "chat_efficacy", "chat_agreement"} <= set(
        summary["agents"]["all-layers"]
    )


def test_plain_edits_may_be_asked_in_chat(chat: str, tmp_path: Path) -> None:
    settings = replace(QUICK, model=chat, ask_in_chat=True, num_edits=2, generation=())
    found = compare(settings, ["all-layers"], [0], tmp_path / "out", progress=False)
    plain = compare(
        replace(settings, ask_in_chat=False), ["all-layers"], [0], tmp_path / "two", progress=False
    )
    for with_chat, without in zip(found.rows, plain.rows, strict=True):
        assert "chat_efficacy" in with_chat["metrics"]
        assert "chat_efficacy" not in without["metrics"]
        for name, value in without["metrics"].items():
            assert with_chat["metrics"][name] == value


def test_a_memory_check_does_not_make_results_others(tmp_path: Path) -> None:
    settings = replace(QUICK, model="tiny", num_edits=1, generation=())
    compare(settings, [], [0], tmp_path, progress=False)
    again = replace(settings, memory_check="warn")
    compare(again, [], [0], tmp_path, resume=True, progress=False)
    with pytest.raises(SettingsError, match="needs a chat template"):
        compare(
            replace(settings, prompt_form="chat"), [], [0], tmp_path, resume=True, progress=False
        )


def test_a_batch_has_a_row_per_fact() -> None:
    settings = replace(QUICK, model="tiny", num_edits=5, edits_per_step=2, max_steps_per_edit=3)
    env = make_env(settings, progress=False)
    agent = make_agent("all-layers")
    agent.reset(env, 0)
    episode = play(env, agent, 0, progress=False)
    assert len(episode.edits) == len(episode.requests) == 5
    pairs = [episode.edits[i] for i in (0, 2, 4)]
    assert [edit.reward for edit in episode.edits[:4:2]] == [
        edit.reward for edit in episode.edits[1:4:2]
    ]
    records = unwrapped(env).history.records
    assert [record.metrics["efficacy"] for record in records] == [
        edit.metrics["efficacy"] for edit in episode.edits
    ]
    assert len({edit.reward for edit in pairs}) == 3
    env.close()


def test_a_comparison_in_batches(tmp_path: Path) -> None:
    settings = replace(QUICK, model="tiny", generation=())
    for n, rewards in ((1, 3), (3, 1)):
        found = compare(
            replace(settings, edits_per_step=n),
            ["all-layers"],
            [0],
            tmp_path / str(n),
            progress=False,
        )
        row = found.rows[1]
        assert (row["num_edits"], row["settings"]["edits_per_step"]) == (3, n)
        edits = found.details["all-layers", 0]["edits"]
        assert len({edit["reward"] for edit in edits}) == rewards


def test_a_world_made_on_demand_is_asked_without_an_end_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path))
    found = settle_asking(CompareSettings(model="planted:pairs:0"))
    assert (found.prompt_form, found.end_token) == ("plain", False)
    # Its model was made with one token per answer, so behind one there is no end to learn.
    settings = replace(
        QUICK, model="planted:plain:0", dataset=None, update_rule=None, num_edits=2, generation=()
    )
    episode = play(make_env(settle_asking(settings), False), make_agent("oracle"), 0)
    assert [edit.metrics["answered"] for edit in episode.edits] == [1.0, 1.0]
