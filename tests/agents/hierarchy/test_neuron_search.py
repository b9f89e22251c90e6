"""The search for what a neuron is to write, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiedit_agents.hierarchy import neuron_search
from hiedit_agents.hierarchy.neuron_plan import Planner, ShapeForm, Target
from hiedit_agents.hierarchy.neuron_search import SearchForm, seek
from hiedit_agents.hierarchy.neuron_shape import NeuronShape
from hiedit_env.resident.nudges import Nudges, answer_losses
from hiedit_env.resident.resident import ResidentLLM
from tests.agents.hierarchy.test_neuron import model, neuron

#: Of one subject and one answer; the second has six tokens more behind the subject.
PROMPTS = ("w5 w9 w4", "w5 w9 w21 w8 w6 w3 w11 w12 w4")
FORM = SearchForm(0.3, 0.5, 60, 0.3)
#: With which the mean alone would be good enough too early.
LOOSE = SearchForm(0.3, 0.5, 60, 3.0)


def targets(llm: ResidentLLM, prompts: Sequence[str] = PROMPTS) -> list[Target]:
    low = neuron(llm)
    encoded = [
        llm.encoder.with_subject(llm.encode(prompt, "w7"), prompt, "w9") for prompt in prompts
    ]
    # What detectors read besides these prompts has no part in a search.
    form = ShapeForm(0.6, 20.0, 0, 2.7, reworded=False)
    planner = Planner(llm, low.mlps, low._readings, form)
    capture = llm.read(*encoded).capture()
    return planner.targets(capture, [tuple(encoded)], lambda _: 0, [], 0)


def losses(llm: ResidentLLM, target: Target, vector: Tensor) -> Tensor:
    """Of every prompt, with the strength its neuron will have in it."""
    low = neuron(llm)
    mlp = low.mlps[target.home]
    capture = llm.read(*target.prompts).capture()
    starts = torch.tensor([0, *[p.length for p in target.prompts]]).cumsum(0)
    places = [p.positions("subject")[0] for p in target.prompts]
    rows = [int(starts[i]) + place for i, place in enumerate(places)]
    fires = target.shape.firing(capture.keys[mlp.gate.layer][rows].float())
    nudges = Nudges(llm, target.prompts, places, [mlp.back])
    return nudges.losses([fires[:, None] * vector])


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Which prompts each pass runs from now on."""
    seen: list[tuple[int, ...]] = []
    own = Nudges.logits

    def note(
        self: Nudges, vectors: Sequence[Tensor | None], rows: Sequence[int] | None = None
    ) -> Tensor:
        seen.append(tuple(self._all if rows is None else rows))
        return own(self, vectors, rows)

    monkeypatch.setattr(Nudges, "logits", note)
    return seen


def test_every_prompt_is_answered_well_enough_at_the_end() -> None:
    llm = model()
    (target,) = targets(llm)
    (vector,) = seek(llm, neuron(llm).mlps, [target], FORM)
    assert float(losses(llm, target, torch.zeros_like(vector)).min()) > FORM.enough
    assert float(losses(llm, target, vector).max()) < FORM.enough + 0.02


def test_every_token_has_more_than_one_half_at_the_end() -> None:
    llm = model()
    (target,) = targets(llm, ("w5 w9 w4",))
    answer = llm.encode("w5 w9 w4", "w7 w12 w3")
    prompt = llm.encoder.with_subject(answer, "w5 w9 w4", "w9")
    (vector,) = seek(llm, neuron(llm).mlps, [replace(target, prompts=(prompt,))], LOOSE)
    back = neuron(llm).mlps[0].back
    nudges = Nudges(llm, [prompt], [prompt.positions("subject")[0]], [back])
    mean, worst = answer_losses(nudges.logits([vector[None]]), [prompt])
    assert float(mean) < LOOSE.enough / 2
    assert float(worst) < 0.69 + 0.02


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("step_size", [0.06, 0.12, 0.3])
def test_what_is_called_answered_is_answered_by_the_vector_that_is_given(
    step_size: float, steps: int
) -> None:
    llm = model()
    (target,) = targets(llm)
    form = replace(FORM, step_size=step_size, steps=steps)
    search = neuron_search._Search(llm, neuron(llm).mlps, [target], form)
    (vector,), (busy,) = search.descend(0.0)
    found = losses(llm, target, vector)
    assert bool(busy) is (float(found.max()) >= FORM.enough)


def test_where_numbers_overflow_half_of_the_vector_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    (target,) = targets(llm)
    own, seen = Nudges.logits, []

    def overflow(self: Nudges, vectors: Any, rows: Any = None) -> Tensor:
        found = own(self, vectors, rows)
        seen.append(float(vectors[1].detach().norm() / search._asked.fires[list(rows)].norm()))
        # The third pass, by one prompt, which takes every other number with it.
        return found * float("nan") if len(seen) == 3 else found

    search = neuron_search._Search(llm, neuron(llm).mlps, [target], FORM)
    monkeypatch.setattr(Nudges, "logits", overflow)
    (vector,), (busy,) = search.descend(0.0)
    monkeypatch.undo()
    assert seen[3] == pytest.approx(seen[2] / 2, rel=1e-4)
    assert not bool(busy)
    assert float(losses(llm, target, vector).max()) < FORM.enough + 0.02


def test_what_is_not_a_number_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    (target,) = targets(llm)
    search = neuron_search._Search(llm, neuron(llm).mlps, [target], replace(FORM, steps=3))
    own = Nudges.logits
    monkeypatch.setattr(Nudges, "logits", lambda *args: own(*args) * float("nan"))
    (vector,), (busy,) = search.descend(0.0)
    assert bool(busy)
    assert bool(vector.isfinite().all())


class _Silent:
    """The shape of a neuron that does not fire in the prompts at some places."""

    def __init__(self, shape: NeuronShape, silent: Sequence[int]) -> None:
        self._shape, self._silent, self._seen = shape, silent, 0

    def firing(self, readings: Tensor) -> Tensor:
        number, self._seen = self._seen, self._seen + 1
        return self._shape.firing(readings) * (0.01 if number in self._silent else 1)


def test_a_prompt_that_the_neuron_does_not_fire_in_is_not_sought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    # With other tokens before the subject, hidden states have another length there.
    (target,) = targets(llm, (PROMPTS[0], f"w30 w31 {PROMPTS[1]}"))
    mlps = neuron(llm).mlps
    both = neuron_search._Search(llm, mlps, [target], FORM)._length
    one = neuron_search._Search(llm, mlps, [replace(target, prompts=target.prompts[:1])], FORM)
    assert abs(float(one._length / both) - 1) > 1e-3
    alone = seek(llm, mlps, [replace(target, prompts=target.prompts[:1])], FORM)
    seen = noted(monkeypatch)
    silent = replace(target, shape=_Silent(target.shape, [1]))  # type: ignore[arg-type]
    torch.testing.assert_close(seek(llm, mlps, [silent], FORM), alone, rtol=1e-4, atol=1e-4)
    assert set(seen) == {(0,)}
    # One that fires nowhere is sought in vain, but sought.
    del seen[:]
    mute = replace(target, shape=_Silent(target.shape, [0, 1]))  # type: ignore[arg-type]
    seek(llm, mlps, [mute], FORM)
    assert set(seen) == {(0,), (1,)}


def test_halves_of_the_prompts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    (target,) = targets(llm, (*PROMPTS, "w11 w9 w4"))
    seen = noted(monkeypatch)
    # Nothing is answered so soon: two rounds, and a last look at both halves.
    form = replace(FORM, step_size=1e-4, steps=2)
    _, busy = neuron_search._Search(llm, neuron(llm).mlps, [target], form).descend(0.0)
    assert seen == [(0, 2), (1,), (0, 2), (1,), (0, 2), (1,)]
    assert busy.tolist() == [True]
    # Where there is one prompt, a round is one pass.
    del seen[:]
    single = replace(target, prompts=target.prompts[:1])
    neuron_search._Search(llm, neuron(llm).mlps, [single], form).descend(0.0)
    assert seen == [(0,), (0,), (0,)]


def test_a_round_is_a_step_along_the_gradient_of_each_half() -> None:
    llm = model()
    (target,) = targets(llm)
    search = neuron_search._Search(llm, neuron(llm).mlps, [target], replace(FORM, steps=1))
    found, _ = search.descend(0.0)
    # One prompt is one half here, by whole passes of the model.
    vector, speed = torch.zeros_like(found[0]), torch.zeros_like(found[0])
    for half in range(2):
        vector.requires_grad_()
        (gradient,) = torch.autograd.grad(losses(llm, target, vector)[half], vector)
        speed = FORM.momentum * speed + gradient / gradient.norm()
        vector = (vector - float(search._length) * speed).detach()
    torch.testing.assert_close(found[0], vector, rtol=1e-3, atol=1e-4)


def test_a_half_that_is_answered_makes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    (target,) = targets(llm)
    mlps = neuron(llm).mlps
    first = replace(target, prompts=target.prompts[:1])
    answered = seek(llm, mlps, [first], FORM)
    search = neuron_search._Search(llm, mlps, [target], replace(FORM, steps=1))
    kept: list[Tensor] = []
    own = Nudges.logits

    def note(self: Nudges, vectors: Any, rows: Any = None) -> Tensor:
        kept.extend(v.detach() for v in vectors if v is not None)
        return own(self, vectors, rows)

    monkeypatch.setattr(Nudges, "logits", note)
    search.descend(0.0, None, answered)
    # The first prompt is answered where it starts; the vector is the same when the second is run.
    assert float(losses(llm, target, answered[0])[0]) < FORM.enough
    strengths = search._asked.fires[:, 0]
    torch.testing.assert_close(kept[1] / strengths[1], kept[0] / strengths[0])


def test_a_vector_is_sought_for_the_strength_that_the_neuron_has() -> None:
    llm = model()
    (target,) = targets(llm)
    weak = replace(target, shape=_Half(target.shape))  # type: ignore[arg-type]
    (found,) = seek(llm, neuron(llm).mlps, [weak], FORM)
    assert float(losses(llm, target, 0.5 * found).max()) < FORM.enough + 0.02


class _Half:
    """A shape that fires half as strongly everywhere."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def firing(self, readings: Tensor) -> Tensor:
        strength: Tensor = self.shape.firing(readings)
        return 0.5 * strength


# -- noise ----------------------------------------------------------------------------------------

NOISY = replace(FORM, noise=0.6)


def under_noise(llm: ResidentLLM, target: Target, vector: Tensor) -> float:
    """Mean loss with vectors around one, in directions that the search did not draw."""
    generator = torch.Generator().manual_seed(99)
    found = []
    for _ in range(20):
        drawn = torch.randn(vector.shape, generator=generator)
        around = vector + 0.6 * vector.norm() * drawn / drawn.norm()
        found.append(losses(llm, target, around).mean())
    return float(torch.stack(found).mean())


def test_what_is_found_under_noise_stands_noise() -> None:
    llm = model()
    (target,) = targets(llm)
    mlps = neuron(llm).mlps
    (firm,), (other,) = (seek(llm, mlps, [target], form) for form in (NOISY, FORM))
    assert under_noise(llm, target, firm) < 0.8 * under_noise(llm, target, other)


def test_noise_is_the_same_for_the_same_facts() -> None:
    llm = model()
    (target,) = targets(llm)
    mlps = neuron(llm).mlps
    first = seek(llm, mlps, [target], NOISY)
    torch.manual_seed(5)  # nobody else's numbers are drawn
    assert torch.equal(seek(llm, mlps, [target], NOISY), first)


def test_noise_has_its_length_and_passes_gradients_on() -> None:
    added = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    drawn = [torch.Generator().manual_seed(i) for i in range(2)]
    noisy = neuron_search._with_noise(added, 0.6, drawn)
    assert torch.allclose((noisy - added).norm(dim=1), torch.tensor([3.0, 0.0]))
    (gradient,) = torch.autograd.grad(noisy.sum(), added)
    assert torch.equal(gradient, torch.ones(2, 3))


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_who_rests_is_not_run_again(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    facts = [targets(llm, ("w5 w9 w4",))[0], targets(llm)[0]]
    mlps, form = neuron(llm).mlps, replace(FORM, step_size=0.1, noise=noise)
    seen, alone, passes = noted(monkeypatch), [], []
    for fact in facts:
        alone.append(seek(llm, mlps, [fact], form)[0])
        passes.append(len(seen))
        del seen[:]
    together = seek(llm, mlps, facts, form)
    first, second = passes
    assert first != second
    # One prompt of each fact a pass; the second one has two, which take turns.
    wanted = [(i < first) + (i < second) for i in range(max(passes))]
    assert [len(rows) for rows in seen] == wanted
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-3)


def test_only_the_facts_that_are_sought_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    (short,), (long,) = targets(llm, ("w5 w9 w4",)), targets(llm)
    search = neuron_search._Search(llm, neuron(llm).mlps, [short, long], FORM)
    seen = noted(monkeypatch)
    vectors, busy = search.descend(0.0, torch.tensor([False, True]))
    assert set(seen) == {(1,), (2,)}
    assert torch.equal(vectors[0], torch.zeros_like(vectors[0]))
    assert busy.tolist() == [False, False]


def test_what_cannot_be_found_under_noise_is_sought_on_without() -> None:
    llm = model()
    (target,) = targets(llm)
    mlps = neuron(llm).mlps
    hopeless = replace(FORM, noise=1.9, steps=10)
    search = neuron_search._Search(llm, mlps, [target], hopeless)
    under, busy = search.descend(1.9)
    assert busy.tolist() == [True]
    found = seek(llm, mlps, [target], hopeless)
    assert torch.equal(found, search.descend(0.0, busy, under)[0])
    assert not torch.equal(found, search.descend(0.0)[0])
    assert float(losses(llm, target, found[0]).max()) < FORM.enough + 0.02
