"""The search for what neurons are to write, at the present weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """

    step_size: float
    momentum: float
    steps: int
    enough: float


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
    vectors = torch.zeros(len(targets), mlps[targets[0].home].hidden, device=llm.device)
    short = [replace(target, prompts=_short(target.prompts)) for target in targets]
    if any(len(a.prompts) < len(b.prompts) for a, b in zip(short, targets, strict=True)):
        vectors = _descend(llm, mlps, short, form, vectors)
    return _descend(llm, mlps, targets, form, vectors)


def _short(prompts: Sequence[EncodedPrompt]) -> tuple[EncodedPrompt, ...]:
    """The prompts with the fewest tokens behind the subject, and those with hardly more."""
    ends = [p.length - p.positions("subject")[0] for p in prompts]
    return tuple(p for p, end in zip(prompts, ends, strict=True) if end <= min(ends) + _HARDLY)


#: −log p of a token with p = 1/2, in nats.
_HALF = math.log(2)

#: Tokens.
_HARDLY = 2

#: Difference of a strength from 1 that does not matter.
_NEARLY = 0.05


@torch.inference_mode(False)
@torch.enable_grad()
def _descend(
    llm: ResidentLLM,
    mlps: Sequence[CandidateMLP],
    targets: Sequence[Target],
    form: SearchForm,
    start: Tensor,
) -> Tensor:
    """One round, from the vectors it starts from."""
    device = llm.device
    prompts = [prompt for target in targets for prompt in target.prompts]
    owners = torch.tensor([i for i, t in enumerate(targets) for _ in t.prompts], device=device)
    used = sorted({target.home for target in targets})
    pairs = [(mlps[i].gate.layer, mlps[i].back) for i in used]
    nudges = Nudges(
        llm,
        prompts,
        [p.positions("subject")[0] for p in prompts],
        [layer for pair in pairs for layer in pair],
    )
    idle = [torch.zeros(1, llm.shapes[gate][1], device=device) for gate, _ in pairs]
    homes = torch.tensor([target.home for target in targets], device=device)[owners]
    here = [(homes == i).float()[:, None] for i in used]
    vectors = start.clone().requires_grad_(True)
    fires = torch.ones(len(owners), 1, device=device)
    numbers = torch.bincount(owners, minlength=len(targets)).float()
    length, speed = torch.zeros_like(numbers), torch.zeros_like(start)
    for step in range(form.steps + 1):
        added = vectors[owners] * fires
        losses = nudges.losses(
            [x for zero, own in zip(idle, here, strict=True) for x in (zero, added * own)]
        )
        if not step:
            # What the MLPs read at the subjects does not depend on what is added behind them.
            read = dict(zip(used, nudges.keys[::2], strict=True))
            rows = enumerate(owners.tolist())
            fires = torch.stack(
                [targets[i].shape.firing(read[targets[i].home][row].float()) for row, i in rows]
            )[:, None]
            length = length.index_add(0, owners, nudges.lengths) / numbers * form.step_size
            if bool(start.any()) and bool(((fires - 1).abs() > _NEARLY).any()):
                continue  # these losses are of other strengths than the neurons will have
        # A token of more than one half is the most probable one, whatever the others are.
        open_ = ((losses.detach() >= form.enough) | (nudges.worst >= _HALF)).float()
        busy = torch.zeros_like(numbers).index_add(0, owners, open_) > 0
        if step == form.steps or not bool(busy.any()):
            break
        means = torch.zeros_like(numbers).index_add(0, owners, losses) / numbers
        (gradient,) = torch.autograd.grad(means.sum(), vectors)
        size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
        speed = form.momentum * speed + gradient / size
        with torch.no_grad():
            # A fact all of whose prompts are answered well enough rests.
            vectors -= (length * busy)[:, None] * speed
    return vectors.detach()
