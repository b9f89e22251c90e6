"""MEMIT and AlphaEdit: the closed forms against dense solves, what is read and what is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hiedit_agents.rivals import spread
from hiedit_agents.rivals.alphaedit import AlphaEdit
from hiedit_agents.rivals.memit import Memit
from hiedit_agents.rivals.spread import (
    Spread,
    asked,
    lessened,
    looked_up,
    ridge,
    second_moments,
)
from hiedit_agents.rivals.values import Place, ValueSearch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import all_bits, build_random, normal, resident

SEARCH = ValueSearch(0.3, 0.5, 20, 0.1, 2.0, 0.0, 0.0)
#: Tokens are words; prompt, answer and subject.
FACTS = (("w5 w9 w4", "w7 w3", "w9"), ("w6 w11 w8 w4", "w12", "w11"), ("w3 w20 w15", "w30", "w20"))
#: Indices of the down projections of blocks 0 and 1 of three.
BOTH = (0, 1)
#: Size of the residual stream.
OUT = 32


def model() -> ResidentLLM:
    """Its MLPs write little beside what is there, as in trained models, so values can be found."""
    llama = build_random("llama", hidden_size=OUT, intermediate_size=64)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "proj" in name:
                parameter *= 0.5 if "attn" in name else 0.15
    return resident("llama", (0, 1), matrices=("mlp.down_proj",), model=llama)


def fact(llm: ResidentLLM, number: int) -> EncodedPrompt:
    prompt, answer, subject = FACTS[number]
    return llm.encoder.with_subject(llm.encode(prompt, answer), prompt, subject)


def capture(llm: ResidentLLM, *numbers: int) -> Capture:
    return llm.read(*(fact(llm, number) for number in numbers)).capture()


def mask(llm: ResidentLLM, layers: Sequence[int] = BOTH) -> Any:
    chosen = torch.zeros(len(llm.layers), dtype=torch.bool)
    chosen[list(layers)] = True
    return chosen.numpy()


def place(llm: ResidentLLM, number: int) -> Place:
    prompt = fact(llm, number)
    return prompt, prompt.positions("subject")[0]


def moment(seed: int = 0, size: int = 64, rows: int = 400) -> Tensor:
    """A second moment whose eigenvalues differ by some orders of magnitude."""
    scale = torch.logspace(0, -3, size, dtype=torch.float64)
    given = normal(seed, rows, size, dtype=torch.float64) * scale
    turned = torch.linalg.qr(normal(seed + 1, size, size, dtype=torch.float64)).Q
    return (turned @ (given.mT @ given / rows) @ turned.mT).float()


def rule(llm: ResidentLLM, agent: Memit | AlphaEdit, layers: Sequence[int] = BOTH) -> Spread:
    metrics = {i: agent.metric(moment(i)) for i in layers}
    return Spread(llm, metrics, SEARCH, openings=0, remembers=agent.remembers)


# -- the closed forms -----------------------------------------------------------------------------


def test_memit_is_its_equation() -> None:
    """R Kᵀ (λ (C + prior) + K Kᵀ)⁻¹ with facts as columns, solved as one dense system."""
    # Short keys, so that both terms of the sum count.
    c, keys, wanted = moment(), 0.02 * normal(3, 5, 64), normal(4, 5, 16)
    found = ridge(Memit(weight=7.0, prior=0.02).metric(c), keys, wanted)
    whole = c.double() + 0.02 * c.double().diagonal().mean() * torch.eye(64)
    k, r = keys.double().mT, wanted.double().mT
    dense = r @ k.mT @ torch.linalg.inv(7 * whole + k @ k.mT)
    torch.testing.assert_close(found.dense().double(), dense.mT, atol=1e-4, rtol=1e-3)


def test_alphaedit_is_its_equation_with_earlier_edits() -> None:
    """Solves (P (K Kᵀ + K_p K_pᵀ) + ridge) X = P K Rᵀ, as the released code writes it."""
    c, earlier, keys = moment().double(), 0.1 * normal(2, 6, 64), 0.1 * normal(3, 5, 64)
    wanted = normal(4, 5, 16)
    mean = c.diagonal().mean()
    values, directions = torch.linalg.eigh(c)
    free = directions[:, values < 0.5 * mean]
    assert 10 < free.shape[1] < 60
    p, kp, k = free @ free.mT, earlier.double().mT, keys.double().mT
    left = p @ (k @ k.mT + kp @ kp.mT) + 3 * mean * torch.eye(64)
    dense = torch.linalg.solve(left, p @ k @ wanted.double())
    first = AlphaEdit(threshold=0.5, ridge=3.0).metric(c.float())
    found = ridge(lessened(first, earlier), keys, wanted)
    torch.testing.assert_close(found.dense().double(), dense, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(ridge(first, keys, wanted).dense().double(), dense, atol=1e-2)


def test_alphaedit_changes_nothing_where_much_is_read() -> None:
    c = moment()
    values, directions = torch.linalg.eigh(c.double())
    large = directions[:, values >= 0.5 * values.mean()].mT.float()
    assert len(large) > 4
    change = ridge(AlphaEdit(threshold=0.5).metric(c), normal(3, 5, 64), normal(4, 5, 16))
    assert float(change.dense().norm()) > 0.1
    assert float((large @ change.dense()).norm()) < 1e-5
    # MEMIT does change it.
    other = ridge(Memit().metric(c), normal(3, 5, 64), normal(4, 5, 16))
    assert float((large @ other.dense()).norm()) > 0.01


def test_what_was_written_counts_by_woodbury() -> None:
    c, keys = moment().double(), normal(2, 6, 64)
    metric = torch.linalg.inv(c + 0.01 * torch.eye(64))
    dense = torch.linalg.inv(c + 0.01 * torch.eye(64) + keys.double().mT @ keys.double())
    torch.testing.assert_close(lessened(metric.float(), keys).double(), dense, atol=1e-3, rtol=1e-3)


# -- what is read ---------------------------------------------------------------------------------


def own_pass(llm: ResidentLLM, prompt: EncodedPrompt, block: int) -> tuple[list[Tensor], Tensor]:
    """Inputs of both down projections and the hidden states behind a block, by plain hooks."""
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []
    handles = [
        layer.module.register_forward_hook(lambda _m, args, _o, i=i: found.update({i: args[0][0]}))
        for i, layer in enumerate(llm.layers)
    ]
    handles.append(
        llm.model.model.layers[block].register_forward_hook(
            lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    try:
        with torch.no_grad():
            llm.model(torch.tensor([prompt.input_ids]))
    finally:
        for handle in handles:
            handle.remove()
    return [found[i] for i in sorted(found)], states[0].reshape(prompt.length, -1)


def test_what_is_looked_up_is_what_the_model_has_there() -> None:
    llm = model()
    places = [place(llm, number) for number in (0, 1, 2)]
    keys, hidden = looked_up(llm, BOTH, places)
    for row, (prompt, at) in enumerate(places):
        given, states = own_pass(llm, prompt, 1)
        for one, wanted in zip(keys, given, strict=True):
            torch.testing.assert_close(one[row], wanted[at], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[row], states[at], atol=1e-5, rtol=1e-5)


def test_the_second_moment_is_of_all_tokens_but_the_first_at_the_unedited_weights() -> None:
    llm = model()
    prompts = [fact(llm, number) for number in (0, 1, 2)]
    rows = torch.cat([own_pass(llm, prompt, 1)[0][1][1:] for prompt in prompts])
    low = rule(llm, Memit())
    llm.commit(low.propose(capture(llm, 0), mask(llm)))
    found = second_moments(llm, BOTH, prompts)
    torch.testing.assert_close(found[1], rows.mT @ rows / len(rows), atol=1e-4, rtol=1e-4)


def test_a_key_is_half_the_bare_prompt_and_half_what_stands_behind_words() -> None:
    llm = model()
    facts = asked(llm, [(fact(llm, 0),), (fact(llm, 1),)], 0)
    given = normal(0, 2, 5)
    assert torch.equal(facts.rows(given), given)
    # By hand: two facts, of which the first is read behind two openings.
    hand = spread.Asked(
        facts.places, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 3])
    )
    rows = torch.tensor([[8.0], [2.0], [4.0], [5.0]])
    assert hand.rows(rows).tolist() == [[8 / 2 + 3 / 2], [5.0]]


def test_every_form_of_a_fact_is_a_row_and_has_the_facts_vector() -> None:
    llm = model()
    one, other = fact(llm, 0), fact(llm, 1)
    facts = asked(llm, [(one, other), (fact(llm, 2),)], 0)
    assert facts.facts.tolist() == [0, 0, 1]
    assert facts.forms.tolist() == facts.bare.tolist() == [0, 1, 2]


# -- what is written ------------------------------------------------------------------------------


def sought(
    llm: ResidentLLM, low: Spread, layer: int, numbers: Sequence[int]
) -> tuple[list[Place], Tensor]:
    """The places of some facts, and the vectors that are sought for them."""
    places = [place(llm, number) for number in numbers]
    _, hidden = looked_up(llm, [layer], places)
    owners = torch.arange(len(numbers))
    return places, low.search.seek(llm, layer, places, owners, hidden.norm(dim=1))


def test_with_no_weight_on_what_is_read_elsewhere_the_value_is_there_exactly() -> None:
    llm = model()
    low = rule(llm, Memit(weight=1e-6), [1])
    places, vectors = sought(llm, low, 1, [0])
    _, before = looked_up(llm, [1], places)
    bits = all_bits(llm.model)
    updates = low.propose(capture(llm, 0), mask(llm))
    assert all_bits(llm.model) == bits
    llm.commit(updates)
    _, after = looked_up(llm, [1], places)
    assert float(vectors.norm()) > 0.1
    torch.testing.assert_close(after - before, vectors, atol=1e-3, rtol=1e-3)


def test_the_first_of_two_blocks_takes_half_and_the_last_what_is_left() -> None:
    llm = model()
    low = rule(llm, Memit(weight=1e-6))
    places, vectors = sought(llm, low, 1, [0])
    _, before = looked_up(llm, [1], places)
    first, last = low.propose(capture(llm, 0), mask(llm))
    assert first is not None
    assert last is not None
    keys, _ = looked_up(llm, [0, 1], places)
    torch.testing.assert_close(first.apply(keys[0]), vectors / 2, atol=1e-3, rtol=1e-3)
    llm.commit([first, None])
    keys, between = looked_up(llm, [1], places)
    # Attention and the second MLP see the first change, so what is left is not the other half.
    assert not torch.allclose(before + vectors - between, vectors / 2, atol=1e-2)
    torch.testing.assert_close(
        last.apply(keys[0]), before + vectors - between, atol=1e-3, rtol=1e-3
    )


def test_facts_of_a_batch_are_solved_together() -> None:
    llm = model()
    agent = Memit(weight=0.5)
    low = rule(llm, agent, [1])
    places, vectors = sought(llm, low, 1, [0, 1, 2])
    (keys,), _ = looked_up(llm, [1], places)
    c = moment(1).double()
    whole = 0.5 * (c + agent.prior * c.diagonal().mean() * torch.eye(64))
    k = keys.double().mT
    dense = torch.linalg.solve(whole + k @ k.mT, k @ vectors.double())
    _, joint = low.propose(capture(llm, 0, 1, 2), mask(llm))
    assert joint is not None
    torch.testing.assert_close(joint.dense().double(), dense, atol=1e-3, rtol=1e-2)
    apart = [low.propose(capture(llm, number), mask(llm))[1] for number in (0, 1, 2)]
    total = sum(one.dense() for one in apart if one is not None)
    assert not torch.allclose(torch.as_tensor(total).double(), dense, atol=1e-2)


def test_alphaedit_remembers_the_keys_after_they_were_written_and_memit_nothing() -> None:
    llm = model()
    memit, alpha = rule(llm, Memit()), rule(llm, AlphaEdit(threshold=5.0))
    memit.propose(capture(llm, 0), mask(llm))
    assert all(memit._metrics[i] is memit._first[i] for i in BOTH)
    first = {i: alpha._first[i].clone() for i in BOTH}
    llm.commit(alpha.propose(capture(llm, 0), mask(llm)))
    keys, _ = looked_up(llm, BOTH, [place(llm, 0)])
    for i, rows in zip(BOTH, keys, strict=True):
        wanted = lessened(first[i], rows)
        torch.testing.assert_close(alpha._metrics[i], wanted, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(wanted, first[i], atol=1e-3)
        assert torch.equal(alpha._first[i], first[i])
    alpha.reset()
    assert all(alpha._metrics[i] is alpha._first[i] for i in BOTH)


def test_layers_that_are_not_chosen_stay() -> None:
    llm = model()
    low = rule(llm, Memit())
    assert low.propose(capture(llm, 0), mask(llm, [])) == (None, None)
    first, last = low.propose(capture(llm, 0), mask(llm, [1]))
    assert first is None
    assert last is not None


# -- state ----------------------------------------------------------------------------------------


def test_statistics_go_back_bit_for_bit() -> None:
    llm = model()
    low = rule(llm, AlphaEdit(threshold=5.0))
    low.propose(capture(llm, 0), mask(llm))
    before = low.statistics()
    one = low.propose(capture(llm, 1), mask(llm))
    low.load_statistics(before)
    two = low.propose(capture(llm, 1), mask(llm))
    for a, b in zip(one, two, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.left, b.left)
        assert torch.equal(a.right, b.right)


def test_a_clone_runs_the_fork_and_shares_the_metrics() -> None:
    llm = model()
    low = rule(llm, AlphaEdit(threshold=5.0))
    fork = llm.fork()
    twin = low.clone_for(fork)
    assert twin.llm is fork
    assert low.llm is llm
    assert all(twin._first[i] is low._first[i] for i in BOTH)
    twin.propose(capture(llm, 0), mask(llm))
    assert all(low._metrics[i] is low._first[i] for i in BOTH)
    assert not torch.equal(twin._metrics[0], low._metrics[0])
