"""How good the edited model is after an edit: the terms of the reward, and the same as a loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import PromptError
from hiedit_env.evaluation.info_metrics import mean_of
from hiedit_env.evaluation.matching import EXTRA_TOKENS, generated_answer, is_match, normalise
from hiedit_env.evaluation.names import LocalityReference, RewardKind
from hiedit_env.evaluation.reward_terms import (
    MEASURED,
    Means,
    Metrics,
    Quality,
    UnitMetrics,
    first_probes,
    means_of,
    measure,
    measure_forms,
    not_measured,
    prompts_of,
)
from hiedit_env.evaluation.scores import scores_together
from hiedit_env.evaluation.unedited import UneditedModel, answer_log_probs
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.encoded import AskedForm
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.batched import logits_together
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.reading import Reading
from hiedit_env.resident.resident import ResidentLLM


@dataclass(frozen=True, slots=True)
class References:
    """What unrelated prompts are compared with; never changed once made, so saved states share it.

    Args:
        log_probs: The reference model's log-probabilities by prompt, answer tokens × vocabulary.
        texts: Its greedy continuations by prompt; only where the reward is by generation.
    """

    log_probs: Mapping[EncodedPrompt, Tensor]
    texts: Mapping[EncodedPrompt, str]


class Evaluator:
    """Judges an edit unit by its facts, their paraphrases, unrelated prompts and remembered edits.

    Of every fact of the unit:

    * edit: mean of the fact's score and the mean score of its paraphrases.
    * locality: how little the model's output on unrelated prompts (this fact's, and the first of
      every remembered edit) differs from the reference model's.
    * recent retention: score of the remembered edits' own prompts.

    A prompt that is asked in two forms counts half in each. A term of the unit is the mean over its
    facts of what each would have alone, with the facts edited before the unit as its memory.

    A score is −(nats per answer token) for ``"loss"``, the share of answer tokens that are the
    argmax under teacher forcing for ``"token_accuracy"``, and 1 or 0 by
    :func:`~hiedit_env.evaluation.matching.is_match` for ``"generation"``; the difference on
    unrelated prompts is −KL(reference ‖ edited) per answer token, the share of equal argmaxes at
    the true answer's tokens (``argmax_match``), and equality of the generated answers. An edit
    remembered for a steps weighs ``decay ** a`` in the weighted means (HiEdit and RLEdit's memory
    backtracking sums instead of averaging).

    The environment's settings check these values, see ``hiedit_env.envs.settings``.

    Args:
        llm: The model.
        kind: Unit of the terms.
        decay: μ in (0, 1].
        reference: What unrelated prompts are compared with: the unedited model, or the model as it
            was before the present fact (as in the papers).
        unedited: What the unedited model says; forks of one model share it. Made anew where None.
        prompt_form: How a request is asked that does not say so itself; with ``"both"`` the metrics
            are told form by form too.

    Attributes:
        on_device: Whether terms are scalar tensors that were never on the host. False unless set;
            without effect on terms by generation, which are judged as text.
        references: What unrelated prompts are compared with, see :func:`prepare_together`.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        kind: RewardKind = "loss",
        decay: float = 0.95,
        reference: LocalityReference = "unedited",
        unedited: UneditedModel | None = None,
        prompt_form: PromptForm = "plain",
    ) -> None:
        self.prompt_form: PromptForm = prompt_form
        self.llm, self.kind, self.decay, self.reference = llm, kind, decay, reference
        self.on_device = False
        self.unedited = UneditedModel(llm) if unedited is None else unedited
        self.forget_references()

    def clone_for(self, llm: ResidentLLM) -> Evaluator:
        """The same for a fork of the model; what the unedited model says is shared."""
        twin = copy.copy(self)
        twin.llm, twin.unedited = llm, self.unedited.clone_for(llm)
        return twin

    def encode(self, request: Request) -> EncodedFact:
        """Tokens of a request and its probes, in the forms asked.

        Raises:
            PromptError: a text that is empty or too long, or a form that the tokenizer does not
                have; names the request's source.
        """
        encoder, form = self.llm.encoder, request.prompt_form or self.prompt_form

        def forms(text: str, answer: str) -> tuple[EncodedPrompt, ...]:
            return encoder.encode_forms(text, answer, form, request.system)

        def asked(text: str) -> tuple[EncodedPrompt, ...]:
            found = forms(text, request.answer)
            return tuple(encoder.with_subject(one, text, request.subject) for one in found)

        try:
            return EncodedFact(
                request=request,
                prompts=asked(request.prompt),
                paraphrases=tuple(p for text in request.paraphrases for p in asked(text)),
                probes=tuple(p for q in request.locality for p in forms(q.prompt, q.answer)),
            )
        except PromptError as error:
            raise PromptError(f"{request.source}: {error}") from error

    def forget_references(self) -> None:
        """Drops all references; called when a stream begins."""
        self.references = References({}, {})

    def summarise(
        self,
        unit: Sequence[EncodedFact],
        remembered: Sequence[EncodedFact],
        scores: Sequence[NDArray[np.float64]],
        table: Tensor,
    ) -> Quality:
        """The quality from the scores of single prompts.

        Args:
            unit: The facts being edited.
            remembered: Facts edited before, latest first.
            scores: Of the P prompts of :func:`~.reward_terms.prompts_of`, then of the unedited
                model's greedy answers to the unit's unrelated prompts: −nats, token accuracy, KL
                from the reference, equal argmaxes.
            table: The same, rows × 4 float32 on the model's device.
        """
        prompts = prompts_of(unit, remembered)
        count = len(prompts)
        losses, correct, kl, equal = (column[:count] for column in scores)
        if not (np.isfinite(losses).all() and np.isfinite(kl).all()):
            nothing = not_measured(len(unit), self.prompt_form == "both")
            return Quality(dict.fromkeys(MEASURED, np.nan), nothing, False)
        means = means_of(unit, remembered, self.decay)
        greedy = scores[1][count:]
        facts = measure(unit, means, correct, equal, greedy)
        forms: Mapping[AskedForm, Metrics] = {}
        if self.prompt_form == "both":
            forms = measure_forms(unit, remembered, self.decay, correct, equal, greedy)
        measured = UnitMetrics(mean_of(facts), facts, forms)
        if self.kind == "loss":
            score, same, perfect = losses, -kl, 0.0
        elif self.kind == "token_accuracy":
            score, same, perfect = correct, equal, 1.0
        else:
            texts = self.generate(prompts)
            score = np.array(
                [float(is_match(t, p.answer)) for t, p in zip(texts, prompts, strict=True)]
            )
            same = np.array(
                [float(self._same_text(t, p)) for t, p in zip(texts, prompts, strict=True)]
            )
            perfect = 1.0
        each = [self._terms(mean, score, same, perfect) for mean in means]
        terms: dict[str, Any] = {
            term: sum(one[term] for one in each) / len(each) for term in MEASURED
        }
        if self.on_device and self.kind != "generation":
            rows = table[:count]
            own, other = (rows[:, 0], -rows[:, 2]) if self.kind == "loss" else rows[:, 1::2].T
            for term in MEASURED:
                column = other if term == "locality" else own
                found = [_on_device(column, mean.coefficients()[term], perfect) for mean in means]
                terms[term] = found[0] if len(found) == 1 else torch.stack(found).mean()
        return Quality(terms, measured, True)

    def loss(
        self,
        unit: Sequence[EncodedFact],
        remembered: Sequence[EncodedFact],
        updates: Updates,
        weights: Mapping[str, float],
        l2: float,
    ) -> Tensor:
        """The differentiable objective of a low level, with the updates as an overlay.

        −(edit, locality and recent-retention terms of kind ``"loss"``, weighted) + l2 Σ_l ‖Δ_l‖²:
        L_t of HiEdit and RLEdit up to the averages described above.

        Returns:
            Scalar tensor with gradients into the factors of ``updates``.
        """
        prompts = prompts_of(unit, remembered)
        losses, _, kl, _ = scores_together(
            [(self.llm, prompts, self.references.log_probs)], updates
        )[0].unbind(1)
        several = [m.coefficients() for m in means_of(unit, remembered, self.decay)]
        device = losses.device

        def weighted(term: str, values: Tensor) -> Tensor:
            # First the dtype, then the device: not every device has float64.
            coefficients = np.mean([one[term] for one in several], 0)
            factors = torch.from_numpy(coefficients).to(values.dtype).to(device)
            return weights[term] * (values @ factors)

        total = -weighted("edit", losses) - weighted("recent_retention", losses)
        total = total + weighted("locality", kl)
        if l2:
            for update in updates:
                if update is not None:
                    total = total + l2 * update.squared_norm()
        return total

    def generate(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """Greedy continuations at the present weights, of the answer's tokens and a few more."""
        budgets = [len(prompt.answer_ids) + EXTRA_TOKENS for prompt in prompts]
        return self.llm.generate(prompts, budgets)

    def _terms(
        self,
        mean: Means,
        score: NDArray[np.float64],
        same: NDArray[np.float64],
        perfect: float,
    ) -> dict[str, float]:
        """The terms of one fact from the scores and likenesses of all prompts."""
        parts = mean.split(score)
        edit, retention = parts["fact"], parts["recent_retention"]
        if not np.isnan(parts["paraphrases"]):
            edit = (edit + parts["paraphrases"]) / 2
        return {
            "edit": edit,
            "locality": mean.locality(same) if mean.has_probes else perfect,
            "recent_retention": perfect if np.isnan(retention) else retention,
        }

    def _same_text(self, text: str, prompt: EncodedPrompt) -> bool:
        reference = self.references.texts.get(prompt)
        return reference is not None and normalise(generated_answer(text)) == normalise(
            generated_answer(reference)
        )


def prepare_together(
    asked: Sequence[tuple[Evaluator, Sequence[EncodedFact], Sequence[EncodedFact]]],
) -> None:
    """Computes the references of edit units that are about to be edited, in few passes.

    Args:
        asked: Per environment its evaluator, the facts of the unit and the facts edited before,
            latest first; the models are forks of one, or there is one environment. References to
            prompts of no other unit are kept.
    """
    found: list[References] = []
    for (evaluator, *_), wanted, rows in zip(asked, *_reference_log_probs(asked), strict=True):
        texts: dict[EncodedPrompt, str] = {}
        for probe in wanted if evaluator.kind == "generation" else ():
            if evaluator.reference == "unedited":
                texts[probe] = evaluator.unedited.text(probe)
            else:
                [texts[probe]] = evaluator.generate([probe])
        found.append(References(rows, texts))
    for (evaluator, *_), references in zip(asked, found, strict=True):
        evaluator.references = references


def evaluate_together(
    asked: Sequence[tuple[Evaluator, Sequence[EncodedFact], Sequence[EncodedFact], Reading | None]],
) -> list[Quality]:
    """How good the edits of several environments are, in few passes.

    Args:
        asked: Per environment its evaluator, the facts of the unit being edited
            (:func:`prepare_together` was called for it), the facts edited before, latest first, and
            the unit's own reading at the present weights if there is one already. The models are
            forks of one, or there is one environment.
    """
    with torch.inference_mode():
        answers = _unedited_answers([(evaluator, unit) for evaluator, unit, *_ in asked])
        # The unit's own prompts come first.
        prompts = [
            prompts_of(unit, remembered)[len(reading.prompts) if reading is not None else 0 :]
            for _, unit, remembered, reading in asked
        ]
        found = scores_together(
            [
                (evaluator.llm, [*wanted, *greedy], evaluator.references.log_probs)
                for (evaluator, *_), wanted, greedy in zip(asked, prompts, answers, strict=True)
            ]
        )
        qualities: list[Quality] = []
        for (evaluator, unit, remembered, reading), table in zip(asked, found, strict=True):
            if reading is not None:
                losses, accuracies = reading.summaries.unbind(1)
                own = F.pad(torch.stack((-losses, accuracies), 1), (0, 2))
                table = torch.cat((own, table))
            scores = list(table.T.cpu().double().numpy())
            qualities.append(evaluator.summarise(unit, remembered, scores, table))
    return qualities


# -- inside ---------------------------------------------------------------------------------------


def _on_device(column: Tensor, coefficients: NDArray[np.float64], perfect: float) -> Tensor:
    """A term of one fact as a scalar tensor; one without prompts is not measured but perfect."""
    value = column @ torch.from_numpy(coefficients).to(column.dtype).to(column.device)
    return value if coefficients.any() else torch.full_like(value, perfect)


def _reference_log_probs(
    asked: Sequence[tuple[Evaluator, Sequence[EncodedFact], Sequence[EncodedFact]]],
) -> tuple[list[list[EncodedPrompt]], list[dict[EncodedPrompt, Tensor]]]:
    """Per environment the prompts that need a reference, and its log-probabilities."""
    prompts = [
        list(dict.fromkeys((*(p for f in unit for p in f.probes), *first_probes(remembered))))
        for _, unit, remembered in asked
    ]
    rows: list[dict[EncodedPrompt, Tensor]] = [{} for _ in asked]
    unedited = [i for i, (evaluator, *_) in enumerate(asked) if evaluator.reference == "unedited"]
    if unedited:
        # A fact's probes are always run together, and alone with nothing else, so that a reference
        # depends on the stream and not on what was known before it.
        groups: list[tuple[int, tuple[EncodedPrompt, ...]]] = []
        for i in unedited:
            evaluator, unit, _ = asked[i]
            old, own = evaluator.references.log_probs, {p for f in unit for p in f.probes}
            rows[i] = {p: old[p] for p in prompts[i] if p in old and p not in own}
            rest = [(p,) for p in prompts[i] if p not in old and p not in own]
            groups += [(i, group) for group in (*(f.probes for f in unit), *rest)]
        shared = asked[unedited[0]][0].unedited
        found = shared.log_probs_of([group for _, group in groups], together=len(asked) > 1)
        for (i, _), part in zip(groups, found, strict=True):
            rows[i] |= part
    previous = [i for i in range(len(asked)) if i not in unedited]
    if previous:
        # Never inference tensors, wherever this is called from: they later enter autograd graphs.
        with torch.inference_mode(False), torch.no_grad():
            if len(previous) == 1:
                [i] = previous
                rows[i] = answer_log_probs(asked[i][0].llm, prompts[i])
            else:
                wanted = [(asked[i][0].llm, prompts[i]) for i in previous]
                for places, batch, logits in logits_together(wanted):
                    sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
                    split = torch.split(logits.float().log_softmax(-1), sizes)
                    for (member, place), values in zip(places, split, strict=True):
                        rows[previous[member]][prompts[previous[member]][place]] = values
    return prompts, rows


def _unedited_answers(
    asked: Sequence[tuple[Evaluator, Sequence[EncodedFact]]],
) -> list[list[EncodedPrompt]]:
    """The unedited model's greedy answers to the unrelated prompts of every unit."""
    first = asked[0][0].unedited
    # Whatever is not known yet, in shared passes.
    shared = [unit for evaluator, unit in asked if evaluator.unedited.shares_with(first)]
    first.answers([probe for unit in shared for fact in unit for probe in fact.probes])
    return [
        evaluator.unedited.answers([probe for fact in unit for probe in fact.probes])
        for evaluator, unit in asked
    ]
