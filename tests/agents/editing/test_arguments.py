"""What an editor refuses, in one line and before anything has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hiedit_agents import Checks, Editor
from hiedit_env.errors import HieditError, LedgerError, ResultsExistError, SettingsError
from tests.support.editors import NONE, bits, live


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.from_pretrained("tiny", checks=NONE) as made:
        yield made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"agent": 5}, "agent must be a name, got 5"),
        ({"checks": 5}, "checks must be Checks"),
        ({"earlier": 5}, "earlier must be a list of Requests, got 5"),
        ({"earlier": ["a"]}, "earlier must be a list of Requests"),
        ({"end_token": "x"}, "end_token must be True, False or None, got 'x'"),
        ({"prompt_form": "x"}, "prompt_form must be one of plain, chat, both, got 'x'"),
        ({"max_steps_per_edit": 0}, "max_steps_per_edit must be ≥ 1"),
        ({"max_steps_per_edit": "x"}, "max_steps_per_edit must be ≥ 1"),
        ({"layers_per_edit": 0}, "layers_per_edit must be ≥ 1"),
        ({"agent": "all-layers", "layers_per_edit": 3}, "changes nothing about all-layers"),
        ({"seed": -1}, "seed must be ≥ 0"),
    ],
)
def test_settings_are_checked_when_it_is_made(settings: dict[str, Any], said: str) -> None:
    model, tokenizer = live()
    with pytest.raises(SettingsError) as caught:
        Editor(model, tokenizer, **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_form_is_checked_where_there_is_a_template_too() -> None:
    model, tokenizer = live()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(SettingsError, match="prompt_form must be one of"):
        Editor(model, tokenizer, prompt_form="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_and_a_tokenizer_are_needed(which: int) -> None:
    given: list[Any] = list(live())
    given[which] = None
    with pytest.raises(SettingsError, match=r"(model|tokenizer) must be"):
        Editor(*given)


@pytest.mark.parametrize("name", ["target", "roll_back"])
def test_checks_are_on_or_off(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be True or False, got 'x'"):
        Checks(**{name: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda editor: editor.ask(5),
        lambda editor: editor.ask([5]),
        lambda editor: editor.ask("a", max_new_tokens=0),
        lambda editor: editor.rewind(None),
        lambda editor: editor.rewind(False),
        lambda editor: editor.rewind("1"),
        lambda editor: editor.undo(True),
        lambda editor: editor.save_delta(""),
        lambda editor: editor.save_delta("/nowhere/at/all"),
    ],
)
def test_what_is_asked_wrongly_changes_nothing(
    editor: Editor, call: Callable[[Editor], object]
) -> None:
    editor.edit(("Belka lives in", "Averlund"))
    before = bits(editor)
    with pytest.raises(HieditError) as caught:
        call(editor)
    assert "\n" not in str(caught.value)
    assert bits(editor) == before
    assert len(editor.ledger) == 1


def test_a_file_that_is_there_is_not_written_over(editor: Editor, tmp_path: Path) -> None:
    editor.edit(("Belka lives in", "Averlund"))
    path, link = tmp_path / "mine.txt", tmp_path / "link"
    path.write_text("mine")
    link.symlink_to(tmp_path / "nothing")
    for there in (path, link, tmp_path):
        with pytest.raises(ResultsExistError, match="exists; give another file"):
            editor.save_delta(there)
    assert path.read_text() == "mine"
    assert link.is_symlink()


def test_another_default_dtype_is_refused_and_the_model_put_back(editor: Editor) -> None:
    unedited = bits(editor)
    editor.edit(("Belka lives in", "Averlund"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(SettingsError, match="torch's default dtype is bfloat16; call"):
            editor.edit(("Dasmo lives in", "Istrand"))
        with pytest.raises(SettingsError, match="torch's default dtype is bfloat16"):
            Editor(*live())
        editor.close()
        assert bits(editor) == unedited
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_ledger_that_is_closed_says_so() -> None:
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(("Belka lives in", "Averlund"))
    with pytest.raises(LedgerError, match="the ledger is closed; open it again"):
        list(editor.ledger)


@pytest.mark.parametrize("call", ["undo", "ask", "edit", "close"])
def test_nothing_is_called_from_within_an_edit(editor: Editor, call: str) -> None:
    def on_results(_: object) -> None:
        given: dict[str, tuple[object, ...]] = {"undo": (1,), "close": ()}
        getattr(editor, call)(*given.get(call, ("Belka lives in",)))

    with pytest.raises(HieditError, match=r"at work; call this when edit has returned|facts must"):
        editor.edit(("Belka lives in", "Averlund"), on_results=on_results)
    # What was written before stays, in the model and in the ledger, and it goes on.
    assert len(editor.ledger) == 1
    assert editor.ask("Belka lives in")[0].startswith(" Averlund")


def test_prompts_may_come_in_any_order_of_things(editor: Editor) -> None:
    texts = ["Belka lives in", "Dasmo lives in"]
    wanted = editor.ask(texts, max_new_tokens=2)
    assert editor.ask((text for text in texts), max_new_tokens=2) == wanted
    assert editor.ask(dict.fromkeys(texts).keys(), max_new_tokens=2) == wanted  # type: ignore[arg-type]
