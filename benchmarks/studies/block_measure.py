"""What a model gives about a fact, and what can be seen of every block before one is chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.detectors import inputs
from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.neuron_plan import Target
from hiedit_benchmarks.studies.block_records import Measured
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import HieditWarning
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match
from hiedit_env.evaluation.names import AskedForm, metric_in
from hiedit_env.evaluation.questions import questions_about
from hiedit_env.evaluation.unedited import UneditedModel, answer_log_probs
from hiedit_env.model.mlps import CandidateMLP
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM

#: Strength of a neuron, 1 at the fact itself, from which it counts as fired.
FIRED = 0.1
#: A gradient below this counts as this.
_LEAST = 1e-12


class FactQuestions:
    """What is asked about one fact, and the unedited model's answers to compare with.

    Made while nothing is edited.

    Args:
        llm: The model, unedited.
        unedited: Remembers its answers.
        request: The fact.
        forms: In which everything is asked; at least one.

    Raises:
        PromptError: a text that cannot be tokenised; names the request's source.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        unedited: UneditedModel,
        request: Request,
        forms: Sequence[AskedForm],
    ) -> None:
        self._llm = llm
        groups = questions_about(llm, [request], forms).groups

        def asked(metric: str) -> list[list[EncodedPrompt]]:
            """Per prompt of a metric its forms."""
            by_form = [groups[metric_in(form, metric)].facts[0] for form in forms]
            return [list(together) for together in zip(*by_form, strict=True)]

        [self._fact] = asked("efficacy")
        self._paraphrases = asked("generalization")
        self._own = [unedited.answers(prompts) for prompts in asked("specificity")]
        flat = [prompt for prompts in self._own for prompt in prompts]
        self._reference = {p: value for p, (value, _) in _teacher_forced(llm, flat).items()}

    def measure(self) -> Measured:
        """What the model gives now."""
        llm = self._llm
        wanted = [*self._fact, *(p for prompts in self._paraphrases for p in prompts)]
        own = [p for prompts in self._own for p in prompts]
        found = _teacher_forced(llm, dict.fromkeys((*wanted, *own)))
        # A greedy continuation follows the argmax, so what that gives to the end is known.
        open_ = [p for p in dict.fromkeys(wanted) if found[p][1] < 1 or not _ends(llm, p)]
        budgets = [_text_tokens(llm, p) + EXTRA_TOKENS for p in open_]
        texts = dict(zip(open_, llm.generate(open_, budgets), strict=True))

        def given(prompt: EncodedPrompt) -> list[float]:
            right = prompt not in texts or is_match(texts[prompt], prompt.answer)
            return [round(found[prompt][0], 5), float(right)]

        def kept(prompt: EncodedPrompt) -> list[float]:
            nats, share = found[prompt]
            return [round(nats - self._reference[prompt], 5), round(share, 5)]

        return Measured(
            [given(p) for p in self._fact],
            [[given(p) for p in prompts] for prompts in self._paraphrases],
            [[kept(p) for p in prompts] for prompts in self._own],
        )


def _text_tokens(llm: ResidentLLM, prompt: EncodedPrompt) -> int:
    """Number of answer tokens without the end token."""
    return len(prompt.answer_ids) - _ends(llm, prompt)


def _ends(llm: ResidentLLM, prompt: EncodedPrompt) -> bool:
    """Whether the end token is behind the answer's text."""
    return len(prompt.answer_ids) > 1 and prompt.answer_ids[-1] == llm.encoder.end_id


def _teacher_forced(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt] | Mapping[EncodedPrompt, None]
) -> dict[EncodedPrompt, tuple[float, float]]:
    """Per prompt −log p per token of the answer's text, and the share of argmax tokens.

    The end token counts in the share only: a sentence may as well go on with a full stop.
    """
    found = {}
    for prompt, rows in answer_log_probs(llm, list(prompts)).items():
        ids = torch.tensor(prompt.answer_ids, device=rows.device)
        nats = -float(rows.gather(1, ids[:, None])[: _text_tokens(llm, prompt)].mean())
        found[prompt] = nats, float((rows.argmax(1) == ids).float().mean())
    return found


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a fact before a choice.

    Args:
        fact: Name → number.
        options: The same per MLP.
        fires: Per MLP, the share of control prompts at which its neuron would fire.
    """

    fact: dict[str, float]
    options: list[dict[str, float]]
    fires: list[float]


class Observer:
    """Looks at facts and blocks before anything is written, without a search.

    Args:
        llm: The model, unedited.
        low: The low level, calibrated.
        controls: Prompts that no neuron should fire at, of other facts than those looked at.
    """

    def __init__(self, llm: ResidentLLM, low: Neuron, controls: Sequence[EncodedPrompt]) -> None:
        self._llm, self._low = llm, low
        gates = [mlp.gate.layer for mlp in low.mlps]
        found: list[list[Tensor]] = [[] for _ in gates]
        owners: list[Tensor] = []
        first = 0
        with torch.inference_mode():
            for part, read in inputs(llm, gates, controls):
                places = torch.arange(part.longest, device=llm.device)
                real = places < part.lengths[:, None]
                for rows, given in zip(found, read, strict=True):
                    rows.append(given[real].float())
                rows_of = torch.arange(len(part.prompts), device=llm.device)[:, None] + first
                owners.append(rows_of.expand_as(real)[real])
                first += len(part.prompts)
        self._controls = [torch.cat(rows) for rows in found]
        self._owners, self._count = torch.cat(owners), first

    def mask_of(self, mlp: CandidateMLP) -> NDArray[np.bool_]:
        """The layers of one MLP, L bool."""
        mask = np.zeros(len(self._llm.layers), bool)
        mask[list(mlp.layers)] = True
        return mask

    def look(self, request: Request, prompts: Sequence[EncodedPrompt]) -> Sight:
        """What is seen of a fact and of every MLP for it.

        Args:
            request: The fact.
            prompts: Its own prompt in every form that is edited.
        """
        reading = self._llm.read(*prompts)
        losses = reading.summaries[:, 0].tolist()
        capture = reading.capture()
        first = prompts[0]
        last = first.positions("subject")[0]
        spans = first.subject_spans
        fact = {
            "nats": reading.loss,
            "nats_between_forms": losses[-1] - losses[0],
            "answer_tokens": float(len(first.answer_ids)),
            "subject_tokens": float(spans[-1][1] - spans[-1][0]) if spans else 0.0,
            "tokens_before_subject": float(spans[-1][0]) if spans else 0.0,
            "tokens_behind_subject": float(len(first.prompt_ids) - 1 - last),
            "subject_missing": float(first.subject_missing),
        }
        norms = capture.gradient_norms().square()
        options, fires = [], []
        for index, mlp in enumerate(self._low.mlps):
            with warnings.catch_warnings():
                # That nothing can be written there is one of the things seen.
                warnings.simplefilter("ignore", HieditWarning)
                targets = self._low.plan(capture, self.mask_of(mlp))
            fires.append(self._fires(index, targets))
            gradient = float(norms[list(mlp.layers)].sum().sqrt())
            options.append(
                {
                    "weight_gradient": math.log10(max(gradient, _LEAST)),
                    **_push(capture, mlp),
                    **self._apart(capture, mlp, targets),
                    "fires": fires[-1],
                }
            )
        rounded = [{name: round(x, 5) for name, x in one.items()} for one in (fact, *options)]
        return Sight(rounded[0], rounded[1:], fires)

    def _fires(self, index: int, targets: Sequence[Target]) -> float:
        """Share of the control prompts at which any of the neurons fires."""
        if not targets:
            return 0.0
        strengths = torch.stack([t.shape.firing(self._controls[index]) for t in targets])
        fired = (strengths.abs() >= FIRED).any(0).float()
        prompts = torch.zeros(self._count, device=fired.device)
        prompts.scatter_reduce_(0, self._owners, fired, "amax")
        return float(prompts.mean())

    def _apart(
        self, capture: Capture, mlp: CandidateMLP, targets: Sequence[Target]
    ) -> dict[str, float]:
        """How well the fact can be told from the rest in an MLP; of several neurons the worst."""
        starts, row = {}, 0
        for prompt in capture.prompts:
            starts[prompt] = row
            row += prompt.length
        keys = capture.keys[mlp.gate.layer]
        spreads, lowest, covered = [], [], 0
        for target in targets:
            rows = [starts[p] + p.positions("subject")[0] for p in target.prompts if p in starts]
            lowest.append(float(target.shape.detector.scores(keys[rows].float()).min()))
            spreads.append(target.shape.detector.spread * math.sqrt(mlp.hidden))
            covered += len(rows)
        return {
            "spread": max(spreads, default=0.0),
            "lowest_score": min(lowest, default=0.0),
            "neurons": float(len(targets)),
            "prompts_covered": covered / len(capture.prompts),
        }


def _push(capture: Capture, mlp: CandidateMLP) -> dict[str, float]:
    """How far a vector at the subject would lower the loss at first order.

    Both are of the gradients at what the MLP writes at the subject of every prompt: the mean of
    their lengths (log10), and the length of their mean over that, 1 where all point the same way.
    """
    rows = capture.value_gradients[mlp.back][capture.rows("subject")].float()
    lengths = rows.norm(dim=1)
    mean = float(lengths.mean())
    together = float(rows.mean(0).norm()) / max(mean, _LEAST)
    return {"push": math.log10(max(mean, _LEAST)), "alignment": together}
