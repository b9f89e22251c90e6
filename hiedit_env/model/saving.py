"""Saving an edited model: a copy of its folder in which only the edited matrices are other bytes.

All files are copied. Within the safetensors files the bytes of edited matrices are overwritten in
place, in the dtype they are stored in, so that header, metadata, order, shards and all other
tensors stay byte for byte: tied weights, vision parts and whatever else the loaded model leaves
out.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from hiedit_env.errors import HieditWarning, ModelError
from hiedit_env.model.folders import (
    DTYPES,
    EXPORTED_WEIGHTS,
    OTHER_WEIGHTS,
    StoredTensor,
    check_folder,
    is_within,
    stored_tensors,
    weight_files,
)
from hiedit_env.model.loading import CONVERTED, SMOLLM2_HUB_ID, cache_folder
from hiedit_env.model.own_folders import own_folder

#: Folders that belong to the place where a model lies and not to the model.
_NOT_OF_THE_MODEL = (".git", ".cache", "__pycache__", ".ipynb_checkpoints")
#: A ledger is of the weights beside it: whoever saves other weights writes another one.
_LEFT_BEHIND = (".lock", ".DS_Store", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")


@dataclass(frozen=True, slots=True)
class EditedMatrix:
    """One edited matrix.

    Args:
        name: Name of the parameter in the loaded model.
        base: Unedited values, in the loaded dtype.
        edited: Edited values, in the loaded dtype.
        places: Where it is stored.
    """

    name: str
    base: Tensor
    edited: Tensor
    places: tuple[StoredTensor, ...]

    def stored(self, place: StoredTensor, old: Tensor) -> Tensor:
        """The edited values in the dtype of the file.

        Args:
            place: One of ``places``.
            old: What is stored there.

        Where the model was loaded in a narrower dtype than that of the file, the change is added to
        the stored values, which keeps their precision.
        """
        kind = DTYPES[place.dtype]
        base, edited = self.base.cpu(), self.edited.cpu()
        if torch.equal(base.to(kind), old):
            return edited.to(kind)
        return (old.double() + (edited.double() - base.double())).to(kind)


def find_folder(name: str) -> Path | None:
    """The folder in which a model of that name lies on this machine; nothing is downloaded.

    Args:
        name: As for :func:`load_model`.

    Returns:
        For a hub id its snapshot in the hub's cache; None where there is none.
    """
    if (own := own_folder(name, cache_folder())) is not None:
        return own
    if name and os.path.isdir(name):
        return Path(name)
    if name == "smollm2-135m":
        if (converted := cache_folder() / CONVERTED).is_dir():
            return converted
        name = SMOLLM2_HUB_ID
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def source_folder(model: Any) -> Path:
    """The folder that a loaded model was read from; for a hub id its snapshot in the cache.

    Raises:
        ModelError: there is no such folder any more.
    """
    source = str(model.name_or_path)
    if os.path.isdir(source):
        return Path(source).resolve()
    found = try_to_load_from_cache(source, "config.json") if source else None
    if not isinstance(found, str):
        raise ModelError(f"the files of model {source!r} are not on this machine any more")
    return Path(found).parent


def check_source(folder: Path, out: Path) -> None:
    """Checks that a folder can be copied and edited; reads headers and names only.

    Raises:
        ModelError: see :func:`.folders.check_folder`; or ``out`` lies within the folder, or a link
            in it leads out of it.
    """
    check_folder(folder)
    if is_within(out, folder) or out.resolve() == folder.resolve():
        raise ModelError(f"{out} lies in the model's own folder {folder}; give another --out")
    for path, name in _files(folder):
        # Weights are parsed, so nothing else can be carried out of another place by their name.
        if path.is_symlink() and path.suffix != ".safetensors" and not _is_own(path, folder):
            raise ModelError(
                f"{name} in {folder} is a link that leads out of the folder; put a copy of the "
                "file in its place (cp -rL copies a folder without links)"
            )


def locate(weights: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[StoredTensor, ...]]:
    """Where parameters of a loaded, unedited model are stored.

    A parameter is recognised by its values, among the tensors of its shape, those of its name
    first: names in a file and in a model may begin differently, and tied weights have two.

    Args:
        weights: Unedited parameters by name, in the dtype they were loaded in.
        folder: Where the model was loaded from.

    Returns:
        Per parameter at least one place.

    Raises:
        ModelError: a parameter is stored in no tensor as it is.
    """
    used = weight_files(folder)
    others = [f for f in sorted(folder.glob("*.safetensors")) if f not in used and not _other(f)]
    stored = [tensor for file in (*used, *others) for tensor in stored_tensors(file)]
    found: dict[str, tuple[StoredTensor, ...]] = {}
    for name, weight in weights.items():
        alike = [t for t in stored if t.shape == tuple(weight.shape) and t.dtype in DTYPES]
        alike.sort(key=lambda t: -_common_end(t.name, name))
        end = max((_common_end(t.name, name) for t in alike), default=0)
        near = [t for t in alike if _common_end(t.name, name) == end] if end else []
        value = weight.detach().cpu()
        places = tuple(t for t in near if torch.equal(t.read().to(value.dtype), value))
        if not any(place.file in used for place in places):
            places = tuple(t for t in alike if torch.equal(t.read().to(value.dtype), value))
        if not any(place.file in used for place in places):
            raise ModelError(
                f"the weights of {name!r} are stored in {folder} {_how(stored, name)}, so the "
                "folder cannot be edited; choose other --layers, or save the loaded model with "
                "save_pretrained and edit that folder"
            )
        found[name] = places
    return found


def _how(stored: Sequence[StoredTensor], name: str) -> str:
    """How a parameter is stored that cannot be edited."""
    for tensor in stored:
        if tensor.name == name and tensor.dtype not in DTYPES:
            return f"as {tensor.dtype}, where weights are edited as {', '.join(DTYPES)} only"
    return "in another layout than they are loaded in"


def save_edited(folder: Path, target: Path, matrices: Sequence[EditedMatrix]) -> list[str]:
    """Copies a model's folder and writes the edited matrices into the copy.

    Args:
        folder: The unedited model's folder; it is only read.
        target: Does not exist; its parent does.
        matrices: What was edited.

    Returns:
        Names of files that were left out, since they hold the unedited weights in other formats.

    Raises:
        OSError: something cannot be read or written.
    """
    left_out = copy_folder(folder, target)
    for matrix in matrices:
        for place in matrix.places:
            new = matrix.stored(place, place.read()).contiguous().flatten().view(torch.uint8)
            with (target / place.file.relative_to(folder)).open("r+b") as file:
                file.seek(place.start)
                file.write(new.numpy().tobytes())
    return left_out


def copy_folder(folder: Path, target: Path) -> list[str]:
    """Copies the files of a model; each copy is a plain file with the mode of any new file.

    Warns of what is neither a file nor a folder, since it is not copied.

    Args:
        folder: The model's folder.
        target: Does not exist; its parent does.

    Returns:
        Names of files that were left out, since they hold the weights in other formats.

    Raises:
        OSError: something cannot be read or written.
    """
    target.mkdir()
    if odd := [name for path, name in _all(folder) if not path.is_file()]:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        warnings.warn(
            f"not copied from {folder}, since they are neither files nor folders but links to "
            f"folders, links that lead nowhere, pipes or the like: {', '.join(odd[:5])}{more}",
            HieditWarning,
            stacklevel=2,
        )
    left_out = []
    for path, name in _files(folder):
        if _other(path):
            left_out.append(name)
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return left_out


def differences(folder: Path, target: Path, matrices: Sequence[EditedMatrix]) -> list[str]:
    """Compares the saved weights with the unedited ones and the edited matrices, bit for bit.

    Returns:
        One line per tensor that is not what it should be; none where all are.
    """
    expected = {
        (place.file.relative_to(folder), place.name): matrix
        for matrix in matrices
        for place in matrix.places
    }
    lines = []
    for old_file in sorted(folder.rglob("*.safetensors")):
        name = old_file.relative_to(folder)
        if not (target / name).is_file():
            continue
        olds, news = stored_tensors(old_file), stored_tensors(target / name)
        if [t.name for t in olds] != [t.name for t in news]:
            lines.append(f"{name} holds other tensors")
            continue
        for old, new in zip(olds, news, strict=True):
            matrix = expected.get((name, old.name))
            if matrix is None:
                if not _same_bytes(old, new):
                    lines.append(f"{old.name} in {name} was not edited and differs")
                continue
            gap = difference(new.read(), matrix.stored(old, old.read()))
            if gap is not None:
                lines.append(f"{old.name} in {name} differs by up to {gap:.3g}")
    return lines


def difference(one: Tensor, two: Tensor) -> float | None:
    """The largest absolute difference of two tensors of one shape and dtype; None for equal."""
    if torch.equal(one, two):
        return None
    return float((one.double() - two.double()).abs().max())


def _same_bytes(old: StoredTensor, new: StoredTensor) -> bool:
    if (old.dtype, old.shape, old.end - old.start) != (new.dtype, new.shape, new.end - new.start):
        return False
    with old.file.open("rb") as one, new.file.open("rb") as two:
        one.seek(old.start)
        two.seek(new.start)
        left = old.end - old.start
        while left > 0:
            size = min(left, 2**24)
            if one.read(size) != two.read(size):
                return False
            left -= size
    return True


def _common_end(one: str, two: str) -> int:
    """Number of equal last parts of two dotted names.

    >>> _common_end("model.layers.1.up.weight", "layers.1.up.weight")
    4
    """
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(two.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _files(folder: Path) -> Iterable[tuple[Path, str]]:
    """Regular files of a model's folder, with their names relative to it."""
    return ((path, name) for path, name in _all(folder) if path.is_file())


def _all(folder: Path) -> Iterable[tuple[Path, str]]:
    """All that a model's folder holds, with names relative to it, but for true folders."""
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _NOT_OF_THE_MODEL)
        for name in sorted((*names, *(f for f in folders if Path(above, f).is_symlink()))):
            if name not in _LEFT_BEHIND:
                path = Path(above, name)
                yield path, os.path.relpath(path, folder)


def _other(path: Path) -> bool:
    patterns = (*OTHER_WEIGHTS, *EXPORTED_WEIGHTS)
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


def _is_own(path: Path, folder: Path) -> bool:
    """Whether a link leads to a file of the same model: in the hub's cache, its blobs."""
    hub = folder.parent.name == "snapshots"
    return is_within(path, folder.parent.parent if hub else folder)
