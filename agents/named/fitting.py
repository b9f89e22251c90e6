"""Which trained agent that ships fits a model: found by the model's folder, not by its typed name.

An agent fits where its candidate layers are there with their shapes, the tokenizer reads a text as
in training, and the weights are those it was trained for, or close relatives: edited, fine-tuned or
in another dtype. Closeness is the cosine of a few fixed entries of every candidate matrix with
those in the agent's record, but for the quarter of them that differ most. Only headers, these
entries and the tokenizer are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hiedit_agents.named.checkpoints import LEVELS, PANGRAM, kind_of, read_record
from hiedit_env.errors import HieditError
from hiedit_env.files import parse_json
from hiedit_env.model.folders import DTYPES, StoredTensor, stored_tensors, weight_files
from hiedit_env.model.relatives import RELATED, closeness, cosine, file_stamp, sample
from hiedit_env.model.saving import find_folder
from hiedit_env.model.tokenization import PromptEncoder

#: Where the trained agents that ship with hiedit are: a folder per agent and model.
SHIPPED = Path(__file__).parents[1] / "trained"


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
        stamp = () if folder is None else file_stamp(folder)
    except (HieditError, OSError):  # loading the model says what is wrong
        return None
    return _find(name, folder.resolve(), stamp) if folder is not None and stamp else None


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


def _why(record: Mapping[str, Any], folder: Path) -> str | None:
    """Why an agent fits a folder; None if it does not."""
    trained = record["model"]
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
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
    one, two = ([x for layer in layers for x in layer] for layers in (wanted, found))
    close = closeness(one, two)
    if close < RELATED:
        return None
    if cosine(one, two) > 1 - 1e-9:
        return f"the weights are those of {original}, for which it was trained"
    return (
        f"the weights are those of {original}, for which it was trained, edited, fine-tuned or "
        f"rounded (cosine {close:.4f})"
    )


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
