"""Files of candidate layers, as ``hiedit layers`` writes them: names, scores, and whose they are.

A file is JSON. What is read of it:

- ``format`` and ``version``: :data:`FORMAT` and :data:`VERSION`;
- ``model``: ``name`` (for messages) and ``structure`` (:func:`structure_fingerprint`);
- ``layers``: the full names of the candidate layers; may be changed by hand.

All else, such as the scores of all measured layers, is for readers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hiedit_env.errors import LayerError
from hiedit_env.files import parse_json, write_bytes
from hiedit_env.model.structure import sizes

FORMAT = "hiedit-layers"
VERSION = 1
#: How the name of such a file ends.
SUFFIX = ".json"


def structure_fingerprint(model_type: str, modules: Mapping[str, nn.Module], blocks: str) -> str:
    """16 hexadecimal digits of the names and shapes of all matrices in the blocks.

    Edited or fine-tuned weights keep it, since their layers are the same; another size of the same
    kind of model has another one.

    Args:
        model_type: ``config.model_type``.
        modules: Name → module, as in ``named_modules()``.
        blocks: Full name of the list of blocks.
    """
    matrices = [
        (name, *sizes(module))
        for name, module in modules.items()
        if name.startswith(f"{blocks}.") and isinstance(module, nn.Linear | Conv1D)
    ]
    text = json.dumps([model_type, matrices])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_layers(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of candidate layers; it appears complete or not at all.

    Args:
        path: Its name must end in :data:`SUFFIX`.
        content: At least ``model`` and ``layers``, see above; format and version are added.

    Raises:
        OutputError: it cannot be written.
    """
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_bytes(path, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())


def is_layer_file(pattern: object) -> bool:
    """Whether a layer pattern is the path of a file.

    >>> is_layer_file("found.json"), is_layer_file("model.layers.{1-2}.mlp.up_proj")
    (True, False)
    """
    return isinstance(pattern, str) and pattern.endswith(SUFFIX)


def read_layers(path: str, structure: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The candidate layers that a file names.

    Args:
        path: The file.
        structure: :func:`structure_fingerprint` of the model they are for.
        modules: The model's modules by name.

    Raises:
        LayerError: no such file, no file of layers, one of another version, or of another model;
            one line.
    """
    content = _read(path)
    model = content.get("model")
    names: Any = content.get("layers")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(model, dict) or not are_names or not names:
        raise LayerError(f"{path} names no layers; write it anew with 'hiedit layers'")
    whose = f"model {model.get('name')!r}"
    lacking = [name for name in names if name not in modules]
    if lacking:
        raise LayerError(
            f"{path} was made for {whose}: {lacking[0]!r} ({len(lacking)} of {len(names)} layers) "
            "does not exist here; run 'hiedit layers' on this model"
        )
    if model.get("structure") != structure:
        raise LayerError(
            f"{path} was made for {whose}, whose matrices have other names or shapes; run "
            "'hiedit layers' on this model"
        )
    return list(names)


def _read(path: str) -> dict[str, Any]:
    """The content of a file of layers of this version."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LayerError(
            f"there is no file of layers {path!r}; 'hiedit layers --out {path}' writes one"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise LayerError(f"file of layers {path!r} cannot be read: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LayerError(
            f"{path} is no file of layers (format {FORMAT!r}); 'hiedit layers' writes one"
        )
    if content.get("version") != VERSION:
        raise LayerError(
            f"{path} has version {content.get('version')!r} of the format; this hiedit reads "
            f"{VERSION}: write it anew with 'hiedit layers'"
        )
    return content
