"""The search for what neurons are to write, at the present weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        dtype: The precision of the passes; None for the model's own.
    """

    step_size: float
    momentum: float
    steps: int
    enough: float
    dtype: torch.dtype | None = None


def seek(
    llm: ResidentLLM, mlps: Sequence[CandidateMLP], targets: Sequence[Target], form: SearchForm
) -> Tensor:
    """What the neurons of F facts are to write: F × d_out float32.

    In two rounds: first for the prompts that take few tokens behind the subject, which is most of
    the way and costs half as much, then for all.

    Args:
        llm: The model.
        mlps: Its MLPs, to which the targets' ``home`` points.
        targets: At least one.
        form: How.
    """
    search = _Search(llm, mlps, targets, form)
    vectors = torch.zeros(len(targets), mlps[targets[0].home].hidden, device=llm.device)
    prompts = iter(range(len(search.owners)))
    places = [[next(prompts) for _ in target.prompts] for target in targets]
    short = [i for t, own in zip(targets, places, strict=True) for i in _short(t.prompts, own)]
    if len(short) < len(search.owners):
        vectors = search.descend(vectors, short)
    return search.descend(vectors, range(len(search.owners)))


def _short(prompts: Sequence[EncodedPrompt], places: Sequence[int]) -> list[int]:
    """Places of the prompts with the fewest tokens behind the subject, or hardly more."""
    ends = [p.length - p.positions("subject")[0] for p in prompts]
    return [at for at, end in zip(places, ends, strict=True) if end <= min(ends) + _HARDLY]


#: −log p of a token with p = 1/2, in nats.
_HALF = math.log(2)

#: Tokens.
_HARDLY = 2


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
        self._form, device = form, llm.device
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
        self._numbers = torch.bincount(self.owners, minlength=len(targets)).float()
        sizes = torch.zeros_like(self._numbers).index_add(0, self.owners, self._nudges.lengths)
        self._length = sizes / self._numbers * form.step_size

    @torch.inference_mode(False)
    @torch.enable_grad()
    def descend(self, start: Tensor, rows: Sequence[int]) -> Tensor:
        """One round, from the vectors it starts from, for some of the prompts."""
        form, chosen = self._form, torch.tensor(list(rows), device=start.device)
        owners, fires = self.owners[chosen], self._fires[chosen]
        numbers = torch.bincount(owners, minlength=len(start)).float()
        vectors = start.clone().requires_grad_(True)
        speed = torch.zeros_like(start)
        for step in range(form.steps + 1):
            added = vectors[owners] * fires
            losses = self._nudges.losses(
                [x for here in self._here for x in (None, added * here[chosen])], rows
            )
            # A token of more than one half is the most probable one, whatever the others are.
            open_ = ((losses.detach() >= form.enough) | (self._nudges.worst >= _HALF)).float()
            busy = torch.zeros_like(numbers).index_add(0, owners, open_) > 0
            if step == form.steps or not bool(busy.any()):
                break
            means = torch.zeros_like(numbers).index_add(0, owners, losses) / numbers
            (gradient,) = torch.autograd.grad(means.sum(), vectors)
            size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
            speed = form.momentum * speed + gradient / size
            with torch.no_grad():
                # A fact all of whose prompts are answered well enough rests.
                vectors -= (self._length * busy)[:, None] * speed
        return vectors.detach()
