"""Which built-in model a folder holds: found by the values of its weights, not by its name.

What belongs to a built-in model, such as its facts, its layers and the step size tuned for it, is
the same for a copy of it under another name, and for one that was edited, fine-tuned or rounded.
Only headers and a few entries of some matrices are read. Nothing here imports torch before a folder
is looked at.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from hiedit_env.datasets.difficulty import is_world
from hiedit_env.errors import HieditError
from hiedit_env.model.built_in import BUILT_IN, LAYER_SELECTION, BuiltIn, built_in

if TYPE_CHECKING:
    from torch import Tensor

#: Closeness of the sampled entries from which weights count as relatives; strangers are near 0.4.
RELATED = 0.9
#: Entries of a matrix that are compared.
_ENTRIES = 16
#: Matrices of a model that are compared, about.
_MATRICES = 8


def belongings(model: object) -> BuiltIn:
    """What belongs to a model, however it is named; the defaults of every other model otherwise.

    Args:
        model: As for :func:`~hiedit_env.model.loading.load_model`; nothing is downloaded.

    >>> belongings("planted").rule, belongings("no/model").rule
    ('gradient', 'decorrelated')
    """
    return built_in(known_as(model) if isinstance(model, str) else model)


def environment_for(model: object, dataset: str | os.PathLike[str] | None = None) -> str:
    """Id of the environment for layer selection on a model and a data set.

    Args:
        model: As for :func:`belongings`.
        dataset: Name or path of the facts; None for the model's own.

    >>> environment_for("planted"), environment_for("planted", "mine.json")
    ('hiedit/Planted-v1', 'hiedit/LayerSelection-v1')
    """
    known = belongings(model)
    fits = dataset is None or os.fspath(dataset).startswith(known.facts)
    return f"hiedit/{known.environment if fits else LAYER_SELECTION}-v1"


def known_as(model: str) -> str:
    """The built-in model that a folder or hub id holds: the same weights, or close relatives.

    Args:
        model: As for :func:`~hiedit_env.model.loading.load_model`; nothing is downloaded.

    Returns:
        The name itself where it is no relative of a built-in model.

    >>> known_as("tiny"), known_as("no/model")
    ('tiny', 'no/model')
    """
    if not model or is_world(model) or (model in BUILT_IN and not Path(model).is_dir()):
        return model
    from hiedit_env.model.saving import find_folder

    try:
        folder = find_folder(model)
        if folder is None or not (stamp := file_stamp(folder)):
            return model
        for name in BUILT_IN:
            home = None if Path(name).is_dir() else find_folder(name)
            if home is not None and _are_related(home, folder.resolve(), stamp):
                return name
    except (HieditError, OSError):  # loading the model says what is wrong
        pass
    return model


def file_stamp(folder: Path) -> tuple[tuple[int, int], ...]:
    """When and how large the weight files of a folder are; it may change while a process runs."""
    from hiedit_env.model.folders import weight_files

    return tuple((f.stat().st_mtime_ns, f.stat().st_size) for f in weight_files(folder))


@lru_cache(maxsize=64)
def _are_related(one: Path, two: Path, stamp: object) -> bool:
    """Whether two folders hold models of the same matrices with much the same values.

    Args:
        one: The first folder.
        two: The second.
        stamp: Changes when the second folder does.
    """
    from hiedit_env.model.folders import DTYPES, stored_tensors, weight_files

    first, second = (
        {_within(t.name): t for file in weight_files(folder) for t in stored_tensors(file)}
        for folder in (one, two)
    )
    # Tokens may have been added.
    names = sorted(n for n, t in first.items() if len(t.shape) == 2 and "embed" not in n)
    alike = [n in second and second[n].shape == first[n].shape for n in names]
    # Files may hold more than the model reads, such as a copy of tied weights; but another block
    # makes another model.
    kinds = {_without_numbers(name) for name in names}
    same = [n for n in second if _without_numbers(n) in kinds]
    if not names or not all(alike) or len(same) != len(names):
        return False
    few = names[:: max(1, len(names) // _MATRICES)]
    samples = [
        [x for name in few if tensors[name].dtype in DTYPES for x in sample(tensors[name].read())]
        for tensors in (first, second)
    ]
    return len(samples[0]) == len(samples[1]) and closeness(*samples) >= RELATED


def _within(name: str) -> str:
    """The name of a tensor within the decoder, which may have been saved without its head.

    >>> _within("model.layers.0.mlp.up_proj.weight"), _within("layers.0.mlp.up_proj.weight")
    ('layers.0.mlp.up_proj.weight', 'layers.0.mlp.up_proj.weight')
    """
    return name.removeprefix("model.")


def _without_numbers(name: str) -> str:
    """The name of a tensor for all blocks alike."""
    return re.sub(r"\d+", "{}", name)


def sample(matrix: Tensor) -> list[float]:
    """A few entries of a matrix, evenly spaced; by them its relatives are recognised.

    >>> import torch
    >>> sample(torch.arange(31.0)) == [float(2 * i) for i in range(16)]
    True
    """
    flat = matrix.detach().flatten()
    places = [i * (flat.numel() - 1) // (_ENTRIES - 1) for i in range(_ENTRIES)]
    return [float(f"{value:.5g}") for value in flat[places].double().tolist()]


def closeness(one: Sequence[float], two: Sequence[float]) -> float:
    """The cosine, or that without the quarter of entries that differ most, if it is larger.

    An edit may write a few rows anew, in which entries are many times larger than elsewhere: one of
    them in the sample would hide that all others are the same.

    >>> closeness([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, -90.0, 4.0])
    1.0
    """
    pairs = sorted(zip(one, two, strict=True), key=lambda pair: abs(pair[0] - pair[1]))
    kept = pairs[: len(pairs) - len(pairs) // 4]
    return max(cosine(one, two), cosine([a for a, _ in kept], [b for _, b in kept]))


def cosine(one: Sequence[float], two: Sequence[float]) -> float:
    """Cosine of the angle between two vectors; 0 where either is zero.

    >>> cosine([3.0, 4.0], [4.0, 3.0])
    0.96
    """
    norm = math.sqrt(sum(x * x for x in one) * sum(x * x for x in two))
    return sum(x * y for x, y in zip(one, two, strict=True)) / norm if norm else 0.0
