"""The search for what a neuron is to write: its two rounds, and when it ends."""

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
from hiedit_env.resident.nudges import Nudges
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
    planner = Planner(llm, low.mlps, low._readings, ShapeForm(0.4, 20.0, 0, 1.8))
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


def descend(llm: ResidentLLM, target: Target, start: Tensor) -> Tensor:
    """One round over all prompts."""
    search = neuron_search._Search(llm, neuron(llm).mlps, [target], FORM)
    return search.descend(start, range(len(target.prompts)))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of prompts of each pass that is run from now on."""
    seen: list[int] = []
    own = Nudges.losses

    def note(
        self: Nudges, vectors: Sequence[Tensor | None], rows: Sequence[int] | None = None
    ) -> Tensor:
        seen.append(len(self._all if rows is None else rows))
        return own(self, vectors, rows)

    monkeypatch.setattr(Nudges, "losses", note)
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
    assert float(nudges.losses([vector[None]])) < LOOSE.enough / 2
    assert float(nudges.worst) < 0.69 + 0.02


def test_the_first_round_is_of_the_prompt_with_few_tokens_behind_the_subject(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model()
    (target,) = targets(llm)
    mlps = neuron(llm).mlps
    seen = counted(monkeypatch)
    seek(llm, mlps, [target], FORM)
    first = seen.index(2)
    assert first > 1
    assert seen == [1] * first + [2] * (len(seen) - first)
    # From the vector of the first round, fewer steps are left than from nothing.
    left = len(seen) - first
    del seen[:]
    descend(llm, target, torch.zeros(1, mlps[0].hidden))
    assert left < len(seen)


def test_one_round_where_all_prompts_are_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model()
    (target,) = targets(llm, ("w5 w9 w4", "w5 w9 w21 w4"))
    seen = counted(monkeypatch)
    seek(llm, neuron(llm).mlps, [target], FORM)
    assert set(seen) == {2}


def test_short_prompts_by_hand() -> None:
    llm = model()
    (target,) = targets(llm, ("w5 w9 w4", "w5 w9 w21 w8 w6 w3 w4", "w3 w9 w6 w4"))
    # Behind the subject stand 1 + 1, 5 + 1 and 2 + 1 tokens, the answer's among them.
    assert neuron_search._short(target.prompts, (4, 5, 6)) == [4, 6]


def test_strengths_are_known_before_a_vector_counts_as_good_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second round begins with a vector; its strength in the other prompts is not 1."""
    llm = model()
    (target,) = targets(llm)
    mlps = neuron(llm).mlps
    weak = replace(target, shape=_Half(target.shape))  # type: ignore[arg-type]
    full = descend(llm, target, torch.zeros(1, mlps[0].hidden))
    seen = counted(monkeypatch)
    found = descend(llm, weak, full)
    assert len(seen) > 2
    assert float(losses(llm, target, 0.5 * found[0]).max()) < 2 * FORM.enough


class _Half:
    """A shape that fires half as strongly everywhere."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def firing(self, readings: Tensor) -> Tensor:
        strength: Tensor = self.shape.firing(readings)
        return 0.5 * strength
