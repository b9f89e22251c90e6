"""The search for what neurons are to write, at the present weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.hierarchy.fired_prompts import FiredPrompts
from hiedit_agents.hierarchy.kept_sentences import PARTS as KEPT_PARTS
from hiedit_agents.hierarchy.kept_sentences import SAME, KeptSentences
from hiedit_agents.hierarchy.neuron_plan import Target
from hiedit_agents.hierarchy.rewordings import LONGEST
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.nudges import answer_losses
from hiedit_env.resident.resident import ResidentLLM


@dataclass(frozen=True, slots=True)
class SearchForm:
    """How values are sought: by normalised gradient descent with momentum.

    Args:
        step_size: Length of a step, as a share of the mean length of the hidden states that the
            vector is added to.
        momentum: Share of the last step that is taken again.
        steps: Largest number of rounds, in each of which all prompts are run. Where they do not
            suffice, as many again without noise, and as many again without keeping sentences.
        enough: −log p per answer token, in nats, below which a prompt needs no more, if every token
            has more than one half as well.
        noise: Length of what is added to a vector in a random direction in every pass, as a share
            of its own: what is found under noise has other vectors around it that do as well, and
            answers more prompts that it was not sought for.
        keeping: What a nat of divergence in the sentences that are kept counts against one of the
            mean loss; they are not looked at where it is 0.
        settling: Share of a step's length that is lost by the last one, for facts that keep
            sentences.
        dtype: The precision of the passes; None for the model's own.
    """

    step_size: float
    momentum: float
    steps: int
    enough: float
    noise: float = 0.0
    keeping: float = 0.0
    settling: float = 0.0
    dtype: torch.dtype | None = None


def seek(
    llm: ResidentLLM,
    mlps: Sequence[CandidateMLP],
    targets: Sequence[Target],
    form: SearchForm,
    without: Tensor | None = None,
) -> Tensor:
    """What the neurons of F facts are to write: F × d_out float32.

    Where no vector answers a fact under noise, the search goes on without noise from the vector
    that it has; where none does while sentences are kept, it goes on without keeping them.

    Args:
        llm: The model.
        mlps: Its MLPs, to which the targets' ``home`` points.
        targets: At least one.
        form: How.
        without: F × d_out float32, what the facts' neurons write now; nothing where None. What the
            model says without it is what is kept.
    """
    found: list[Tensor] = []
    # Sentences of more facts would take much memory, and are no faster.
    number = AT_ONCE if form.keeping else len(targets)
    for first in range(0, len(targets), number):
        some = slice(first, first + number)
        search = _Search(llm, mlps, targets[some], form, None if without is None else without[some])
        vectors, busy = search.descend(form.noise)
        again = busy if form.noise else busy & search.keeps
        if bool(again.any()):
            vectors, left = search.descend(0.0, again, vectors)
            busy = torch.where(again, left, busy)
        if bool((busy & search.keeps).any()):
            vectors, _ = search.descend(0.0, busy & search.keeps, vectors, keeping=False)
        found.append(vectors)
    return torch.cat(found)


#: Most facts that are sought at once where sentences are kept.
AT_ONCE = 8

#: −log p of a token with p = 1/2, in nats.
_HALF = math.log(2)

#: Parts of a fact's prompts that are run in turn. At the same noise, a step after each half needs a
#: quarter to two fifths fewer tokens than one after all prompts, and answers more paraphrases.
PARTS = 2


class _Search:
    """The prompts of some facts, run with vectors of the strengths that the neurons will have."""

    @torch.inference_mode(False)
    def __init__(
        self,
        llm: ResidentLLM,
        mlps: Sequence[CandidateMLP],
        targets: Sequence[Target],
        form: SearchForm,
        without: Tensor | None = None,
    ) -> None:
        self._form, self._targets = form, targets
        prompts, owners, kinds = _numbered([target.prompts for target in targets])
        first = len(prompts)
        if form.keeping:
            more = _numbered([target.kept for target in targets])
            # A prompt that is no sentence but a text has a batch without sentences.
            apart = PARTS if max(p.length for p in prompts) > LONGEST else 0
            prompts, owners = prompts + more[0], owners + more[1]
            kinds = kinds + [kind + apart for kind in more[2]]
        given = kinds if len(prompts) > first else None
        self._asked = FiredPrompts(llm, mlps, targets, prompts, owners, form.dtype, given)
        self._width = mlps[targets[0].home].hidden
        self._kept = None
        #: F bool, which facts keep sentences.
        self.keeps = torch.zeros(len(targets), dtype=torch.bool, device=llm.device)
        if given is not None:
            if without is None:
                without = torch.zeros(len(targets), self._width, device=llm.device)
            self._kept = KeptSentences(self._asked, first, without)
            self.keeps = self._kept.has.any(1)
        #: Per target, by place, the parts of its prompts in which its neuron fires (of all of them
        #: where it fires in none): every other prompt.
        self._parts: list[list[list[int]]] = []
        reached, lengths = self._asked.reached, []
        for index in range(len(targets)):
            own = [row for row, owner in enumerate(owners[:first]) if owner == index]
            own = [row for row in own if reached[row]] or own
            self._parts.append([own[i::PARTS] for i in range(min(PARTS, len(own)))])
            lengths.append(self._asked.nudges.lengths[own].mean())
        self._length = torch.stack(lengths) * form.step_size

    @torch.inference_mode(False)
    @torch.enable_grad()
    def descend(
        self,
        noise: float,
        sought: Tensor | None = None,
        start: Tensor | None = None,
        keeping: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The descent. A fact rests when a vector answers all of its prompts well enough.

        Where it keeps sentences, these must say nearly the same as well, unless there is a start:
        what comes from a descent before has had its rounds for that.

        Args:
            noise: As of the form.
            sought: F bool, which facts are sought; all where None.
            start: F × d_out float32, the vectors to begin with; zeros where None.
            keeping: Whether sentences are kept, if there are any.

        Returns:
            F × d_out float32, and F bool, which facts were not answered well enough at the end.
        """
        form, number, device = self._form, len(self._targets), self._asked.owners.device
        vectors = torch.zeros(number, self._width, device=device)
        vectors = (vectors if start is None else start.clone()).requires_grad_()
        speed = torch.zeros_like(vectors)
        # A part that is answered makes no step by itself, so both parts of a fact that rests were
        # answered by the same vector.
        waiting = torch.zeros(number, PARTS, dtype=torch.bool, device=device)
        for i, parts in enumerate(self._parts):
            waiting[i, : len(parts)] = sought is None or bool(sought[i])
        kept = self._kept if keeping else None
        # What keeps sentences waits for each part of them too.
        changed = waiting.new_zeros(number, KEPT_PARTS)
        if start is None and kept is not None:
            changed |= waiting.any(1)[:, None] & kept.has
        # The same noise for a fact, whatever is sought with it or was sought before.
        generators = [torch.Generator().manual_seed(0) for _ in range(number)]
        numbers = torch.tensor([len(parts) for parts in self._parts], device=device)
        limits = form.steps * numbers
        # After its last step, every part of a fact is looked at once more.
        for turn in range((form.steps + 1) * PARTS):
            running = (waiting.any(1) | changed.any(1)) & (turn < limits + numbers)
            if not bool(running.any()):
                break
            facts, stepping = running.nonzero()[:, 0].tolist(), running & (turn < limits)
            looked = stepping.nonzero()[:, 0].tolist() if kept is not None else []
            losses, wrong, divergences = self._run(vectors, facts, looked, turn, noise, generators)
            for i in facts:
                waiting[i, turn % len(self._parts[i])] = wrong[i]
            moving = wrong & stepping
            losses = torch.where(moving, losses, 0.0)
            if kept is not None:
                # From a start on, what is answered stays.
                differs = ~(divergences.detach() <= SAME) & (
                    moving if start is not None else stepping
                )
                if start is None:
                    changed[running, turn % KEPT_PARTS] = differs[running]
                moving = moving | differs
                losses = losses + form.keeping * torch.where(differs, divergences, 0.0)
            if not bool(moving.any()):
                continue
            (gradient,) = torch.autograd.grad(losses[moving].sum(), vectors)
            size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
            turned = form.momentum * speed + gradient / size
            # Where numbers overflow, the vector is too long for this precision: half of it is left.
            far = moving & ~(losses.detach().isfinite() & size[:, 0].isfinite())
            moving = moving & ~far
            speed = torch.where(moving[:, None], turned, speed.masked_fill(far[:, None], 0))
            length = self._length * moving
            if kept is not None:
                done = (turn / (limits - 1).clamp_min(1)).clamp_max(1) if start is None else 1.0
                length = length * (1 - form.settling * self.keeps * done)
                if start is None:
                    # What was looked at before this step has to be looked at again.
                    changed |= moving[:, None] & kept.has
            with torch.no_grad():
                stepped = vectors - length[:, None] * speed
                vectors.copy_(torch.where(far[:, None], vectors / 2, stepped))
        return vectors.detach(), waiting.any(1)

    def _run(
        self,
        vectors: Tensor,
        facts: Sequence[int],
        looked: Sequence[int],
        turn: int,
        noise: float,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs what of some facts is in turn.

        Args:
            vectors: F × d_out.
            facts: Those whose prompts are run.
            looked: Those whose kept sentences are run.
            turn: From 0.
            noise: As of the form.
            generators: One a fact.

        Returns:
            F float32, the mean loss of each fact's prompts; F bool, whether one of them is not
            answered well enough; F float32, how much its sentences have changed.
        """
        asked, number = self._asked, len(vectors)
        rows = sorted(row for i in facts for row in self._parts[i][turn % len(self._parts[i])])
        more = self._kept.rows(looked, turn) if self._kept is not None else []
        chosen = torch.tensor([*rows, *more], device=vectors.device)
        owners = asked.owners[chosen[: len(rows)]]
        added = asked.added(vectors, chosen)
        if noise:
            drawn = [generators[i] for i in owners.tolist()]
            noisy = _with_noise(added[: len(rows)], noise, drawn)
            added = torch.cat((noisy, added[len(rows) :]))
        logits = asked.nudges.logits(asked.given(added, chosen), [*rows, *more])
        prompts = [asked.prompts[i] for i in rows]
        end = sum(len(p.answer_ids) for p in prompts)
        means, worst = answer_losses(logits[:end], prompts)
        # A token of more than one half is the most probable one, whatever the others are. What is
        # not a number is not answered.
        right = (means.detach() < self._form.enough) & (worst < _HALF)
        wrong = vectors.new_zeros(number).index_add(0, owners, (~right).float()) > 0
        sizes = torch.bincount(owners, minlength=number).clamp_min(1).float()
        losses = torch.zeros_like(sizes).index_add(0, owners, means) / sizes
        divergences = torch.zeros_like(sizes)
        if more and self._kept is not None:
            divergences = self._kept.divergences(logits[end:], more)
        return losses, wrong, divergences


def _numbered(
    groups: Sequence[Sequence[EncodedPrompt]],
) -> tuple[list[EncodedPrompt], list[int], list[int]]:
    """What belongs to some facts in one row, with whose it is, and in which turns it is run.

    With two parts of prompts and four of sentences, what is run in a turn is of one kind where a
    neuron fires in all of them.
    """
    numbered = [(p, i, j % PARTS) for i, group in enumerate(groups) for j, p in enumerate(group)]
    return [p for p, _, _ in numbered], [i for _, i, _ in numbered], [k for _, _, k in numbered]


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
