"""Episodes with every option tried, written for offline learning: ``hiedit record``."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from hiedit_agents.bandits.fixed_best import greedy_search, recorded_score
from hiedit_agents.bandits.recording import Recording, record
from hiedit_agents.bandits.recording_files import EXTRA, write_recording
from hiedit_benchmarks.commands.record_settings import Family, RecordSettings
from hiedit_benchmarks.comparison.episode import bar
from hiedit_benchmarks.comparison.results import versions
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import EditingSettings, EnvSettings
from hiedit_env.errors import (
    OutputError,
    ResultsExistError,
    SettingsError,
    require_libraries,
)
from hiedit_env.model.relatives import environment_for

#: Most layers whose subsets are all tried.
MOST_LAYERS = 8


def options(family: Family, count: int) -> NDArray[np.int8]:
    """The options of a family, fewest layers first: M × L.

    Raises:
        SettingsError: all subsets of more than 8 layers.

    >>> options("ranges", 3).tolist()
    [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]
    """
    if family == "subsets" and count > MOST_LAYERS:
        raise SettingsError(
            f"--options subsets tries all 2^{count} sets of {count} layers, at most 2^{MOST_LAYERS}"
            "; take singles, pairs or ranges, or fewer --layers"
        )
    places = range(count)
    chosen: set[tuple[int, ...]] = {(), tuple(places)}
    if family == "subsets":
        chosen |= {c for size in places for c in combinations(places, size)}
    elif family == "ranges":
        chosen |= {tuple(range(a, b + 1)) for a in places for b in range(a, count)}
    else:
        sizes = (1,) if family == "singles" else (1, 2)
        chosen |= {c for size in sizes for c in combinations(places, size)}
    masks = np.zeros((len(chosen), count), np.int8)
    for row, layers in enumerate(sorted(chosen, key=lambda c: (len(c), c))):
        masks[row, list(layers)] = 1
    return masks


def main(given: RecordSettings, editing: EditingSettings, out: Path) -> int:
    """Records and says what came of it; returns 0.

    Args:
        given: Which options, in which episodes.
        editing: The environment.
        out: A new folder.

    Raises:
        OutputError: ``out`` is a file.
        ResultsExistError: ``out`` holds something.
        MissingLibraryError: pyarrow or minari is not installed.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a new folder with --out")
    if out.exists() and any(out.iterdir()):
        raise ResultsExistError(f"{out} is not empty; give another folder with --out")
    require_libraries(EXTRA, "pyarrow", "minari")  # before anything is recorded
    name = environment_for(editing.model, editing.dataset).removesuffix("-v1")
    known = {field.name for field in fields(EnvSettings)}
    arguments: dict[str, Any] = {
        field.name: getattr(editing, field.name)
        for field in fields(editing)
        if field.name in known and getattr(editing, field.name) != field.default
    }
    env = gymnasium.make(f"{name}-v{given.version}", **{"model": editing.model, **arguments})
    inner = env.unwrapped
    assert isinstance(inner, EditingEnv)
    masks = options(given.options, len(inner.llm.layers))
    seeds = range(given.seed, given.seed + given.episodes)
    facts = min(editing.num_edits or len(inner.requests), len(inner.requests))
    with bar("facts recorded", given.episodes * facts, True) as shown:
        found = record(
            env,
            masks,
            seeds,
            chunk=given.chunk,
            versions=versions(),
            progress=lambda done, total: shown.update(),
        )
    write_recording(found, out)
    print(summary(found))
    print(f"Recorded in {out}")
    return 0


def summary(found: Recording) -> str:
    """What the recorded rewards say about a choice per fact, in a few lines."""
    rewards = found.rewards
    fixed = greedy_search(recorded_score(found.masks, rewards), found.masks.shape[1])
    best = float(rewards.max(1).mean())
    layers = "".join(map(str, fixed.layers.astype(int)))
    return (
        f"{len(found)} facts, {len(found.masks)} options each; mean reward per fact: "
        f"random option {rewards.mean():.3f}, best fixed {fixed.reward:.3f} (layers {layers}), "
        f"best per fact {best:.3f}; headroom {best - fixed.reward:.3f}"
    )
