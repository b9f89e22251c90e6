"""Asked while it is edited: an answer is the old model's or the new one's, never a mixture."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hiedit_agents import Checks
from hiedit_agents.serving.answering import Question
from hiedit_agents.serving.served_model import ServedModel
from hiedit_agents.serving.snapshots import Snapshot
from tests.support.editors import FACTS, NONE, bits
from tests.support.models import all_bits
from tests.support.served import RIGHT, asked, completion, served

BUDGET = 8


def answer(model: ServedModel, snapshot: Snapshot, prompt: str) -> str:
    pieces: list[str] = []
    model.answer(snapshot, Question(model.tokens(prompt), BUDGET), pieces.append)
    return "".join(pieces)


def by_hand(snapshot: Snapshot, ids: tuple[int, ...], ends: frozenset[int]) -> list[int]:
    """Greedy tokens by whole passes."""
    read = list(ids)
    for _ in range(BUDGET):
        with torch.no_grad():
            token = int(
                snapshot.model(torch.tensor([read]), use_cache=False).logits[0, -1].argmax()
            )
        read.append(token)
        if token in ends:
            break
    return read[len(ids) :]


def test_snapshots_are_the_editors_weights_bit_for_bit_and_stay() -> None:
    model = served()
    states = [(model.present, bits(model._editor))]
    for fact in FACTS[:3]:
        model.edit(fact)
        states.append((model.present, bits(model._editor)))
    model.undo(2)
    states.append((model.present, bits(model._editor)))
    assert len({snapshot.fingerprint for snapshot, _ in states}) == 5
    for snapshot, wanted in states:
        assert all_bits(snapshot.model) == wanted
    assert all_bits(model.unedited.model) == states[0][1]
    model._editor.close()
    assert all_bits(states[3][0].model) == states[3][1]


def test_only_matrices_that_an_edit_changed_are_copied() -> None:
    # One layer per edit.
    model = served(layers_per_edit=1, agent="random-layers", seed=3)
    base = dict(model._editor.model.named_parameters())
    for fact in FACTS[:2]:
        before = model.present
        model.edit(fact)
        layers = model._events[-1].record["layers"]
        assert len(layers) == 1
        old, new = (dict(s.model.named_parameters()) for s in (before, model.present))
        fresh = {name for name in old if old[name].data_ptr() != new[name].data_ptr()}
        assert fresh == {f"{layer}.weight" for layer in layers}
        # The editor goes on writing into its own.
        assert all(new[name].data_ptr() != base[name].data_ptr() for name in fresh)
    model.undo(1)
    model.undo(2)
    unedited = dict(model.unedited.model.named_parameters())
    for name, weight in model.present.model.named_parameters():
        assert weight.data_ptr() == unedited[name].data_ptr()
        assert not weight.requires_grad


def test_an_answer_that_has_begun_ends_with_the_model_it_began_with() -> None:
    # Steps this large break the model, so that every answer changes.
    model = served(step_size=1.0, max_steps_per_edit=1)
    llm = model._editor.llm
    model.edit(FACTS[8])
    old = model.present
    prompts = [fact.prompt for fact in FACTS[:8]]
    wanted = {prompt: answer(model, old, prompt) for prompt in prompts}
    begun, go_on = threading.Event(), threading.Event()
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        pieces: list[str] = []

        def send(piece: str) -> None:
            pieces.append(piece)
            begun.set()
            assert go_on.wait(60)

        model.answer(old, Question(model.tokens(prompt), BUDGET), send)
        found[prompt] = "".join(pieces)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    model.edit([(f.prompt, f.answer) for f in FACTS[:8]])
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == wanted
    # It would show: behind the first old token the edited model goes on in another way.
    mixed = []
    for prompt in prompts:
        ids = model.tokens(prompt)
        one = by_hand(old, ids, llm.end_ids)
        mixed.append(by_hand(model.present, (*ids, one[0]), llm.end_ids) != one[1:])
    assert any(mixed)


@pytest.mark.parametrize("batch", [1, 3])
def test_many_ask_while_one_edits(batch: int) -> None:
    model = served()
    prompt = FACTS[0].prompt
    stop = threading.Event()
    seen: list[tuple[str, str]] = []

    def ask(client: Any) -> None:
        while not stop.is_set():
            body = {"model": "tiny", "prompt": prompt, "max_tokens": BUDGET}
            reply = client.post("/v1/completions", json=body).json()
            seen.append((reply["system_fingerprint"], reply["choices"][0]["text"]))

    facts = [{"prompt": f.prompt, "answer": f.answer} for f in FACTS[:3]]
    known = {model.present.fingerprint: answer(model, model.present, prompt)}
    with asked(model) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            ids = []
            for start in range(0, 3, batch):
                body = {"facts": facts[start : start + batch], "together": batch}
                done = client.post("/edits", json=body, headers=RIGHT).json()
                ids.append(done["data"][0]["id"])
                # Whoever asks after the reply sees the edit.
                assert completion(client, prompt) == answer(model, model.present, prompt)
                known[model.present.fingerprint] = answer(model, model.present, prompt)
            for id in ids:
                client.delete(f"/edits/{id}", headers=RIGHT)
                known[model.present.fingerprint] = answer(model, model.present, prompt)
        stop.set()
        for thread in threads:
            thread.join()
    assert len(set(known.values())) > 1
    assert len(seen) > 4
    assert {pair for pair in seen if known[pair[0]] != pair[1]} == set()


def test_an_edit_that_is_rolled_back_is_never_seen() -> None:
    model = served(checks=Checks(min_agreement=1.0), step_size=1.0, max_steps_per_edit=1)
    before = model.present
    [result], fingerprint = model.edit(FACTS[0])
    assert result.status == "rolled back"
    assert model.present is before
    assert fingerprint == before.fingerprint


def test_an_answer_ends_when_nobody_waits_for_it() -> None:
    model = served(checks=NONE)
    question = Question(model.tokens(FACTS[0].prompt), BUDGET)
    pieces: list[str] = []

    def send(piece: str) -> None:
        pieces.append(piece)
        question.gone.set()

    end = model.answer(model.present, question, send)
    assert end.tokens < len(by_hand(model.present, question.ids, model._speaker.ends))
    assert len(pieces) <= 2
