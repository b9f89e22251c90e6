"""Sentences about subjects of facts in which a search keeps what the model says.

A neuron reads the subject and not the question, so a vector that is sought for one question alone
answers all of them: the model then says the new answer wherever the subject is mentioned. What
belongs to a vector is therefore how much it changes what the model says in other sentences, as in
ROME (arXiv 2202.05262, section 3.1, eq. 4), which looks at one sentence and at its last token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hiedit_agents.hierarchy.fired_prompts import FiredPrompts
from hiedit_env.model.encoded import AskedForm

#: Parts of a fact's sentences that are run in turn. With four, a step runs as many tokens of
#: sentences as of prompts.
PARTS = 4

#: Tokens that are told apart at each place, the most probable ones; all others, mostly with the new
#: answer among them, count together. To tell all apart would take 30 MB for a fact of SmolLM2.
TOLD_APART = 128

#: KL divergence, in nats, mean over the sentences of a part, up to which the model counts as saying
#: the same. Below it a search would go on for what nobody sees.
SAME = 0.6

#: Nats by which a fact's answer may be less plausible behind a sentence than behind the fact's own
#: prompt for the sentence to count as one that may ask the same; the largest share of such ones.
_LESS, _SHARE = 1.0, 1 / 3

#: Most prompts whose logits are held at once.
_AT_ONCE = 64


class KeptSentences:
    """How much vectors change what a model says in the sentences that some targets keep.

    Sentences behind which a fact's answer is about as plausible as behind its own prompt may ask
    for it in other words. They are left out, the most plausible first, but never more than a third.

    Args:
        fired: Prompts of F targets and sentences that they keep.
        first: The place of the first sentence; the prompts stand before it.
        without: F × d_out float32, what the targets' neurons write now: nothing, unless a fact is
            edited again. What the model says without it is what is kept.

    Attributes:
        has: F × PARTS bool, of which targets there are sentences in a part.
    """

    def __init__(self, fired: FiredPrompts, first: int, without: Tensor) -> None:
        number = len(without)
        self._fired, self._number = fired, number
        owners = fired.owners.tolist()
        rows = range(first, len(owners))
        own = [[row for row in rows if owners[row] == i] for i in range(number)]
        reached = [[i for i in some if fired.reached[i]] for some in own]
        alike = _alike(fired, reached, first, self._look(first, without))
        left = {i for some in reached for i in some} - alike
        #: Per part and target, the sentences in which the neuron fires and that are not left out.
        self._rows = [
            [[i for i in some[part::PARTS] if i in left] for some in own] for part in range(PARTS)
        ]
        has = [[bool(part[i]) for part in self._rows] for i in range(number)]
        self.has = torch.tensor(has, device=fired.owners.device).reshape(number, PARTS)

    def rows(self, facts: Sequence[int], turn: int) -> list[int]:
        """The sentences of some targets whose turn it is, rising."""
        part = self._rows[turn % PARTS]
        return sorted(row for i in facts for row in part[i])

    def divergences(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """How much vectors change what the model says in some sentences.

        Args:
            logits: With the vectors, at what follows the subjects; gradients flow into them.
            rows: The sentences.

        Returns:
            F float32, the KL divergence of the model with the vectors from the model without them,
            in nats, of the most probable tokens and all others together: sum over the places of a
            sentence, mean over a target's sentences; 0 where none of a target's sentences is run.
        """
        if not rows:
            return logits.new_zeros(self._number, dtype=torch.float32)
        before = torch.cat([self._before[i] for i in rows])
        now = shares(logits, torch.cat([self._top[i] for i in rows]))
        each = (before.exp() * (before - now)).sum(-1)
        owners = self._fired.owners[torch.tensor(rows, device=logits.device)]
        places = torch.tensor([len(self._before[i]) for i in rows], device=logits.device)
        total = each.new_zeros(self._number).index_add(0, owners.repeat_interleave(places), each)
        counts: Tensor = torch.bincount(owners, minlength=self._number).clamp_min(1)
        return total / counts

    @torch.no_grad()
    def _look(self, first: int, without: Tensor) -> list[float]:
        """Notes what the model says without the targets' neurons.

        Returns:
            Per prompt, log p of the first token of its answer; per sentence, log p of the token of
            the fact's answer that stands behind it.
        """
        fired, number = self._fired, len(self._fired.prompts)
        self._top: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}
        found: dict[int, float] = {}
        for kind in sorted(set(fired.kinds)):
            rows = [i for i in range(number) if fired.kinds[i] == kind]
            for some in (rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)):
                chosen = torch.tensor(some, device=without.device)
                given = fired.given(-fired.added(without, chosen), chosen)
                logits = fired.nudges.logits(given, some)
                for i, places in zip(some, fired.places(some), strict=True):
                    own, at = logits[places], 0 if i < first else -1
                    told = own[at].float().log_softmax(-1)
                    found[i] = float(told[fired.prompts[i].answer_ids[at]])
                    if i >= first:
                        top = own.topk(min(TOLD_APART, own.shape[-1] - 1)).indices
                        self._top[i], self._before[i] = top, shares(own, top)
        return [found[i] for i in range(number)]


def _alike(
    fired: FiredPrompts, sentences: Sequence[Sequence[int]], first: int, plausible: Sequence[float]
) -> set[int]:
    """The sentences that may ask the same as a prompt with the same answer.

    Args:
        fired: Prompts and sentences.
        sentences: Per target.
        first: Number of prompts.
        plausible: Per prompt and sentence.
    """
    owners = fired.owners.tolist()
    keys = [(i, p.form, p.answer) for i, p in zip(owners, fired.prompts, strict=True)]
    own: dict[tuple[int, AskedForm, str], float] = {}
    for key, found in zip(keys[:first], plausible, strict=False):
        own[key] = max(found, own.get(key, -math.inf))
    alike: set[int] = set()
    for some in sentences:
        near = [i for i in some if plausible[i] > own.get(keys[i], math.inf) - _LESS]
        near.sort(key=lambda i: -plausible[i])
        alike.update(near[: int(len(some) * _SHARE)])
    return alike


def shares(logits: Tensor, top: Tensor) -> Tensor:
    """Log probabilities of some tokens, and of all others together.

    Args:
        logits: P × vocabulary.
        top: P × K int64, K tokens of each row.

    Returns:
        P × (K + 1) float32.

    >>> logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    >>> shares(logits, torch.tensor([[1, 0]])).exp()
    tensor([[0.2500, 0.5000, 0.2500]])
    """
    told = logits.float().log_softmax(-1).gather(-1, top)
    # As much as float32 can tell from nothing.
    others = (1 - told.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat((told, others), -1)
