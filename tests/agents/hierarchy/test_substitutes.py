"""Which neurons are given up for facts, and who takes over what they did."""

from __future__ import annotations

import torch

from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.neuron_changes import NeuronChanges
from hiedit_agents.hierarchy.neuron_shape import NeuronShape
from hiedit_agents.hierarchy.substitutes import of_neuron
from tests.agents.hierarchy.test_neuron import (
    FACTS,
    FIRST,
    HIDDEN,
    INNER,
    OWN,
    elsewhere,
    model,
    neuron,
    unit,
)


def test_others_write_what_a_neuron_wrote_that_is_gone() -> None:
    llm = model()
    low = neuron(llm, substitutes=True, search_steps=1)
    mlp = low.mlps[0]
    captures = [llm.read(prompt).capture() for prompt in elsewhere(llm)]
    fired = torch.cat([capture.keys[mlp.back][1:] for capture in captures])
    before, order = llm.weight(mlp.back), low.state_dict()["order.0"].tolist()
    updates = low.propose(unit(llm, FACTS[0]), FIRST)
    assert [len(u.left) for u in updates if u is not None] == [1, 1, 2]
    llm.commit(updates)
    gone = order[0]
    # By an independent least squares, with the same ridge as rows of the system.
    noise = (1e-3 * fired.square().mean() * len(fired)).sqrt()
    system = torch.cat((fired[:, order[1:]], noise * torch.eye(INNER - 1)))
    wanted = torch.cat((fired[:, gone], torch.zeros(INNER - 1)))
    shares = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    moved = llm.weight(mlp.back) - before
    expected = torch.outer(shares, before[gone])
    torch.testing.assert_close(moved[order[1:]], expected, rtol=2e-2, atol=2e-3)
    # What is lost of what the MLP gives is less than without.
    with_others = fired[:, order[1:]] @ shares - fired[:, gone]
    assert float(with_others.norm()) < 0.7 * float(fired[:, gone].norm())


def test_a_second_neuron_loses_what_it_writes_by_then_and_facts_are_no_substitutes() -> None:
    llm = model()
    low = neuron(llm, substitutes=True)
    llm.commit(low.propose(unit(llm, FACTS[0]), FIRST))
    mlp, order = low.mlps[0], low.state_dict()["order.0"].tolist()
    first = llm.weight(mlp.back)[order[0]].clone()
    llm.commit(low.propose(unit(llm, FACTS[1]), FIRST))
    torch.testing.assert_close(llm.weight(mlp.back)[order[0]], first)
    assert unit(llm, FACTS[0]).answered
    assert unit(llm, FACTS[1]).answered


def test_neurons_written_together_are_those_written_one_after_the_other() -> None:
    llm = model()
    low = neuron(llm, substitutes=True)
    mlp, order = low.mlps[0], low.state_dict()["order.0"].tolist()
    capture = llm.read(*elsewhere(llm, 1)).capture()
    reading = capture.keys[mlp.gate.layer][2]
    detector = low._readings[0].detector(reading[None], reading[None][:0])
    shape = NeuronShape(mlp, detector, reading, 0.4, 20.0)
    vectors = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    shares = [of_neuron(low.state_dict()["substitutes.0"], torch.tensor(order), k) for k in (0, 1)]

    def write(changes: NeuronChanges, k: int) -> None:
        changes.write(order[k], shape, vectors[k], shares[k])

    unedited, both = llm.snapshot(), NeuronChanges(llm, mlp)
    write(both, 0)
    write(both, 1)
    llm.commit([both.updates().get(i) for i in range(6)])
    together = [llm.weight(layer).clone() for layer in mlp.layers]
    llm.restore(unedited)
    for k in (0, 1):
        one = NeuronChanges(llm, mlp)
        write(one, k)
        llm.commit([one.updates().get(i) for i in range(6)])
    for layer, weight in zip(mlp.layers, together, strict=True):
        torch.testing.assert_close(weight, llm.weight(layer), rtol=1e-4, atol=1e-5)


def test_texts_count_in_full_for_who_stands_in_and_for_a_tenth_in_what_is_read() -> None:
    llm = model()
    low, other = neuron(llm, substitutes=True), Neuron(llm, **OWN)
    texts = elsewhere(llm, 90)[60:]
    other.calibrate_on(elsewhere(llm), texts=texts)
    mlp, mine, its = low.mlps[0], low.state_dict(), other.state_dict()
    captures = [llm.read(prompt).capture() for prompt in (*elsewhere(llm), *texts)]
    read = [capture.keys[mlp.gate.layer][1:].double() for capture in captures]
    prompts, others = torch.cat(read[:60]), torch.cat(read[60:])
    rows = torch.cat((prompts, others))
    weights = torch.tensor([0.9 / len(prompts)] * len(prompts) + [0.1 / len(others)] * len(others))
    mean = weights.double() @ rows
    covariance = ((rows - mean).mT * weights) @ (rows - mean)
    torch.testing.assert_close(its["mean.0"], mean.float(), rtol=1e-4, atol=1e-5)
    upper = torch.triu_indices(HIDDEN, HIDDEN)
    expected = covariance.float()[upper[0], upper[1]]
    torch.testing.assert_close(its["covariance.0"], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(its["norms.0"], mine["norms.0"])
    fired = torch.cat([capture.keys[mlp.back][1:] for capture in captures])
    written = fired.square().sum(0) * llm.weight(mlp.back).square().sum(1)
    order = its["order.0"].long()
    assert order.tolist() == written.argsort().tolist() != mine["order.0"].tolist()
    noise = (1e-3 * fired.square().mean() * len(fired)).sqrt()
    system = torch.cat((fired[:, order[1:]], noise * torch.eye(INNER - 1)))
    wanted = torch.cat((fired[:, order[0]], torch.zeros(INNER - 1)))
    shares = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    found = of_neuron(its["substitutes.0"], order, 0)[order[1:]]
    torch.testing.assert_close(found, shares, rtol=2e-2, atol=2e-3)
