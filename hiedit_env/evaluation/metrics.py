"""The metrics of the field over a whole stream of facts, at the model's present weights.

Efficacy (the requests' own prompts), generalization (their paraphrases), specificity (unrelated
prompts), retention (efficacy on the facts edited first) and portability (what follows from the
facts), each asked in one or two forms and read in four ways: with the answer given token by token
(*teacher forcing*), which overestimates because content and length are given away
(arXiv 2509.22072), and generated freely.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match, starts_with
from hiedit_env.evaluation.names import GENERATED, AskedForm, metric_in
from hiedit_env.evaluation.questions import questions_about
from hiedit_env.evaluation.unedited import Progress, UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

Scores = dict[str, NDArray[np.float64]]

#: How each of :data:`~hiedit_env.evaluation.names.METRICS` is read.
READINGS = ("token_accuracy", "exact_match", "generation", "generation_prefix")

#: Most facts that retention is measured on.
RETENTION_LIMIT = 500


def retention_size(num_facts: int) -> int:
    """How many facts from the start of a stream retention is measured on: a third, 1 to 500.

    >>> [retention_size(n) for n in (1, 5, 150, 9000)]
    [1, 1, 50, 500]
    """
    return min(max(num_facts // 3, 1), RETENTION_LIMIT)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What :func:`evaluate` found.

    Args:
        per_fact: Metric → reading → F float64 in percent, in the order of the requests; NaN where
            a fact has nothing to measure (no paraphrases, no unrelated prompts, and for retention
            the facts after the first third).
        answers: F texts, the greedy continuations of the requests' own prompts; empty where none
            were asked for.
        chat_answers: The same in the chat form; an empty text for a prompt that a template has
            written already.
        first_texts: Metric that answers were generated for → F texts, the greedy continuation of
            each fact's first prompt of that kind; an empty text where a fact has none.
    """

    per_fact: Mapping[str, Scores]
    answers: tuple[str, ...]
    chat_answers: tuple[str, ...] = ()
    first_texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metric → reading → mean over facts in percent; NaN where no fact has anything."""
        return {
            metric: {reading: _mean(values) for reading, values in scores.items()}
            for metric, scores in self.per_fact.items()
        }


def evaluate(
    llm: ResidentLLM,
    requests: Sequence[Request],
    reference: UneditedModel | None,
    *,
    forms: Sequence[AskedForm] = ("plain",),
    generation: Collection[str] = GENERATED,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures the model at its present weights on a stream of facts.

    Every metric holds ``token_accuracy`` (share of answer tokens that are the argmax under teacher
    forcing, the end token among them where the model's encoder puts one behind every answer),
    ``exact_match`` (all of them are) and, where asked for, ``generation`` and ``generation_prefix``
    (:func:`~hiedit_env.evaluation.matching.is_match` and
    :func:`~hiedit_env.evaluation.matching.starts_with` on the greedy continuation, of the tokens of
    the answer's text plus ``EXTRA_TOKENS``). A fact's value is the mean over its prompts.

    Specificity is measured against the true answers; its ``agreement`` is the share of tokens of
    the *unedited* model's own greedy answers that are still the argmax, which shows damage that
    true answers hide. Where the data has prompts that ask the same about other subjects, they are
    measured once more by themselves as ``neighbours``, and the others as ``unrelated``.

    Where the data has prompts of portability or other names of subjects, ``portability`` is over
    all of them and ``portability/KIND`` over each kind; a generated answer is right if it gives the
    answer or one of its aliases.

    Args:
        llm: The model.
        requests: F facts in stream order.
        reference: The unedited model's answers; ``agreement`` is left out where None.
        forms: ``"plain"`` asks every prompt as it is. ``"chat"`` asks it as the message of a user
            through the tokenizer's chat template, exactly as ``apply_chat_template`` with
            ``add_generation_prompt=True`` does; its metrics are called ``chat_efficacy`` and so on.
        generation: Metrics to generate answers for, which takes most of the time; retention has
            what efficacy has.
        progress: Called after every batch, with the stages ``"reference"``, ``"teacher forcing"``
            and ``"generation"``.

    Raises:
        SettingsError: no requests, an unknown metric or form, or a reference made for another
            model.
        PromptError: a text that is empty or too long, which names the request's source; or the chat
            form of a tokenizer that has no chat template.
    """
    if not requests:
        raise SettingsError("an evaluation needs at least one request")
    if reference is not None and reference.llm is not llm:
        raise SettingsError("the reference answers belong to another ResidentLLM; make them anew")
    unknown = set(generation) - set(GENERATED)
    if unknown:
        raise SettingsError(f"unknown metrics {sorted(unknown)}; known: {', '.join(GENERATED)}")
    questions = questions_about(llm, requests, forms)
    groups = questions.groups
    local = [name for name, group in groups.items() if group.metric == "specificity"]
    own: dict[EncodedPrompt, EncodedPrompt] = {}
    if reference is not None:
        probes = questions.prompts(local)
        own = dict(zip(probes, reference.answers(probes, progress), strict=True))
    accuracy, exact = _teacher_forced(llm, [*questions.prompts(), *own.values()], progress)
    per_fact: dict[str, Scores] = {
        name: {
            "token_accuracy": _per_fact(group.facts, accuracy),
            "exact_match": _per_fact(group.facts, exact),
        }
        for name, group in groups.items()
    }
    wanted = [name for name, group in groups.items() if group.metric in generation]
    texts = _generate(llm, questions.prompts(wanted), progress)
    for reading, judge in (("generation", is_match), ("generation_prefix", starts_with)):
        values = {
            p: float(any(judge(text, right) for right in (p.answer, *questions.aliases.get(p, ()))))
            for p, text in texts.items()
        }
        for name in wanted:
            per_fact[name][reading] = _per_fact(groups[name].facts, values)
    if reference is not None:
        agreement = {p: accuracy[answered] for p, answered in own.items()}
        for name in local:
            per_fact[name]["agreement"] = _per_fact(groups[name].facts, agreement)
    early = np.arange(len(requests)) < retention_size(len(requests))
    answers: dict[str, tuple[str, ...]] = {"plain": (), "chat": ()}
    for form in dict.fromkeys(forms):
        efficacy = metric_in(form, "efficacy")
        per_fact[metric_in(form, "retention")] = {
            reading: np.where(early, values, np.nan)
            for reading, values in per_fact[efficacy].items()
        }
        if efficacy in wanted:
            facts = groups[efficacy].facts
            answers[form] = tuple(texts[fact[0]] if fact else "" for fact in facts)
    first = {
        name: tuple(texts[fact[0]] if fact else "" for fact in groups[name].facts)
        for name in wanted
    }
    return Evaluation(per_fact, answers["plain"], answers["chat"], first)


# -- inside ---------------------------------------------------------------------------------------


@torch.inference_mode()
def _teacher_forced(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt], progress: Progress | None
) -> tuple[dict[EncodedPrompt, float], dict[EncodedPrompt, float]]:
    """Share of correct answer tokens, and whether all are, by prompt; from 0 to 1."""
    unique = list(dict.fromkeys(prompts))
    accuracy: dict[EncodedPrompt, float] = {}
    exact: dict[EncodedPrompt, float] = {}
    for bucket in llm.buckets(unique):
        batch = llm.batch([unique[i] for i in bucket])
        correct = llm.answer_logits(batch).argmax(-1) == batch.labels
        # Without float64, which not every device has: counts are exact, and divided here.
        counts = batch.to_rows(correct, fill=False).sum(1).tolist()
        for prompt, count in zip(batch.prompts, counts, strict=True):
            accuracy[prompt] = count / len(prompt.answer_ids)
            exact[prompt] = float(count == len(prompt.answer_ids))
        if progress is not None:
            progress("teacher forcing", len(accuracy), len(unique))
    return accuracy, exact


def _generate(
    llm: ResidentLLM, prompts: Sequence[EncodedPrompt], progress: Progress | None
) -> dict[EncodedPrompt, str]:
    """Greedy continuations; prompts that differ in the wording of the answer only are run once."""
    end = llm.encoder.end_id

    def key(p: EncodedPrompt) -> tuple[int, tuple[int, ...]]:
        # The end token is no part of the answer's text, so it earns no further one.
        ended = end is not None and p.answer_ids[-1] == end and len(p.answer_ids) > 1
        return len(p.answer_ids) - ended + EXTRA_TOKENS, p.prompt_ids

    runs = {key(p): p for p in prompts}
    # Similar budgets and lengths together, in the sizes that ResidentLLM.generate batches.
    keys = sorted(runs, key=lambda found: (found[0], len(found[1])))
    size = max(1, llm.max_batch_tokens // 64)
    texts: dict[tuple[int, tuple[int, ...]], str] = {}
    for start in range(0, len(keys), size):
        group = keys[start : start + size]
        made = llm.generate([runs[found] for found in group], [budget for budget, _ in group])
        texts.update(zip(group, made, strict=True))
        if progress is not None:
            progress("generation", len(texts), len(keys))
    return {p: texts[key(p)] for p in prompts}


def _per_fact(
    facts: Sequence[Sequence[EncodedPrompt]], values: Mapping[EncodedPrompt, float]
) -> NDArray[np.float64]:
    """Mean of each fact's values in percent; NaN for a fact without any."""
    return np.array(
        [100.0 * float(np.mean([values[p] for p in fact])) if fact else np.nan for fact in facts]
    )


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
