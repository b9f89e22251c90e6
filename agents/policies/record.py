"""Trained policies on disk: ``policy.json`` and ``policy.safetensors``, nothing that runs code."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from hiedit_agents.named.checkpoints import facts_entry, file_digest, trained_facts
from hiedit_agents.policies.task import Sizes, Task
from torch import Tensor

from hiedit_env.errors import CheckpointError, HieditError, ResultsExistError
from hiedit_env.files import write_bytes

FORMAT = 1
JSON_FILE, TENSOR_FILE = "policy.json", "policy.safetensors"


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """What is known about a trained policy.

    Args:
        library: Its prefix in ``hiedit compare --agents LIBRARY:DIR``.
        algorithm: Name of the algorithm.
        task: What it was trained on.
        sizes: What it was made for.
        policy: What the library needs to build the network again; plain JSON.
        tensors: Its parameters by name, on the CPU.
        digest: 16 hexadecimal digits of the tensors' file.
        folder: Where it was read.
    """

    library: str
    algorithm: str
    task: Task
    sizes: Sizes
    policy: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    digest: str
    folder: Path


def refuse_finished(out: Path | str) -> None:
    """Called before a training begins.

    Raises:
        ResultsExistError: the folder holds a trained policy.
    """
    if (Path(out) / JSON_FILE).exists():
        raise ResultsExistError(f"{out} holds a trained policy; give another --out")


def save_policy(
    out: Path | str,
    *,
    library: str,
    algorithm: str,
    task: Task,
    sizes: Sizes,
    policy: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    training: Mapping[str, Any],
    packages: Sequence[str] = (),
) -> None:
    """Writes what ``hiedit compare`` reads, ``policy.json`` last; each file whole or not at all.

    Args:
        out: The folder; made if need be.
        library: Prefix in ``hiedit compare --agents LIBRARY:DIR``.
        algorithm: Name of the algorithm.
        task: What the policy was trained on.
        sizes: :meth:`Task.sizes` of the environments.
        policy: What ``load`` needs to build the network again; plain JSON.
        tensors: Its parameters by name.
        training: Steps, seed, hyperparameters, results of evaluations: plain JSON, for the reader.
        packages: Installed packages whose versions are recorded, besides torch and gymnasium.

    Raises:
        ResultsExistError: the folder holds a trained policy.
        CheckpointError: the folder cannot be written.
    """
    refuse_finished(out)
    out = Path(out)
    names = ("hiedit", "torch", "gymnasium", "numpy", *packages)
    record = {
        "format": FORMAT,
        "library": library,
        "algorithm": algorithm,
        "task": task.to_json(),
        "sizes": {
            "observation": sizes.observation,
            "layers": sizes.layers,
            "names": list(sizes.names),
        },
        "policy": dict(policy),
        "training": {**training, **facts_entry(sizes.facts)},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / TENSOR_FILE, safetensors.torch.save(plain))
        write_bytes(out / JSON_FILE, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error


def read_policy(folder: Path | str, library: str) -> PolicyRecord:
    """A policy that :func:`save_policy` wrote.

    Raises:
        CheckpointError: there is none, it is damaged, or another library trained it.
    """
    folder = Path(folder)
    file = folder / JSON_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise CheckpointError(
                f"{file} has format {found['format']!r}; this version of hiedit reads {FORMAT}"
            )
        if found["library"] != library:
            raise CheckpointError(
                f"{folder} was trained by {found['library']}, not by {library}; name it "
                f"{found['library']}:{folder}"
            )
        sizes = found["sizes"]
        return PolicyRecord(
            library=library,
            algorithm=found["algorithm"],
            task=Task.from_json(found["task"]),
            sizes=Sizes(
                sizes["observation"], sizes["layers"], tuple(sizes["names"]), trained_facts(found)
            ),
            policy=found["policy"],
            tensors=safetensors.torch.load((folder / TENSOR_FILE).read_bytes()),
            digest=file_digest(folder / TENSOR_FILE),
            folder=folder,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        hint = error if isinstance(error, HieditError | OSError) else repr(error)
        raise CheckpointError(f"{folder} holds no policy of {library}: {hint}") from error
