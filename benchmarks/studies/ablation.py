r"""Ablations of ``hiedit``: leaves out or changes one component at a time, and compares.

    python -m hiedit_benchmarks.studies.ablation \
        --train FILE --evaluate FILE --layers PATTERN … --out DIR

One low level is calibrated, as in ``hiedit train hiedit``, then a high level is trained over it for
every variant that needs one (the others only act in another way; ``trained-low`` acts through a low
level that is trained too), then every variant edits the same streams. Each training and each
variant's streams run in one process, ``--jobs`` processes at a time. Finished work is kept: the
same command continues where it was stopped. At the end the study prints the table of ``hiedit
compare`` with the paired differences from ``hiedit``, and writes it to ``DIR/table``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from hiedit_agents.command_line import Switch, parse, run_script
from hiedit_agents.named.checkpoints import JSON_FILE
from hiedit_benchmarks.comparison.console import replace_what_cannot_be_encoded
from hiedit_benchmarks.comparison.results import plain, write_json
from hiedit_env.envs.settings import AtLeast0, AtLeast1, Patterns, settings
from hiedit_env.errors import SettingsError
from hiedit_env.files import write_bytes

PROGRAM = "python -m hiedit_benchmarks.studies.ablation"

#: Runs one ``hiedit`` command line; what it prints goes to a file.
Run = Callable[[Sequence[str], Path], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table.

    Args:
        agent: Agent that is compared; ``{low}``, ``{trained}`` and ``{high}`` stand for folders:
            the low level that is only calibrated, the one that is trained too, and the agent that
            ``train`` makes.
        train: Agent and options that its high level is trained with, over ``{low}``; empty where
            ``hiedit``'s own high level is used.
    """

    agent: str = "{high}"
    train: tuple[str, ...] = ()


#: The high level of ``hiedit``, and its settings: they are drawn in acting as in training.
_POLICY = "hiedit,high.layers_per_edit={k},high.deterministic=false"

VARIANTS: Mapping[str, Variant] = {
    "hiedit": Variant(train=(_POLICY + "+{low}",)),
    "random-choice": Variant("random-layers,layers_per_edit={k}+{low}"),
    "best-choice": Variant("{high},high.deterministic=true"),
    "straight-through": Variant(
        train=("straight-through,layers_per_edit={k}+{low}", "--high-learning-rate", "0.01")
    ),
    "learned-size": Variant(train=(_POLICY + ",high.size=learned+{low}",)),
    "intrinsic": Variant(train=(_POLICY + "+{low}", "--intrinsic")),
    "no-history": Variant(train=(_POLICY + ",high.history=false+{low}",)),
    "one-step": Variant("{high},max_steps_per_edit=1"),
    "trained-low": Variant("{high}+{trained}"),
    "no-end-token": Variant("{high},end_answers=false"),
    "no-rehearsal": Variant("{high},facts=0,probes=0,end_answers=false"),
    "no-look-ahead": Variant("{high},look_ahead=false"),
}
#: The variant whose levels those variants use that train none.
_BASE = "hiedit"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the command line says.

    Args:
        out: The folder.
        train: Options of every ``hiedit train``.
        compare: Options of every ``hiedit compare``.
        layers_per_edit: K.
        low_settings: Behind the low level's name, as ``name=value,name=value``.
        low_window: Facts per optimiser step of the low level; None for the preset's.
        low_episodes, high_episodes: Episodes to train either level on, the low one
            for ``trained-low`` alone.
        variants: Names of the rows, ``hiedit`` first.
    """

    out: Path
    train: tuple[str, ...]
    compare: tuple[str, ...]
    layers_per_edit: int
    low_settings: str
    low_window: int | None
    low_episodes: int
    high_episodes: int
    variants: tuple[str, ...]

    def filled(self, text: str, high: str = _BASE) -> str:
        """The text with folders and K in their places."""
        return text.format(
            k=self.layers_per_edit,
            low=self.out / "calibrated",
            trained=self.out / "trained",
            high=self.out / high,
        )

    def low(self, episodes: int, folder: str) -> list[str]:
        """Command line that trains a low level, or with no episodes only calibrates it."""
        query = f",{self.low_settings}" if self.low_settings else ""
        agent = self.filled("random-layers,layers_per_edit={k}+hiedit") + query
        window = () if self.low_window is None else ("--window", str(self.low_window))
        count = ("--train-low", "--episodes", str(episodes))
        return ["train", agent, *self.train, *window, *count, *self._to(folder)]

    def high(self, name: str) -> list[str]:
        """Command line that trains a variant's high level."""
        agent, *options = (self.filled(text) for text in VARIANTS[name].train)
        count = ("--episodes", str(self.high_episodes))
        own = ("--no-train-low", "--name", name)
        return ["train", agent, *self.train, *own, *options, *count, *self._to(name)]

    def rows(self, name: str) -> list[str]:
        """Command line that runs a variant on the streams."""
        variant = VARIANTS[name]
        agent = self.filled(variant.agent, name if variant.train else _BASE)
        folder = f"rows/{name}"
        return ["compare", "--agents", f"{name}={agent}", *self.compare, *self._to(folder)]

    def table(self) -> list[str]:
        """Command line that prints everything as one table."""
        agents = [self.rows(name)[2] for name in self.variants]
        return [
            *("compare", "--agents", *agents, "--baseline", _BASE),
            *self.compare,
            *self._to("table"),
        ]

    def _to(self, folder: str) -> list[str]:
        return ["--resume", "--out", str(self.out / folder)]


def ablate(plan: Plan, run: Run, jobs: int = 1) -> None:
    """Trains and compares what ``plan.out`` does not hold yet, ``jobs`` processes at a time.

    Raises:
        SettingsError: an unknown variant, a plan without ``hiedit``, with which the others are
            compared, or a folder that was begun with other settings.
    """
    unknown = set(plan.variants) - set(VARIANTS)
    if unknown or _BASE not in plan.variants:
        raise SettingsError(
            f"variants must be {_BASE} and any of {', '.join(VARIANTS)}; got {plan.variants}"
        )
    replace_what_cannot_be_encoded()
    out = plan.out
    (out / "logs").mkdir(parents=True, exist_ok=True)
    _check_same(plan)

    def train(folder: str, command: list[str], *after: Future[None]) -> None:
        _wait(after)
        if not (out / folder / JSON_FILE).exists():
            run(command, out / "logs" / f"{folder}.txt")

    def compare(name: str, *after: Future[None]) -> None:
        _wait(after)
        folder = out / "rows" / name
        if not folder.exists():
            # So that the unedited model is measured once.
            shutil.copytree(out / "rows" / "unedited", folder)
        if not (folder / "summary.json").exists():
            run(plan.rows(name), out / "logs" / f"rows-{name}.txt")

    def unedited() -> None:
        if not (out / "rows" / "unedited" / "results.jsonl").exists():
            command = ["compare", "--agents", "no-edit", *plan.compare]
            folder = out / "rows" / "unedited.part"
            run([*command, "--resume", "--out", str(folder)], out / "logs" / "rows-unedited.txt")
            (folder / "summary.json").unlink()
            folder.rename(out / "rows" / "unedited")

    # In the order in which they are needed: what waits never holds the place of what it waits for.
    with ThreadPoolExecutor(jobs) as pool:
        low = pool.submit(train, "calibrated", plan.low(0, "calibrated"))
        plain = pool.submit(unedited)
        done = [low, plain]
        base = pool.submit(train, _BASE, plan.high(_BASE), low)
        trained: list[Future[None]] = []
        if "trained-low" in plan.variants:
            command = plan.low(plan.low_episodes, "trained")
            trained.append(pool.submit(train, "trained", command))
        own = dict.fromkeys(plan.variants, base)
        for name in plan.variants:
            if name != _BASE and VARIANTS[name].train:
                own[name] = pool.submit(train, name, plan.high(name), low)
        needed = [*done, *trained, *own.values()]
        for name in plan.variants:
            also = trained if name == "trained-low" else []
            needed.append(pool.submit(compare, name, own[name], *done, *also))
        wait(needed, return_when=FIRST_EXCEPTION)
        # Where one has failed, what has not begun is not begun any more.
        pool.shutdown(wait=True, cancel_futures=True)
    _wait([future for future in needed if not future.cancelled()])
    _merge([out / "rows" / name for name in plan.variants], out / "table")
    run(plan.table(), out / "logs" / "table.txt")
    print((out / "logs" / "table.txt").read_text(encoding="utf-8"))


def _check_same(plan: Plan) -> None:
    """Writes the plan into the folder; refuses a folder that was begun with another plan."""
    file = plan.out / "plan.json"
    # More rows may be added.
    wanted = {name: value for name, value in plain(asdict(plan)).items() if name != "variants"}
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if old.get(name) != value:
                raise SettingsError(
                    f"{plan.out} was begun with {name} {old.get(name)!r} and not {value!r}; give "
                    "another --out"
                )
    write_json(file, wanted)


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def _merge(folders: Sequence[Path], into: Path) -> None:
    """The rows of several comparisons of the same streams as one."""
    (into / "runs").mkdir(parents=True, exist_ok=True)
    lines: dict[str, None] = {}
    for folder in folders:
        lines |= dict.fromkeys((folder / "results.jsonl").read_text("utf-8").splitlines())
        for path in (folder / "runs").iterdir():
            shutil.copyfile(path, into / "runs" / path.name)
    write_bytes(into / "results.jsonl", "".join(f"{line}\n" for line in lines).encode("utf-8"))


def in_a_process(threads: int) -> Run:
    """Returns a function that runs command lines as processes of ``threads`` threads each."""
    # Logs are read as UTF-8.
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }

    def run(command: Sequence[str], log: Path) -> None:
        # In one piece: several processes are begun at the same time.
        print(f"{shlex.join(['hiedit', *command])}\n", end="", flush=True)
        whole = [sys.executable, "-m", "hiedit_benchmarks.commands.cli", *command]
        errors = log.with_suffix(".err")
        with log.open("wb") as out, errors.open("wb") as err:
            done = subprocess.run(whole, env=environment, stdout=out, stderr=err, check=False)
        if done.returncode:
            last = errors.read_text("utf-8", errors="replace").splitlines()[-1:]
            raise SettingsError(f"{''.join(last)} (in hiedit {' '.join(command)}; see {errors})")

    return run


@settings
class Options:
    """Ablations of hiedit: leaves out or changes one component at a time, and compares."""

    train: str
    """training facts: a name or file"""
    evaluate: str
    """other facts to edit: a name or file"""
    out: Path
    """folder of everything that the study writes"""
    layers: Patterns
    """candidate weight matrices"""
    layers_per_edit: AtLeast1
    """K, layers per fact"""
    model: str = "smollm2-135m"
    """name or path"""
    low_settings: str = ""
    """settings of the low level, such as step_size=1e-4,facts=0"""
    low_window: AtLeast1 | None = None
    """facts per optimiser step of the low level; by default the preset's"""
    low_episodes: AtLeast1 = 6
    """episodes to train the low level of trained-low on"""
    high_episodes: AtLeast1 = 8
    """episodes to train a high level on"""
    edits_per_episode: AtLeast1 = 25
    """facts per training episode"""
    num_edits: AtLeast1 = 100
    """facts per stream"""
    seeds: tuple[AtLeast0, ...] = (0, 1, 2)
    """one stream per seed"""
    generation: Switch = False
    """also generate answers"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """rows of the table"""
    jobs: AtLeast1 = 1
    """processes at a time"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    common = ("--model", given.model, "--layers", *given.layers)
    plan = Plan(
        out=given.out,
        train=(
            *common,
            *("--dataset", given.train, "--exclude", given.evaluate, "--evaluation-edits", "0"),
            *("--edits-per-episode", str(given.edits_per_episode), "--no-tensorboard"),
        ),
        compare=(
            *common,
            *("--dataset", given.evaluate, "--num-edits", str(given.num_edits)),
            *("--seeds", *map(str, given.seeds)),
            *(() if given.generation else ("--no-generation",)),
        ),
        layers_per_edit=given.layers_per_edit,
        low_settings=given.low_settings,
        low_window=given.low_window,
        low_episodes=given.low_episodes,
        high_episodes=given.high_episodes,
        variants=tuple(given.variants),
    )
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    ablate(plan, in_a_process(threads), given.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
