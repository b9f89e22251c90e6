"""High levels that learn which layers to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiedit_agents.hierarchy.options import Choice
from hiedit_agents.protocol import Observation
from hiedit_env.envs.observations import GLOBAL_FEATURES, LAYER_FEATURES, size_of
from hiedit_env.errors import SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.low_rank import layer_groups
from hiedit_env.rules.moments import RunningMoments

Size = Literal["fixed", "learned"]

#: Features of a layer that tell of earlier edits: accumulated change, its cosine with the present
#: gradient, share of the facts that wrote it; see :class:`hiedit_env.envs.observations.Observer`.
HISTORY_FEATURES = (3, 4, 5)


def half(num_layers: int) -> int:
    """K where none is given: half of the layers, at least one."""
    return max(1, num_layers // 2)


class InputMoments(RunningMoments, nn.Module):
    """Running moments of a network's inputs, saved with its parameters.

    ``count`` is a plain number in ``state_dict()``, ``mean`` and ``squares`` are tensors.

    Args:
        groups, size, device: As for :class:`~hiedit_env.rules.moments.RunningMoments`.
    """

    def __init__(self, groups: int, size: int, device: torch.device) -> None:
        nn.Module.__init__(self)
        RunningMoments.__init__(self, groups, size, device)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination.update({f"{prefix}{name}": v for name, v in self.statistics().items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        own = self.statistics()
        missing = [f"{prefix}{name}" for name in own if f"{prefix}{name}" not in state_dict]
        if missing:
            missing_keys: list[str] = arguments[2]
            missing_keys += missing
        else:
            self.load_statistics({name: state_dict[f"{prefix}{name}"] for name in own})


class StraightThroughRouter(nn.Module):
    """The router of HiEdit (arXiv 2604.11214): top-K of a gate over encoded activations.

    h_l = scale_l ⊙ ReLU(W [u_l ‖ v_l] + b) + shift_l with one W per layer shape, mean over tokens;
    logits z from one linear map of all h_l together; the K largest are edited. Going back, the mask
    passes its gradient on to z unchanged (straight-through estimator). Inputs are normalised by
    running moments of the training facts, which stay as they are afterwards.

    Args:
        shapes: ``(d_in, d_out)`` per layer.
        device: Device of the model.
        layers_per_edit: K; half of the layers where None.
        hidden: Columns of h_l.
        seed: Of the random initial values.

    Raises:
        SettingsError: K outside 1 … L.
    """

    name = "straight-through"
    straight_through: ClassVar[bool] = True

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        layers_per_edit: int | None = None,
        hidden: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers_per_edit = _checked_size(layers_per_edit, len(shapes))
        self.groups = layer_groups(list(shapes))
        self._order = np.argsort([i for group in self.groups for i in group]).tolist()
        generator = torch.Generator().manual_seed(seed)
        sizes = [sum(shapes[group[0]]) for group in self.groups]
        self.encoders = nn.ModuleList(seeded_linear(size, hidden, generator) for size in sizes)
        self.scales = nn.ParameterList(torch.ones(len(g), 1, hidden) for g in self.groups)
        self.shifts = nn.ParameterList(torch.zeros(len(g), 1, hidden) for g in self.groups)
        self.gate = seeded_linear(hidden * len(shapes), len(shapes), generator)
        self.to(device)
        self.moments = nn.ModuleList(
            InputMoments(len(group), size, device)
            for group, size in zip(self.groups, sizes, strict=True)
        )

    def reset(self, seed: int) -> None:
        """Nothing here is random."""

    def choose(
        self, observation: Observation, capture: Capture, generator: torch.Generator | None = None
    ) -> Choice:
        """The K layers of largest logit; with ``generator`` (training) moments are updated."""
        logits = self.logits(capture, learn_moments=generator is not None)
        mask = torch.zeros_like(logits)
        mask[logits.topk(self.layers_per_edit).indices] = 1.0
        gates = (mask - logits).detach() + logits
        return Choice(mask.bool().cpu().numpy(), gates=gates)

    def logits(self, capture: Capture, *, learn_moments: bool = False) -> Tensor:
        """z, L float32 on the model's device."""
        parts = []
        for place, group in enumerate(self.groups):
            rows = torch.stack(
                [torch.cat((capture.keys[i], capture.value_gradients[i]), 1) for i in group]
            ).float()
            moments = self.moments[place]
            assert isinstance(moments, InputMoments)
            if learn_moments:
                moments.update(rows)
            if moments.count:
                rows = moments.normalise(rows, list(range(len(group))))
            inner = self.encoders[place](rows).relu()
            parts.append((self.scales[place] * inner + self.shifts[place]).mean(1))
        hidden = torch.cat(parts)[self._order]
        logits: Tensor = self.gate(hidden.flatten())
        return logits


class PolicyRouter(nn.Module):
    """A stochastic policy over layer sets, trained by its rewards.

    One network scores every layer from the layer's part of the observation, the five numbers about
    fact and stream, and a learned embedding of the layer; so its size hardly grows with L.

    * ``size="fixed"``: K layers are drawn one after another without replacement, each with
      probability softmax(score) among those left (Plackett and Luce). ``log_probability`` is that
      of the drawn order, ``entropy`` that of the first draw. The best choice is the top K.
    * ``size="learned"``: every layer is drawn on its own with probability sigmoid(score), so that
      the number of layers follows from their scores and from the sparsity term of the reward;
      ``entropy`` is the mean over layers. The best choice is every layer above one half, and the
      best one if there is none.

    Args:
        num_layers: L.
        device: Where the parameters live.
        size: Whether K is fixed or follows from the scores.
        layers_per_edit: K, and where ``size="learned"`` the expected number of layers at the
            beginning.
        share: K as a share of the layers, where ``layers_per_edit`` is None; at least one.
        history: Whether it sees what earlier edits did to the layers.
        normalize: Whether the features are normalised by their running moments over the training
            facts and all layers, which stay as they are afterwards; what differs little between
            layers, such as the logarithm of a norm, then counts as much as the rest.
        clip: Deviations that a normalised feature counts as at most. What lies further out in a new
            fact than in most of training then looks like the edge of it.
        deterministic: Whether acting takes the best choice; if not, choices are drawn as in
            training, from what :meth:`reset` was seeded with. A policy that was trained with an
            entropy bonus spreads its edits over all layers that do well, which the best choice
            undoes.
        temperature: What the scores are divided by where acting draws. Above 1 a stream's edits are
            spread further than in training, over more layers.
        hidden: Hidden units.
        embedding: Columns of the layer embedding.
        seed: Of the random initial values.

    Raises:
        SettingsError: K outside 1 … L, a share outside (0, 1], an unknown size, or a clip or
            temperature that is not positive.
    """

    name = "policy"

    def __init__(
        self,
        num_layers: int,
        device: torch.device,
        *,
        size: Size = "fixed",
        layers_per_edit: int | None = None,
        share: float = 0.5,
        history: bool = True,
        normalize: bool = False,
        clip: float = 5.0,
        deterministic: bool = True,
        temperature: float = 1.0,
        hidden: int = 64,
        embedding: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size not in get_args(Size):
            raise SettingsError(f"size must be one of {get_args(Size)}, got {size!r}")
        self.size: Size = size
        if not 0 < share <= 1:
            raise SettingsError(f"share must be in (0, 1], got {share!r}")
        if layers_per_edit is None:
            layers_per_edit = max(1, int(share * num_layers))
        self.layers_per_edit = _checked_size(layers_per_edit, num_layers)
        if not 0 < clip < float("inf"):
            raise SettingsError(f"clip must be a number > 0, got {clip!r}")
        if not 0 < temperature < float("inf"):
            raise SettingsError(f"temperature must be a number > 0, got {temperature!r}")
        self.history, self.clip, self.deterministic = history, clip, deterministic
        self.temperature = temperature
        self._generator = torch.Generator()
        features = LAYER_FEATURES + GLOBAL_FEATURES
        self.moments = InputMoments(1, features, device) if normalize else None
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(num_layers, embedding, generator=generator))
        inputs = LAYER_FEATURES + GLOBAL_FEATURES + embedding
        self.first = seeded_linear(inputs, hidden, generator)
        self.second = seeded_linear(hidden, hidden, generator)
        self.score = seeded_linear(hidden, 1, generator)
        #: A layer's score that does not depend on the fact.
        self.bias = nn.Parameter(torch.zeros(num_layers))
        begin = min(max(self.layers_per_edit / num_layers, 0.01), 0.99)
        with torch.no_grad():
            self.score.weight.zero_()
            self.score.bias.zero_()
            if size == "learned":
                self.bias.fill_(float(np.log(begin / (1 - begin))))
        self.to(device)

    def reset(self, seed: int) -> None:
        """Seeds what acting draws from, where it is not deterministic."""
        # Not the bits that Gymnasium draws the stream of facts from.
        bits = np.random.SeedSequence([seed, 4]).generate_state(1, np.uint64)[0]
        self._generator.manual_seed(int(bits >> np.uint64(1)))

    def features(self, observation: Observation) -> Tensor:
        """L × (features of the layer, then those of fact and stream) float32, not normalised.

        What an observation of version 2 holds beside that of version 1 is not read.
        """
        table = torch.from_numpy(np.asarray(observation, np.float32)).to(self.bias.device)
        table = table[: size_of(len(self.bias))]
        layers = table[:-GLOBAL_FEATURES].view(len(self.bias), LAYER_FEATURES)
        if not self.history:
            layers = layers.clone()
            layers[:, list(HISTORY_FEATURES)] = 0.0
        rest = table[-GLOBAL_FEATURES:].expand(len(self.bias), -1)
        return torch.cat((layers, rest), 1)

    def scores(self, observation: Observation) -> Tensor:
        """L float32 scores."""
        features = self.features(observation)
        if self.moments is not None and self.moments.count:
            features = self.moments.normalise(features[None], [0])[0]
            features = features.clamp(-self.clip, self.clip)
        rows = torch.cat((features, self.embedding), 1)
        hidden = self.second(self.first(rows).tanh()).tanh()
        scores: Tensor = self.score(hidden)[:, 0] + self.bias
        return scores

    def choose(
        self, observation: Observation, capture: Capture, generator: torch.Generator | None = None
    ) -> Choice:
        """A sampled choice with its log-probability; without ``generator`` as the agent acts.

        With ``generator`` (training) the moments take the observation in.
        """
        if self.moments is not None and generator is not None:
            self.moments.update(self.features(observation)[None])
        scores = self.scores(observation)
        if generator is None and not self.deterministic:
            generator = self._generator
            scores = scores / self.temperature
        if self.size == "fixed":
            return _plackett_luce(scores, self.layers_per_edit, generator)
        return _independent(scores, generator)

    def log_probability(self, observation: Observation, order: Sequence[int]) -> Tensor:
        """Of drawing exactly these layers (in this order where K is fixed)."""
        scores = self.scores(observation)
        if self.size == "fixed":
            return _order_log_probability(scores, torch.tensor(list(order), device=scores.device))
        mask = torch.zeros_like(scores)
        mask[list(order)] = 1.0
        return -nn.functional.binary_cross_entropy_with_logits(scores, mask, reduction="sum")


def _plackett_luce(scores: Tensor, count: int, generator: torch.Generator | None) -> Choice:
    if generator is None:
        mask = torch.zeros_like(scores)
        mask[scores.topk(count).indices] = 1.0
        return Choice(_as_mask(mask))
    # The largest of scores with Gumbel noise, in order, are a draw without replacement.
    uniform = torch.rand(len(scores), generator=generator).clamp_min(1e-12).to(scores.device)
    order = (scores.detach() - (-uniform.log()).log()).topk(count).indices
    mask = torch.zeros_like(scores)
    mask[order] = 1.0
    logarithms = scores.log_softmax(0)
    entropy = -(logarithms.exp() * logarithms).sum()
    return Choice(_as_mask(mask), _order_log_probability(scores, order), entropy)


def _order_log_probability(scores: Tensor, order: Tensor) -> Tensor:
    drawn = scores[order]
    out = torch.zeros_like(scores, dtype=torch.bool)
    total = scores.new_zeros(())
    for place, index in enumerate(order.tolist()):
        total = total + drawn[place] - scores.masked_fill(out, -torch.inf).logsumexp(0)
        out = out.clone()
        out[index] = True
    return total


def _independent(scores: Tensor, generator: torch.Generator | None) -> Choice:
    if generator is None:
        mask = (scores > 0).float()
        mask[scores.argmax()] = 1.0
        return Choice(_as_mask(mask))
    uniform = torch.rand(len(scores), generator=generator).to(scores.device)
    mask = (uniform < scores.detach().sigmoid()).float()
    loss = nn.functional.binary_cross_entropy_with_logits(scores, mask, reduction="sum")
    # p log p + (1 − p) log(1 − p), where log(1 − p) = log p − score.
    entropy = (scores * (1 - scores.sigmoid()) - nn.functional.logsigmoid(scores)).mean()
    return Choice(_as_mask(mask), -loss, entropy)


def _as_mask(mask: Tensor) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = mask.bool().cpu().numpy()
    return found


def _checked_size(layers_per_edit: int | None, num_layers: int) -> int:
    size = half(num_layers) if layers_per_edit is None else layers_per_edit
    if not 1 <= size <= num_layers:
        raise SettingsError(
            f"layers_per_edit must be from 1 to the number of candidate layers, {num_layers}; "
            f"got {layers_per_edit!r}"
        )
    return size


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear map, uniform in ±1/√inputs (torch's default) drawn from a generator."""
    # Not initialised by torch, which would draw from its global generator.
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
