"""Folders of recordings: ``record.json``, ``facts.parquet`` and a Minari data set.

``record.json`` says what was recorded, ``facts.parquet`` holds one row per fact with the outcome of
every option, and ``minari`` holds the same episodes as a Minari data set, for libraries that read
those.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_agents.bandits.recording import Origin, Recording
from hiedit_env.errors import DatasetError, MissingLibraryError
from hiedit_env.files import parse_json, write_bytes

FORMAT = 1
RECORD, FACTS, MINARI = "record.json", "facts.parquet", "minari"
EXTRA = "offline"


def write_recording(recording: Recording, folder: Path) -> None:
    """Writes a recording into a new folder.

    Raises:
        MissingLibraryError: pyarrow or minari is not installed.
        OutputError: a file cannot be written.
    """
    pa, parquet = _arrow()
    _minari()
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "episode": recording.episodes,
        "seed": recording.seeds[recording.episodes],
        "prompt": [prompt for prompt, _ in recording.facts],
        "answer": [answer for _, answer in recording.facts],
        "observation": _lists(pa, recording.observations),
        "action": recording.actions,
        "rewards": _lists(pa, recording.rewards),
    }
    columns |= {f"term/{n}": _lists(pa, v) for n, v in recording.terms.items()}
    columns |= {f"metric/{n}": _lists(pa, v) for n, v in recording.metrics.items()}
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    write_bytes(folder / FACTS, sink.getvalue().to_pybytes())
    _write_minari(recording, folder / MINARI)
    about = {
        "format": FORMAT,
        **asdict(recording.origin),
        "masks": recording.masks.astype(int).tolist(),
        "seeds": recording.seeds.tolist(),
        "last_observations": recording.last_observations.tolist(),
        "action_space": {"MultiBinary": len(recording.origin.layers)},
        "observation_space": {"Box": [-1.0, 1.0, recording.origin.observation_size, "float32"]},
    }
    # Last, so that a folder without it is known to be unfinished.
    write_bytes(folder / RECORD, json.dumps(about, indent=1).encode())


def read_recording(folder: Path) -> Recording:
    """Reads a recording back.

    Raises:
        DatasetError: no recording, or one of another format; names the file.
        MissingLibraryError: pyarrow is not installed.
    """
    _, parquet = _arrow()
    path = folder / RECORD
    try:
        about = parse_json(path.read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise DatasetError(
                f"{path} has format {about.get('format')!r}, and this version reads {FORMAT}; "
                "record again"
            )
        rows = parquet.read_table(folder / FACTS)
    except (OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{folder} holds no recording: {error}; make one with hiedit record"
        ) from error

    def matrix(name: str, dtype: Any) -> NDArray[Any]:
        return np.array(rows.column(name).to_pylist(), dtype)

    def group(prefix: str) -> dict[str, NDArray[np.float64]]:
        names = [n for n in rows.column_names if n.startswith(prefix)]
        return {n.removeprefix(prefix): matrix(n, np.float64) for n in names}

    origin = Origin(
        environment=about["environment"],
        model=about["model"],
        fingerprint=about["fingerprint"],
        layers=tuple(about["layers"]),
        observation_size=about["observation_size"],
        settings=about["settings"],
        versions=about["versions"],
    )
    return Recording(
        origin=origin,
        masks=np.array(about["masks"], bool),
        seeds=np.array(about["seeds"], np.int64),
        episodes=matrix("episode", np.int64),
        observations=matrix("observation", np.float32),
        last_observations=np.array(about["last_observations"], np.float32),
        actions=matrix("action", np.int64),
        rewards=matrix("rewards", np.float64),
        terms=group("term/"),
        metrics=group("metric/"),
        facts=list(
            zip(rows.column("prompt").to_pylist(), rows.column("answer").to_pylist(), strict=True)
        ),
    )


def minari_name(origin: Origin) -> str:
    """Name of the Minari data set of a recording."""
    letters = "".join(c if c.isalnum() else "-" for c in origin.model).strip("-").lower()
    return f"hiedit/{letters or 'model'}-v0"


def load_minari(folder: Path) -> Any:
    """The Minari data set in a recording's folder.

    The reward of an episode is that of the option carried out; ``infos["option_rewards"]`` has
    those of all options before every fact, and ``infos["option"]`` the index of the one taken.

    Raises:
        MissingLibraryError: minari is not installed.
        DatasetError: there is none.
    """
    minari = _minari()
    about = read_recording(folder).origin
    with _datasets_in(folder / MINARI):
        return minari.load_dataset(minari_name(about))


# -- inside ---------------------------------------------------------------------------------------


def _write_minari(recording: Recording, folder: Path) -> None:
    minari = _minari()
    from minari.data_collector import EpisodeBuffer

    count = len(recording.origin.layers)
    buffers = []
    for place, seed in enumerate(recording.seeds.tolist()):
        rows = np.flatnonzero(recording.episodes == place)
        actions = recording.actions[rows]
        ended = np.zeros(len(rows), bool)
        ended[-1:] = True
        nothing = np.full((1, len(recording.masks)), np.nan)
        infos = {
            "option_rewards": np.concatenate((recording.rewards[rows], nothing)),
            # A list: Minari cannot read arrays of one axis back.
            "option": [*actions.tolist(), -1],
        }
        seen = (recording.observations[rows], recording.last_observations[place][None])
        content: dict[str, Any] = {
            "id": place,
            "seed": seed,
            "observations": np.concatenate(seen),
            "actions": recording.masks[actions].astype(np.int8),
            "rewards": recording.rewards[rows, actions],
            "terminations": ended,
            "truncations": np.zeros(len(rows), bool),
            "infos": infos,
        }
        buffers.append(EpisodeBuffer(**content))
    folder.mkdir(parents=True, exist_ok=True)
    spec = _spec(recording.origin)
    with _datasets_in(folder), warnings.catch_warnings():
        # About what nobody has given, such as the score of a reference policy.
        warnings.simplefilter("ignore", UserWarning)
        made = minari.create_dataset_from_buffers(
            minari_name(recording.origin),
            buffers,
            env=spec,
            eval_env=spec,
            action_space=spaces.MultiBinary(count),
            observation_space=spaces.Box(
                -1.0, 1.0, (recording.origin.observation_size,), np.float32
            ),
            algorithm_name="uniform over the options",
            description=f"Every option tried on every fact: {recording.origin.words}.",
            data_format="arrow",
            requirements=["hiedit"],
            **_UNKNOWN,
        )
        made.storage.update_metadata(
            {"hiedit": json.dumps({**asdict(recording.origin), "masks": recording.masks.tolist()})}
        )


def _spec(origin: Origin) -> Any:
    """The specification of the environment; None where it was not made by ``gym.make``."""
    if not origin.environment:
        return None
    spec = copy.copy(gym.spec(origin.environment))
    spec.kwargs = dict(origin.settings)
    return spec


#: Nobody is named, so that Minari does not warn.
_UNKNOWN = {"author": "hiedit", "author_email": "unknown", "code_permalink": "unknown"}


@contextmanager
def _datasets_in(folder: Path) -> Iterator[None]:
    """Lets Minari read and write in a folder for the time of the body."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _lists(pa: Any, values: NDArray[Any]) -> Any:
    """Rows as an Arrow column of lists of one length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingLibraryError("pyarrow", EXTRA) from error
    return pyarrow, parquet


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise MissingLibraryError("minari", EXTRA) from error
    return minari
