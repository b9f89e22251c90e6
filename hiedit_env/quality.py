"""How good the edited model is after an edit: the terms of the reward, and the same as a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.capture import Reading
from hiedit_env.errors import PromptError, SettingsError
from hiedit_env.matching import EXTRA_TOKENS, generated_answer, is_match, normalise
from hiedit_env.requests import Request
from hiedit_env.resident import ResidentLLM
from hiedit_env.tensor_cache import TensorCache
from hiedit_env.tokenization import EncodedPrompt
from hiedit_env.updates import Updates

RewardKind = Literal["loss", "token_accuracy", "generation"]
LocalityReference = Literal["unedited", "previous"]

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


@dataclass(frozen=True, slots=True)
class EncodedFact:
    """A request and everything that judges it, as tokens."""

    request: Request
    prompt: EncodedPrompt
    paraphrases: tuple[EncodedPrompt, ...]
    probes: tuple[EncodedPrompt, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """The state of the edited model as seen from one fact.

    Args:
        levels: ``edit``, ``locality`` and ``retention`` in the unit of the reward kind, higher is
            better, unweighted. Nothing to measure counts as perfect: 0 nats, or accuracy 1.
        metrics: Token accuracies whatever the reward kind: ``efficacy``, ``generalization``,
            ``agreement`` (with the reference model's own predictions on unrelated prompts),
            ``retention``; NaN where there is nothing to measure.
        finite: Whether the losses of all prompts and the divergences of the unrelated ones are.
            False after numerical collapse: then all levels are NaN and there are no metrics, since
            accuracies do not show it (the argmax of NaN is a token like any other).
    """

    levels: dict[str, float]
    metrics: dict[str, float]
    finite: bool


class Evaluator:
    """Judges an edit by the fact, its paraphrases, unrelated prompts and remembered edits.

    * edit: mean of the fact's score and the mean score of its paraphrases.
    * locality: how little the model's output on unrelated prompts (this fact's, and the first of
      every remembered edit) differs from the reference model's.
    * retention: score of the remembered edits' own prompts.

    A score is −(nats per answer token) for ``"loss"``, the share of answer tokens that are the
    argmax under teacher forcing for ``"token_accuracy"``, and 1 or 0 by
    :func:`~hiedit_env.matching.is_match` for ``"generation"``; the difference on unrelated prompts
    is −KL(reference ‖ edited) per answer token, the share of equal argmaxes, and equality of the
    generated answers. An edit remembered for a steps weighs ``decay ** a`` in the weighted means
    (HiEdit and RLEdit's memory backtracking sums instead of averaging).

    Args:
        llm: The model.
        kind: Unit of the levels.
        decay: μ in (0, 1].
        reference: What unrelated prompts are compared with: the unedited model, or the model as it
            was before the present fact (as in the papers).
        cache_bytes: Bound of the memory for the unedited model's log-probabilities.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        kind: RewardKind = "loss",
        decay: float = 0.95,
        reference: LocalityReference = "unedited",
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        check_judging(kind, decay, reference)
        self.llm, self.kind, self.decay, self.reference = llm, kind, decay, reference
        self._unedited = TensorCache(cache_bytes)
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
        wanted = dict.fromkeys((*fact.probes, *_first_probes(remembered)))
        weights = self.llm.unedited() if unedited else nullcontext()
        # Never inference tensors, wherever this is called from: they later enter autograd graphs.
        with torch.inference_mode(False), torch.no_grad(), weights:
            # A fact's probes are always run together, and with nothing else, so that a reference
            # depends on the stream alone and not on what was known before it.
            rest = [probe for probe in wanted if probe not in fact.probes]
            if unedited:
                log_probs |= self._log_probs(fact.probes, remember=True)
                for probe in rest:
                    if probe in old_log_probs:
                        log_probs[probe] = old_log_probs[probe]
                    else:
                        log_probs |= self._log_probs((probe,), remember=True)
            else:
                log_probs |= self._log_probs(tuple(wanted), remember=False)
            for probe in wanted if self.kind == "generation" else ():
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
        with torch.inference_mode():
            prompts = self._prompts(fact, remembered, with_fact=reading is None)
            scores = self._forward(prompts, None)
            if reading is not None:
                own = (-reading.loss, float(reading.correct.float().mean()), 0.0, 0.0)
                scores = [
                    torch.cat((scores[0].new_tensor([v]), s))
                    for v, s in zip(own, scores, strict=True)
                ]
                prompts = [fact.prompt, *prompts]
            losses, correct, kl, agree = (values.cpu().double().numpy() for values in scores)
        if not (np.isfinite(losses).all() and np.isfinite(kl).all()):
            return Quality(dict.fromkeys(("edit", "locality", "retention"), np.nan), {}, False)
        means = _Means(fact, remembered, self.decay)
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
        levels = {
            "edit": edit,
            "locality": perfect if np.isnan(local) and not means.has_probes else local,
            "retention": parts["retention"] if remembered else perfect,
        }
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
        prompts = self._prompts(fact, remembered, with_fact=True)
        losses, _, kl, _ = self._forward(prompts, updates)
        means = _Means(fact, remembered, self.decay)
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

    def _log_probs(
        self, probes: tuple[EncodedPrompt, ...], *, remember: bool
    ) -> dict[EncodedPrompt, Tensor]:
        """Log-probabilities at the present weights of probes that are run together."""
        known = self._unedited.get(probes) if remember else None
        if known is None:
            rows: dict[EncodedPrompt, Tensor] = {}
            for bucket in self.llm.buckets(probes):
                batch = self.llm.batch([probes[i] for i in bucket])
                found = self.llm.answer_logits(batch).float().log_softmax(-1)
                sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
                rows |= dict(zip(batch.prompts, torch.split(found, sizes), strict=True))
            if not probes:
                return {}
            known = torch.cat([rows[probe] for probe in probes])
            if remember:
                self._unedited.put(probes, known)
        sizes = [len(probe.answer_ids) for probe in probes]
        return dict(zip(probes, torch.split(known, sizes), strict=True))

    @staticmethod
    def _prompts(
        fact: EncodedFact, remembered: Sequence[EncodedFact], with_fact: bool
    ) -> list[EncodedPrompt]:
        """Fact, paraphrases, probes, remembered prompts, remembered probes: in this order."""
        return [
            *([fact.prompt] if with_fact else []),
            *fact.paraphrases,
            *fact.probes,
            *(old.prompt for old in remembered),
            *_first_probes(remembered),
        ]

    def _forward(self, prompts: Sequence[EncodedPrompt], updates: Updates | None) -> list[Tensor]:
        """Per prompt: −nats, token accuracy, KL from the reference, argmax agreement with it.

        The last two are 0 for prompts without a reference. Same prompt twice is run once.
        """
        unique = list(dict.fromkeys(prompts))
        parts: list[Tensor] = []
        order: list[int] = []
        for bucket in self.llm.buckets(unique):
            batch = self.llm.batch([unique[i] for i in bucket])
            logits = self.llm.answer_logits(batch, updates).float()
            values = self._scores(batch.prompts, logits, batch.labels)
            parts.append(batch.column_means(torch.stack(values, 1)))
            order += bucket
        if not order:
            return [torch.zeros(0, device=self.llm.device)] * 4
        place = {unique[i]: k for k, i in enumerate(order)}
        index = torch.tensor([place[p] for p in prompts], device=self.llm.device)
        return list(torch.cat(parts)[index].unbind(1))

    def _scores(
        self, prompts: Sequence[EncodedPrompt], logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        predictions = logits.argmax(-1)
        losses = -F.cross_entropy(logits, labels, reduction="none")
        correct = (predictions == labels).float()
        kl, agree = torch.zeros_like(losses), torch.zeros_like(losses)
        sizes = [len(prompt.answer_ids) for prompt in prompts]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        rows: list[int] = []
        references: list[Tensor] = []
        for prompt, start, size in zip(prompts, starts, sizes, strict=True):
            known = self._reference_log_probs.get(prompt)
            if known is not None:
                rows += range(start, start + size)
                references.append(known)
        if rows:
            index = torch.tensor(rows, device=logits.device)
            reference = torch.cat(references)
            now = logits[index].log_softmax(-1)
            divergence = F.kl_div(now, reference, reduction="none", log_target=True).sum(-1)
            kl = kl.index_put((index,), divergence)
            equal = (predictions[index] == reference.argmax(-1)).float()
            agree = agree.index_put((index,), equal)
        return losses, correct, kl, agree

    def _generate(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        budgets = [len(prompt.answer_ids) + EXTRA_TOKENS for prompt in prompts]
        return self.llm.generate([prompt.prompt for prompt in prompts], budgets)

    def _same_text(self, text: str, prompt: EncodedPrompt) -> bool:
        reference = self._reference_texts.get(prompt)
        return reference is not None and normalise(generated_answer(text)) == normalise(
            generated_answer(reference)
        )


def _first_probes(remembered: Sequence[EncodedFact]) -> list[EncodedPrompt]:
    return [old.probes[0] for old in remembered if old.probes]


class _Means:
    """Which prompt counts how much in which level; order as in :meth:`Evaluator._prompts`."""

    def __init__(self, fact: EncodedFact, remembered: Sequence[EncodedFact], decay: float) -> None:
        sizes = (1, len(fact.paraphrases), len(fact.probes), len(remembered))
        ends = np.cumsum([0, *sizes])
        self._fact, self._paraphrases, self._probes, self._retention = (
            slice(int(a), int(b)) for a, b in pairwise(ends)
        )
        ages = decay ** np.arange(1, len(remembered) + 1)
        total = int(ends[-1]) + len(_first_probes(remembered))
        self.has_probes = bool(fact.probes) or any(old.probes for old in remembered)
        self._edit = np.zeros(total)
        self._edit[self._fact] = 0.5 if fact.paraphrases else 1.0
        if fact.paraphrases:
            self._edit[self._paraphrases] = 0.5 / len(fact.paraphrases)
        self._remember = np.zeros(total)
        if remembered:
            self._remember[self._retention] = ages / ages.sum()
        self._local = np.zeros(total)
        if fact.probes:
            self._local[self._probes] = 1.0 / len(fact.probes)
        place = int(ends[-1])
        for age, old in zip(ages, remembered, strict=True):
            if old.probes:
                self._local[place] = age
                place += 1
        if self.has_probes:
            self._local /= self._local.sum()

    def coefficients(self) -> dict[str, np.ndarray]:
        """Coefficient of every prompt in the edit, locality and retention levels."""
        return {"edit": self._edit, "locality": self._local, "retention": self._remember}

    def locality(self, values: np.ndarray) -> float:
        """Weighted mean over unrelated prompts; NaN where there are none."""
        return float(values @ self._local) if self.has_probes else float("nan")

    def split(self, values: np.ndarray) -> dict[str, float]:
        """Means over the fact, its paraphrases and the remembered prompts; NaN where none."""
        paraphrases = values[self._paraphrases]
        has_memory = self._remember.any()
        return {
            "fact": float(values[self._fact][0]),
            "paraphrases": float(paraphrases.mean()) if len(paraphrases) else float("nan"),
            "retention": float(values @ self._remember) if has_memory else float("nan"),
        }
