"""What MLPs read everywhere, and directions that tell one token's reading from all others.

With mean μ and covariance C of what an MLP reads, the score of a reading k is the linear function
without an offset that is 1 at k, 0 at μ and of least variance: s(x) = w · x with w in the span of
C⁻¹ k and C⁻¹ μ (Fisher's discriminant, with the offset read from x). Elsewhere it has a spread of
about 1/√d. The constant is the same with 1 at both, so that it is nearly 1 for every x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hiedit_agents.hierarchy.substitutes import MOST_NEURONS, substitutes
from hiedit_env.errors import SettingsError
from hiedit_env.model.architectures import block_list
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

#: What texts of any kind count in mean and covariance beside prompts about facts. SmolLM2, block 7,
#: neurons of 150 facts: tokens of other texts at which one fires, of 7,504; prompts about other
#: subjects in which one does, of 900; own paraphrases in which it does, plain and in chat:
#: 39, 21, 95.1 and 96.5 % with 0, 8, 20, 95.1 and 96.8 % with 0.1, 8, 32, 95.1 and 97.5 % with 0.3.
TEXTS_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Detector:
    """A linear score of what an MLP reads: ``x @ row`` is 1 at one reading and 0 on average.

    Args:
        row: d float32.
        constant: d float32, whose product is 1 at the reading and on average, and nearly for all x.
        spread: Root mean square of the score over everything that is read.
    """

    row: Tensor
    constant: Tensor
    spread: float

    def scores(self, readings: Tensor) -> Tensor:
        """Scores of … × d readings."""
        return readings @ self.row


class Readings:
    """Mean and inverse covariance of what one MLP reads.

    Args:
        mean: d float32.
        covariance: d × d float32.
        ridge: Share of the mean diagonal that is added to the covariance.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, ridge: float) -> None:
        noise = ridge * covariance.diagonal().mean().clamp_min(1e-30)
        whole = covariance.double() + noise.double() * torch.eye(len(mean)).to(mean.device).double()
        self.mean = mean
        self.inverse = torch.linalg.inv(whole).float()

    def detector(self, readings: Tensor, others: Tensor) -> Detector:
        """The detector of the mean of some readings, which is nearly 0 at some others.

        Args:
            readings: P × d float32.
            others: T × d float32; each counts in the covariance like all tokens elsewhere together.
        """
        both = torch.stack((readings.mean(0), self.mean))
        found = both @ self.inverse
        if len(others):
            # Woodbury's identity, with the covariance of all.
            apart = others - self.mean
            met = apart @ self.inverse
            inner = met @ apart.mT + torch.eye(len(others), device=met.device)
            found = found - (met @ both.mT).mT @ torch.linalg.solve(inner, met)
        # The two rows of least variance that are (1, 0) and (1, 1) at the reading and at the mean.
        wanted = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=found.device)
        weights = torch.linalg.solve(found @ both.mT, wanted, left=False)
        row, constant = weights @ found
        return Detector(row, constant, float(weights[0, 0].clamp_min(0)) ** 0.5)


def reading_statistics(
    llm: ResidentLLM,
    mlps: Sequence[CandidateMLP],
    prompts: Sequence[EncodedPrompt],
    on_prompts: Callable[[int], None] | None = None,
    texts: Sequence[EncodedPrompt] = (),
) -> dict[str, Tensor]:
    """What MLPs read at all tokens of some prompts, and which of their neurons matter least.

    Args:
        llm: The model, at the unedited weights.
        mlps: Its MLPs.
        prompts: Of all kinds, plain and in chat form.
        on_prompts: Called with the number of prompts after every few of them.
        texts: Other texts. They count as much as prompts for what neurons matter and who stands in
            for them, and :data:`TEXTS_SHARE` in mean and covariance.

    Returns:
        Per MLP i ``mean.i`` (d) and ``covariance.i`` (the upper triangle, d (d + 1) / 2), float32;
        ``order.i`` (I int32), neurons by the mean square of what they write, smallest first;
        ``norms.i`` (I float32), lengths of the neurons' rows in the gate matrix; and, for MLPs of
        up to :data:`.substitutes.MOST_NEURONS`, ``substitutes.i``, see there.

    Raises:
        SettingsError: no prompts.
    """
    if not prompts:
        raise SettingsError("a calibration needs at least one prompt")
    shown = [prompts, texts] if texts else [prompts]
    sums = [[torch.zeros(m.hidden, device=llm.device) for m in mlps] for _ in shown]
    squares = [[torch.zeros(m.hidden, m.hidden, device=llm.device) for m in mlps] for _ in shown]
    small = [m.neurons <= MOST_NEURONS for m in mlps]
    firings = [
        torch.zeros(*[m.neurons] * (1 + few), device=llm.device)
        for m, few in zip(mlps, small, strict=True)
    ]
    counts = [0] * len(shown)
    with torch.inference_mode():
        layers = [layer for mlp in mlps for layer in (mlp.gate.layer, mlp.back)]
        for kind, some in enumerate(shown):
            for part, found_in in inputs(llm, layers, some):
                # The first token of a text reads like no other, and is never a subject's last.
                places = torch.arange(part.longest, device=llm.device)
                real = (places < part.lengths[:, None]) & (places > 0)
                counts[kind] += int(real.sum())
                for i, (given, inner) in enumerate(zip(found_in[::2], found_in[1::2], strict=True)):
                    rows = given[real].float()
                    sums[kind][i] += rows.sum(0)
                    squares[kind][i] += rows.mT @ rows
                    fired = inner[real].float()
                    firings[i] += fired.mT @ fired if small[i] else fired.square().sum(0)
                if on_prompts is not None:
                    on_prompts(len(part.prompts))
    shares = (1 - TEXTS_SHARE, TEXTS_SHARE) if texts else (1.0,)
    found: dict[str, Tensor] = {}
    for i, mlp in enumerate(mlps):
        weights = [share / max(count, 1) for share, count in zip(shares, counts, strict=True)]
        mean = torch.stack([w * one[i] for w, one in zip(weights, sums, strict=True)]).sum(0)
        second = torch.stack([w * one[i] for w, one in zip(weights, squares, strict=True)]).sum(0)
        covariance = second - torch.outer(mean, mean)
        fired = firings[i].diagonal() if small[i] else firings[i]
        written = fired * llm.weight(mlp.back).square().sum(1)
        order = written.argsort(stable=True).int()
        upper = torch.triu_indices(mlp.hidden, mlp.hidden, device=llm.device)
        found |= {
            f"mean.{i}": mean,
            f"covariance.{i}": covariance[upper[0], upper[1]],
            f"order.{i}": order,
            f"norms.{i}": rows_of_gate(llm, mlp).norm(dim=1),
        }
        if small[i]:
            found[f"substitutes.{i}"] = substitutes(firings[i] / max(sum(counts), 1), order)
    return found


def inputs(
    llm: ResidentLLM,
    layers: Sequence[int],
    prompts: Sequence[EncodedPrompt],
    block: int | None = None,
) -> Iterator[tuple[PromptBatch, list[Tensor]]]:
    """Batches of prompts, and what each layer is given in them: prompts × tokens × d_in.

    Nothing behind the last of the layers, or behind the block, is run.

    Args:
        llm: The model.
        layers: Indices of the layers.
        prompts: The prompts.
        block: Index of a block whose output, prompts × tokens × hidden size, is the last entry.
    """
    modules = {layer: llm.layers[layer].module for layer in layers}
    if block is not None:
        modules[_BLOCK] = block_list(llm.model)[0][block]
    for bucket in llm.buckets(prompts):
        together = llm.batch([prompts[i] for i in bucket])
        shared = llm.can_share(together)
        for part in [together] if shared else [llm.batch([prompts[i]]) for i in bucket]:
            found: dict[int, Tensor] = {}

            def hook(name: int, found: dict[int, Tensor] = found, part: PromptBatch = part) -> Any:
                def note(_module: Any, args: tuple[Tensor, ...], output: Any) -> None:
                    given = output[0] if isinstance(output, tuple) else output
                    rows = given if name == _BLOCK else args[0]
                    found[name] = rows.reshape(len(part.prompts), part.longest, -1)
                    if len(found) == len(modules):
                        raise _SeenAll

                return note

            with ExitStack() as hooks:
                for name, module in modules.items():
                    hooks.callback(module.register_forward_hook(hook(name)).remove)
                with suppress(_SeenAll):
                    llm.answer_logits(part, remember=False)
            yield part, [found[name] for name in (*layers, *([] if block is None else [_BLOCK]))]


#: Stands for the block among the indices of layers.
_BLOCK = -1


class _SeenAll(Exception):
    """Ends a pass."""


def readings(statistics: Mapping[str, Tensor], index: int, ridge: float) -> Readings:
    """The :class:`Readings` of one MLP from what :func:`reading_statistics` gave."""
    mean = statistics[f"mean.{index}"].float()
    upper = torch.triu_indices(len(mean), len(mean), device=mean.device)
    covariance = mean.new_zeros(len(mean), len(mean))
    covariance[upper[0], upper[1]] = statistics[f"covariance.{index}"].float()
    covariance = covariance + covariance.triu(1).mT
    return Readings(mean, covariance, ridge)


def rows_of_gate(llm: ResidentLLM, mlp: CandidateMLP) -> Tensor:
    """The neurons' rows in the gate matrix, I × d float32."""
    first = mlp.gate.first
    return llm.weight(mlp.gate.layer)[:, first : first + mlp.neurons].mT
