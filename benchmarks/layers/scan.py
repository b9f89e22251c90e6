"""Which layers are worth editing: effect per unit of damage of every matrix, measured on few facts.

Every fact is written into every layer alone, from the unedited weights, by a closed-form rule, step
after step, until it is given. The size of a step is the same for all layers in the unit that
matters: by its gradient it would take away half of the loss. So a fact is written about as far as
it must be, whatever the scale of a layer and its rule. Then the model is asked the fact's
paraphrases, unrelated prompts, and *subject-swapped* prompts, the fact's own prompt with another
subject in its place. The model's own weights are never written: changes belong to forks
(:meth:`~hiedit_env.resident.resident.ResidentLLM.fork`).

The score of a layer is

    score = mean effect / (mean damage + 0.05)

over the facts, in nats per token: *effect* is the mean of the gains on the fact and on its
paraphrases (gain: −log p(answer) before minus after), and 0 for a fact that is not given after the
last step; *damage* is the mean of the divergences KL[unedited ‖ edited] at the unedited model's own
greedy answers to unrelated and to subject-swapped prompts. With the 0.05 a layer that changes
nothing scores 0 and not 0/0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from hiedit_benchmarks.layers.facts import FactPrompts
from hiedit_benchmarks.layers.scores import LayerScore, Trial, mean_known
from hiedit_env.errors import LayerError, NonFiniteUpdateError
from hiedit_env.evaluation.unedited import UneditedModel, answer_log_probs
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.loading import LoadedModel
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.batched import read_together
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule

#: Share of the loss that the gradient predicts a step to take away.
SHARE = 0.5
#: Nats per token that stand for more, so that one broken trial does not hide all others.
WORST = 50.0


def scan(
    loaded: LoadedModel,
    layers: Sequence[CandidateLayer],
    facts: Sequence[FactPrompts],
    make: Callable[[ResidentLLM], UpdateRule],
    *,
    steps: int = 10,
    progress: Callable[[int], None] = lambda done: None,
    skipped: Callable[[str], None] = lambda reason: None,
) -> list[LayerScore]:
    """Measures every layer.

    Blocks are measured one after another, each as the first that is run again, so that the time of
    an update is that of an environment whose first candidate block it is.

    Args:
        loaded: The model; its weights stay as they are.
        layers: What to measure, in forward order.
        facts: From :func:`.facts.prompts_of`.
        make: Makes the update rule for a resident model.
        steps: Maximum number of updates per fact.
        progress: Called with the number of trials that were finished since the last call.
        skipped: Called with the reason for every layer that cannot be edited.

    Returns:
        One score per layer that can be edited.

    Raises:
        LayerError: none can be edited.
    """

    def without(reason: str) -> None:
        progress(len(facts))
        skipped(reason)

    found: list[LayerScore] = []
    for llm in _by_block(loaded, layers, without):
        found += _scan_block(llm, facts, make(llm), steps, progress)
    if not found:
        raise LayerError("none of the layers can be edited; see the reasons above")
    return found


def _by_block(
    loaded: LoadedModel,
    layers: Sequence[CandidateLayer],
    skipped: Callable[[str], None],
) -> Iterator[ResidentLLM]:
    """A resident model per block; of one layer each where not all of a block can be edited."""
    for block in sorted({layer.block for layer in layers}):
        own = [layer for layer in layers if layer.block == block]
        try:
            yield ResidentLLM(loaded.model, loaded.tokenizer, own)
            continue
        except LayerError as error:
            if len(own) == 1:
                skipped(str(error))
                continue
        for layer in own:
            try:
                llm = ResidentLLM(loaded.model, loaded.tokenizer, [layer])
            except LayerError as error:
                skipped(str(error))
                continue
            yield llm


def _scan_block(
    llm: ResidentLLM,
    facts: Sequence[FactPrompts],
    rule: UpdateRule,
    steps: int,
    progress: Callable[[int], None],
) -> list[LayerScore]:
    befores = [Answers.of(llm, fact) for fact in facts]
    captures, seconds = [], []
    for fact in facts:
        # What is below the block is known by now, as for a prompt that an environment has met.
        start = time.perf_counter()
        captures.append(llm.read(fact.prompt).capture())
        seconds.append(time.perf_counter() - start)
    for capture in captures:
        # As in the middle of a stream: the rule's statistics are those of all facts.
        rule.observe(capture)
    forks = [llm.fork() for _ in facts]
    scores = []
    for i, layer in enumerate(llm.layers):
        # Once for the time alone: below, several facts are read together.
        start = time.perf_counter()
        rule.propose(captures[0], np.arange(len(llm.layers)) == i)
        proposing = time.perf_counter() - start
        given = write_all(forks, i, [fact.prompt for fact in facts], captures, rule, steps)
        trials = []
        for k, fact in enumerate(facts):
            trials.append(judge(forks[k], i, fact, befores[k], given[k], seconds[k] + proposing))
            forks[k].restore_unedited()
            progress(1)
        scores.append(LayerScore.of(layer, trials))
    return scores


@dataclass(frozen=True, slots=True)
class Answers:
    """What the unedited model says to the prompts that judge a fact.

    Args:
        losses: −log p(answer) per prompt of the fact and its paraphrases, mean over tokens.
        reference: Log-probabilities at the unedited model's own answers to the other prompts.
    """

    losses: dict[EncodedPrompt, float]
    reference: dict[EncodedPrompt, torch.Tensor]

    @classmethod
    def of(cls, llm: ResidentLLM, fact: FactPrompts) -> Answers:
        """Asks the model at its present weights."""
        own = list(dict.fromkeys((fact.prompt, *fact.paraphrases)))
        others = list(dict.fromkeys(fact.others))
        # Together, as after an edit: what shares a batch changes the last bits.
        rows = answer_log_probs(llm, [*own, *others])
        return cls({p: _loss(p, rows[p]) for p in own}, {p: rows[p] for p in others})


def write_all(
    forks: Sequence[ResidentLLM],
    layer: int,
    prompts: Sequence[EncodedPrompt],
    captures: Sequence[Capture],
    rule: UpdateRule,
    steps: int,
) -> list[bool]:
    """Writes each fact into its own fork, step after step until it is given.

    Args:
        forks: One per fact, unedited.
        layer: Index of the only layer that is written.
        prompts: The facts.
        captures: Of the facts at the unedited weights.
        rule: Proposes the updates; takes no capture into its statistics.
        steps: Maximum number of updates per fact.

    Returns:
        Whether each fact is given in the end: every token of its answer is the argmax. A fact whose
        update is not finite, or by its gradient would raise the loss, gets no further step.
    """
    given = [capture.answered for capture in captures]
    left = [k for k, done in enumerate(given) if not done]
    present = list(captures)
    for _ in range(steps):
        left = [k for k in left if _write(forks[k], layer, present[k], rule)]
        if not left:
            break
        readings = read_together([(forks[k], (prompts[k],)) for k in left])
        for k, reading in zip(left, readings, strict=True):
            given[k] = reading.answered
            if given[k]:
                reading.release()
            else:
                present[k] = reading.capture()
        left = [k for k in left if not given[k]]
    return given


def _write(fork: ResidentLLM, layer: int, capture: Capture, rule: UpdateRule) -> bool:
    """One step of one fact; False, and nothing is written, where there is no way down."""
    update = rule.propose(capture, np.arange(len(fork.layers)) == layer)[layer]
    if update is None or not np.isfinite(capture.loss):
        return False
    predicted = -directional(capture, layer, update)
    if not np.isfinite(predicted) or predicted <= 0:
        return False
    updates: list[LowRankUpdate | None] = [None] * len(fork.layers)
    updates[layer] = update.scaled(SHARE * capture.loss / predicted)
    try:
        fork.commit(updates)
    except NonFiniteUpdateError:
        return False
    return True


def judge(
    editor: ResidentLLM,
    layer: int,
    fact: FactPrompts,
    before: Answers,
    given: bool,
    seconds: float,
) -> Trial:
    """Measures what a fact that is written into a fork has changed.

    Args:
        editor: The fork.
        layer: Index of the layer that was written.
        fact: The fact.
        before: What the unedited model says.
        given: Whether the fact is given.
        seconds: Time of one update.
    """
    own = list(before.losses)
    now = answer_log_probs(editor, [*own, *before.reference])
    gains = {p: before.losses[p] - _loss(p, now[p]) for p in own}
    right = {p: float(_is_given(p, now[p])) for p in own}
    damages = {p: divergence(rows, now[p]) for p, rows in before.reference.items()}
    kept = [
        float((now[p].argmax(-1) == rows.argmax(-1)).float().mean())
        for p, rows in before.reference.items()
    ]
    change = editor.change(layer)
    norm = 0.0 if change is None else float(torch.linalg.vector_norm(change))
    return Trial(
        given=given,
        size=norm / base if (base := editor.base_norm(layer)) else float("nan"),
        gain=gains[fact.prompt],
        paraphrase_gain=mean_known([gains[p] for p in fact.paraphrases]),
        paraphrases_given=mean_known([right[p] for p in fact.paraphrases]),
        unrelated=mean_known([damages[p] for p in fact.unrelated]),
        swapped=mean_known([damages[p] for p in fact.swapped]),
        agreement=mean_known(kept),
        seconds=seconds,
    )


def directional(capture: Capture, layer: int, update: LowRankUpdate) -> float:
    """What the gradient predicts the loss to rise by under an update of one layer.

    ⟨uᵀ v, leftᵀ right⟩ for keys u and value gradients v, without the products.
    """
    keys, values = capture.keys[layer].float(), capture.value_gradients[layer].float()
    return float(((keys @ update.left.mT) * (values @ update.right.mT)).sum())


def divergence(reference: torch.Tensor, now: torch.Tensor) -> float:
    """KL[reference ‖ now] in nats per token, of log-probabilities tokens × vocabulary.

    :data:`WORST` where it is larger, or the edited model's numbers are not finite.
    """
    return _bounded(float(F.kl_div(now, reference, reduction="batchmean", log_target=True)))


def _bounded(nats: float) -> float:
    return min(nats, WORST) if np.isfinite(nats) else WORST


def _labels(prompt: EncodedPrompt, rows: torch.Tensor) -> torch.Tensor:
    return torch.tensor(prompt.answer_ids, device=rows.device)


def _loss(prompt: EncodedPrompt, rows: torch.Tensor) -> float:
    """−log p(answer), mean over its tokens, from log-probabilities; at most :data:`WORST`."""
    return _bounded(float(F.nll_loss(rows, _labels(prompt, rows))))


def _is_given(prompt: EncodedPrompt, rows: torch.Tensor) -> bool:
    return bool((rows.argmax(-1) == _labels(prompt, rows)).all())


def not_given(unedited: UneditedModel, facts: Sequence[FactPrompts]) -> Iterator[FactPrompts]:
    """The facts that the unedited model does not give, with its own answers to other prompts.

    Args:
        unedited: The model.
        facts: Asked one after another, as they are wanted.
    """
    for fact in facts:
        if not _is_given(fact.prompt, answer_log_probs(unedited.llm, [fact.prompt])[fact.prompt]):
            yield fact.answered_by(unedited)
