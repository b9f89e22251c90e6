"""A low level with experience replay: every update also rehearses earlier facts and other prompts.

At every primitive step the model runs a few requests edited earlier and a few unrelated prompts, at
the present weights or, with ``look_ahead``, at the weights that the fact's own update would give.
The loss

    Σ −log p(y_i | x_i)  +  Σ KL[p_unedited ‖ p]

(mean over the tokens of each prompt) gives a second low-rank update of the same layers, by the same
decorrelated rule. With ``look_ahead`` training is first-order: gradients at those weights count as
constants, so how the parameters move the weights through the fact's own update is left out. So is
how they move the bound of the second update's size.

The earlier requests are those that the agent itself edited in this episode, without their
paraphrases, each with its latest answer; a fact that was already answered, or for which no layer
was chosen, was not edited. The unrelated prompts come from training, each once with the unedited
model's own answer and once with the true one; both are held to the unedited model's distribution.
No prompt of an evaluation is used. This is experience replay (Lin 1992) on the weights of the
edited model; the memory of the last k edits in HiEdit and RLEdit acts in training only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_env.errors import NonFiniteUpdateError, SettingsError
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture, GradientRows
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM


class Rehearsal(Hypernetwork):
    """A hypernetwork in decorrelated form that rehearses.

    Args:
        llm: The model, at which the rehearsed prompts are run.
        facts: Earlier requests per primitive step.
        probes: Unrelated prompts per primitive step; there are none before calibration.
        fact_weight, probe_weight: Weights of the two sums.
        largest: Bound of the size (Frobenius norm) of what is rehearsed, as a multiple of the
            fact's own update, layer by layer.
        look_ahead: Whether what is rehearsed is run at the weights that the fact's own update would
            give, so that it also repairs the damage of that update; at the present ones if not.
        end_answers: Whether a rehearsed answer is followed by the tokenizer's end token, and the
            present request is rehearsed too: the model learns to give the answer and stop.
        seed: Of the initial values; and with that of an episode (:meth:`seed`) of what is rehearsed
            when.
        cache_bytes: Bound of the memory for the unedited model's log-probabilities.
        **settings: As for :class:`~hiedit_agents.hierarchy.hypernetwork.Hypernetwork`.

    Raises:
        SettingsError: a negative number of prompts, or a weight that is negative or not finite.
    """

    name = "rehearsal"

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        facts: int = 4,
        probes: int = 4,
        fact_weight: float = 1.0,
        probe_weight: float = 1.0,
        largest: float = 2.0,
        look_ahead: bool = False,
        end_answers: bool = False,
        seed: int = 0,
        cache_bytes: int = 256 * 2**20,
        **settings: Any,
    ) -> None:
        for count in (facts, probes):
            if not isinstance(count, int) or count < 0:
                raise SettingsError(
                    f"facts and probes must be whole numbers ≥ 0, got {facts!r} and {probes!r}"
                )
        for weight in (fact_weight, probe_weight, largest):
            if not 0 <= weight < float("inf"):
                raise SettingsError(
                    "fact_weight, probe_weight and largest must be numbers ≥ 0, got "
                    f"{fact_weight!r}, {probe_weight!r} and {largest!r}"
                )
        self.llm = llm
        self.facts, self.probes = facts, probes
        self.fact_weight, self.probe_weight = fact_weight, probe_weight
        self.largest, self.look_ahead = largest, look_ahead
        end = llm.tokenizer.eos_token_id
        self._end: tuple[int, ...] = (end,) if end_answers and end is not None else ()
        self._seed, self._episode = seed, 0
        self._bank: tuple[EncodedPrompt, ...] = ()
        self._unedited = UneditedModel(llm, cache_bytes=cache_bytes)
        self._past: tuple[EncodedPrompt, ...] = ()
        self._earlier: tuple[EncodedPrompt, ...] = ()
        #: Accumulated changes of the weights (never written in place), prompts, and their rows.
        self._latest: tuple[tuple[Tensor | None, ...], list[EncodedPrompt], GradientRows] | None = (
            None
        )
        super().__init__(llm.shapes, llm.device, **{"form": "decorrelated", **settings}, seed=seed)

    # -- what is rehearsed ----------------------------------------------------------------------

    def calibrate(self, captures: Iterable[Capture]) -> None:
        """Takes the statistics, and the prompts themselves for rehearsal."""
        prompts: list[EncodedPrompt] = []

        def noted() -> Iterable[Capture]:
            for capture in captures:
                prompts.extend(capture.prompts)
                yield capture

        super().calibrate(noted())
        own = self._unedited.answers(prompts)
        found = [self._prompt(p.prompt_ids, p.answer_ids) for p in (*own, *prompts)]
        self._bank = tuple(dict.fromkeys(found))

    def state_dict(self) -> dict[str, Any]:
        """Parameters, calibration, and the tokens of the unrelated prompts."""
        bank = [[list(p.prompt_ids), list(p.answer_ids)] for p in self._bank]
        return {**super().state_dict(), "bank": bank}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a saved :meth:`state_dict` back."""
        rest = dict(state)
        bank = tuple(self._prompt(prompt, answer) for prompt, answer in rest.pop("bank"))
        super().load_state_dict(rest)
        self._bank = bank

    def _prompt(self, prompt: Sequence[int], answer: Sequence[int]) -> EncodedPrompt:
        """An unrelated prompt that is given by its tokens alone, as it is saved."""
        decode = self.llm.encoder.decode
        return EncodedPrompt(decode(prompt), decode(answer), tuple(prompt), tuple(answer))

    def seed(self, seed: int) -> None:
        """Of what is rehearsed when, in the episodes that begin from now on."""
        self._episode = seed

    def remember(self, facts: Sequence[EncodedPrompt]) -> None:
        """Facts that were edited into the model before, rehearsed from the next reset on.

        Args:
            facts: Earliest first, each prompt once.
        """
        self._earlier = tuple(facts)

    def reset(self) -> None:
        """Forgets the statistics and the requests of this episode."""
        super().reset()
        self._past = self._earlier
        self._rng = np.random.default_rng([self._seed, 3, self._episode])

    def observe(self, capture: Capture) -> None:
        """Takes one capture into the statistics, and its request into the memory."""
        super().observe(capture)
        if self._past[-len(capture.prompts) :] != capture.prompts:
            # A prompt that is given another answer has that one from now on. A new tuple: saved
            # states hold the old one.
            asked = {prompt.prompt_ids for prompt in capture.prompts}
            others = (prompt for prompt in self._past if prompt.prompt_ids not in asked)
            self._past = (*others, *capture.prompts)

    def statistics(self) -> dict[str, Any]:
        """Statistics, memory and random state of this episode."""
        own = {"past": self._past, "random": self._rng.bit_generator.state}
        return {**super().statistics(), **own}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        super().load_statistics(statistics)
        self._past = statistics["past"]
        self._rng.bit_generator.state = statistics["random"]

    def clone_for(self, llm: ResidentLLM) -> Self:
        """As in the base class; the copy rehearses on ``llm``."""
        twin = super().clone_for(llm)
        twin.llm, twin._latest = llm, None
        twin._unedited = self._unedited.clone_for(llm)
        return twin

    # -- the update -----------------------------------------------------------------------------

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The hypernetwork's update of the fact, and that of what is rehearsed, as one."""
        own = super().compute(capture, layers)
        written = _times(own, multipliers)
        present = {prompt.prompt_ids for prompt in capture.prompts}
        earlier = [prompt for prompt in self._past if prompt.prompt_ids not in present]
        facts, probes = self._draw(earlier, self.facts), self._draw(self._bank, self.probes)
        if self._end:
            facts = [self._ended(prompt) for prompt in (*capture.prompts, *facts)]
        if not (facts or probes) or not layers.any():
            return written
        references = [self._unedited.log_probs((probe,))[probe] for probe in probes]

        def loss(logits: Tensor, batch: PromptBatch) -> Tensor:
            sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
            parts, labels = torch.split(logits, sizes), torch.split(batch.labels, sizes)
            total = logits.new_zeros(())
            for part, label in zip(parts[: len(facts)], labels, strict=False):
                total = total + self.fact_weight * F.cross_entropy(part, label)
            for part, reference in zip(parts[len(facts) :], references, strict=True):
                divergence = F.kl_div(
                    part.log_softmax(-1), reference, reduction="batchmean", log_target=True
                )
                total = total + self.probe_weight * divergence
            return total

        prompts = [*facts, *probes]
        if self.look_ahead:
            try:
                rows = self.llm.gradients(prompts, loss, written)
            except NonFiniteUpdateError:
                # Refused where it is written, which ends the episode.
                return written
        else:
            rows = self._rows_at_present(prompts, loss)
        rehearsed = self.correct(rows, layers)
        # Bounded as if all were written: a multiplier of 0 would leave no bound to differentiate.
        joined = tuple(
            None if one is None or two is None else _joined(one, self._bounded(two, one))
            for one, two in zip(own, rehearsed, strict=True)
        )
        return _times(joined, multipliers)

    def _bounded(self, update: LowRankUpdate, other: LowRankUpdate) -> LowRankUpdate:
        """An update no larger than ``largest`` times another one."""
        with torch.no_grad():
            sizes = [u.squared_norm().clamp_min(0).sqrt() for u in (update, other)]
            factor = (self.largest * sizes[1] / sizes[0].clamp_min(1e-30)).clamp_max(1.0)
        return LowRankUpdate(update.left, update.right * factor)

    def _rows_at_present(
        self, prompts: list[EncodedPrompt], loss: Callable[[Tensor, PromptBatch], Tensor]
    ) -> GradientRows:
        """Gradients at the present weights; not computed again where both are as the last time.

        Options that are tried from one saved state all begin with the same rehearsal.
        """
        weights = tuple(self.llm.snapshot().changes.values())
        if self._latest is not None:
            old_weights, old_prompts, rows = self._latest
            same = all(a is b for a, b in zip(weights, old_weights, strict=True))
            if same and prompts == old_prompts:
                return rows
        rows = self.llm.gradients(prompts, loss)
        self._latest = weights, prompts, rows
        return rows

    def _draw(self, prompts: Sequence[EncodedPrompt], count: int) -> list[EncodedPrompt]:
        chosen = self._rng.choice(len(prompts), min(count, len(prompts)), replace=False)
        return [prompts[i] for i in chosen]

    def _ended(self, prompt: EncodedPrompt) -> EncodedPrompt:
        """The same request with an end token after its answer, if it has none and there is room."""
        limit = self.llm.encoder.max_length
        full = limit is not None and prompt.length >= limit
        if full or prompt.answer_ids[-1] in (*self._end, self.llm.encoder.end_id):
            return prompt
        return replace(prompt, answer_ids=(*prompt.answer_ids, *self._end))


def _times(
    updates: Sequence[LowRankUpdate | None], multipliers: NDArray[np.float32] | Tensor | None
) -> tuple[LowRankUpdate | None, ...]:
    """Every layer's update times its multiplier; gradients flow into a tensor of them."""
    if multipliers is None:
        return tuple(updates)
    factors = torch.as_tensor(multipliers)
    return tuple(
        None if u is None else LowRankUpdate(u.left, u.right * factor.to(u.right))
        for u, factor in zip(updates, factors, strict=True)
    )


def _joined(one: LowRankUpdate, two: LowRankUpdate) -> LowRankUpdate:
    """The sum of two updates of one layer."""
    return LowRankUpdate(torch.cat((one.left, two.left)), torch.cat((one.right, two.right)))
