"""A low level whose edits are tied to the subject: a value is sought, then written in closed form.

For the facts of an edit unit, at the present weights:

1. **Values.** One vector per fact and chosen layer is added to the layer's output at the subject's
   last token, in every prompt of the fact (each form asked, and the plain one behind some opening
   words). All vectors of a fact are sought together: steps of normalised gradient descent with
   momentum on the mean of −log p(answer) until every prompt is below a bound. The length of a step
   is that of all vectors of the fact together, so layers share the work as the gradient says, and
   the vectors stay short: what is written is what was needed.
2. **Write.** With K the inputs of layer l at these tokens, V the vectors and C_l the second moment
   of the inputs the layer meets elsewhere, the change is the least one, in the metric of C_l, that
   maps K to V: with A = K C_l⁻¹, it is Aᵀ (A Kᵀ + ridge)⁻¹ V. Inputs at other subjects and at other
   tokens hardly meet it.
3. **Protection.** What was written once counts in C_l from then on, so later edits leave it alone.
   With ``repeats``, some earlier facts are asked again at every step: one that is lost is sought
   and written anew together with the present one.

This is ROME's and MEMIT's form (arXiv 2202.05262, eq. 2; arXiv 2210.07229, eq. 14), with the
lifelong moments of AlphaEdit's aim (arXiv 2410.02355); ours are the joint search over layers, the
normalised steps, the prompts of both forms and the repeated questions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.hierarchy.fact_memory import FactMemory, Unit, units_of
from hiedit_agents.hierarchy.key_moments import inverses, key_moments, symmetric
from hiedit_agents.hierarchy.openings import OPENINGS, behind
from hiedit_env.errors import SettingsError, as_float, whole_number
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.resident.nudges import Nudges
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import positive


class Anchored(FactMemory):
    """Seeks values at the subject in several layers and writes them in closed form.

    Args:
        llm: The model, on which values are sought.
        step_size: Length of a step of the search, of all vectors of a fact together, as a share of
            the mean length of the hidden states that the vectors are added to.
        momentum: Share of the last step that is taken again.
        search_steps: Largest number of steps of the search.
        enough: −log p per answer token, in nats, below which a prompt needs no more.
        openings: Number of :data:`.openings.OPENINGS` behind which the plain prompt is sought too.
        ridge: Share of the mean diagonal of A Kᵀ that is added to it.
        prior: Share of the mean diagonal of C_l that is added to it.
        protect: Number of tokens that an edited fact counts for in C_l.
        repeats: Earlier facts that are asked again at every step.
        metric: 1 for steps that are steepest in the metric of the damage they do, 0 for plain ones.
        seed: Of which facts are asked again; and with that of an episode.

    Raises:
        SettingsError: a number out of range.
    """

    name: ClassVar[str] = "anchored"
    default_step_size: ClassVar[float] = 0.08
    default_tokens = "subject"
    #: What a training shows it: all prompts, in every form.
    calibrates_on: ClassVar[str] = "all"

    def __init__(
        self,
        llm: ResidentLLM,
        *,
        step_size: float | None = None,
        momentum: float = 0.5,
        search_steps: int = 20,
        enough: float = 0.4,
        openings: int = 1,
        ridge: float = 0.1,
        prior: float = 0.1,
        protect: float = 1000.0,
        repeats: int = 0,
        metric: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= as_float(momentum) < 1:
            raise SettingsError(f"momentum must be a number in [0, 1), got {momentum!r}")
        if not 0 <= as_float(metric) <= 1:
            raise SettingsError(f"metric must be a number in [0, 1], got {metric!r}")
        if whole_number(openings, "openings", 0) > len(OPENINGS):
            raise SettingsError(f"openings must be at most {len(OPENINGS)}, got {openings!r}")
        self.momentum, self.openings = momentum, openings
        self.search_steps = whole_number(search_steps, "search_steps", 1)
        self.repeats = whole_number(repeats, "repeats", 0)
        self.enough, self.ridge = positive(enough, "enough"), positive(ridge, "ridge")
        self.prior, self.protect = positive(prior, "prior"), positive(protect, "protect")
        self.metric = metric
        self.llm = llm
        self._seed, self._episode = seed, 0
        self._moments: dict[str, Tensor] = {}
        self._first: list[Tensor] = []
        super().__init__(llm.shapes, llm.device, step_size=step_size)

    # -- what the layers meet elsewhere ---------------------------------------------------------

    @property
    def wants_calibration(self) -> bool:
        """Whether :meth:`calibrate` has not been called yet, now or before it was saved."""
        return not self._moments

    def require_ready(self) -> None:
        """Raises SettingsError where the second moments were never taken."""
        if not self._inverses:
            raise SettingsError(
                "the low level 'anchored' needs second moments: call calibrate(captures) first, or "
                "use a folder made by 'hiedit train HIGH+anchored --episodes 0 --out DIR'"
            )

    def calibrate(self, captures: Iterable[Capture]) -> None:
        """Takes the second moments of the layers' inputs from prompts of all kinds.

        Args:
            captures: At the unedited weights, plain and in chat form.

        Raises:
            SettingsError: no captures.
        """
        self._set_moments(key_moments(captures, self.shapes, self.device))

    def _set_moments(self, moments: Mapping[str, Tensor]) -> None:
        self._moments = dict(moments)
        self._sensitivity = moments["sensitivity"].to(self.device).float().clamp_min(1e-6)
        self._first = inverses(moments, len(self.shapes), self.prior, self.device)
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """The calibration by name."""
        return dict(self._moments)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a saved :meth:`state_dict` back.

        Raises:
            SettingsError: a calibration of another number of layers; nothing has changed.
        """
        saved = sum(name.startswith("total.") for name in state)
        if state and saved != len(self.shapes):
            raise SettingsError(
                f"the saved calibration is of {saved} layers, the model has {len(self.shapes)} "
                "candidates; calibrate again"
            )
        if saved:
            self._set_moments({name: torch.as_tensor(value) for name, value in state.items()})

    # -- the episode ------------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        """Of which facts are asked again, in the episodes that begin from now on."""
        self._episode = seed

    def reset(self) -> None:
        """Forgets what was written in this episode."""
        self.recall()
        self._inverses: tuple[Tensor, ...] = tuple(self._first)
        self._rng = np.random.default_rng([self._seed, 5, self._episode])

    def statistics(self) -> dict[str, Any]:
        """Memory, inverse second moments and random state of this episode."""
        return {
            "past": self._past,
            "inverses": self._inverses,
            "random": self._rng.bit_generator.state,
        }

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Puts saved statistics back, bit for bit."""
        self._past, self._inverses = statistics["past"], statistics["inverses"]
        self._rng.bit_generator.state = statistics["random"]

    def clone_for(self, llm: ResidentLLM) -> Self:
        """As in the base class; the copy seeks on ``llm`` and shares the second moments."""
        # They are large and never written in place.
        shared = (*self._moments.values(), *self._first, *self._inverses)
        return copy.deepcopy(self, {id(self.llm): llm, **{id(one): one for one in shared}})

    # -- the update -------------------------------------------------------------------------------

    def compute(
        self,
        capture: Capture,
        layers: NDArray[np.bool_],
        multipliers: NDArray[np.float32] | Tensor | None = None,
    ) -> tuple[LowRankUpdate | None, ...]:
        """The update that answers the facts of the capture, and earlier ones that need it.

        Args:
            capture: Its prompts are what is edited; its gradients are not used.
            layers: L bool, the layers to update.
            multipliers: L factors on what is written (1 where None); gradients flow into a tensor.

        Returns:
            L entries, None for a layer not chosen. Float32.

        Raises:
            SettingsError: the second moments were never taken.
        """
        self.require_ready()
        updates: list[LowRankUpdate | None] = [None] * len(self.shapes)
        chosen = np.flatnonzero(layers).tolist()
        if not chosen:
            return tuple(updates)
        present = units_of(self.llm, capture.prompts)
        facts = [*present, *self._lost(present)]
        prompts, owners = self._sought(facts)
        with torch.inference_mode(False), torch.enable_grad():
            keys, values = self._search(prompts, owners, int(owners.max()) + 1, chosen)
        inverses = list(self._inverses)
        for layer, rows, wanted in zip(chosen, keys, values, strict=True):
            inverse = inverses[layer]
            addresses = rows @ inverse
            gram = symmetric(addresses @ rows.mT)
            ridged = _plus(gram, self.ridge * gram.diagonal().mean())
            right = torch.linalg.solve(ridged.double(), wanted.double()).float()
            factor = 1.0 if multipliers is None else torch.as_tensor(multipliers[layer])
            updates[layer] = LowRankUpdate(addresses, right * factor)
            # The rows of a fact count together, like `protect` tokens (Woodbury's identity).
            weights = self.protect / torch.bincount(owners).float()[owners]
            inner = _plus(gram, 1 / weights)
            fall = addresses.mT @ torch.linalg.solve(inner.double(), addresses.double()).float()
            inverses[layer] = inverse - symmetric(fall)
        self._inverses = tuple(inverses)
        return tuple(updates)

    def _lost(self, present: Sequence[Unit]) -> list[Unit]:
        """Some earlier facts, those of them that the model no longer gives."""
        past = self.others(present)
        count = min(self.repeats * len(present), len(past))
        drawn = [past[i] for i in self._rng.choice(len(past), count, replace=False)]
        if not drawn:
            return []
        prompts, right = [prompt for unit in drawn for prompt in unit], dict[EncodedPrompt, bool]()
        with torch.inference_mode():
            for bucket in self.llm.buckets(prompts):
                batch = self.llm.batch([prompts[i] for i in bucket])
                hits = self.llm.answer_logits(batch).argmax(-1) == batch.labels
                sizes = [len(prompt.answer_ids) for prompt in batch.prompts]
                found = torch.stack([part.all() for part in torch.split(hits, sizes)]).tolist()
                right |= dict(zip(batch.prompts, found, strict=True))
        return [unit for unit in drawn if not all(right[prompt] for prompt in unit)]

    def _sought(self, facts: Sequence[Unit]) -> tuple[list[tuple[EncodedPrompt, int]], Tensor]:
        """All prompts of the facts with the position of the subject, and whose vectors each has.

        Facts that read the same up to the subject give the layers the same inputs, so only one
        value can be written for them: they share their vectors.
        """
        found: list[tuple[EncodedPrompt, int]] = []
        owners: list[int] = []
        known: dict[tuple[int, ...], int] = {}
        for unit in facts:
            places = [prompt.positions("subject")[0] for prompt in unit]
            starts = [p.prompt_ids[: at + 1] for p, at in zip(unit, places, strict=True)]
            new = max(owners, default=-1) + 1
            number = next((known[start] for start in starts if start in known), new)
            known |= dict.fromkeys(starts, number)
            for prompt, at in zip(unit, places, strict=True):
                found.append((prompt, at))
                for opening in OPENINGS[: self.openings]:
                    found += behind(self.llm, opening, prompt, at)
                owners += [number] * (len(found) - len(owners))
        return found, torch.tensor(owners, device=self.device)

    def _search(
        self,
        prompts: Sequence[tuple[EncodedPrompt, int]],
        owners: Tensor,
        facts: int,
        chosen: Sequence[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of the layers at the subject, and the values to write there.

        Returns:
            Per chosen layer P × d_in and P × d_out, float32.
        """
        nudges = Nudges(self.llm, [p for p, _ in prompts], [at for _, at in prompts], chosen)
        vectors = [
            torch.zeros(facts, self.shapes[layer][1], device=self.device, requires_grad=True)
            for layer in chosen
        ]
        speed: list[Tensor] | None = None
        counts = torch.bincount(owners, minlength=facts).float()
        length = torch.zeros(facts, device=self.device)
        for step in range(self.search_steps + 1):
            losses = nudges.losses([vector[owners] for vector in vectors])
            open_ = losses.detach() >= self.enough
            busy = torch.zeros(facts, device=self.device).index_add(0, owners, open_.float()) > 0
            if step == self.search_steps or not bool(busy.any()):
                break
            means = torch.zeros(facts, device=self.device).index_add(0, owners, losses) / counts
            gradients = torch.autograd.grad(means.sum(), vectors)
            if not step:
                length = length.index_add(0, owners, nudges.lengths) / counts * self.step_size
                shares = self._shares(nudges.keys, owners, counts, chosen)
            sizes = sum(w * g.square().sum(1) for w, g in zip(shares, gradients, strict=True))
            speeds = shares / sizes.clamp_min(1e-30).sqrt()
            steps = [w[:, None] * g for w, g in zip(speeds, gradients, strict=True)]
            if speed is None:
                speed = steps
            else:
                speed = [self.momentum * v + s for v, s in zip(speed, steps, strict=True)]
            with torch.no_grad():
                # A fact all of whose prompts are answered well enough rests.
                for vector, v in zip(vectors, speed, strict=True):
                    vector -= (length * busy)[:, None] * v
        keys = [rows.float() for rows in nudges.keys]
        return keys, [vector.detach()[owners] for vector in vectors]

    def _shares(
        self, keys: Sequence[Tensor], owners: Tensor, counts: Tensor, chosen: Sequence[int]
    ) -> Tensor:
        """How cheap it is to write a vector into each layer, layers × facts, with mean 1.

        A vector x, written at keys whose mean is k, disturbs other tokens by ‖x‖² / (k C⁻¹ kᵀ) in
        the mean square, and what that does to answers goes with the layer's sensitivity.
        """
        rows = []
        for layer, found in zip(chosen, keys, strict=True):
            mean = torch.zeros(len(counts), found.shape[1], device=self.device)
            mean = mean.index_add(0, owners, found.float()) / counts[:, None]
            room = ((mean @ self._inverses[layer]) * mean).sum(1)
            rows.append(room / self._sensitivity[layer])
        table = torch.stack(rows) ** self.metric
        return table / table.mean(0)


def _plus(matrix: Tensor, diagonal: Tensor) -> Tensor:
    """A matrix with numbers, or one number, added to its diagonal."""
    return matrix + torch.diag(diagonal.expand(len(matrix)))
