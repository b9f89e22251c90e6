"""The editor: what it writes, what its checks roll back, failures on the way."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

import hiedit_env
from hiedit_agents import Checks, Editor, make_agent
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.protocol import begin_episode
from hiedit_env import Request
from hiedit_env.errors import (
    DatasetError,
    HieditWarning,
    NonFiniteUpdateError,
    PromptError,
    SettingsError,
)
from hiedit_env.resident.resident import ResidentLLM
from tests.support.editors import FACTS, NONE, bits, dense, gap, live
from tests.support.models import all_bits


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.from_pretrained("tiny", checks=NONE) as made:
        yield made


def test_a_pair_is_written_and_told(editor: Editor) -> None:
    [result] = editor.edit(("Belka lives in", "Averlund"))
    assert (result.status, result.id, result.holds, result.problems) == ("written", 1, True, ())
    assert (result.prompt, result.answer, result.subject) == (
        "Belka lives in",
        "Averlund",
        "Belka lives in",
    )
    assert not result.before["plain"].startswith(" Averlund")
    assert result.after["plain"].startswith(" Averlund")
    assert editor.ask("Belka lives in", max_new_tokens=6)[0].startswith(" Averlund")
    assert set(result.layers) <= set(editor.llm.names)
    assert result.layers
    # By the model itself, with nothing of the editor.
    ids = torch.tensor([editor.llm.encoder.encode_prompt("Belka lives in")])
    first = editor.model(input_ids=ids).logits[0, -1].argmax()
    assert int(first) == editor.llm.encode("Belka lives in", "Averlund").answer_ids[0]


def test_facts_come_in_every_form(editor: Editor) -> None:
    results = editor.edit(
        [
            ("Belka lives in", "Averlund", "Belka"),
            {"prompt": "{} lives in", "answer": "Istrand", "subject": "Dasmo"},
            Request("Elvane lives in", "Eskermere", "Elvane"),
        ]
    )
    assert [(r.prompt, r.answer, r.subject) for r in results] == [
        ("Belka lives in", "Averlund", "Belka"),
        ("Dasmo lives in", "Istrand", "Dasmo"),
        ("Elvane lives in", "Eskermere", "Elvane"),
    ]
    assert [r.id for r in results] == [1, 2, 3]


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ([("a", "b"), ("only one",)], DatasetError, "fact 1 must be"),
        ("a text", DatasetError, "facts must be"),
        (3, DatasetError, "facts must be"),
        ([("a", " ")], DatasetError, "fact 0.*answer.*empty"),
        ([{"prompt": "a"}], DatasetError, "fact 0 has the fields prompt"),
        ([{"prompt": "a", "answer": "b", "subjekt": "c"}], DatasetError, "'subjekt' is unknown"),
        ([("Belka lives in", "Averlund"), ("long " * 9999, "x")], PromptError, "fact 1"),
    ],
)
def test_what_is_no_fact_is_named_and_nothing_changes(
    editor: Editor, facts: Any, error: type[Exception], message: str
) -> None:
    before = bits(editor)
    with pytest.raises(error, match=message):
        editor.edit(facts)
    assert bits(editor) == before
    assert len(editor.ledger) == 0


@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        ("all-layers", {}),
        ("random-layers", {"layers_per_edit": 2}),
        ("random-layers+rehearsal,facts=2,probes=0", {"max_steps_per_edit": 3}),
        ("gradient-norm+ridge", {"step_size": 0.001}),
    ],
)
def test_it_writes_what_the_environment_writes(agent: str, settings: dict[str, Any]) -> None:
    """The same agent, seed and facts in ``hiedit/LayerSelection-v1`` give the same bits."""
    facts = list(FACTS[:6])
    own = {k: v for k, v in settings.items() if k == "max_steps_per_edit" or k == "step_size"}
    env = gymnasium.make(
        "hiedit/LayerSelection-v1", model="tiny", num_edits=None, disable_env_checker=True, **own
    )
    made = make_agent(agent, **settings)
    observation, info = begin_episode(env, made, 3, options={"requests": facts})
    ended = False
    while not ended:
        observation, _, ended, _, info = env.step(made.select_action(observation, info))
    inner = env.unwrapped
    assert isinstance(inner, hiedit_env.EditingEnv)
    with Editor.from_pretrained(
        "tiny", agent=agent, seed=3, checks=NONE, max_error=0, **settings
    ) as editor:
        results = editor.edit(facts)
        assert {r.status for r in results} == {"written"}
        assert bits(editor) == all_bits(inner.llm.model)
        assert [r.steps for r in results] == [r.steps for r in inner.history.records]
    env.close()


def test_updates_of_a_fact_are_recorded_as_one_of_smaller_rank() -> None:
    """Against the same edit as it was computed: the change differs by the given error at most."""
    sizes, changes, ranks = [], [], []
    for max_error in (0.0, 0.05):
        with Editor.from_pretrained("tiny", checks=NONE, max_error=max_error) as editor:
            [result] = editor.edit(FACTS[0])
            assert result.steps > 1
            recorded = editor.ledger.steps(1)
            sizes.append(len(recorded))
            ranks.append(sum(len(u.left) for step in recorded for u in step if u is not None))
            changes.append([editor.llm.change(i) for i in range(len(editor.llm.layers))])
            assert gap(editor, dense(editor, (1,))) < 1e-6
    assert sizes == [result.steps, 1]
    assert ranks[1] < ranks[0] / 2
    for one, two in zip(*changes, strict=True):
        assert one is not None
        assert two is not None
        assert 0 < float((one - two).norm() / one.norm()) <= 0.0501
    with pytest.raises(SettingsError, match="max_error"):
        Editor.from_pretrained("tiny", max_error=1.5)


def test_a_known_fact_is_left_alone(editor: Editor) -> None:
    editor.edit(("Belka lives in", "Averlund"))
    before = bits(editor)
    [result] = editor.edit(("Belka lives in", "Averlund"))
    assert (result.status, result.id, result.before) == ("known", None, result.after)
    assert bits(editor) == before
    assert len(editor.ledger) == 1


def test_the_same_prompt_with_another_answer_replaces_the_earlier_edit(editor: Editor) -> None:
    [one] = editor.edit(("Belka lives in", "Averlund"))
    [two] = editor.edit(("Belka lives in", "Istrand"))
    assert (one.replaces, two.replaces) == (None, 1)
    assert editor.ask("Belka lives in")[0].startswith(" Istrand")
    assert editor.ledger[2].record["facts"][0]["replaces"] == 1
    # Undone, the earlier answer is there again.
    editor.undo(2)
    assert editor.ask("Belka lives in")[0].startswith(" Averlund")


def test_facts_written_together_have_one_id_and_are_undone_together(editor: Editor) -> None:
    states = [bits(editor)]
    results = editor.edit(FACTS[:5], together=2)
    assert [r.id for r in results] == [1, 1, 2, 2, 3]
    assert [r.status for r in results] == ["written"] * 5
    recorded = [fact["request"]["prompt"] for fact in editor.ledger[2].record["facts"]]
    assert recorded == [FACTS[2].prompt, FACTS[3].prompt]
    editor.undo(2)
    assert gap(editor, dense(editor, (1, 3))) < 1e-6
    assert list(editor.ledger.facts()) == [FACTS[i].prompt for i in (0, 1, 4)]
    editor.rewind(0)
    assert bits(editor) == states[0]
    # A prompt that comes twice is in two edits, so that the later answer counts.
    twice = [FACTS[0], (FACTS[0].prompt, "Istrand"), FACTS[1]]
    assert [r.id for r in editor.edit(twice, together=3)] == [6, 7, 7]


def test_facts_that_fail_together_are_written_one_by_one() -> None:
    checks = Checks(min_agreement=None, earlier=0)
    with Editor.from_pretrained("tiny", checks=checks, max_steps_per_edit=1) as editor:
        results = editor.edit(FACTS[:6], together=6)
        alone = [editor.ledger[n].record["facts"] for n in editor.ledger.active]
    assert {r.status for r in results} == {"written", "rolled back"}
    assert all(len(facts) == 1 for facts in alone)
    assert [r.id for r in results if r.id is not None] == list(range(1, len(alone) + 1))


def chat_editor() -> Editor:
    """The tiny model with a chat template of plain words."""
    model, tokens = live()
    tokens.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )
    return Editor(model, tokens, name="tiny", checks=NONE)


def test_facts_are_edited_plain_and_in_chat_where_there_is_a_template() -> None:
    with chat_editor() as editor:
        [both] = editor.edit(("Belka lives in", "Averlund"))
        assert list(both.before) == list(both.after) == ["plain", "chat"]
        said = editor.ask("Belka lives in") + editor.ask("Belka lives in", chat=True)
        assert [text.startswith(" Averlund") for text in said] == [True, True]
        [plain] = editor.edit(Request("Dasmo lives in", "Istrand", "Dasmo", prompt_form="plain"))
        assert list(plain.after) == ["plain"]
        recorded = editor.ledger[2].record["facts"][0]["request"]
        assert recorded["prompt_form"] == "plain"
        # Taken from the ledger again, it has its own form still.
        editor.undo(1)
        [fact] = editor._session.facts
        assert list(fact.forms) == ["plain"]
    with pytest.raises(SettingsError, match="needs a chat template"):
        Editor.from_pretrained("tiny", prompt_form="both")


@pytest.mark.parametrize(
    ("checks", "settings", "problem"),
    [
        (Checks(min_agreement=None), {"step_size": 1e-9}, "the answer is not given"),
        (Checks(target=False), {"step_size": 0.5}, "agreement with the unedited model"),
        (NONE, {"agent": "no-edit"}, "the agent chose no layers"),
    ],
)
def test_an_edit_that_fails_a_check_is_rolled_back_and_the_next_one_goes_on(
    checks: Checks, settings: dict[str, Any], problem: str
) -> None:
    with Editor.from_pretrained("tiny", checks=checks, **settings) as editor:
        before = bits(editor)
        results = editor.edit([("Belka lives in", "Averlund"), ("Dasmo lives in", "Istrand")])
        assert [r.status for r in results] == ["rolled back"] * 2
        assert all(problem in r.problems[0] and not r.holds and r.id is None for r in results)
        assert bits(editor) == before
        assert len(editor.ledger) == 0


def test_an_edit_that_breaks_earlier_ones_is_rolled_back() -> None:
    lenient = Checks(target=False, min_agreement=None, earlier=0)
    strict = Checks(target=False, min_agreement=None, earlier=8, max_lost=0.0)
    with Editor.from_pretrained("tiny", checks=lenient, step_size=0.02) as editor:
        results = editor.edit(FACTS[:6])
        lost = editor.ask([r.prompt for r in results])
        given = [t.startswith(f" {r.answer}") for t, r in zip(lost, results, strict=True)]
        assert not all(given), "the steps are large enough to break something"
    with Editor.from_pretrained("tiny", checks=strict, step_size=0.02) as editor:
        results = editor.edit(FACTS[:6])
        kept = [r for r in results if r.status == "written"]
        assert any("earlier facts asked are lost" in " ".join(r.problems) for r in results)
        texts = editor.ask([r.prompt for r in kept])
        assert all(t.startswith(f" {r.answer}") for t, r in zip(texts, kept, strict=True))


def test_an_edit_that_fails_may_be_kept() -> None:
    checks = Checks(min_agreement=None, roll_back=False)
    with Editor.from_pretrained("tiny", checks=checks, step_size=1e-6) as editor:
        [result] = editor.edit(("Belka lives in", "Averlund"))
        assert (result.status, result.id, result.holds) == ("written", 1, False)
        assert editor.ledger[1].record["facts"][0]["problems"] == list(result.problems)


def test_a_model_that_collapses_is_rolled_back_even_without_checks() -> None:
    checks = Checks(target=False, min_agreement=None, earlier=0, roll_back=False)
    with Editor.from_pretrained("tiny", checks=checks, step_size=1e18) as editor:
        before = bits(editor)
        [result] = editor.edit(("Belka lives in", "Averlund"))
        assert result.status == "rolled back"
        assert "finite" in result.problems[0]
        assert bits(editor) == before
        assert math.isfinite(editor.llm.read(editor.llm.encode("Belka lives in", "x")).loss)


@pytest.mark.parametrize("bad", [{"earlier": -1}, {"max_lost": 2}, {"min_agreement": "x"}])
def test_checks_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(bad))):
        Checks(**bad)


def same(one: Any, two: Any) -> bool:
    """Whether nested statistics are equal, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["commit", "append", "read"])
def test_a_failure_half_way_leaves_the_model_as_it_was(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    editor.edit(FACTS[0])
    before, statistics = bits(editor), editor._session.levels.low.statistics()
    owner: Any = Ledger if where == "append" else ResidentLLM
    own, calls = getattr(owner, where), []

    def fail(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(1)
        # The second step of the fact: the first one is written.
        if where == "append" or len(calls) == 2:
            raise error
        return own(self, *args, **named)

    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(type(error)):
        editor.edit([FACTS[3]])
    monkeypatch.undo()
    assert bits(editor) == before
    assert len(editor.ledger) == 1
    assert same(statistics, editor._session.levels.low.statistics())
    [result] = editor.edit(FACTS[3])
    assert result.id == 2


def test_an_update_that_is_not_finite_is_rolled_back_and_said(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(editor)

    def refuse(self: Any, updates: Any) -> Any:
        raise NonFiniteUpdateError("update of x is not finite")

    monkeypatch.setattr(ResidentLLM, "commit", refuse)
    [result] = editor.edit(FACTS[0])
    monkeypatch.undo()
    assert (result.status, result.problems) == ("rolled back", ("update of x is not finite",))
    assert bits(editor) == before


def test_a_subject_that_is_not_in_its_prompt_is_said_where_it_matters() -> None:
    facts = [("Belka lives in", "Averlund", "nobody"), ("Strelka lives in", "Cindrath", "Strelka")]
    agent = "all-layers+decorrelated,tokens=subject"
    with Editor.from_pretrained("tiny", checks=NONE, agent=agent) as editor:
        with pytest.warns(HieditWarning, match=r"1 of 2 facts name a subject.*fact 0 \('nobody'\)"):
            editor.edit(facts)
        editor.edit(facts[1])
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(facts)


def test_earlier_facts_are_rehearsed_until_they_are_edited_again() -> None:
    agent = "all-layers+rehearsal,facts=2,probes=0"
    with Editor.from_pretrained(
        "tiny", checks=NONE, agent=agent, earlier=FACTS[:2], end_token=False
    ) as editor:
        first = [editor.llm.encode(f.prompt, f.answer).prompt_ids for f in FACTS[:3]]
        low: Any = editor.low_level
        assert [p.prompt_ids for p in low._past] == first[:2]
        editor.edit([FACTS[1], FACTS[2]])
        editor.undo(2)
        assert [p.prompt_ids for p in low._past] == first[:2]
        # Of the ledger now, with the answer that was given there.
        assert editor.ledger.active == (1,)


def test_between_edits_no_copy_of_the_model_is_kept() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        llm = editor.llm
        half = llm.upper.find(llm, llm.layers[0].block, torch.bfloat16)
        assert half is not None
        assert half.is_copy
        copy = weakref.ref(half)
        del half
        editor.edit(FACTS[0])
        gc.collect()
        assert copy() is None
