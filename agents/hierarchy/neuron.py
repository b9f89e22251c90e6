"""A low level that gives every fact a neuron of its own, which fires at the fact's subject only.

For the facts of an edit unit, at the present weights, all in the first chosen MLP with room:

1. **Value.** A vector is added to what the MLP gives at the subject's last token, in every prompt
   of the fact and in rewordings of it (:mod:`.rewordings`). It is sought under noise by normalised
   gradient descent with momentum, on the mean of −log p(answer) of one half of them and the other
   in turn and on changes of what is said otherwise about the subject (:mod:`.kept_sentences`).
2. **Detector.** From what the MLP reads at these tokens and what it reads elsewhere comes a
   direction whose product s with the reading is 1 at the subject and about 0 at other tokens,
   whatever the form and the words before it (:mod:`.detectors`). What the prompts and rewordings
   differ in at the subject has no part in it.
3. **Neuron.** The neuron that matters least and holds no fact yet is written anew: its gate gives
   β (s − θ), its other row a number that falls as s rises, so that their product is largest where s
   is about 1, and 0 below θ; its column is the vector. Below θ nothing is added, however
   many facts are written: what a linear memory adds up over edits, the activation cuts off.

Facts stay in one MLP, since its neurons do not read what they write. Those of a later MLP do, as
readings that occur nowhere else, and were measured to fire at them a thousand times too strongly.

What the old neuron did is left to others as far as they can do it (:mod:`.substitutes`). A change
of one neuron is of rank 1 in what it reads and of rank 2 in what the MLP writes, and taking it back
takes back one fact alone.

Neurons as key and value memories: Geva et al., arXiv 2012.14913; a neuron added per fact:
T-Patcher, arXiv 2301.09785, eq. 5; the value: ROME, arXiv 2202.05262, section 3.1. Ours are
rewriting the least used neurons of the middle of the model, so that the model keeps its shape, the
detector in closed form, and where it fires most.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.detectors import Readings, reading_statistics, readings
from hiedit_agents.hierarchy.fact_memory import FactMemory, Unit, units_of
from hiedit_agents.hierarchy.neuron_changes import NeuronChanges
from hiedit_agents.hierarchy.neuron_plan import Planner, ShapeForm, Target
from hiedit_agents.hierarchy.neuron_search import SearchForm, seek
from hiedit_agents.hierarchy.other_names import NAMES
from hiedit_agents.hierarchy.substitutes import of_neuron
from hiedit_env.errors import SettingsError, as_float, whole_number
from hiedit_env.model.mlps import candidate_mlps
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.upper_half import quick_dtype
from hiedit_env.rules.base import positive

#: Relative difference of a gate row's length above which its neuron was written before.
_WRITTEN = 0.02


class Neuron(FactMemory):
    """Writes each fact into one neuron of the first chosen MLP.

    An MLP is chosen when all of its matrices are (``gate_proj``, ``up_proj`` and ``down_proj``, or
    what they are called); what is chosen of other MLPs is left alone.

    Args:
        llm: The model, on which values are sought.
        step_size: Length of a step of the search, as a share of the mean length of the hidden
            states that the vector is added to.
        momentum: Share of the last step that is taken again.
        search_steps: Largest number of rounds of a search, in each of which all prompts are run,
            one half after the other; up to twice as many follow where these do not suffice.
        enough: −log p per answer token, in nats, below which a prompt needs no more, if every token
            has more than one half as well.
        threshold: θ, the score above which a neuron fires; two thirds of it where it is made
            without a rewording; lower where a prompt of the fact itself scores less than 0.9,
            higher where a token of an earlier fact reads alike, and 0.7 for a prompt that is read
            behind its subject.
        sharpness: β, how steeply the gate rises with the score.
        ridge: Share of the mean diagonal that is added to the covariance of what MLPs read.
        companions: Earlier facts about the same subject that are sought again with a new one.
        swaps: Other names with the same last token that a neuron must not fire at, as far as the
            spread allows.
        widest: Largest spread of a neuron's score over everything that is read, as a multiple of
            1/√d, at this threshold, and larger in proportion at a higher one; where it is larger, a
            subject cannot be told from the rest. On SmolLM2 most have 0.4 to 0.7, and one neuron of
            1.1 did more damage than 37 others together.
        substitutes: Whether other neurons take over what a rewritten one did (:mod:`.substitutes`).
        noise: Length of the noise that is added to a vector in every pass of the search, as a share
            of its own; 0 for none.
        reworded: Whether neurons are made for rewordings of each fact as well.
        keeping: What a change of what the model says in other sentences about a subject counts in
            the search, in nats of KL divergence, against a nat of −log p; 0 to leave it alone.
        settling: Share of a step's length that is lost by the last one, where that is kept.
        search_dtype: The precision of the search's passes: ``"own"`` for the model's,
            ``"bfloat16"``, or ``"auto"`` for bfloat16 where that is faster.

    Raises:
        SettingsError: a number out of range, or candidate layers among which no MLP is whole.
    """

    name: ClassVar[str] = "neuron"
    default_step_size: ClassVar[float] = 0.6
    default_tokens = "subject"
    #: What a training shows it: all prompts, in every form.
    calibrates_on: ClassVar[str] = "all"
    #: Whether a training may show it texts that the model has written itself.
    reads_texts: ClassVar[bool] = True
    uses_gradients: ClassVar[bool] = False

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        step_size: float | None = None,
        momentum: float = 0.5,
        search_steps: int = 8,
        enough: float = 0.3,
        threshold: float = 0.75,
        sharpness: float = 60.0,
        ridge: float = 0.01,
        companions: int = 2,
        swaps: int = 24,
        widest: float = 1.95,
        substitutes: bool = True,
        noise: float = 0.5,
        reworded: bool = True,
        keeping: float = 0.3,
        settling: float = 0.67,
        search_dtype: str = "auto",
    ) -> None:
        if not 0 <= as_float(momentum) < 1:
            raise SettingsError(f"momentum must be a number in [0, 1), got {momentum!r}")
        if not 0 < as_float(threshold) < 0.9:
            raise SettingsError(f"threshold must be a number in (0, 0.9), got {threshold!r}")
        self.momentum, self.threshold = momentum, threshold
        self.search_steps = whole_number(search_steps, "search_steps", 1)
        self.companions = whole_number(companions, "companions", 0)
        if whole_number(swaps, "swaps", 0) > len(NAMES):
            raise SettingsError(f"swaps must be at most {len(NAMES)}, got {swaps!r}")
        self.swaps, self.substitutes, self.reworded = swaps, substitutes, reworded
        if not 0 <= as_float(noise) < 2:
            raise SettingsError(f"noise must be a number in [0, 2), got {noise!r}")
        self.noise = noise
        if not 0 <= as_float(keeping) < math.inf:
            raise SettingsError(f"keeping must be a number of at least 0, got {keeping!r}")
        if not 0 <= as_float(settling) < 1:
            raise SettingsError(f"settling must be a number in [0, 1), got {settling!r}")
        self.keeping, self.settling = keeping, settling
        # Decided once: free memory may change within an episode.
        self.search_dtype = quick_dtype(llm, search_dtype)
        self.enough, self.ridge = positive(enough, "enough"), positive(ridge, "ridge")
        self.sharpness = positive(sharpness, "sharpness")
        self.widest = positive(widest, "widest")
        self.llm = llm
        self.mlps = candidate_mlps(llm.model, llm.layers)
        if not self.mlps:
            raise SettingsError(
                "the low level 'neuron' needs candidate layers that hold all matrices of an MLP, "
                f"and there is none among {', '.join(llm.names[:4])}{', …' * (len(llm.names) > 4)};"
                " give for example --layers 'model.layers.{4,8}.mlp.*_proj', or the low level "
                "'anchored'"
            )
        self._statistics: dict[str, Tensor] = {}
        self._readings: list[Readings] = []
        super().__init__(llm.shapes, llm.device, step_size=step_size)

    # -- what the MLPs read elsewhere -----------------------------------------------------------

    @property
    def wants_calibration(self) -> bool:
        """Whether :meth:`calibrate_on` has not been called yet, now or before it was saved."""
        return not self._statistics

    def require_ready(self) -> None:
        """Raises SettingsError where it was never shown what the MLPs read."""
        if self.wants_calibration:
            raise SettingsError(
                "the low level 'neuron' has to see what the model reads: call calibrate_on(prompts)"
                " first, or use a folder made by 'hiedit train HIGH+neuron --episodes 0 --out DIR'"
            )

    def calibrate_on(
        self,
        prompts: Sequence[EncodedPrompt],
        on_prompts: Callable[[int], None] | None = None,
        texts: Sequence[EncodedPrompt] = (),
    ) -> None:
        """Takes what the MLPs read in prompts of all kinds, plain and in chat form.

        Args:
            prompts: Some hundreds of them; more make detectors sharper.
            on_prompts: Called with the number of prompts and texts after every few of them.
            texts: Other texts, so that texts of all kinds are left as they are, and not only
                prompts about facts: neurons fire in them less, and those that matter there are
                kept, or others stand in for them.

        Raises:
            SettingsError: no prompts.
        """
        with self.llm.unedited():
            self._set(reading_statistics(self.llm, self.mlps, prompts, on_prompts, texts))

    def _set(self, statistics: Mapping[str, Tensor]) -> None:
        self._statistics = {name: value.to(self.device) for name, value in statistics.items()}
        indices = range(len(self.mlps))
        self._readings = [readings(self._statistics, i, self.ridge) for i in indices]
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """The calibration by name."""
        return dict(self._statistics)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a saved :meth:`state_dict` back.

        Raises:
            SettingsError: a calibration of other MLPs; nothing has changed.
        """
        if not state:
            return
        saved = [len(state[f"order.{i}"]) for i in range(len(state)) if f"order.{i}" in state]
        if saved != [mlp.neurons for mlp in self.mlps]:
            raise SettingsError(
                f"the saved calibration is of {len(saved)} MLPs, the model has {len(self.mlps)} "
                "among its candidates, or they have other sizes; calibrate again"
            )
        self._set({name: torch.as_tensor(value) for name, value in state.items()})

    # -- the episode ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets what was written in this episode."""
        self.recall()
        #: By a fact's first prompt, the MLP and the neuron that hold it.
        self._held: dict[tuple[int, ...], tuple[int, int]] = {}
        #: By MLP, how many of the neurons in order were looked at.
        self._next: tuple[int, ...] = (0,) * len(self.mlps)

    def statistics(self) -> dict[str, Any]:
        """Which facts were seen in this episode, and which neurons hold them."""
        return {"past": self._past, "held": self._held, "next": self._next}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self._past, self._held = statistics["past"], statistics["held"]
        self._next = statistics["next"]

    def clone_for(self, llm: ResidentLLM) -> Self:
        """As in the base class; the copy seeks on ``llm`` and shares the calibration."""
        shared = (*self._statistics.values(), *self._readings, *self.mlps)
        return copy.deepcopy(self, {id(self.llm): llm, **{id(one): one for one in shared}})

    # -- the update -------------------------------------------------------------------------------

    def plan(self, capture: Capture, layers: NDArray[np.bool_]) -> list[Target]:
        """The neurons that :meth:`compute` would write, before their vectors are sought.

        Facts that are answered in all of their prompts are left alone, unless all facts are.

        Args:
            capture: Its prompts are what is edited; its keys are read, not its gradients.
            layers: L bool, the layers to update.

        Returns:
            None where no MLP is chosen whole, or where no prompt can be told from the rest.

        Raises:
            SettingsError: never calibrated.
        """
        self.require_ready()
        chosen = [i for i, mlp in enumerate(self.mlps) if all(layers[j] for j in mlp.layers)]
        if not chosen:
            return []
        units = _open(capture, units_of(self.llm, capture.prompts))
        numbers = self.threshold, self.sharpness, self.swaps, self.widest
        form = ShapeForm(*numbers, self.reworded, self.keeping > 0)
        planner = Planner(self.llm, self.mlps, self._readings, form)
        return planner.targets(
            capture, units, self._homes(chosen), self.others(units), self.companions
        )

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The update that answers the facts of the capture.

        Args:
            capture: Its prompts are what is edited; its gradients are not used.
            layers: L bool, the layers to update.
            multipliers: L factors (1 where None): the one of the matrix that writes to the residual
                stream scales the vector, the others are not used; gradients flow into a tensor.

        Returns:
            L entries, None for a layer that nothing is written into. Float32.

        Raises:
            SettingsError: never calibrated, or all neurons of the chosen MLP hold facts.
        """
        targets = self.plan(capture, layers)
        updates: list[LowRankUpdate | None] = [None] * len(self.shapes)
        if not targets:
            return tuple(updates)
        changes = {t.home: NeuronChanges(self.llm, self.mlps[t.home]) for t in targets}
        held, following = dict(self._held), list(self._next)
        without = torch.zeros(len(targets), self.mlps[targets[0].home].hidden, device=self.device)
        for row, t in enumerate(targets):
            if held.get(t.fact, (-1, -1))[0] == t.home:
                without[row] = changes[t.home].gives(held[t.fact][1], t.shape.reading)
        vectors = self._search(targets, without)
        for target, vector in zip(targets, vectors, strict=True):
            i, fact = target.home, target.fact
            home, neuron = held.get(fact, (-1, -1))
            substitute = None
            if home != i:  # not written yet, or in an MLP that is not chosen now
                place = self._free(i, following[i], changes[i])
                neuron, following[i] = int(self._statistics[f"order.{i}"][place]), place + 1
                substitute = self._substitute(i, place, changes[i])
                held[fact] = (i, neuron)
            # What the neuron gives as it is was there while the vector was sought.
            before = changes[i].gives(neuron, target.shape.reading, substitute)
            back = self.mlps[i].back
            factor = 1.0 if multipliers is None else torch.as_tensor(multipliers[back])
            changes[i].write(neuron, target.shape, vector * factor + before, substitute)
        for one in changes.values():
            for layer, update in one.updates().items():
                updates[layer] = update
        self._held, self._next = held, tuple(following)
        return tuple(updates)

    def _homes(self, chosen: Sequence[int]) -> Callable[[tuple[int, ...]], int]:
        """Where the neuron of a fact goes: where it is, else the first chosen MLP with room."""
        room = {i: self.mlps[i].neurons - self._next[i] for i in chosen}
        known = {fact: i for fact, (i, _) in self._held.items() if i in room}

        def home(fact: tuple[int, ...]) -> int:
            if fact not in known:
                known[fact] = next((i for i in room if room[i] > 0), chosen[0])
                room[known[fact]] -= 1
            return known[fact]

        return home

    def _search(self, targets: Sequence[Target], without: Tensor) -> Tensor:
        """What the neurons of F facts are to write, where they write that now: F × d_out float32.

        A vector that several facts share has to say more, and is sought without noise and
        rewordings, which would take several times as long.
        """
        found = torch.zeros_like(without)
        single = [len(units_of(self.llm, target.prompts)) == 1 for target in targets]
        for noise, alone in ((self.noise, True), (0.0, False)):
            chosen = [i for i, one in enumerate(single) if one is alone]
            if chosen:
                sought = [targets[i] for i in chosen]
                if alone:
                    sought = [replace(t, prompts=(*t.prompts, *t.rewordings)) for t in sought]
                numbers = self.step_size, self.momentum, self.search_steps, self.enough, noise
                form = SearchForm(*numbers, self.keeping, self.settling, self.search_dtype)
                found[chosen] = seek(self.llm, self.mlps, sought, form, without[chosen])
        return found

    def _written(self, index: int, changes: NeuronChanges) -> Tensor:
        """Which neurons of an MLP were written by whatever, now or before it was saved: I bool."""
        own = self._statistics[f"norms.{index}"]
        return (changes.gate_lengths() - own).abs() > _WRITTEN * own

    def _free(self, index: int, start: int, changes: NeuronChanges) -> int:
        """The place in order, from one on, of the first neuron that holds no fact."""
        order = self._statistics[f"order.{index}"].long()
        free = ~self._written(index, changes)[order]
        free[:start] = False
        if not bool(free.any()):
            raise SettingsError(
                f"all {len(order)} neurons of the MLP of block {self.mlps[index].block} hold facts;"
                " choose other layers"
            )
        return int(free.int().argmax())

    def _substitute(self, index: int, place: int, changes: NeuronChanges) -> Tensor | None:
        """Which neurons stand in for the one at a place in order: I float32; None for none."""
        table = self._statistics.get(f"substitutes.{index}")
        if table is None or not self.substitutes:
            return None
        found = of_neuron(table, self._statistics[f"order.{index}"], place)
        return found.masked_fill(self._written(index, changes), 0)


def _open(capture: Capture, units: list[Unit]) -> list[Unit]:
    """Those of the facts of a capture of which a prompt is not answered; all where none is left."""
    parts = torch.split(capture.correct, [len(p.answer_ids) for p in capture.prompts])
    right = {p: bool(part.all()) for p, part in zip(capture.prompts, parts, strict=True)}
    return [unit for unit in units if not all(right[p] for p in unit)] or units
