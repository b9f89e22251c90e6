"""Which trained agent that ships fits a model: found by the model's folder, not by its typed name.

An agent fits where its candidate layers are there with their shapes, the tokenizer reads a text as
in training, and the weights are those it was trained for, or close relatives: edited, fine-tuned or
in another dtype. Closeness is the cosine of a few fixed entries of every candidate matrix with
those in the agent's record. Only headers, these entries and the tokenizer are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hiedit_agents.named.checkpoints import LEVELS, PANGRAM, kind_of, read_record, sample
from hiedit_env.errors import HieditError
from hiedit_env.model.built_in import BUILT_IN
from hiedit_env.model.folders import DTYPES, StoredTensor, stored_tensors, weight_files
from hiedit_env.model.saving import find_folder
from hiedit_env.model.tokenization import PromptEncoder

#: Where the trained agents that ship with hiedit are: a folder per agent and model.
SHIPPED = Path(__file__).parents[1] / "trained"
#: Cosine of the sampled entries from which weights count as relatives; strangers are near 0.
RELATED = 0.9


@dataclass(frozen=True, slots=True)
class Fit:
    """A trained agent that fits a model.

    Args:
        folder: The agent.
        why: Why it fits, as the end of a sentence.
    """

    folder: Path
    why: str


def find_shipped(name: str, model: str) -> Fit | None:
    """The trained agent of a name that ships for a model.

    Args:
        name: Such as ``"hiedit"``.
        model: As for :func:`~hiedit_env.model.loading.load_model`; nothing is downloaded.

    Returns:
        None where none fits.
    """
    if not model:
        return None
    by_name = SHIPPED / f"{name}-{model}"
    if not Path(model).is_dir() and kind_of(by_name) == LEVELS:
        return Fit(by_name, f"it was trained for {model}")
    try:
        folder = find_folder(model)
        files = [] if folder is None else weight_files(folder)
    except HieditError:  # loading the model says what is wrong
        return None
    if folder is None or not files:
        return None
    # A folder may change while the process runs.
    stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _find(name, folder.resolve(), stamp)


@lru_cache(maxsize=32)
def _find(name: str, folder: Path, stamp: object) -> Fit | None:
    for place in sorted(SHIPPED.glob(f"{name}-*")):
        if kind_of(place) != LEVELS:
            continue
        record = read_record(place)
        why = _why(record, folder) if record["name"] == name else None
        if why is not None:
            return Fit(place, why)
    return None


def known_as(model: str) -> str:
    """The built-in model that a folder or hub id holds: the same weights, or close relatives.

    What belongs to a built-in model, such as its layers and the step size tuned for it, does not
    depend on how it is called.

    Args:
        model: As for :func:`~hiedit_env.model.loading.load_model`.

    Returns:
        The name itself where it is no relative of a built-in model.
    """
    if model in BUILT_IN and not Path(model).is_dir():
        return model
    try:
        folder = find_folder(model)
        if folder is None:
            return model
        for name in BUILT_IN:
            home = None if Path(name).is_dir() else find_folder(name)
            if home is not None and _are_related(home, folder):
                return name
    except HieditError:  # loading the model says what is wrong
        pass
    return model


def _are_related(one: Path, two: Path) -> bool:
    """Whether two folders hold models of the same matrices with much the same values."""
    first, second = (
        {t.name: t for file in weight_files(folder) for t in stored_tensors(file)}
        for folder in (one, two)
    )
    # Tokens may have been added.
    names = sorted(n for n, t in first.items() if len(t.shape) == 2 and "embed" not in n)
    alike = [n in second and second[n].shape == first[n].shape for n in names]
    if not names or not all(alike) or len(first) != len(second):
        return False
    few = names[:: max(1, len(names) // 8)]
    samples = [
        [x for name in few if tensors[name].dtype in DTYPES for x in sample(tensors[name].read())]
        for tensors in (first, second)
    ]
    return len(samples[0]) == len(samples[1]) and cosine(*samples) >= RELATED


def _why(record: Mapping[str, Any], folder: Path) -> str | None:
    """Why an agent fits a folder; None if it does not."""
    trained = record["model"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != trained["model_type"]:
            return None
        stored = {t.name: t for file in weight_files(folder) for t in stored_tensors(file)}
    except (HieditError, OSError, ValueError, AttributeError):
        return None
    places: list[StoredTensor] = []
    for layer, shape in zip(trained["layers"], trained["shapes"], strict=True):
        place = _stored(stored, f"{layer}.weight")
        if place is None or place.dtype not in DTYPES or sorted(place.shape) != sorted(shape):
            return None
        places.append(place)
    if not _reads_alike(folder, trained["tokenizer"]):
        return None
    wanted = trained.get("sample")
    original = record["model_name"]
    if not wanted:
        return f"layers, shapes and tokenizer are those of {original}, for which it was trained"
    found = [sample(place.read()) for place in places]
    close = cosine([x for layer in wanted for x in layer], [x for layer in found for x in layer])
    if close < RELATED:
        return None
    if close > 1 - 1e-9:
        return f"the weights are those of {original}, for which it was trained"
    return (
        f"the weights are those of {original}, for which it was trained, edited, fine-tuned or "
        f"rounded (cosine {close:.4f})"
    )


def cosine(one: Sequence[float], two: Sequence[float]) -> float:
    """Cosine of the angle between two vectors; 0 where either is zero.

    >>> cosine([3.0, 4.0], [4.0, 3.0])
    0.96
    """
    norm = math.sqrt(sum(x * x for x in one) * sum(x * x for x in two))
    return sum(x * y for x, y in zip(one, two, strict=True)) / norm if norm else 0.0


def _stored(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """The tensor of that name, or the only one whose name ends or begins later in the same way."""
    if name in stored:
        return stored[name]
    alike = [key for key in stored if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return stored[alike[0]] if len(alike) == 1 else None


def _reads_alike(folder: Path, tokenizer: Sequence[int]) -> bool:
    """Whether a folder's tokenizer reads a text as in training and has no fewer tokens."""
    try:
        auto: Any = AutoTokenizer
        found = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = PromptEncoder(found, None).encode_prompt(PANGRAM)
    # A tokenizer may be wrong in any way, and loading the model says what is wrong.
    except Exception:
        return False
    return len(found) >= tokenizer[0] and list(ids) == list(tokenizer[1:])
