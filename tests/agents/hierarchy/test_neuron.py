"""The low level of one neuron per fact: detector, shape, what is written, memory and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.neuron_changes import NeuronChanges
from hiedit_agents.hierarchy.neuron_plan import Planner, ShapeForm
from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM
from tests.support.models import build_random, resident

HIDDEN, INNER = 48, 64
#: Tokens are words, so a fact's subject is one word of its prompt.
FACTS = (("w5 w9 w4", "w7 w3", "w9"), ("w6 w11 w8 w4", "w12", "w11"), ("w3 w20 w15", "w30", "w20"))
SAME = ("w5 w9 w21 w8", "w13", "w9")  # of the subject of the first
ALL = np.ones(6, bool)
#: In a model this small, a step of the usual length crosses what several are to approach.
OWN: dict[str, Any] = {
    "step_size": 0.3,
    "search_steps": 40,
    "substitutes": False,
    "widest": 2.7,
    # Its tokenizer knows none of the words of other sentences.
    "keeping": 0.0,
}
FIRST = np.array([True] * 3 + [False] * 3)


def model(model_type: str = "llama", **settings: Any) -> ResidentLLM:
    """Wide enough for words to be told apart, and not saturated."""
    wide = (
        {"n_embd": HIDDEN, "n_inner": INNER}
        if model_type == "gpt2"
        else {"hidden_size": HIDDEN, "intermediate_size": INNER}
    )
    built = build_random(model_type, **wide)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 and not any(word in name for word in ("embed", "wte", "head")):
                parameter *= 0.5 if "attn" in name else 0.15
        # As in trained models, what is read has a mean that is far from 0.
        built.get_input_embeddings().weight += torch.randn(
            HIDDEN, generator=torch.Generator().manual_seed(4)
        )
    return resident(model_type, (0, 1), model=built, **settings)


def unit(llm: ResidentLLM, *facts: tuple[str, str, str]) -> Capture:
    prompts = []
    for prompt, answer, subject in facts:
        encoded = llm.encode(prompt, answer)
        prompts.append(llm.encoder.with_subject(encoded, prompt, subject))
    return llm.read(*prompts).capture()


def elsewhere(llm: ResidentLLM, count: int = 60) -> list[EncodedPrompt]:
    """Random words, of several lengths."""
    rng = np.random.default_rng(0)
    sizes = [6 + i % 3 for i in range(count)]
    texts = [" ".join(f"w{i}" for i in rng.integers(3, 32, size)) for size in sizes]
    return [llm.encode(text, "w3") for text in texts]


def neuron(llm: ResidentLLM, **settings: Any) -> Neuron:
    low = Neuron(llm, **{**OWN, **settings})
    low.calibrate_on(elsewhere(llm))
    return low


def losses(llm: ResidentLLM, *facts: tuple[str, str, str]) -> list[float]:
    return [unit(llm, fact).loss for fact in facts]


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_a_fact_is_answered_and_only_one_neuron_has_changed(model_type: str) -> None:
    llm = model(model_type)
    low = neuron(llm)
    before = {layer: llm.weight(layer) for mlp in low.mlps for layer in mlp.layers}
    capture = unit(llm, FACTS[0])
    updates = low.propose(capture, np.ones(len(llm.layers), bool))
    llm.commit(updates)
    assert unit(llm, FACTS[0]).answered
    assert unit(llm, FACTS[0]).loss < capture.loss / 4
    ((home, written),) = low.statistics()["held"].values()
    mlp = low.mlps[home]
    assert (home, written) == (0, int(low.state_dict()["order.0"][0]))
    assert [i for i, update in enumerate(updates) if update is not None] == list(mlp.layers)
    for layer in mlp.layers:
        moved = (llm.weight(layer) - before[layer]).abs()
        if layer == mlp.back:
            assert moved.amax(1).nonzero().flatten().tolist() == [written]
        else:
            reads = [r for r in (mlp.gate, mlp.up) if r is not None and r.layer == layer]
            places = sorted(read.first + written for read in reads)
            assert moved.amax(0).nonzero().flatten().tolist() == places


def test_facts_go_into_the_first_chosen_mlp_that_has_room() -> None:
    llm = model()
    low = neuron(llm, search_steps=1)
    low.propose(unit(llm, *FACTS), ALL)
    assert [home for home, _ in low.statistics()["held"].values()] == [0, 0, 0]
    low.reset()
    low._next = (INNER - 1, 0)
    low.propose(unit(llm, *FACTS), ALL)
    assert [home for home, _ in low.statistics()["held"].values()] == [0, 1, 1]


def test_what_the_mlp_gives_changes_by_the_vector_and_by_the_neuron_that_is_gone() -> None:
    llm = model()
    low = neuron(llm)
    capture = unit(llm, FACTS[0])
    mlp = low.mlps[0]
    place = capture.prompt.positions("subject")[0]
    before = [x.clone() for x in capture.keys]
    held = int(low.state_dict()["order.0"][0])
    updates = low.propose(capture, FIRST)
    assert [u is not None for u in updates] == FIRST.tolist()
    vector = seek(low, capture)
    reading = before[mlp.gate.layer]
    gone = before[mlp.back][:, held, None] * llm.weight(mlp.back)[held]
    llm.commit(updates)
    x = reading
    w_gate, w_up, w_back = (llm.weight(i) for i in (mlp.gate.layer, mlp.up.layer, mlp.back))  # type: ignore[union-attr]
    now = (F.silu(x @ w_gate[:, held]) * (x @ w_up[:, held]))[:, None] * w_back[held]
    others = reading[[i for i in range(1, len(reading)) if i != place]]
    score = low._readings[0].detector(reading[place : place + 1], others).scores(reading)
    assert float(score[place]) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(now[place], vector, rtol=0.05, atol=1e-3)
    for other in range(len(reading)):
        if float(score[other]) < 0.2:
            assert float(now[other].norm()) < 0.02 * float(vector.norm())
    assert gone.shape == now.shape


def seek(low: Neuron, capture: Capture) -> Tensor:
    """The vector of the one fact of a capture, at the present weights."""
    # Strengths in a fact's prompts depend on the form, and what is found depends on them.
    form = ShapeForm(low.threshold, low.sharpness, low.swaps, low.widest, low.reworded)
    planner = Planner(low.llm, low.mlps, low._readings, form)
    targets = planner.targets(capture, [capture.prompts], lambda _: 0, [], 0)
    return low._search(targets, torch.zeros(len(targets), HIDDEN))[0]


@pytest.mark.parametrize(("substitutes", "error"), [(False, 0.15), (True, 0.1)])
def test_the_loss_after_the_write_is_that_of_the_vector(substitutes: bool, error: float) -> None:
    llm = model()
    low = neuron(llm, substitutes=substitutes)
    capture = unit(llm, FACTS[1])
    vector = seek(low, capture)
    place = capture.prompt.positions("subject")[0]
    expected = Nudges(llm, capture.prompts, [place], [low.mlps[0].back]).losses([vector[None]])
    llm.commit(low.propose(capture, FIRST))
    # The neuron that is gone did little.
    assert unit(llm, FACTS[1]).loss == pytest.approx(float(expected), abs=error)


def test_steps_along_the_gradient_are_those_of_finite_differences() -> None:
    llm = model()
    low = neuron(llm, search_steps=1, momentum=0.0, step_size=0.01, noise=0.0)
    capture = unit(llm, FACTS[2])
    place = capture.prompt.positions("subject")[0]
    nudges = Nudges(llm, capture.prompts, [place], [low.mlps[0].back])
    slopes = []
    for axis in range(HIDDEN):
        step = torch.zeros(1, HIDDEN)
        step[0, axis] = 1e-2
        with torch.no_grad():
            slopes.append(float(nudges.losses([step]) - nudges.losses([-step])) / 2e-2)
    vector = seek(low, capture)
    downhill = -torch.tensor(slopes)
    assert float(F.cosine_similarity(vector, downhill, dim=0)) > 0.999
    assert float(vector.norm()) == pytest.approx(0.01 * float(nudges.lengths), rel=1e-3)


def test_facts_written_together_are_those_written_alone() -> None:
    llm = model()
    low = neuron(llm)
    together = low.propose(unit(llm, *FACTS), FIRST)
    dense = [u.dense() if u else None for u in together]
    alone: list[Tensor | None] = [None] * 6
    low.reset()
    for fact in FACTS:
        for i, update in enumerate(low.propose(unit(llm, fact), FIRST)):
            if update is not None:
                alone[i] = update.dense() + (0 if alone[i] is None else alone[i])
    for one, other in zip(dense[:3], alone[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-3)
    assert all(u is not None and len(u.left) == 3 for u in together[:3])


def test_a_fact_of_a_batch_that_is_answered_is_not_sought_again() -> None:
    llm = model()
    low = neuron(llm)
    llm.commit(low.propose(unit(llm, FACTS[0]), FIRST))
    pair = unit(llm, *FACTS[:2])
    facts = [prompt.prompt_ids for prompt in pair.prompts]
    assert [t.fact for t in low.plan(pair, FIRST)] == facts[1:]
    both = low.propose(pair, FIRST)
    assert all(u is not None and len(u.left) == 1 for u in both[:3])
    llm.commit(both)
    answered = unit(llm, *FACTS[:2])
    assert answered.answered
    assert [t.fact for t in low.plan(answered, FIRST)] == facts


def test_facts_about_one_subject_share_a_neuron_and_are_both_answered() -> None:
    llm = model()
    low = neuron(llm, search_steps=60)
    updates = low.propose(unit(llm, FACTS[0], SAME), ALL)
    assert [u is not None for u in updates] == FIRST.tolist()
    assert all(len(u.left) == 1 for u in updates if u is not None)
    llm.commit(updates)
    assert unit(llm, FACTS[0]).answered
    assert unit(llm, SAME).answered


def test_a_later_fact_about_the_subject_keeps_the_earlier_one() -> None:
    def play(companions: int) -> float:
        llm = model()
        low = neuron(llm, companions=companions, search_steps=60)
        for fact in (FACTS[0], SAME):
            capture = unit(llm, fact)
            low.observe(capture)
            llm.commit(low.propose(capture, FIRST))
        assert unit(llm, SAME).answered
        return unit(llm, FACTS[0]).loss

    assert play(2) < 0.5 < play(0)


def test_a_fact_that_is_edited_again_stays_in_its_neuron() -> None:
    llm = model()
    low = neuron(llm)
    llm.commit(low.propose(unit(llm, FACTS[0]), ALL))
    first = dict(low.statistics()["held"])
    again = (FACTS[0][0], "w18", "w9")
    llm.commit(low.propose(unit(llm, again), ALL))
    assert low.statistics()["held"] == first
    assert unit(llm, again).answered


def test_an_older_answer_to_the_same_prompt_is_no_companion() -> None:
    llm = model()
    low = neuron(llm)
    low.observe(unit(llm, FACTS[0], SAME))
    again = unit(llm, (FACTS[0][0], "w18", "w9"))
    (kept,) = low.others([again.prompts])
    assert kept[0].prompt == SAME[0]


def test_a_fact_whose_mlp_is_not_chosen_again_gets_a_neuron_of_another_one() -> None:
    llm = model()
    # Under noise the first vector is so long that in so small a model no second one outweighs it.
    low = neuron(llm, noise=0.0)
    llm.commit(low.propose(unit(llm, FACTS[0]), FIRST))
    assert low.statistics()["held"] != {}
    again = (FACTS[0][0], "w18", "w9")
    llm.commit(low.propose(unit(llm, again), ~FIRST))
    # The least neuron of the second MLP, and not the one with the number of the first.
    assert list(low.statistics()["held"].values()) == [(1, int(low.state_dict()["order.1"][0]))]
    assert unit(llm, again).answered


def test_other_facts_stay() -> None:
    llm = model()
    low = neuron(llm)
    for fact in FACTS:
        llm.commit(low.propose(unit(llm, fact), FIRST))
    assert all(unit(llm, fact).answered for fact in FACTS)


def test_multipliers_scale_the_vector_alone() -> None:
    llm = model()
    low = neuron(llm)
    mlp, unwritten = low.mlps[0], low.statistics()
    capture = unit(llm, FACTS[0])
    reading = capture.keys[mlp.gate.layer][capture.prompt.positions("subject")[0]]
    held = int(low.state_dict()["order.0"][0])
    before = NeuronChanges(llm, mlp).gives(held, reading)
    added = []
    for factor in (1.0, 0.5):
        low.load_statistics(unwritten)
        unedited = llm.commit(low.propose(capture, FIRST, np.full(6, factor, np.float32)))
        added.append(NeuronChanges(llm, mlp).gives(held, reading) - before)
        llm.restore(unedited)
    assert float(added[0].norm()) > 0
    torch.testing.assert_close(added[1], added[0] / 2, rtol=1e-3, atol=1e-4)
    low.load_statistics(unwritten)
    gates = torch.ones(6, requires_grad=True)
    (update,) = [u for u in (low.compute(capture, FIRST, gates)[mlp.back],) if u is not None]
    update.right.sum().backward()
    assert gates.grad is not None
    assert gates.grad.count_nonzero() == 1


# -- which neurons --------------------------------------------------------------------------------


def test_the_calibration_is_that_of_prompts_read_one_by_one() -> None:
    llm = model()
    low = neuron(llm)
    mlp, state = low.mlps[1], low.state_dict()
    alone = [llm.read(prompt).capture() for prompt in elsewhere(llm)]
    readings = torch.cat([capture.keys[mlp.gate.layer][1:] for capture in alone])
    firing = torch.cat([capture.keys[mlp.back][1:] for capture in alone])
    upper = torch.triu_indices(HIDDEN, HIDDEN)
    covariance = torch.cov(readings.mT, correction=0)[upper[0], upper[1]]
    torch.testing.assert_close(state["mean.1"], readings.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["covariance.1"], covariance, rtol=1e-3, atol=1e-4)
    written = firing.square().sum(0) * llm.weight(mlp.back).norm(dim=1).square()
    assert state["order.1"].tolist() == written.argsort().tolist()
    whole = low._readings[1]
    inverse = torch.linalg.inv(torch.cov(readings.mT, correction=0))
    small = Neuron(llm, ridge=1e-7)
    small.load_state_dict(state)
    torch.testing.assert_close(small._readings[1].inverse, inverse, rtol=2e-2, atol=1e-2)
    assert whole.inverse.shape == inverse.shape


def test_neurons_that_hold_facts_in_a_saved_model_are_left_alone() -> None:
    llm = model()
    low = neuron(llm)
    llm.commit(low.propose(unit(llm, FACTS[0]), ALL))
    saved = low.state_dict()
    other = resident("llama", (0, 1), model=llm.model)  # its weights are the edited ones
    later = Neuron(other, **OWN)
    later.load_state_dict(saved)
    later.propose(unit(other, FACTS[1]), FIRST)
    assert list(later.statistics()["held"].values()) == [(0, int(saved["order.0"][1]))]


def test_a_full_mlp_is_refused() -> None:
    llm = model()
    low = neuron(llm, search_steps=1)
    low._next = (INNER, 0)
    with pytest.raises(SettingsError, match=r"all 64 neurons of the MLP of block 0 hold facts"):
        low.propose(unit(llm, FACTS[0]), FIRST)


def test_an_mlp_that_is_not_chosen_as_a_whole_is_left_alone() -> None:
    llm = model()
    low = neuron(llm)
    layers = ALL.copy()
    layers[1] = False
    updates = low.propose(unit(llm, FACTS[0]), layers)
    assert [u is not None for u in updates] == [False] * 3 + [True] * 3
    assert low.propose(unit(llm, FACTS[0]), np.zeros(6, bool)) == (None,) * 6


# -- state ----------------------------------------------------------------------------------------


def same(one: tuple[LowRankUpdate | None, ...], other: tuple[LowRankUpdate | None, ...]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and torch.equal(a.dense(), b.dense()))
        for a, b in pairs
    )


def test_statistics_come_back_and_a_saved_calibration_is_the_same() -> None:
    llm = model()
    low = neuron(llm)
    before = low.statistics()
    first = low.propose(unit(llm, FACTS[0]), ALL)
    low.load_statistics(before)
    assert same(first, low.propose(unit(llm, FACTS[0]), ALL))
    low.reset()
    assert low.statistics() == {"past": (), "held": {}, "next": (0, 0)}
    other = Neuron(llm, **OWN)
    assert other.wants_calibration
    other.load_state_dict({name: x.clone() for name, x in low.state_dict().items()})
    assert not other.wants_calibration
    assert same(first, other.propose(unit(llm, FACTS[0]), ALL))


def test_a_copy_runs_its_own_view_and_shares_the_calibration() -> None:
    llm = model()
    low = neuron(llm)
    fork = llm.fork()
    copy = low.clone_for(fork)
    assert copy.llm is fork
    assert copy._readings[0] is low._readings[0]
    fork.commit(copy.propose(unit(fork, FACTS[0]), ALL))
    assert low.statistics()["held"] == {}
    assert unit(fork, FACTS[0]).answered
    assert not unit(llm, FACTS[0]).answered


def test_half_precision_answers_too() -> None:
    llm = model(dtype=torch.bfloat16)
    low = neuron(llm)
    llm.commit(low.propose(unit(llm, FACTS[1]), ALL))
    assert unit(llm, FACTS[1]).answered


def test_bad_settings_and_a_missing_calibration_are_named() -> None:
    llm = model()
    with pytest.raises(SettingsError, match="momentum must be a number in"):
        Neuron(llm, momentum=1.0)
    with pytest.raises(SettingsError, match="threshold must be a number in"):
        Neuron(llm, threshold=0.9)
    with pytest.raises(SettingsError, match="call calibrate"):
        Neuron(llm).propose(unit(llm, FACTS[0]), ALL)
    with pytest.raises(SettingsError, match="all matrices of an MLP"):
        Neuron(resident("llama", matrices=("mlp.down_proj",)))
    low = neuron(llm)
    with pytest.raises(SettingsError, match="calibrate again"):
        Neuron(resident("llama")).load_state_dict(low.state_dict())
    with pytest.raises(SettingsError, match="at least one prompt"):
        Neuron(llm).calibrate_on([])


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "much"])
def test_keeping_and_settling_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="keeping must be a number of at least 0"):
        Neuron(model(), keeping=value)
    with pytest.raises(SettingsError, match="settling must be a number in"):
        Neuron(model(), settling=value)


@pytest.mark.parametrize("noise", [-0.1, 2, float("nan"), "much"])
def test_noise_out_of_range_is_refused(noise: Any) -> None:
    with pytest.raises(SettingsError, match="noise must be a number"):
        Neuron(model(), noise=noise)
