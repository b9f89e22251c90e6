"""Prompts about some facts, run with what the facts' neurons will add to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hiedit_agents.hierarchy.neuron_plan import Target
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM

#: Strength of a neuron from which a prompt can be answered by it. Below, no vector of a usual
#: length answers it, and the search for one would take all its steps.
REACHED = 0.1


class FiredPrompts:
    """Prompts, each about one of some targets, with the strengths of the targets' neurons in them.

    Args:
        llm: The model, at its present weights; they must not change while this object is used.
        mlps: Its MLPs, to which the targets' ``home`` points.
        targets: The targets.
        prompts: P prompts; vectors are added at the last tokens of their subjects.
        owners: P indices of targets.
        dtype: The precision of the runs; None for the model's own.
        kinds: As of :class:`.nudges.Nudges`.

    Attributes:
        nudges: The prompts, run with vectors.
        prompts, kinds: As given.
        owners: P int64.
        fires: P × 1 float32, the strengths.
        reached: P, whether the neuron fires there at all.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        mlps: Sequence[CandidateMLP],
        targets: Sequence[Target],
        prompts: Sequence[EncodedPrompt],
        owners: Sequence[int],
        dtype: torch.dtype | None,
        kinds: Sequence[int] | None = None,
    ) -> None:
        self.prompts = tuple(prompts)
        self.kinds = tuple(kinds or [0] * len(prompts))
        used = sorted({target.home for target in targets})
        pairs = [(mlps[i].gate.layer, mlps[i].back) for i in used]
        self.nudges = Nudges(
            llm,
            prompts,
            [p.positions("subject")[0] for p in prompts],
            [layer for pair in pairs for layer in pair],
            dtype,
            kinds,
        )
        # What the MLPs read at the subjects does not depend on what is added behind them.
        read = dict(zip(used, self.nudges.keys[::2], strict=True))
        self.fires = torch.stack(
            [
                targets[i].shape.firing(read[targets[i].home][row].float())
                for row, i in enumerate(owners)
            ]
        )[:, None]
        self.reached: list[bool] = (self.fires[:, 0] >= REACHED).tolist()
        self.owners = torch.tensor(owners, device=llm.device)
        homes = torch.tensor([target.home for target in targets], device=llm.device)[self.owners]
        self._here = [(homes == i).float()[:, None] for i in used]

    def added(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """What the neurons add in some prompts.

        Args:
            vectors: F × d_out, one per target.
            rows: P' int64, the prompts.

        Returns:
            P' × d_out.
        """
        found: Tensor = vectors[self.owners[rows]] * self.fires[rows]
        return found

    def given(self, added: Tensor, rows: Tensor) -> list[Tensor | None]:
        """The same as :class:`.nudges.Nudges` takes it, layer by layer."""
        return [x for here in self._here for x in (None, added * here[rows])]

    def places(self, rows: Sequence[int]) -> list[Tensor]:
        """Where the answer tokens of some prompts stand among theirs all, prompt by prompt."""
        sizes = [len(self.prompts[i].answer_ids) for i in rows]
        return list(torch.split(torch.arange(sum(sizes), device=self.owners.device), sizes))
