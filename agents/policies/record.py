"""Policies of RL libraries on disk, in the one format of :mod:`hiedit_agents.named.checkpoints`."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from hiedit_agents.named.checkpoints import (
    JSON_FILE,
    POLICY,
    facts_entry,
    read_record,
    read_tensors,
    trained_facts,
    weights_of,
    write_agent,
)
from hiedit_agents.policies.task import Sizes, Task
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError


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
        ResultsExistError: the folder holds a trained agent.
    """
    if (Path(out) / JSON_FILE).exists():
        raise ResultsExistError(f"{out} holds a trained agent; give another --out")


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
    """Writes what ``hiedit compare`` reads: ``agent.safetensors``, then ``agent.json``.

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
        ResultsExistError: the folder holds a trained agent.
        CheckpointError: the folder cannot be written, or a parameter is not finite.
    """
    refuse_finished(out)
    names = ("hiedit", "torch", "gymnasium", "numpy", *packages)
    record = {
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
    write_agent(Path(out), POLICY, record, tensors)


def read_policy(folder: Path | str, library: str) -> PolicyRecord:
    """A policy that :func:`save_policy` wrote.

    Raises:
        CheckpointError: there is none, it is damaged, or another library trained it.
    """
    folder = Path(folder)
    found = read_record(folder, POLICY)
    if found["library"] != library:
        raise CheckpointError(
            f"{folder} was trained by {found['library']}, not by {library}; name it "
            f"{found['library']}:{folder}"
        )
    sizes = found["sizes"]
    try:
        task = Task.from_json(found["task"])
    except SettingsError as error:
        raise CheckpointError(f"{folder} holds no policy of {library}: {error}") from error
    return PolicyRecord(
        library=library,
        algorithm=found["algorithm"],
        task=task,
        sizes=Sizes(
            sizes["observation"], sizes["layers"], tuple(sizes["names"]), trained_facts(found)
        ),
        policy=found["policy"],
        tensors=read_tensors(folder, found),
        digest=weights_of(found),
        folder=folder,
    )
