"""The search for what neurons are to write, at the present weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.hierarchy.neuron_plan import Target
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM


@dataclass(frozen=True, slots=True)
class SearchForm:
    """How values are sought: by normalised gradient descent with momentum.

    Args:
        step_size: Length of a step, as a share of the mean length of the hidden states that the
            vector is added to.
        momentum: Share of the last step that is taken again.
        steps: Largest number of rounds, in each of which all prompts are run; as many again without
            noise where they do not suffice under noise.
        enough: −log p per answer token, in nats, below which a prompt needs no more, if every token
            has more than one half as well.
        noise: Length of what is added to a vector in a random direction in every pass, as a share
            of its own: what is found under noise has other vectors around it that do as well, and
            answers more prompts that it was not sought for.
        dtype: The precision of the passes; None for the model's own.
    """

    step_size: float
    momentum: float
    steps: int
    enough: float
    noise: float = 0.0
    dtype: torch.dtype | None = None


def seek(
    llm: ResidentLLM, mlps: Sequence[CandidateMLP], targets: Sequence[Target], form: SearchForm
) -> Tensor:
    """What the neurons of F facts are to write: F × d_out float32.

    Where no vector answers a fact under noise, the search goes on without noise from the vector
    that it has.

    Args:
        llm: The model.
        mlps: Its MLPs, to which the targets' ``home`` points.
        targets: At least one.
        form: How.
    """
    search = _Search(llm, mlps, targets, form)
    vectors, busy = search.descend(form.noise)
    if form.noise and bool(busy.any()):
        vectors, _ = search.descend(0.0, busy, vectors)
    return vectors


#: −log p of a token with p = 1/2, in nats.
_HALF = math.log(2)

#: Parts of a fact's prompts that are run in turn. At the same noise, a step after each half needs a
#: quarter to two fifths fewer tokens than one after all prompts, and answers more paraphrases.
PARTS = 2

#: Strength of a neuron from which a prompt can be answered by it. Below, no vector of a usual
#: length answers it, and the search for one would take all its steps.
REACHED = 0.1


class _Search:
    """The prompts of some facts, run with vectors of the strengths that the neurons will have."""

    @torch.inference_mode(False)
    def __init__(
        self,
        llm: ResidentLLM,
        mlps: Sequence[CandidateMLP],
        targets: Sequence[Target],
        form: SearchForm,
    ) -> None:
        self._form, self._targets, device = form, targets, llm.device
        prompts = [prompt for target in targets for prompt in target.prompts]
        owners = [i for i, target in enumerate(targets) for _ in target.prompts]
        used = sorted({target.home for target in targets})
        pairs = [(mlps[i].gate.layer, mlps[i].back) for i in used]
        self._nudges = Nudges(
            llm,
            prompts,
            [p.positions("subject")[0] for p in prompts],
            [layer for pair in pairs for layer in pair],
            form.dtype,
        )
        # What the MLPs read at the subjects does not depend on what is added behind them.
        read = dict(zip(used, self._nudges.keys[::2], strict=True))
        self._fires = torch.stack(
            [
                targets[i].shape.firing(read[targets[i].home][row].float())
                for row, i in enumerate(owners)
            ]
        )[:, None]
        self.owners = torch.tensor(owners, device=device)
        homes = torch.tensor([target.home for target in targets], device=device)[self.owners]
        self._here = [(homes == i).float()[:, None] for i in used]
        self._width = mlps[targets[0].home].hidden
        #: Per target, by place, the parts of its prompts in which its neuron fires (of all of them
        #: where it fires in none): every other prompt. Asked in both forms, these are what stands
        #: in plain form with one question, and what stands in chat with the other question.
        self._parts: list[list[list[int]]] = []
        reached, lengths = (self._fires[:, 0] >= REACHED).tolist(), []
        for index in range(len(targets)):
            own = [row for row, owner in enumerate(owners) if owner == index]
            own = [row for row in own if reached[row]] or own
            self._parts.append([own[i::PARTS] for i in range(min(PARTS, len(own)))])
            lengths.append(self._nudges.lengths[own].mean())
        self._length = torch.stack(lengths) * form.step_size

    @torch.inference_mode(False)
    @torch.enable_grad()
    def descend(
        self, noise: float, sought: Tensor | None = None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The descent. A fact rests when a vector answers all of its prompts well enough.

        Args:
            noise: As of the form.
            sought: F bool, which facts are sought; all where None.
            start: F × d_out float32, the vectors to begin with; zeros where None.

        Returns:
            F × d_out float32, and F bool, which facts were not answered well enough at the end.
        """
        form, number, device = self._form, len(self._targets), self.owners.device
        vectors = torch.zeros(number, self._width, device=device)
        vectors = (vectors if start is None else start.clone()).requires_grad_()
        speed = torch.zeros_like(vectors)
        # A part that is answered makes no step, so both parts of a fact that rests were answered
        # by the same vector.
        waiting = torch.zeros(number, PARTS, dtype=torch.bool, device=device)
        for i, parts in enumerate(self._parts):
            waiting[i, : len(parts)] = sought is None or bool(sought[i])
        # The same noise for a fact, whatever is sought with it or was sought before.
        generators = [torch.Generator().manual_seed(0) for _ in range(number)]
        numbers = torch.tensor([len(parts) for parts in self._parts], device=device)
        limits = form.steps * numbers
        # After its last step, every part of a fact is looked at once more.
        for turn in range((form.steps + 1) * PARTS):
            running = (waiting.any(1) & (turn < limits + numbers)).nonzero()[:, 0].tolist()
            if not running:
                break
            turns = {i: turn % len(self._parts[i]) for i in running}
            rows = sorted(row for i, part in turns.items() for row in self._parts[i][part])
            chosen = torch.tensor(rows, device=device)
            owners, fires = self.owners[chosen], self._fires[chosen]
            drawn = [generators[i] for i in owners.tolist()] if noise else []
            added = _with_noise(vectors[owners] * fires, noise, drawn)
            losses = self._nudges.losses(
                [x for here in self._here for x in (None, added * here[chosen])], rows
            )
            # A token of more than one half is the most probable one, whatever the others are. What
            # is not a number is not answered.
            right = (losses.detach() < form.enough) & (self._nudges.worst < _HALF)
            moving = torch.zeros(number, device=device).index_add(0, owners, (~right).float()) > 0
            for i, part in turns.items():
                waiting[i, part] = moving[i]
            moving = moving & (turn < limits)
            if not bool(moving.any()):
                continue
            sizes = torch.bincount(owners, minlength=number).clamp_min(1).float()
            means = torch.zeros_like(sizes).index_add(0, owners, losses) / sizes
            (gradient,) = torch.autograd.grad(means[moving].sum(), vectors)
            size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
            turned = form.momentum * speed + gradient / size
            # Where numbers overflow, the vector is too long for this precision: half of it is left.
            far = moving & ~(means.detach().isfinite() & size[:, 0].isfinite())
            moving = moving & ~far
            speed = torch.where(moving[:, None], turned, speed.masked_fill(far[:, None], 0))
            with torch.no_grad():
                stepped = vectors - (self._length * moving)[:, None] * speed
                vectors.copy_(torch.where(far[:, None], vectors / 2, stepped))
        return vectors.detach(), waiting.any(1)


def _with_noise(added: Tensor, noise: float, generators: Sequence[torch.Generator]) -> Tensor:
    """P × d_out vectors, with noise of a share of their length in a random direction.

    Args:
        added: The vectors; gradients flow through them alone.
        noise: The share.
        generators: P, on the CPU, so that the numbers are the same on every device; none for no
            noise.
    """
    if not generators:
        return added
    width = added.shape[1:]
    drawn = torch.stack([torch.randn(width, generator=one) for one in generators])
    size: Tensor = noise * added.detach().norm(dim=1, keepdim=True)
    directions: Tensor = F.normalize(drawn.to(added), dim=1)
    return added + size * directions
