"""What a fact's subject should carry: the vectors that MEMIT and AlphaEdit seek.

A vector is added behind the last edited block at the subject's last token, in every prompt of the
fact. It is changed on the mean of −log p(answer) over the prompts, with two penalties: a KL
divergence that holds what the model says behind "SUBJECT is a", and a weight decay. Its length is
bounded by a share of that of the hidden state it is added to. This is section 4.3 of arXiv
2210.07229 (eq. 16) and ``memit/compute_z.py`` of kmeng01/memit (commit b86d971), with three
differences: steps follow the normalised gradient with momentum, as in our other agents, which
reaches a loss in fewer steps and with shorter vectors than Adam; a fact is done when −log p alone
is small enough; and the divergence is taken behind "is a", as the paper writes it, not at the
subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.errors import PromptError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.upper_half import quick_dtype

#: A prompt and the position of its subject's last token.
Place = tuple[EncodedPrompt, int]


@dataclass(frozen=True, slots=True)
class ValueSearch:
    """How vectors are sought.

    Args:
        step_size: Length of a step, as a share of that of the hidden state.
        momentum: Share of the last step that is taken again.
        steps: Largest number of steps.
        enough: −log p per answer token, in nats, mean over the prompts of a fact, below which it
            needs no more.
        clamp: Largest length of a vector, as a share of that of the hidden state.
        kl_factor: Weight of the divergence.
        weight_decay: Weight of the vector's length over the hidden state's squared length.
    """

    step_size: float
    momentum: float
    steps: int
    enough: float
    clamp: float
    kl_factor: float
    weight_decay: float

    @torch.inference_mode(False)
    @torch.enable_grad()
    def seek(
        self, llm: ResidentLLM, layer: int, prompts: Sequence[Place], owners: Tensor, sizes: Tensor
    ) -> Tensor:
        """The vectors of F facts, F × d_out float32.

        Args:
            llm: The model, at its present weights.
            layer: Index of the layer behind which they are added.
            prompts: P prompts.
            owners: P int64, the fact of each; a fact's first prompt names its subject.
            sizes: F float32, lengths of the hidden states that the vectors are added to.
        """
        facts, width = len(sizes), llm.shapes[layer][1]
        dtype = quick_dtype(llm, "auto")
        nudges = Nudges(llm, [p for p, _ in prompts], [at for _, at in prompts], [layer], dtype)
        held = _Held(llm, layer, prompts, owners, dtype) if self.kl_factor else None
        counts = torch.bincount(owners, minlength=facts).float()
        vectors = torch.zeros(facts, width, device=llm.device, requires_grad=True)
        speed = torch.zeros(facts, width, device=llm.device)
        for step in range(self.steps + 1):
            losses = nudges.losses([vectors[owners]])
            means = torch.zeros_like(counts).index_add(0, owners, losses) / counts
            busy = means.detach() >= self.enough
            if step == self.steps or not bool(busy.any()):
                break
            total = means + self.weight_decay * vectors.norm(dim=1) / sizes.square()
            if held is not None:
                total = total + self.kl_factor * held.divergences(vectors)
            (gradient,) = torch.autograd.grad(total.sum(), [vectors])
            size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
            speed = self.momentum * speed + gradient / size
            with torch.no_grad():
                # A fact whose loss is small enough rests.
                moved = vectors - (self.step_size * sizes * busy)[:, None] * speed
                limits = self.clamp * sizes / moved.norm(dim=1).clamp_min(1e-30)
                vectors.copy_(moved * limits.clamp_max(1.0)[:, None])
        return vectors.detach()


class _Held:
    """What the model says behind "SUBJECT is a", to be kept under the vectors.

    Facts whose subject is not in their prompt are not held to anything.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        layer: int,
        prompts: Sequence[Place],
        owners: Tensor,
        dtype: torch.dtype,
    ) -> None:
        facts = owners.tolist()
        first = [prompts[facts.index(i)][0] for i in range(max(facts) + 1)]
        found = [(i, place) for i, p in enumerate(first) for place in essence(llm, p)]
        self._owners = torch.tensor([i for i, _ in found], dtype=torch.int64, device=llm.device)
        self._count = len(first)
        asked, places = [p for _, (p, _) in found], [at for _, (_, at) in found]
        self._nudges = Nudges(llm, asked, places, [layer], dtype) if found else None
        self._before: Tensor | None = None

    def divergences(self, vectors: Tensor) -> Tensor:
        """F float32: KL from what it said in the first call, where the vectors are zero."""
        found = vectors.new_zeros(self._count)
        if self._nudges is None:
            return found
        rows = self._nudges.logits([vectors[self._owners]]).float().log_softmax(-1)
        if self._before is None:
            self._before = rows.detach()
        each = F.kl_div(rows, self._before, reduction="none", log_target=True).sum(-1)
        return found.index_add(0, self._owners, each)


def essence(llm: ResidentLLM, prompt: EncodedPrompt) -> list[Place]:
    """The prompt "SUBJECT is a" of a fact's subject; nothing where the prompt has no subject."""
    if prompt.subject_missing or not prompt.subject_spans:
        return []
    start, stop = prompt.subject_spans[-1]
    subject = llm.encoder.decode(prompt.prompt_ids[start:stop]).strip()
    text = f"{subject} is a"
    try:
        asked = llm.encoder.with_subject(llm.encode(text, prompt.answer), text, subject)
    except PromptError:  # a subject that is no text by itself
        return []
    # One answer token: what counts is the distribution in front of it.
    asked = replace(asked, answer_ids=asked.answer_ids[:1])
    return [] if asked.subject_missing else [(asked, asked.positions("subject")[0])]
