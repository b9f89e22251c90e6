"""The folder of a training run: its checkpoints, and whether it can be gone on with."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hiedit_agents.hierarchy.train_settings import defaults
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.hierarchy.training_log import LogRow
from hiedit_agents.named.checkpoints import (
    JSON_FILE,
    check_fits,
    flatten,
    part,
    read_record,
    read_state,
    save_agent,
)
from hiedit_agents.named.spec import AgentSpec
from hiedit_benchmarks.comparison.results import plain
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError
from hiedit_env.files import lock_folder, make_folder, parse_json

#: Files of a training that ended before its first checkpoint, and the lock of the folder.
_CHECKPOINTS = "checkpoint-*"
_BEGUN = frozenset({".lock", "train.jsonl", "tensorboard"})


def parameters(trainer: Trainer) -> dict[str, Any]:
    """State of the levels that have parameters, by name."""
    return {name: level.state_dict() for name, level in trainer.levels().items()}


class TrainingFolder:
    """``out/checkpoint-N``: the agent, the optimisers and the log after N episodes.

    Args:
        out: The folder.
        settings: What a run that is gone on with, or was finished, must have been made with.
        resume: Whether the folder may hold either.

    Raises:
        ResultsExistError: it does, and ``resume`` is False.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.out, self.settings, self.resume = out, plain(settings), resume
        self._look()

    def _look(self) -> None:
        """Sees what the folder holds.

        Raises:
            ResultsExistError: results, and they are not to be gone on with.
        """
        self.finished = (self.out / JSON_FILE).exists()
        if self.finished and not self.resume:
            raise ResultsExistError(
                f"{self.out} holds a trained agent already; give another --out, or --resume to see "
                "what it reached"
            )
        # One that was being written when the training was killed counts as well.
        if not self.resume and any(self.out.glob(_CHECKPOINTS)):
            raise ResultsExistError(
                f"{self.out} holds checkpoints already; give another --out, or --resume to go on"
            )
        if not self.resume and (others := self._others()):
            raise ResultsExistError(
                f"{self.out} holds {others[0]!r} and is no folder of a training; give another --out"
            )

    def _others(self) -> list[str]:
        """Names in the folder that no training writes."""
        if not self.out.is_dir():
            return []
        return sorted(path.name for path in self.out.iterdir() if path.name not in _BEGUN)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, and keeps other processes out of it.

        Raises:
            OutputError: another process trains into it.
            ResultsExistError: one has done so since it was looked at.
            OutputError: it cannot be made.
        """
        self.create()
        lock = lock_folder(self.out)
        try:
            self._look()
            yield
        finally:
            lock.release()

    def create(self) -> None:
        """Makes the folder; called once everything that can be wrong has been checked.

        Raises:
            OutputError: it cannot be made.
        """
        make_folder(self.out)

    def save(
        self, trainer: Trainer, spec: AgentSpec, about: Mapping[str, Any], rows: list[LogRow]
    ) -> None:
        """Writes the state after ``len(rows)`` episodes; agent.json comes last."""
        folder = self.out / f"checkpoint-{len(rows):06d}"
        optimizers, _ = flatten({"optimizer": trainer.optimizer_state()})
        state = {**parameters(trainer), **optimizers}
        save_agent(folder, spec, state, {**about, "log": rows})
        for older in self._all():
            if older != folder:
                shutil.rmtree(older)

    def load(self, trainer: Trainer, env: EditingEnv) -> list[LogRow]:
        """Goes back to the last checkpoint; returns the log so far, empty if there is none."""
        found = self._all()
        if not found:
            return []
        folder = found[-1]
        record = read_record(folder)
        check_fits(folder, record, env.llm)
        self._check_same(record)
        if not isinstance(record["log"], list):
            raise CheckpointError(
                f"{folder} is no checkpoint: field 'log' of {JSON_FILE} must be a list of one row "
                "per episode; remove the folder to begin again"
            )
        rows: list[LogRow] = record["log"]
        wanted = self.settings["settings"]["episodes"]
        if wanted < len(rows):
            raise SettingsError(
                f"cannot resume {self.out}: {len(rows)} episodes are done, and episodes "
                f"is now {wanted}; give at least as many, or another --out"
            )
        state = read_state(folder, record, env.llm.device)
        for name, level in trainer.levels().items():
            level.load_state_dict(part(state, name))
        trainer.load_optimizer_state(part(state, "optimizer"))
        return rows

    def result(self) -> dict[str, Any]:
        """What the evaluation of a finished run with the same settings found.

        Raises:
            SettingsError: it was trained with other settings, or on fewer or more episodes.
        """
        record = read_record(self.out)
        self._check_same(record)
        done = record["training"]["settings"]["episodes"]
        wanted = self.settings["settings"]["episodes"]
        if wanted != done:
            raise SettingsError(
                f"cannot resume {self.out}: it finished after {done} episodes, and what "
                f"{'more' if wanted > done else 'fewer'} would go on from was removed then; give "
                "another --out"
            )
        self.clear()
        print(f"hiedit: {self.out} is finished already; nothing is trained", file=sys.stderr)
        file = self.out / "evaluation.json"
        if not file.exists():
            return {}
        found: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        return found

    def _check_same(self, record: Mapping[str, Any]) -> None:
        """Compares the settings with those of a record; the number of episodes may be another."""
        # What a setting that an older record lacks did then: nothing, as by default.
        known = {"settings": defaults()}
        for name, values in self.settings.items():
            old = {**known.get(name, {}), **record["training"].get(name, {})}
            for key, value in values.items():
                # A longer run goes on from a shorter one, but not where the learning rates of each
                # episode follow from their number.
                longer = key == "episodes" and not old.get("anneal")
                if not longer and old.get(key) != value:
                    raise SettingsError(
                        f"cannot resume {self.out}: {key} was {old.get(key)!r} and is now "
                        f"{value!r}; give another --out"
                    )

    def clear(self) -> None:
        """Removes the checkpoints of a finished run."""
        for folder in self._all():
            shutil.rmtree(folder)

    def _all(self) -> list[Path]:
        complete = [f for f in self.out.glob(_CHECKPOINTS) if (f / JSON_FILE).is_file()]
        return sorted(complete)
