"""Many options tried from one state, side by side: what each would be rewarded, without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hiedit_env.envs.accounting import Accounting, Attempt
from hiedit_env.envs.actions import Choice, as_array
from hiedit_env.envs.episode import EditingEpisode, EpisodeState
from hiedit_env.envs.scheduler import Passes, run_together
from hiedit_env.errors import ActionError, NotEnoughMemoryError, whole_number
from hiedit_env.model.memory_budget import available_memory
from hiedit_env.resident.resident import ResidentLLM

#: Most options at a time where the caller does not say; more are hardly faster.
AT_A_TIME = 32
#: Share of the free memory that options may take where the caller does not say how many.
SHARE = 0.5


class Triable(Protocol):
    """An environment as it is used here."""

    llm: ResidentLLM
    episode: EditingEpisode

    @property
    def intrinsic(self) -> bool:
        """Whether the reward is the advantage over editing all layers."""

    @property
    def weights_of_terms(self) -> dict[str, float]:
        """Weight of every reward term."""

    def _require_running(self) -> None: ...

    def _write(self, choice: Choice, everything: bool) -> Passes[NDArray[np.bool_]]: ...


@dataclass(frozen=True, slots=True)
class TriedOptions:
    """What every option would give on the present fact; arrays of N, or environments × N.

    Args:
        masks: … × L bool, the options in the order they were given.
        rewards: Float64, the reward of ``step``.
        reward_terms: By name, as in ``info``; float64, they sum up to ``rewards``.
        metrics: By name, as in ``info``; float64 with NaN for what was not measured, and bool for
            ``answered``.
        layers: … × L bool, the layers that would be written.
        edit_steps: Int64, the fact's primitive steps.
        error_types: Int64, 0 or why the step would fail, see :class:`.accounting.StepError`.
    """

    masks: NDArray[np.bool_]
    rewards: NDArray[np.float64]
    reward_terms: Mapping[str, NDArray[np.float64]]
    metrics: Mapping[str, NDArray[Any]]
    layers: NDArray[np.bool_]
    edit_steps: NDArray[np.int64]
    error_types: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of options (of every environment)."""
        return int(self.masks.shape[-2])

    @property
    def best(self) -> NDArray[np.int64]:
        """Index of the best option; among equals the first."""
        found: NDArray[np.int64] = np.argmax(self.rewards, -1)
        return found


def try_options(
    envs: Sequence[Triable], masks: Sequence[NDArray[np.bool_]], chunk: int | None
) -> list[TriedOptions]:
    """Tries options in environments of one model.

    Args:
        envs: One environment, or forks of one.
        masks: Of :func:`check_masks`, N × L each.
        chunk: Options at a time, over all environments; None for as many as fit.

    Returns:
        One result per environment.

    Raises:
        ResetNeeded: an environment has no present fact; nothing has changed.
        NotEnoughMemoryError: so many options do not fit; nothing has changed.
        SettingsError: ``chunk`` is no number ≥ 1.
    """
    for env in envs:
        env._require_running()
    total = sum(map(len, masks))
    size = _chunk(envs, masks, chunk, total)
    starts = [_start(env) for env in envs]
    # The intrinsic reward compares every option with the same one: all layers.
    whole = [np.ones((1, own.shape[1]), bool) for own in masks]
    wanted = [
        np.concatenate((own, every)) if env.intrinsic else own
        for env, own, every in zip(envs, masks, whole, strict=True)
    ]
    jobs = [(i, mask) for i, own in enumerate(wanted) for mask in own]
    found: list[list[_Tried]] = [[] for _ in envs]
    for first in range(0, len(jobs), size):
        part = jobs[first : first + size]
        results = run_together([_attempt(envs[i], starts[i], mask) for i, mask in part])
        for (i, _), result in zip(part, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            found[i].append(result)
    return [
        _collected(own, tried, env.intrinsic)
        for env, own, tried in zip(envs, masks, found, strict=True)
    ]


def check_masks(masks: Any, num_layers: int) -> NDArray[np.bool_]:
    """N options as N × L bool.

    Raises:
        ActionError: no array of N ≥ 1 rows of L zeros and ones.

    >>> check_masks([[0, 1, 0]], 3).tolist()
    [[False, True, False]]
    """
    array = as_array(masks, "masks")
    if array.ndim != 2 or array.shape[1] != num_layers or not len(array):
        raise ActionError(
            f"masks must have shape (N, {num_layers}), one row per option and one column per "
            f"candidate layer, got shape {array.shape}"
        )
    if not np.isin(array, (0, 1)).all():
        raise ActionError(f"masks must hold only 0 and 1, got {array.dtype} {array.ravel()[:8]} …")
    return array.astype(bool)


def check_masks_of_several(masks: Any, num_envs: int, num_layers: int) -> list[NDArray[np.bool_]]:
    """Options of several environments, M × L bool each.

    Args:
        masks: N × M × L, or M × L for the same in every environment.
        num_envs: N.
        num_layers: L.

    Raises:
        ActionError: another shape, or other numbers than 0 and 1.
    """
    array = as_array(masks, "masks")
    if array.ndim == 2:
        array = np.broadcast_to(array, (num_envs, *array.shape))
    if array.ndim != 3 or len(array) != num_envs:
        raise ActionError(
            f"masks must have shape ({num_envs}, M, {num_layers}) or (M, {num_layers}), got shape "
            f"{array.shape}"
        )
    return [check_masks(rows, num_layers) for rows in array]


def memory_of_option(env: Triable, layers: int | None = None) -> int:
    """About how many bytes one option takes while it is tried beside others.

    The sum of: the change of every chosen layer twice (float32), the rule's statistics twice, the
    activations and their gradients in one pass over the unit's prompts, and three times their
    logits (float32).

    Args:
        env: The environment, in its present state.
        layers: Number of layers that the option writes, the largest ones; None for all.
    """
    llm, unit = env.llm, env.episode.unit
    sizes = sorted((d_in * d_out for d_in, d_out in llm.shapes), reverse=True)[:layers]
    statistics = sum(x.nbytes for x in _tensors(env.episode.rule.statistics()))
    prompts = [prompt for fact in unit for prompt in fact.prompts]
    tokens = sum(prompt.length for prompt in prompts)
    answers = sum(len(prompt.answer_ids) for prompt in prompts)
    matrices = (m.weight for m in llm.model.modules() if isinstance(m, nn.Linear))
    activations = sum(sum(w.shape) for w in matrices) * llm.dtype.itemsize
    head = llm.model.get_output_embeddings()
    vocabulary = 0 if head is None else len(head.weight)
    return 8 * sum(sizes) + 2 * statistics + 2 * tokens * activations + 12 * answers * vocabulary


# -- inside ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tried:
    """What one option came to."""

    attempt: Attempt
    steps: int


def _chunk(
    envs: Sequence[Triable],
    masks: Sequence[NDArray[np.bool_]],
    chunk: int | None,
    total: int,
) -> int:
    """Options at a time."""
    if chunk is not None:
        whole_number(chunk, "chunk", 1)
    wanted = min(total, AT_A_TIME if chunk is None else chunk)
    free = available_memory(envs[0].llm.device)
    if free is None:
        return wanted
    widest = max(int(own.sum(1).max()) for own in masks)
    widest = len(envs[0].llm.layers) if any(env.intrinsic for env in envs) else widest
    each = max(1, max(memory_of_option(env, widest) for env in envs))
    fits = free // each
    if fits < 1 or (chunk is not None and wanted > fits):
        remedy = (
            f"pass chunk={fits}, which fits, or leave it out" if fits else "free some memory, or "
            "take fewer layers, shorter prompts or dtype='bfloat16'"
        )  # fmt: skip
        raise NotEnoughMemoryError(
            f"{wanted} options at a time need about {wanted * each / 1e9:.2g} GB, and "
            f"{envs[0].llm.device} has {free / 1e9:.2g} GB free; {remedy}"
        )
    return wanted if chunk is not None else max(1, min(wanted, int(SHARE * free) // each))


def _start(env: Triable) -> EpisodeState:
    """The present state, after the rule took in the capture that every option begins with."""
    before = env.episode.save()
    try:
        # Once, and not once per option.
        env.episode.observe()
        return env.episode.save()
    finally:
        env.episode.restore(before)


def _attempt(env: Triable, start: EpisodeState, mask: NDArray[np.bool_]) -> Passes[_Tried]:
    """One option, in an environment of its own that is thrown away."""
    twin = type(env).__new__(type(env))
    twin.__dict__.update(env.__dict__)
    twin.llm, twin.episode = (branch := env.episode.branch(start)).llm, branch
    branch.evaluator.on_device = False
    accounting = Accounting(branch, env.weights_of_terms, intrinsic=False)
    attempt = yield from accounting.attempt(partial(twin._write, Choice(mask)))
    return _Tried(attempt, branch.steps)


def _collected(masks: NDArray[np.bool_], tried: Sequence[_Tried], intrinsic: bool) -> TriedOptions:
    every = tried[len(masks)].attempt.terms if intrinsic else None
    own = tried[: len(masks)]
    terms = {
        name: np.array([float(one.attempt.terms[name]) for one in own])
        - (every[name] if every else 0.0)
        for name in own[0].attempt.terms
    }
    metrics = {
        name: np.array([one.attempt.measured.unit[name] for one in own])
        for name in own[0].attempt.measured.unit
    }
    return TriedOptions(
        masks=masks,
        rewards=np.sum(list(terms.values()), 0),
        reward_terms=terms,
        metrics={n: v if n == "answered" else v.astype(np.float64) for n, v in metrics.items()},
        layers=np.stack([one.attempt.layers for one in own]),
        edit_steps=np.array([one.steps for one in own], np.int64),
        error_types=np.array([int(one.attempt.error) for one in own], np.int64),
    )


def stacked(results: Sequence[TriedOptions]) -> TriedOptions:
    """Results of several environments as one, environments × N."""

    def join(name: str) -> Any:
        parts = [getattr(one, name) for one in results]
        if isinstance(parts[0], Mapping):
            return {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        return np.stack(parts)

    return TriedOptions(**{name: join(name) for name in TriedOptions.__slots__})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
