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
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM


@dataclass(frozen=True, slots=True)
class SearchForm:
    """How values are sought: by normalised gradient descent with momentum.

    Args:
        step_size: Length of a step, as a share of the mean length of the hidden states that the
            vector is added to.
        momentum: Share of the last step that is taken again.
        steps: Largest number of steps in each of the two rounds.
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

    In two rounds: first for the prompts that take few tokens behind the subject, which is most of
    the way and costs half as much, then for all at which the neuron fires. A fact that cannot be
    answered under noise is sought once more without.

    Args:
        llm: The model.
        mlps: Its MLPs, to which the targets' ``home`` points.
        targets: At least one.
        form: How.
    """
    search = _Search(llm, mlps, targets, form)
    vectors, busy = search.rounds(form.noise)
    if form.noise and bool(busy.any()):
        quiet, _ = search.rounds(0.0, busy)
        vectors = torch.where(busy[:, None], quiet, vectors)
    return vectors


def _short(prompts: Sequence[EncodedPrompt], places: Sequence[int]) -> list[int]:
    """Places of the prompts with the fewest tokens behind the subject, or hardly more."""
    ends = [p.length - p.positions("subject")[0] for p in prompts]
    return [at for at, end in zip(places, ends, strict=True) if end <= min(ends) + _HARDLY]


#: −log p of a token with p = 1/2, in nats.
_HALF = math.log(2)

#: Tokens.
_HARDLY = 2

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
        #: Per target its prompts in which its neuron fires, by place; all where it fires in none.
        self._places: list[list[int]] = []
        reached = (self._fires[:, 0] >= REACHED).tolist()
        for index in range(len(targets)):
            own = [row for row, owner in enumerate(owners) if owner == index]
            self._places.append([row for row in own if reached[row]] or own)
        lengths = [self._nudges.lengths[own].mean() for own in self._places]
        self._length = torch.stack(lengths) * form.step_size

    def rounds(self, noise: float, sought: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rounds, from nothing.

        Args:
            noise: As of the form.
            sought: F bool, which facts are sought; all where None.

        Returns:
            F × d_out float32, and F bool, which facts were not answered well enough at the end.
        """
        prompts = [prompt for target in self._targets for prompt in target.prompts]
        places = self._places
        everything = [i for own in places for i in own]
        short = [_short([prompts[i] for i in own], own) for own in places]
        left = torch.tensor([len(a) < len(b) for a, b in zip(short, places, strict=True)])
        left = left.to(self.owners.device)
        nothing = torch.zeros(len(places), self._width, device=left.device)
        if not bool(left.any()):
            return self.descend(nothing, everything, noise, sought)
        first = [i for own in short for i in own]
        vectors, busy = self.descend(nothing, first, noise, sought)
        # A fact whose prompts were all among them is found as if it were alone.
        second = left if sought is None else left & sought
        vectors, still = self.descend(vectors, everything, noise, second)
        return vectors, torch.where(left, still, busy)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def descend(
        self,
        start: Tensor,
        rows: Sequence[int],
        noise: float = 0.0,
        sought: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One round, from the vectors it starts from, for some of the prompts.

        Args:
            start: F × d_out float32.
            rows: Indices of prompts, rising.
            noise: As of the form.
            sought: F bool, whether a fact's vector is still sought; all where None.

        Returns:
            As :meth:`rounds`.
        """
        form = self._form
        vectors = start.clone().requires_grad_(True)
        speed = torch.zeros_like(start)
        busy = torch.ones(len(start), dtype=torch.bool, device=start.device)
        busy = busy if sought is None else sought
        # The same noise for a fact, whatever is sought with it or was sought before.
        generators = [torch.Generator().manual_seed(0) for _ in range(len(start))]
        for step in range(form.steps + 1):
            # A fact that rests is not run again.
            rows = [row for row in rows if busy[self.owners[row]]]
            if not rows:
                break
            chosen = torch.tensor(rows, device=start.device)
            owners, fires = self.owners[chosen], self._fires[chosen]
            numbers = torch.bincount(owners, minlength=len(start)).clamp_min(1).float()
            drawn = [generators[i] for i in owners.tolist()] if noise else []
            added = _with_noise(vectors[owners] * fires, noise, drawn)
            losses = self._nudges.losses(
                [x for here in self._here for x in (None, added * here[chosen])], rows
            )
            # A token of more than one half is the most probable one, whatever the others are.
            open_ = ((losses.detach() >= form.enough) | (self._nudges.worst >= _HALF)).float()
            # Who rests stays at rest: under noise, another pass might wake it again.
            busy = busy & (torch.zeros_like(numbers).index_add(0, owners, open_) > 0)
            if step == form.steps or not bool(busy.any()):
                break
            means = torch.zeros_like(numbers).index_add(0, owners, losses) / numbers
            (gradient,) = torch.autograd.grad(means.sum(), vectors)
            size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
            speed = form.momentum * speed + gradient / size
            with torch.no_grad():
                # A fact all of whose prompts are answered well enough rests.
                vectors -= (self._length * busy)[:, None] * speed
        return vectors.detach(), busy


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
