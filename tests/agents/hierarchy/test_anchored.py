"""The anchored low level: its closed form against dense solves, its search, memory and state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy.anchored import Anchored
from hiedit_agents.hierarchy.fact_memory import units_of
from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM
from tests.support.episodes import SELECTION, make
from tests.support.models import build_random, resident

DOWN = ("mlp.down_proj",)
ALL = np.ones(2, bool)
#: Tokens are words, so a fact's subject is one word of its prompt.
FACTS = (("w5 w9 w4", "w7 w3", "w9"), ("w6 w11 w8 w4", "w12", "w11"), ("w3 w20 w15", "w30", "w20"))


def model(**settings: Any) -> ResidentLLM:
    """Wide enough inside for different tokens to have different inputs, and not saturated."""
    llama = build_random("llama", intermediate_size=256)
    with torch.no_grad():
        llama.lm_head.weight *= 0.3
    return resident("llama", matrices=DOWN, model=llama, **settings)


def unit(llm: ResidentLLM, *numbers: int) -> Capture:
    """A capture of some of the facts."""
    prompts = []
    for number in numbers:
        prompt, answer, subject = FACTS[number]
        encoded = llm.encode(prompt, answer)
        prompts.append(llm.encoder.with_subject(encoded, prompt, subject))
    return llm.read(*prompts).capture()


def elsewhere(llm: ResidentLLM, count: int = 30) -> list[Capture]:
    """Captures of random words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(3, 32, 8)) for _ in range(count)]
    return [llm.read(llm.encode(text, "w3")).capture() for text in texts]


def anchored(llm: ResidentLLM, **settings: Any) -> Anchored:
    low = Anchored(llm, **{"openings": 0, "repeats": 0, "step_size": 0.3, **settings})
    low.calibrate(elsewhere(llm))
    return low


def second_moments(low: Anchored) -> list[Tensor]:
    """What the level's inverses are inverses of."""
    return [torch.linalg.inv(inverse.double()) for inverse in low._inverses]


def found(low: Anchored, capture: Capture) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of the search, as `compute` gets them."""
    facts = units_of(low.llm, capture.prompts)
    prompts, owners = low._sought(facts)
    return low._search(prompts, owners, len(facts), [0, 1])


# -- calibration ----------------------------------------------------------------------------------


def test_the_second_moment_is_that_of_all_inputs_met() -> None:
    llm = model()
    low = anchored(llm, prior=1e-3)
    for layer in range(2):
        rows = torch.cat([capture.keys[layer] for capture in elsewhere(llm)]).double()
        wanted = rows.mT @ rows
        wanted = wanted + 1e-3 * wanted.diagonal().mean() * torch.eye(len(wanted))
        # Half precision is what is kept; the tiny moment has fewer than RANK directions.
        torch.testing.assert_close(
            second_moments(low)[layer], wanted, atol=3e-3 * float(wanted.max()), rtol=0
        )


def test_it_has_to_be_calibrated() -> None:
    llm = model()
    low = Anchored(llm)
    assert low.wants_calibration
    with pytest.raises(SettingsError, match="call calibrate"):
        low.propose(unit(llm, 0), ALL)
    with pytest.raises(SettingsError, match="at least one prompt"):
        low.calibrate([])


# -- the closed form ------------------------------------------------------------------------------


def dense(moment: Tensor, keys: Tensor, values: Tensor, ridge: float) -> Tensor:
    """The least change D in the metric of C with K D = V, by Lagrange multipliers.

    min tr(Dᵀ C D) with K D = V: [C Kᵀ; K −r I] [D; −M] = [0; V], solved as one system.
    """
    keys, values = keys.double(), values.double()
    d, rows = moment.shape[0], len(keys)
    gram = keys @ torch.linalg.solve(moment, keys.mT)
    system = torch.zeros(d + rows, d + rows, dtype=torch.float64)
    system[:d, :d], system[:d, d:], system[d:, :d] = moment, -keys.mT, keys
    system[d:, d:] = ridge * gram.diagonal().mean() * torch.eye(rows)
    right = torch.cat((torch.zeros(d, values.shape[1], dtype=torch.float64), values))
    return torch.linalg.solve(system, right)[:d]


@pytest.mark.parametrize("numbers", [(0,), (0, 1, 2)])
def test_the_update_is_the_dense_solution_of_one_fact_and_of_several(
    numbers: Sequence[int],
) -> None:
    llm = model()
    low = anchored(llm, ridge=0.2)
    capture = unit(llm, *numbers)
    keys, values = found(low, capture)
    moments = second_moments(low)
    updates = low.propose(capture, ALL)
    for layer, update in enumerate(updates):
        assert update is not None
        assert len(update.left) == len(numbers)
        wanted = dense(moments[layer], keys[layer], values[layer], 0.2)
        torch.testing.assert_close(update.dense().double(), wanted, atol=1e-4, rtol=1e-3)


def test_a_written_fact_counts_in_the_second_moment() -> None:
    llm = model()
    low = anchored(llm, protect=50.0)
    before = second_moments(low)
    capture = unit(llm, 0, 1)
    keys, _ = found(low, capture)
    low.propose(capture, ALL)
    for layer, after in enumerate(second_moments(low)):
        rows = keys[layer].double()
        torch.testing.assert_close(after, before[layer] + 50 * rows.mT @ rows, atol=1.0, rtol=1e-2)


def test_a_layer_not_chosen_stays_and_multipliers_scale() -> None:
    llm = model()
    capture = unit(llm, 0)
    one = anchored(llm).propose(capture, np.array([False, True]))
    two = anchored(llm).propose(
        capture, np.array([False, True]), np.array([1, 0.5], dtype=np.float32)
    )
    assert one[0] is None
    assert isinstance(one[1], LowRankUpdate)
    assert isinstance(two[1], LowRankUpdate)
    torch.testing.assert_close(two[1].dense(), one[1].dense() / 2)
    assert anchored(llm).propose(capture, np.zeros(2, bool)) == (None, None)


# -- the search -----------------------------------------------------------------------------------


def real(**settings: Any) -> tuple[Anchored, list[Capture]]:
    """On the built-in tiny model, with some of its facts."""
    env = make(SELECTION, num_edits=4, layers="*.down_proj")
    env.reset(seed=0)
    prompts = [fact.prompt for fact in env.episode.facts]
    low = Anchored(env.llm, **{"openings": 0, "repeats": 0, "ridge": 1e-6, **settings})
    probes = [probe for request in env.requests for probe in request.locality][:60]
    low.calibrate(env.llm.read(env.llm.encode(p.prompt, p.answer)).capture() for p in probes)
    return low, [env.llm.read(prompt).capture() for prompt in prompts]


def test_facts_are_answered_after_their_update_is_written() -> None:
    low, captures = real(search_steps=60)
    before = [capture.answered for capture in captures]
    llm = low.llm
    for capture in captures[:2]:
        llm.commit(
            low.propose(llm.read(*capture.prompts).capture(), np.ones(len(llm.layers), bool))
        )
        assert llm.read(*capture.prompts).capture().answered
    assert not all(before[:2])


def test_the_first_step_has_the_length_that_was_asked_for() -> None:
    llm = model()
    low = anchored(llm, search_steps=1, step_size=0.3)
    capture = unit(llm, 1)
    _, values = found(low, capture)
    prompt = capture.prompt
    nudges = Nudges(llm, [prompt], [prompt.positions("subject")[0]], [0, 1])
    zeros = [torch.zeros(1, 16, requires_grad=True) for _ in range(2)]
    gradients = torch.autograd.grad(nudges.losses(zeros).sum(), zeros)
    # Steepest in the metric Σ ‖x‖² / share, in which the step's length is measured.
    shares = low._shares(nudges.keys, torch.zeros(1, dtype=torch.int64), torch.ones(1), [0, 1])
    whole = torch.cat([w * g.flatten() for w, g in zip(shares, gradients, strict=True)])
    size = sum(w * g.square().sum() for w, g in zip(shares, gradients, strict=True)).sqrt()
    wanted = -0.3 * nudges.lengths[0] * whole / size
    torch.testing.assert_close(torch.cat([v.flatten() for v in values]), wanted)


def test_facts_of_a_batch_are_sought_as_if_each_were_alone() -> None:
    llm = model()
    low = anchored(llm, search_steps=4)
    _, together = found(low, unit(llm, 0, 1))
    for number in (0, 1):
        _, alone = found(low, unit(llm, number))
        for layer in range(2):
            torch.testing.assert_close(
                together[layer][number], alone[layer][0], atol=1e-4, rtol=1e-3
            )


def test_both_forms_of_a_fact_share_their_vectors() -> None:
    llm = model()
    low = anchored(llm)
    one = unit(llm, 0).prompt
    two = EncodedPrompt(
        "other form", one.answer, (8, 9, 4), one.answer_ids, subject_spans=((1, 2),)
    )
    assert units_of(low.llm, [one, two]) == [(one, two)]
    assert len(units_of(low.llm, unit(llm, 0, 1).prompts)) == 2
    capture = llm.read(one, two).capture()
    _, values = found(low, capture)
    assert torch.equal(values[0][0], values[0][1])


def test_openings_stand_before_the_prompt_and_leave_the_subject_where_it_is() -> None:
    llm = model()
    low = anchored(llm, openings=2)
    capture = unit(llm, 0)
    prompts, owners = low._sought(units_of(low.llm, capture.prompts))
    assert len(prompts) == 3
    assert owners.tolist() == [0, 0, 0]
    for prompt, at in prompts:
        assert prompt.prompt_ids[at] == 9
        assert prompt.prompt_ids[-3:] == capture.prompt.prompt_ids


def test_facts_that_read_the_same_up_to_the_subject_share_one_value() -> None:
    """Their inputs are equal, so two values would be averaged and neither fact answered."""
    llm = model()
    low = anchored(llm)
    first = unit(llm, 0).prompt
    text = "w5 w9 w14 w22"
    second = llm.encoder.with_subject(llm.encode(text, "w18"), text, "w9")
    facts = units_of(low.llm, [first, unit(llm, 1).prompt, second])
    prompts, owners = low._sought(facts)
    assert owners.tolist() == [0, 1, 0]
    keys, values = low._search(prompts, owners, 2, [0, 1])
    for layer in range(2):
        torch.testing.assert_close(keys[layer][0], keys[layer][2], atol=1e-5, rtol=1e-4)
        assert torch.equal(values[layer][0], values[layer][2])
    updates = low.propose(llm.read(first, unit(llm, 1).prompt, second).capture(), ALL)
    for update in updates:
        assert update is not None
        assert torch.isfinite(update.dense()).all()


# -- earlier facts --------------------------------------------------------------------------------


def test_a_fact_that_was_lost_is_sought_again_with_the_present_one() -> None:
    low, (first, second, *_) = real(repeats=2, search_steps=60)
    llm, every = low.llm, np.ones(len(low.llm.layers), bool)
    low.observe(first)
    llm.commit(low.propose(first, every))
    low.observe(second)
    assert low._lost(units_of(low.llm, second.prompts)) == []
    llm.restore_unedited()
    assert low._lost(units_of(low.llm, second.prompts)) == [first.prompts]
    updates = low.propose(llm.read(*second.prompts).capture(), every)
    assert updates[0] is not None
    assert len(updates[0].left) == 2
    llm.commit(updates)
    assert llm.read(*first.prompts).capture().answered
    assert llm.read(*second.prompts).capture().answered


def test_of_two_answers_to_a_prompt_the_later_is_kept() -> None:
    llm = model()
    low = anchored(llm)
    first = unit(llm, 0)
    low.observe(first)
    prompt, _, subject = FACTS[0]
    other = llm.encoder.with_subject(llm.encode(prompt, "w25"), prompt, subject)
    low.observe(llm.read(other).capture())
    assert low._past == ((other,),)


def test_facts_of_an_earlier_run_are_asked_again_from_the_next_reset_on() -> None:
    llm = model()
    low = anchored(llm, repeats=3)
    earlier = unit(llm, 0, 1).prompts
    low.remember(earlier)
    assert low._past == ()
    low.reset()
    assert low._past == ((earlier[0],), (earlier[1],))


# -- state ----------------------------------------------------------------------------------------


def test_statistics_go_back_bit_for_bit() -> None:
    llm = model()
    low = anchored(llm, repeats=1)
    low.observe(unit(llm, 0))
    before = low.statistics()
    one = low.propose(unit(llm, 1), ALL)
    low.load_statistics(before)
    two = low.propose(unit(llm, 1), ALL)
    for a, b in zip(one, two, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.left, b.left)
        assert torch.equal(a.right, b.right)


def test_a_saved_calibration_gives_the_same_updates() -> None:
    llm = model()
    low = anchored(llm)
    other = Anchored(llm, openings=0, repeats=0, step_size=0.3)
    other.load_state_dict(low.state_dict())
    for a, b in zip(low._inverses, other._inverses, strict=True):
        assert torch.equal(a, b)


def test_a_clone_runs_the_fork_and_shares_nothing_that_changes() -> None:
    llm = model()
    low = anchored(llm)
    twin = low.clone_for(llm.fork())
    assert twin.llm is not llm
    twin.observe(unit(llm, 0))
    twin.propose(unit(llm, 0), ALL)
    assert low._past == ()
    assert torch.equal(low._inverses[0], low._first[0])
    assert low.llm is llm


def test_clones_hold_no_copies_of_the_second_moments() -> None:
    llm = model()
    low = anchored(llm)
    twin = low.clone_for(llm.fork())
    assert all(a is b for a, b in zip(low._inverses, twin._inverses, strict=True))
    assert twin._rng is not low._rng


def test_gates_receive_gradients() -> None:
    llm = model()
    gates = torch.ones(2, requires_grad=True)
    updates = anchored(llm).compute(unit(llm, 0), ALL, gates)
    assert all(update is not None for update in updates)
    sum(u.right.sum() for u in updates if u is not None).backward()  # type: ignore[union-attr]
    wanted = [u.right.detach().sum() for u in anchored(llm).propose(unit(llm, 0), ALL) if u]
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad, torch.stack(wanted))


def test_a_calibration_of_other_layers_is_refused() -> None:
    low = anchored(model())
    state = {name: value for name, value in low.state_dict().items() if not name.endswith(".1")}
    with pytest.raises(SettingsError, match="is of 1 layers, the model has 2"):
        low.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", 1.0),
        ("metric", -1.0),
        ("search_steps", 0),
        ("enough", 0.0),
        ("openings", 9),
        ("repeats", -1),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        Anchored(model(), **{name: value})
