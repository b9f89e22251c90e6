"""What vectors change in other sentences, against whole passes of the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy import kept_sentences, neuron_search
from hiedit_agents.hierarchy import neuron as neuron_module
from hiedit_agents.hierarchy.fired_prompts import FiredPrompts
from hiedit_agents.hierarchy.kept_sentences import PARTS
from hiedit_agents.hierarchy.neuron_plan import Target
from hiedit_agents.hierarchy.neuron_search import SearchForm, seek
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM
from tests.agents.hierarchy.test_neuron import FIRST, model, neuron
from tests.agents.hierarchy.test_neuron_search import _Silent, losses, targets

#: The subject is w9, and the fact's answer w7.
SENTENCES = ("w5 w9 w13", "w10 w9 w14 w15", "w6 w5 w9", "w11 w9 w3", "w8 w9 w17 w16 w17")
FORM = SearchForm(0.3, 0.5, 20, 0.3)


def sentence(llm: ResidentLLM, text: str) -> EncodedPrompt:
    one = llm.encoder.with_subject(llm.encode(text, "w7"), text, "w9")
    at, ids = one.positions("subject")[0], one.prompt_ids
    cut = replace(one, prompt_ids=ids[: at + 1], answer_ids=(*ids[at + 1 :], *one.answer_ids))
    return replace(cut, subject_spans=((at, at + 1),))


def keeping(llm: ResidentLLM, sentences: Sequence[str] = SENTENCES) -> Target:
    (target,) = targets(llm)
    return replace(target, kept=tuple(sentence(llm, text) for text in sentences))


class Made:
    """What a search of some facts keeps, with vectors added."""

    def __init__(self, llm: ResidentLLM, *facts: Target) -> None:
        form = replace(FORM, keeping=1.0)
        search = neuron_search._Search(llm, neuron(llm).mlps, facts, form)
        assert search._kept is not None
        self.kept, self.fired = search._kept, search._asked

    def divergences(self, vectors: Tensor, facts: Sequence[int], turn: int) -> Tensor:
        rows = self.kept.rows(facts, turn)
        if not rows:
            return torch.zeros(len(vectors))
        chosen = torch.tensor(rows)
        given = self.fired.given(self.fired.added(vectors, chosen), chosen)
        return self.kept.divergences(self.fired.nudges.logits(given, rows), rows)


def by_hand(llm: ResidentLLM, target: Target, one: EncodedPrompt, vector: Tensor) -> float:
    """Sum over places of the full KL divergence, by two passes of the whole model."""
    mlp = neuron(llm).mlps[target.home]
    at = one.positions("subject")[0]
    ids = torch.tensor([one.input_ids])
    read: list[Tensor] = []

    def add(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fires = target.shape.firing(read[0][0, at][None].float())
        changed = output.clone()
        changed[0, at] += fires[0] * vector
        return changed

    gate, back = (llm.layers[layer].module for layer in (mlp.gate.layer, mlp.back))
    with torch.no_grad():
        before = llm.model(ids).logits[0].log_softmax(-1)
        handles = [
            gate.register_forward_hook(lambda _m, args, _o: read.append(args[0])),
            back.register_forward_hook(add),
        ]
        after = llm.model(ids).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
    each = (before.exp() * (before - after)).sum(-1)
    return float(each[at:].sum())


@pytest.fixture
def all_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sentences, "TOLD_APART", 10**6)
    monkeypatch.setattr(kept_sentences, "_SHARE", 0.0)


@pytest.mark.usefixtures("all_apart")
def test_divergences_are_those_of_whole_passes() -> None:
    llm = model()
    target = keeping(llm)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    kept = Made(llm, target)
    assert kept.kept.has.tolist() == [[True] * PARTS]
    for turn in range(PARTS + 1):
        own = target.kept[turn % PARTS :: PARTS]
        wanted = sum(by_hand(llm, target, p, vector) for p in own) / len(own)
        found = kept.divergences(vector[None], [0], turn)
        assert wanted > 0.01
        assert float(found) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.usefixtures("all_apart")
def test_nothing_changes_without_a_vector() -> None:
    llm = model()
    kept = Made(llm, keeping(llm))
    for turn in range(PARTS):
        vectors = torch.zeros(1, 48, requires_grad=True)
        with torch.enable_grad():
            found = kept.divergences(vectors, [0], turn)
            (gradient,) = torch.autograd.grad(found.sum(), vectors)
        assert abs(float(found.detach())) < 1e-4
        assert float(gradient.norm()) < 1e-3


def test_tokens_that_are_not_told_apart_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    vector = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    found = []
    for number in (1, 5, 10**6):
        monkeypatch.setattr(kept_sentences, "TOLD_APART", number)
        found.append(float(Made(llm, keeping(llm)).divergences(vector, [0], 0)))
    # To count tokens together can only make a divergence smaller.
    assert 0 < found[0] < found[1] < found[2]


@pytest.mark.usefixtures("all_apart")
def test_facts_do_not_mix_and_who_is_not_asked_is_not_run() -> None:
    llm = model()
    first, bare, second = keeping(llm), targets(llm)[0], keeping(llm, SENTENCES[3:])
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    kept = Made(llm, first, bare, second)
    assert kept.kept.has.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    alone = [
        Made(llm, one).divergences(vectors[i][None], [0], 0) for i, one in ((0, first), (2, second))
    ]
    together = kept.divergences(vectors, [0, 1, 2], 0)
    wanted = torch.tensor([float(alone[0]), 0.0, float(alone[1])])
    torch.testing.assert_close(together, wanted, rtol=1e-3, atol=1e-4)
    only = kept.divergences(vectors, [2], 0)
    torch.testing.assert_close(only, wanted * torch.tensor([0.0, 0.0, 1.0]), rtol=1e-3, atol=1e-4)
    assert kept.divergences(vectors, [2], 3).tolist() == [0.0, 0.0, 0.0]


def test_what_may_ask_the_same_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    target = keeping(llm)

    def first_token(ids: tuple[int, ...], token: int) -> float:
        with torch.no_grad():
            return float(llm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])

    own = max(first_token(p.prompt_ids, p.answer_ids[0]) for p in target.prompts)
    plausible = [first_token(p.input_ids, p.answer_ids[-1]) for p in target.kept]
    best = sorted(range(5), key=lambda i: -plausible[i])
    # One nat below the fact's own prompt, at most a third of them: one of five.
    monkeypatch.setattr(kept_sentences, "_LESS", own - plausible[best[2]] + 1e-3)
    assert left(llm, target) == set(range(5)) - {best[0]}
    # None where the answer is less plausible everywhere.
    monkeypatch.setattr(kept_sentences, "_LESS", own - plausible[best[0]] - 1e-3)
    assert left(llm, target) == set(range(5))


def left(llm: ResidentLLM, target: Target) -> set[int]:
    """The sentences that are kept, by number."""
    kept, first = Made(llm, target).kept, len(target.prompts)
    return {row - first for turn in range(PARTS) for row in kept.rows([0], turn)}


def change(llm: ResidentLLM, target: Target, vector: Tensor) -> float:
    return sum(by_hand(llm, target, one, vector) for one in target.kept)


def test_a_search_that_keeps_changes_less_and_answers() -> None:
    llm = model()
    target = keeping(llm)
    mlps = neuron(llm).mlps
    (free,), (kept,) = (
        seek(llm, mlps, [target], replace(FORM, keeping=much, settling=0.5)) for much in (0.0, 1.0)
    )
    assert float(losses(llm, target, kept).max()) < FORM.enough + 0.02
    assert change(llm, target, kept) < 0.7 * change(llm, target, free)


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_a_fact_without_sentences_is_sought_as_alone(noise: float) -> None:
    llm = model()
    mlps, form = neuron(llm).mlps, replace(FORM, keeping=1.0, settling=0.5, noise=noise, steps=2)
    bare, other = targets(llm)[0], keeping(llm)
    alone = seek(llm, mlps, [bare], form)[0]
    both = seek(llm, mlps, [bare, other], form)
    torch.testing.assert_close(both[0], alone, rtol=1e-4, atol=1e-4)
    assert float((both[1] - alone).norm()) > 0.1 * float(alone.norm())


@pytest.mark.usefixtures("all_apart")
def test_a_fact_is_answered_where_it_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    monkeypatch.setattr(neuron_search, "SAME", 0.0)
    target = keeping(llm)
    mlps, hopeless = neuron(llm).mlps, replace(FORM, keeping=1e6)
    search = neuron_search._Search(llm, mlps, [target], hopeless)
    vectors, busy = search.descend(0.0)
    assert busy.tolist() == [True]
    vectors, busy = search.descend(0.0, busy, vectors)
    assert busy.tolist() == [True]
    (found,) = seek(llm, mlps, [target], hopeless)
    assert torch.equal(found, search.descend(0.0, busy, vectors, keeping=False)[0][0])
    assert float(losses(llm, target, found).max()) < FORM.enough + 0.02


@pytest.mark.parametrize("settling", [0.0, 0.6])
def test_steps_become_shorter(settling: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without momentum the length of a step is the distance of the vectors before and after it."""
    llm = model()
    (target,) = (replace(one, prompts=one.prompts[:1]) for one in (keeping(llm),))
    form = replace(FORM, keeping=1.0, settling=settling, momentum=0.0, steps=5, enough=1e-6)
    search = neuron_search._Search(llm, neuron(llm).mlps, [target], form)
    seen: list[Tensor] = []
    own = FiredPrompts.added

    def note(self: FiredPrompts, vectors: Tensor, rows: Tensor) -> Tensor:
        seen.append(vectors.detach().clone())
        return own(self, vectors, rows)

    monkeypatch.setattr(FiredPrompts, "added", note)
    search.descend(0.0)
    steps = [float((b - a).norm() / search._length) for a, b in itertools.pairwise(seen)]
    wanted = [1 - settling * turn / 4 for turn in range(5)]
    assert steps[:5] == pytest.approx(wanted, rel=1e-3)


def test_sentences_in_which_a_neuron_is_silent_are_not_run() -> None:
    llm = model()
    target = keeping(llm)
    # The prompts come first.
    silent = _Silent(target.shape, [len(target.prompts) + 1])
    kept = left(llm, replace(target, shape=silent))  # type: ignore[arg-type]
    assert 1 not in kept
    assert len(kept) >= 3


@pytest.mark.usefixtures("all_apart")
def test_what_is_kept_is_what_the_model_says_without_the_neuron() -> None:
    llm = model()
    target = keeping(llm)
    without = torch.randn(48, generator=torch.Generator().manual_seed(3))
    form = replace(FORM, keeping=1.0)
    search = neuron_search._Search(llm, neuron(llm).mlps, [target], form, without[None])
    assert search._kept is not None
    rows = search._kept.rows([0], 0)
    chosen = torch.tensor(rows)

    def off(vector: Tensor) -> float:
        given = search._asked.given(search._asked.added(vector[None], chosen), chosen)
        logits = search._asked.nudges.logits(given, rows)
        return float(search._kept.divergences(logits, rows))  # type: ignore[union-attr]

    assert abs(off(-without)) < 1e-4
    assert off(torch.zeros_like(without)) > 0.01


def test_a_fact_that_is_edited_again_keeps_what_was_said_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    low = neuron(llm, keeping=1.0)
    given: list[Tensor] = []
    own = neuron_module.seek

    def note(*args: Any) -> Tensor:
        given.append(args[-1].clone())
        return own(*args)

    monkeypatch.setattr(neuron_module, "seek", note)
    text = "w5 w9 w4"
    first = llm.encoder.with_subject(llm.encode(text, "w7"), text, "w9")
    updates = low.propose(llm.read(first).capture(), FIRST)
    llm.commit(updates)
    # Of one subject and one prompt, with another answer.
    again = llm.encoder.with_subject(llm.encode(text, "w12"), text, "w9")
    low.propose(llm.read(again).capture(), FIRST)
    assert not bool(given[0].any())
    (at, place), mlp = low._held[first.prompt_ids], low.mlps[0]
    assert at == 0
    with torch.no_grad():
        seen: list[Tensor] = []
        module = llm.layers[mlp.back].module
        handle = module.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        llm.model(torch.tensor([first.prompt_ids]))
        handle.remove()
    fired = seen[0][0, first.positions("subject")[0], place]
    wanted = fired * llm.weight(mlp.back)[place]
    # It is looked at with the mean of what is read in all sentences about the subject.
    assert float((given[1][0] - wanted).norm()) < 0.05 * float(wanted.norm())


def test_a_sentence_is_compared_with_the_prompts_of_its_own_answer() -> None:
    llm = model()
    target = keeping(llm)
    everything = left(llm, target)
    text = "w3 w9 w20"
    # An earlier fact that is answered already would make every sentence seem far from asking it.
    sure = llm.encoder.with_subject(llm.encode(text, "w30"), text, "w9")
    assert left(llm, replace(target, prompts=(*target.prompts, sure))) == everything


def test_many_facts_are_sought_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    mlps, form = neuron(llm).mlps, replace(FORM, keeping=1.0, steps=3)
    facts = [keeping(llm), targets(llm)[0], keeping(llm, SENTENCES[2:])]
    together = seek(llm, mlps, facts, form)
    number, own = [], neuron_search._Search.__init__

    def note(self: Any, *args: Any) -> None:
        number.append(len(args[2]))
        own(self, *args)

    monkeypatch.setattr(neuron_search._Search, "__init__", note)
    monkeypatch.setattr(neuron_search, "AT_ONCE", 2)
    torch.testing.assert_close(seek(llm, mlps, facts, form), together, rtol=1e-3, atol=1e-3)
    assert number == [2, 1]


def test_sentences_share_no_batch_with_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    target = keeping(llm)
    form, kinds = replace(FORM, keeping=1.0, steps=3), []
    found = []
    for longest in (100, 3):
        monkeypatch.setattr(neuron_search, "LONGEST", longest)
        search = neuron_search._Search(llm, neuron(llm).mlps, [target], form)
        kinds.append(set(search._asked.kinds))
        found.append(search.descend(0.0)[0])
    assert kinds == [{0, 1}, {0, 1, 2, 3}]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
