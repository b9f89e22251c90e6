"""Prompts run again and again while vectors are added to what layers give at one token of each.

This is how a value is found that makes the model answer as wanted, as in ROME (arXiv 2202.05262,
section 3.1, step 2), here for several layers and several prompts at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.ends import Chosen, Ends, Runner, WholePrompts
from hiedit_env.resident.packed_ends import PackedEnds, Row, packing_pays
from hiedit_env.resident.upper_half import Compared

if TYPE_CHECKING:
    from hiedit_env.resident.resident import ResidentLLM

#: Largest difference up to which running the ends of prompts counts as running them, in nats per
#: nat above one.
TOLERANCE = 2e-3

#: The same in a precision that is not the model's own.
ROUGH_TOLERANCE = 0.1

#: Most prompts that share a batch; where there are more, those of like lengths do. With 16 ends a
#: pass, weights no longer cost more than the tokens; searches mostly run half of a batch.
TOGETHER = 24


class Nudges:
    """Losses of prompts under vectors that are added to layers' outputs.

    Only tokens from the nudged one on are run, from the first nudged block on, behind the keys and
    values of the tokens before, where that gives this model's own losses; else whole prompts. Short
    ends may be packed into one row (:mod:`.packed_ends`). Losses of up to four prompts are compared
    for every model, precision and layout, and again whenever a row is longer than all rows before.

    Args:
        llm: The model, at its present weights; they must not change while this object is used.
        prompts: P prompts with their answers.
        positions: P positions in ``input_ids``, one of each prompt, where vectors are added.
        layers: The G layers, as indices into ``llm.layers``.
        dtype: The precision of the runs; None for the model's own. One in which this model's losses
            are others is not used.
        kinds: P numbers, where some prompts are seldom run with some others: those of different
            numbers do not share a batch.

    Attributes:
        keys: Per layer P × d_in, what the layer was given at the positions in the last run; before
            the first one what it is given without vectors, in the model's own precision.
        lengths: P float32, how long the hidden states at the positions are behind the layers'
            blocks without vectors, mean over the blocks: what lengths of vectors are compared with.

    Raises:
        SettingsError: a position outside its prompt.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        prompts: Sequence[EncodedPrompt],
        positions: Sequence[int],
        layers: Sequence[int],
        dtype: torch.dtype | None = None,
        kinds: Sequence[int] | None = None,
    ) -> None:
        for prompt, position in zip(prompts, positions, strict=True):
            if not 0 <= position <= prompt.first_position:
                raise SettingsError(
                    f"position {position} is not in the prompt {prompt.prompt!r:.60}, which has "
                    f"{len(prompt.prompt_ids)} tokens"
                )
        self.llm, self.layers = llm, tuple(layers)
        self._all: Chosen = tuple(range(len(prompts)))
        #: Prompts that run apart from the others, if there are such: their places, and they.
        self._parts: list[tuple[Chosen, Nudges]] = []
        self.lengths: Tensor
        self._prompts = tuple(prompts)
        groups = _groups(llm, prompts, positions, kinds)
        if len(groups) > 1:
            for group in groups:
                own = [prompts[i] for i in group], [positions[i] for i in group]
                self._parts.append((group, Nudges(llm, *own, layers, dtype)))
            self._gather(self._all)
            self.lengths = self._in_order([(g, one.lengths) for g, one in self._parts], self._all)
            return
        self._run = self._chosen(prompts, positions, dtype or llm.dtype)
        self.keys, self.lengths = self._run.keys, self._run.lengths

    def losses(self, vectors: Sequence[Tensor | None], rows: Sequence[int] | None = None) -> Tensor:
        """−log p per answer token of prompts, in nats.

        Args:
            vectors: Per layer P' × d_out (or 1 × d_out for one vector everywhere), added at the
                positions; gradients flow into them. None for a layer that is left as it is.
            rows: The P' prompts that are run, rising; all of them where None.

        Returns:
            P' float32; the layers' inputs at the positions are left in ``keys``.
        """
        chosen = self._all if rows is None else tuple(rows)
        logits = self.logits(vectors, chosen)
        return answer_losses(logits, [self._prompts[i] for i in chosen])[0]

    def logits(self, vectors: Sequence[Tensor | None], rows: Sequence[int] | None = None) -> Tensor:
        """Logits at the answer tokens, prompt after prompt; arguments of :meth:`losses`.

        Returns:
            Answer tokens × vocabulary.
        """
        chosen = self._all if rows is None else tuple(rows)
        if self._parts:
            logits: dict[int, Tensor] = {}
            for own, one, (given, places) in self._apart(vectors, chosen):
                sizes = [len(self._prompts[i].answer_ids) for i in own]
                parts = torch.split(one.logits(given, places), sizes)
                logits.update(zip(own, parts, strict=True))
            self._gather(chosen)
            return torch.cat([logits[i] for i in chosen])
        self.keys = list(self.keys)
        with self._run.hooked(self._hooks(self._run.places(chosen), vectors)):
            return self._run.logits(chosen)

    def _apart(
        self, vectors: Sequence[Tensor | None], chosen: Chosen
    ) -> Iterator[tuple[Chosen, Nudges, tuple[list[Tensor | None], Chosen]]]:
        """The parts with chosen prompts: which these are, the part, its vectors and its places."""
        rows = {place: row for row, place in enumerate(chosen)}
        for group, one in self._parts:
            own = tuple(i for i in group if i in rows)
            if own:
                at = [rows[i] for i in own]
                given = [v if v is None or len(v) == 1 else v[at] for v in vectors]
                yield own, one, (given, tuple(group.index(i) for i in own))

    def _gather(self, chosen: Chosen) -> None:
        """Takes over what the parts' last runs left for chosen prompts."""
        wanted = set(chosen)
        ran = [
            (tuple(i for i in group if i in wanted), one)
            for group, one in self._parts
            if wanted.intersection(group)
        ]
        self.keys = [
            self._in_order([(own, one.keys[at]) for own, one in ran], chosen)
            for at in range(len(self.layers))
        ]

    @staticmethod
    def _in_order(found: Sequence[tuple[Chosen, Tensor]], chosen: Chosen) -> Tensor:
        """Rows of the parts in the order of the chosen prompts."""
        places = [i for own, _ in found for i in own]
        back = [places.index(i) for i in chosen]
        return torch.cat([rows for _, rows in found])[back]

    def _hooks(
        self, places: Sequence[int], vectors: Sequence[Tensor | None]
    ) -> dict[int, Callable[..., Tensor]]:
        at = torch.tensor(places, device=self.llm.device)

        def hook(place: int) -> Callable[..., Tensor]:
            def add(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                self.keys[place] = args[0].reshape(-1, args[0].shape[-1])[at].detach()
                vector = vectors[place]
                if vector is None:
                    return output
                added = output.reshape(-1, output.shape[-1]).clone()
                added[at] = added[at] + vector.to(output.dtype)
                return added.reshape(output.shape)

            return add

        return {layer: hook(place) for place, layer in enumerate(self.layers)}

    def _chosen(
        self, prompts: Sequence[EncodedPrompt], positions: Sequence[int], dtype: torch.dtype
    ) -> Runner:
        """The ends alone, if this model gives with them what it gives with whole prompts."""
        llm, known, own = self.llm, self.llm.upper.run_ends, None
        some = _looked_at(prompts, positions)
        lengths = [prompt.length for prompt in prompts]
        row = Row.of(prompts, positions)
        layouts = (True, False) if packing_pays(row) else (False,)
        for precision in dict.fromkeys((dtype, llm.dtype)):
            for packed in layouts:
                # What is known of this layout in this precision.
                state = known.setdefault((precision, packed), Compared())
                longest = len(row.ids) if packed else max(lengths)
                if longest >= state.wrong:
                    continue
                # Whatever a model's code raises here means only that it cannot be run like this.
                try:
                    kind = PackedEnds if packed else Ends
                    ends = kind(llm, prompts, positions, self.layers, precision)
                    if longest <= state.right:
                        return ends
                    if own is None:
                        few = [prompts[i] for i in some], [positions[i] for i in some]
                        whole = WholePrompts(llm, *few, self.layers)
                        own = answer_losses(whole.measured(), whole.prompts)[0]
                    with torch.no_grad():
                        off = answer_losses(ends.logits(ends.all), prompts)[0][some] - own
                    off = off.abs()
                    bound = TOLERANCE if precision == llm.dtype else ROUGH_TOLERANCE
                    if bool((off <= bound * (1 + own)).all()):
                        state.right = longest
                        return ends
                except (MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception:
                    if longest <= state.right:
                        continue
                state.wrong = longest
        whole = WholePrompts(llm, prompts, positions, self.layers)
        whole.measured()
        return whole


def _looked_at(prompts: Sequence[EncodedPrompt], positions: Sequence[int]) -> list[int]:
    """The prompts by which ways of running all of them are compared, rising.

    What is at the beginning and at the end of a row, and what is longest: where a window, a mask or
    padding changes something, it does so there.
    """
    places = range(len(prompts))
    longest = max(places, key=lambda i: prompts[i].length)
    end = max(places, key=lambda i: prompts[i].length - positions[i])
    return sorted({0, len(prompts) - 1, longest, end})


def _groups(
    llm: ResidentLLM,
    prompts: Sequence[EncodedPrompt],
    positions: Sequence[int],
    kinds: Sequence[int] | None,
) -> list[Chosen]:
    """Which prompts share a batch, as rising places."""
    places = range(len(prompts))
    if len(prompts) > 1 and not llm.can_share(llm.batch(prompts)):
        return [(i,) for i in places]
    found: list[Chosen] = []
    for kind in [None] if kinds is None else sorted(set(kinds)):
        own = [i for i in places if kinds is None or kinds[i] == kind]
        if len(own) > TOGETHER:
            own.sort(key=lambda i: (prompts[i].length - positions[i], positions[i]))
        number = math.ceil(len(own) / TOGETHER)
        found += [
            tuple(sorted(own[k * len(own) // number : (k + 1) * len(own) // number]))
            for k in range(number)
        ]
    return found


def answer_losses(logits: Tensor, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
    """−log p of the answer tokens of some prompts, in nats.

    Args:
        logits: Answer tokens × vocabulary, prompt after prompt; gradients flow into the means.
        prompts: The P prompts.

    Returns:
        P float32, the mean of each prompt's tokens; P float32, the largest, without gradients.
    """
    sizes = torch.tensor([len(p.answer_ids) for p in prompts], device=logits.device)
    labels = [token for p in prompts for token in p.answer_ids]
    losses = F.cross_entropy(
        logits.float(), torch.tensor(labels, device=logits.device), reduction="none"
    )
    rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(sizes)
    nothing = losses.detach().new_zeros(len(prompts))
    worst = nothing.scatter_reduce(0, rows, losses.detach(), "amax")
    return nothing.index_add(0, rows, losses) / sizes, worst
