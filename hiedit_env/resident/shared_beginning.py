"""Prompts that begin alike, as in one chat template, with their beginning run once for all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hiedit_env.errors import ModelError
from hiedit_env.model.batches import PromptBatch
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.ends import Ends
from hiedit_env.resident.upper_half import Compared

if TYPE_CHECKING:
    from hiedit_env.resident.resident import ResidentLLM

#: Running a beginning by itself pays from this many common tokens and this many prompts on.
SHORTEST, FEWEST = 16, 3

#: Largest difference of two logits up to which they count as equal, over the largest logit.
TOLERANCE = 1e-4


def alike(prompts: Sequence[EncodedPrompt]) -> list[tuple[int, list[int]]]:
    """Which prompts begin alike.

    >>> chat = [EncodedPrompt("", "", (*range(20), i), (1,)) for i in (5, 6, 7)]
    >>> alike([*chat, EncodedPrompt("", "", (1, 2), (3,))])
    [(20, [0, 1, 2]), (0, [3])]

    Returns:
        Per group the tokens that all of its prompts begin with, and its places in order. The tokens
        are 0 for the group of those that share none or too few. No token of an answer is among
        them, nor is the last one of a prompt.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        begin = prompt.prompt_ids[:SHORTEST]
        groups.setdefault(begin if len(begin) == SHORTEST else (), []).append(place)
    found, rest = [], []
    for begin, places in groups.items():
        common = _common([prompts[i] for i in places]) if begin and len(places) >= FEWEST else 0
        if common >= SHORTEST:
            found.append((common, places))
        else:
            rest += places
    return [*found, *([(0, sorted(rest))] if rest else [])]


def _common(prompts: Sequence[EncodedPrompt]) -> int:
    columns = zip(*(prompt.prompt_ids[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def logits_alike(llm: ResidentLLM, batch: PromptBatch, common: int) -> Tensor:
    """Logits at the answer tokens of prompts that begin alike, prompt after prompt.

    From the first candidate block on, the beginning is run once for all of them; what the blocks
    below give is remembered per prompt. This is done where it gives what this model gives with
    whole prompts, which is looked at for every length of a beginning the first time, and again
    whenever a prompt is longer than all before. In half precision whole prompts are run, since
    what is close there may change places.

    Args:
        llm: The model at its present weights.
        batch: The prompts.
        common: Number of tokens that all of them begin with, as in :func:`alike`; 0 for none.

    Returns:
        Answer tokens × vocabulary, in the model's dtype.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is no memory left.
    """
    exact = llm.dtype in (torch.float32, torch.float64)
    # Of a group that begins alike, a batch may hold few.
    if not (common and exact and len(batch.prompts) >= FEWEST and llm.can_share(batch)):
        return llm.answer_logits(batch)
    state, longest = llm.upper.run_alike.setdefault(common, Compared()), batch.longest
    ends: Tensor | None = None
    if longest < state.wrong:
        # Whatever a model's code raises here means only that it cannot be run like this.
        try:
            ahead = [common] * len(batch.prompts)
            run = _BegunAlike(llm, batch.prompts, ahead, (), llm.dtype)
            with torch.inference_mode(False), torch.no_grad(), run.hooked({}):
                ends = run.logits(run.all).to(llm.dtype)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            if longest > state.right:
                state.wrong = longest
    if ends is not None and longest <= state.right:
        return ends
    whole = llm.answer_logits(batch)
    # Weights that give no numbers say nothing about how they are run.
    if ends is not None and bool(whole.isfinite().all()):
        bound = TOLERANCE * float(whole.abs().max())
        if float((ends - whole).abs().max()) <= bound:
            state.right = longest
        else:
            state.wrong = longest
    return whole


class _BegunAlike(Ends):
    """As :class:`.ends.Ends`, behind one beginning that all prompts have; it measures nothing.

    Raises:
        ModelError: as in the base class, or the cache is of another kind.
    """

    def _first(self) -> int:
        return self.llm.first_block

    def _first_pass(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """As in the base class; what enters the first block is remembered per prompt."""
        number, common = len(self.prompts), self.positions[0]
        ids = torch.tensor([self.prompts[0].prompt_ids[:common]], device=self.llm.device)
        cache = self._fresh(())
        with self.llm.with_changes():
            self._run(ids, torch.ones_like(ids), cache)
        layers = cast(Sequence[Any], cache.layers)
        if any(layer.keys.shape[-2] != common for layer in layers):
            raise ModelError("a cache that drops tokens cannot be shared by several prompts")
        known = [
            (layer.keys.expand(number, -1, -1, -1), layer.values.expand(number, -1, -1, -1))
            for layer in layers
        ]
        return known, self.llm.entering(self.batch(self.all))[:, common:]
