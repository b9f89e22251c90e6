"""How good the edited model is after an edit: the terms of the reward, and the same as a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, generated_answer, is_match, normalise
from hiedit_env.evaluation.names import LocalityReference, RewardKind
from hiedit_env.evaluation.reward_terms import Means, Quality, first_probes
from hiedit_env.evaluation.unedited import UneditedModel, answer_log_probs
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.batched import scores_together
from hiedit_env.resident.capture import Reading
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.resident import ResidentLLM

#: Log-probabilities (answer tokens × vocabulary) and generated texts, by unrelated prompt.
References = tuple[dict[EncodedPrompt, Tensor], dict[EncodedPrompt, str]]


def check_judging(kind: object, decay: object, reference: object) -> None:
    """Refuses settings of :class:`Evaluator` that it does not know.

    Raises:
        SettingsError: names the value and what would be right.
    """
    if kind not in get_args(RewardKind):
        raise SettingsError(f"reward must be one of {get_args(RewardKind)}, got {kind!r}")
    if not isinstance(decay, Real) or not 0 < float(decay) <= 1:
        raise SettingsError(f"retention_decay must be a number in (0, 1], got {decay!r}")
    if reference not in get_args(LocalityReference):
        raise SettingsError(
            f"locality_reference must be one of {get_args(LocalityReference)}, got {reference!r}"
        )


class Evaluator:
    """Judges an edit by the fact, its paraphrases, unrelated prompts and remembered edits.

    * edit: mean of the fact's score and the mean score of its paraphrases.
    * locality: how little the model's output on unrelated prompts (this fact's, and the first of
      every remembered edit) differs from the reference model's.
    * retention: score of the remembered edits' own prompts.

    A score is −(nats per answer token) for ``"loss"``, the share of answer tokens that are the
    argmax under teacher forcing for ``"token_accuracy"``, and 1 or 0 by
    :func:`~hiedit_env.evaluation.matching.is_match` for ``"generation"``; the difference on
    unrelated prompts is −KL(reference ‖ edited) per answer token, the share of equal argmaxes, and
    equality of the generated answers. An edit remembered for a steps weighs ``decay ** a`` in the
    weighted means (HiEdit and RLEdit's memory backtracking sums instead of averaging).

    Args:
        llm: The model.
        kind: Unit of the levels.
        decay: μ in (0, 1].
        reference: What unrelated prompts are compared with: the unedited model, or the model as it
            was before the present fact (as in the papers).
        unedited: Asks the unedited model; forks of one model share what it remembers. None for a
            new one.

    Attributes:
        on_device: Whether levels are scalar tensors that were never on the host. False unless set;
            without effect on levels by generation, which are judged as text.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        kind: RewardKind = "loss",
        decay: float = 0.95,
        reference: LocalityReference = "unedited",
        unedited: UneditedModel | None = None,
    ) -> None:
        check_judging(kind, decay, reference)
        self.llm, self.kind, self.decay, self.reference = llm, kind, decay, reference
        self.on_device = False
        self.unedited = UneditedModel(llm) if unedited is None else unedited
        self.forget_references()

    def encode(self, request: Request) -> EncodedFact:
        """Tokens of a request and its probes.

        Raises:
            PromptError: a text that is empty or too long; names the request's source.
        """
        encode = self.llm.encode
        try:
            return EncodedFact(
                request=request,
                prompt=encode(request.prompt, request.answer),
                paraphrases=tuple(encode(text, request.answer) for text in request.paraphrases),
                probes=tuple(encode(probe.prompt, probe.answer) for probe in request.locality),
            )
        except PromptError as error:
            raise PromptError(f"{request.source}: {error}") from error

    def forget_references(self) -> None:
        """Drops all references; called when a stream begins."""
        self.references = ({}, {})

    @property
    def references(self) -> References:
        """The reference model's log-probabilities and texts, by unrelated prompt."""
        return self._reference_log_probs, self._reference_texts

    @references.setter
    def references(self, references: References) -> None:
        self._reference_log_probs, self._reference_texts = references

    def begin(self, fact: EncodedFact, remembered: Sequence[EncodedFact]) -> None:
        """Computes the references of a fact's unrelated prompts, before it is edited.

        Args:
            fact: The fact about to be edited.
            remembered: Facts edited before, latest first; references of others are dropped.
        """
        unedited = self.reference == "unedited"
        old_log_probs, old_texts = self.references if unedited else ({}, {})
        # New dictionaries, never changed later: saved states hold the old ones.
        log_probs: dict[EncodedPrompt, Tensor] = {}
        texts: dict[EncodedPrompt, str] = {}
        self.references = (log_probs, texts)
        wanted = dict.fromkeys((*fact.probes, *first_probes(remembered)))
        if unedited:
            # A fact's probes are always run together, and with nothing else, so that a reference
            # depends on the stream alone and not on what was known before it.
            log_probs |= self.unedited.log_probs(fact.probes)
            for probe in wanted:
                if probe not in log_probs and probe in old_log_probs:
                    log_probs[probe] = old_log_probs[probe]
                elif probe not in log_probs:
                    log_probs |= self.unedited.log_probs((probe,))
        else:
            log_probs |= answer_log_probs(self.llm, tuple(wanted))
        if self.kind == "generation":
            with self.llm.unedited() if unedited else nullcontext(), torch.no_grad():
                for probe in wanted:
                    texts[probe] = old_texts.get(probe) or self._generate([probe])[0]

    def evaluate(
        self, fact: EncodedFact, remembered: Sequence[EncodedFact], reading: Reading | None = None
    ) -> Quality:
        """The quality at the present weights.

        Args:
            fact: The fact being edited; :meth:`begin` was called for it.
            remembered: Facts edited before, latest first.
            reading: The fact's own reading at the present weights, if there is one already.
        """
        return evaluate_together([(self, fact, remembered, reading)])[0]

    def summarise(
        self,
        fact: EncodedFact,
        remembered: Sequence[EncodedFact],
        prompts: Sequence[EncodedPrompt],
        scores: Sequence[NDArray[np.float64]],
        table: Tensor,
    ) -> Quality:
        """The quality from the scores of single prompts.

        Args:
            fact: The fact being edited.
            remembered: Facts edited before, latest first.
            prompts: P, in the order of :meth:`prompts`.
            scores: P each: −nats, token accuracy, KL from the reference, agreement with it.
            table: The same, P × 4 float32 on the model's device.
        """
        losses, correct, kl, agree = scores
        if not (np.isfinite(losses).all() and np.isfinite(kl).all()):
            return Quality(dict.fromkeys(("edit", "locality", "retention"), np.nan), {}, False)
        means = Means(fact, remembered, self.decay)
        accuracy = means.split(correct)
        agreement = means.locality(agree)
        metrics = {
            "efficacy": accuracy["fact"],
            "generalization": accuracy["paraphrases"],
            "agreement": agreement,
            "retention": accuracy["retention"],
        }
        if self.kind == "loss":
            score, local, perfect = losses, means.locality(-kl), 0.0
        elif self.kind == "token_accuracy":
            score, local, perfect = correct, agreement, 1.0
        else:
            texts = self._generate(prompts)
            score = np.array(
                [float(is_match(t, p.answer)) for t, p in zip(texts, prompts, strict=True)]
            )
            same = np.array(
                [float(self._same_text(t, p)) for t, p in zip(texts, prompts, strict=True)]
            )
            local, perfect = means.locality(same), 1.0
        parts = means.split(score)
        edit = parts["fact"]
        if fact.paraphrases:
            edit = (edit + parts["paraphrases"]) / 2
        levels: dict[str, Any] = {
            "edit": edit,
            "locality": perfect if np.isnan(local) and not means.has_probes else local,
            "retention": parts["retention"] if remembered else perfect,
        }
        if self.on_device and self.kind != "generation":
            own, other = (table[:, 0], -table[:, 2]) if self.kind == "loss" else table[:, 1::2].T
            for level, coefficients in means.coefficients().items():
                factors = torch.from_numpy(coefficients).to(table.dtype).to(table.device)
                value = (other if level == "locality" else own) @ factors
                # A level without prompts is not measured but perfect.
                levels[level] = value if coefficients.any() else torch.full_like(value, perfect)
        return Quality(levels, metrics, True)

    def loss(
        self,
        fact: EncodedFact,
        remembered: Sequence[EncodedFact],
        updates: Updates,
        weights: Mapping[str, float],
        l2: float,
    ) -> Tensor:
        """The differentiable objective of a low level, with the updates as an overlay.

        −(edit, locality and retention levels of kind ``"loss"``, weighted) + l2 Σ_l ‖Δ_l‖²:
        L_t of HiEdit and RLEdit up to the averages described above.

        Returns:
            Scalar tensor with gradients into the factors of ``updates``.
        """
        prompts = self.prompts(fact, remembered, with_fact=True)
        losses, _, kl, _ = scores_together(
            [(self.llm, prompts, self._reference_log_probs)], updates
        )[0].unbind(1)
        means = Means(fact, remembered, self.decay)
        coefficients = means.coefficients()
        device = losses.device

        def dot(part: str, values: Tensor) -> Tensor:
            # First the dtype, then the device: not every device has float64.
            return values @ torch.from_numpy(coefficients[part]).to(values.dtype).to(device)

        total = -weights["edit"] * dot("edit", losses) - weights["retention"] * dot(
            "retention", losses
        )
        total = total + weights["locality"] * dot("locality", kl)
        if l2:
            for update in updates:
                if update is not None:
                    total = total + l2 * update.squared_norm()
        return total

    # -- inside -------------------------------------------------------------------------------

    @staticmethod
    def prompts(
        fact: EncodedFact, remembered: Sequence[EncodedFact], with_fact: bool
    ) -> list[EncodedPrompt]:
        """Fact, paraphrases, probes, remembered prompts, remembered probes: in this order."""
        return [
            *([fact.prompt] if with_fact else []),
            *fact.paraphrases,
            *fact.probes,
            *(old.prompt for old in remembered),
            *first_probes(remembered),
        ]

    def _generate(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        budgets = [len(prompt.answer_ids) + EXTRA_TOKENS for prompt in prompts]
        return self.llm.generate([prompt.prompt for prompt in prompts], budgets)

    def _same_text(self, text: str, prompt: EncodedPrompt) -> bool:
        reference = self._reference_texts.get(prompt)
        return reference is not None and normalise(generated_answer(text)) == normalise(
            generated_answer(reference)
        )


def evaluate_together(
    asked: Sequence[tuple[Evaluator, EncodedFact, Sequence[EncodedFact], Reading | None]],
) -> list[Quality]:
    """What :meth:`Evaluator.evaluate` gives for each of several environments, by few passes.

    Args:
        asked: Its arguments, for every environment; the models are forks of one, or there is one
            environment.
    """
    with torch.inference_mode():
        prompts = [
            evaluator.prompts(fact, remembered, with_fact=reading is None)
            for evaluator, fact, remembered, reading in asked
        ]
        evaluators = [evaluator for evaluator, *_ in asked]
        pairs = zip(evaluators, prompts, strict=True)
        found = scores_together([(e.llm, wanted, e.references[0]) for e, wanted in pairs])
        qualities: list[Quality] = []
        for (evaluator, fact, remembered, reading), wanted, table in zip(
            asked, prompts, found, strict=True
        ):
            if reading is not None:
                loss, accuracy = reading.summary.unbind()
                own = F.pad(torch.stack((-loss, accuracy)), (0, 2))
                table = torch.cat((own[None], table))
                wanted = [fact.prompt, *wanted]
            scores = list(table.T.cpu().double().numpy())
            qualities.append(evaluator.summarise(fact, remembered, wanted, scores, table))
    return qualities
