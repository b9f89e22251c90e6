"""Training an agent on a model and a data set, with checkpoints: ``hiedit train``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.hierarchy.options import HierarchicalAgent
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.hierarchy.training_log import LogRow, Tally
from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.named.checkpoints import describe_model, fact_hashes, facts_entry, save_agent
from hiedit_agents.named.spec import AgentSpec
from hiedit_agents.named.spec_agent import SpecAgent
from hiedit_agents.registry import spec_agent
from hiedit_benchmarks.commands.train_folder import TrainingFolder, parameters
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.comparison.asking import settle_asking
from hiedit_benchmarks.comparison.episode import bar, play, stage_bars, unwrapped
from hiedit_benchmarks.comparison.results import plain, versions, write_json, write_text
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import fingerprint, split_by_subject, without
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import MissingLibraryError, SettingsError, whole_number
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.files import parse_json
from hiedit_env.model.tokenization import EncodedPrompt

#: Exit status of ``hiedit train`` where the training collapsed.
TRAINING_COLLAPSED = 3


def train(
    run: TrainingRun,
    settings: TrainSettings,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = True,
) -> dict[str, Any]:
    """Trains, saves and evaluates an agent.

    ``out`` gets ``agent.json`` and ``agent.safetensors`` (the trained agent, for ``--agents out``),
    ``train.jsonl`` (a row per episode), ``evaluation.json`` (metrics on held-out facts),
    ``tensorboard/`` and, while training, ``checkpoint-N/``.

    Args:
        run: Where and on what.
        settings: How.
        out: A folder without a trained agent or checkpoint, unless ``resume``.
        resume: Go on from the last checkpoint; the result is that of an uninterrupted run. For a
            run that is finished it is returned, and nothing is trained.
        progress: Whether to show progress on standard error.
        tensorboard: Whether to write TensorBoard files, if it is installed.

    Returns:
        What ``evaluation.json`` holds; empty without an evaluation.

    Raises:
        ResultsExistError: ``out`` holds results and ``resume`` is False.
        SettingsError: nothing to train, an argument that the agent does not take, too few facts,
            or a resumed run with other settings or fewer episodes.
        CheckpointError: a checkpoint that cannot be read or does not fit.
        OutputError: another process trains into ``out``.
    """
    editor = _checked(run)
    run = settle_asking(run)
    noted = asdict(run)
    del noted["memory_check"]  # changes nothing of the result
    folder = TrainingFolder(out, {"run": noted, "settings": asdict(settings)}, resume)
    with ExitStack() as stack:
        env = stack.enter_context(closing(make_env(run, settings, editor, progress)))
        inner = unwrapped(env)
        excluded = [] if run.exclude is None else load_requests(run.exclude)
        left = without(inner.requests, excluded)
        if not left:
            raise SettingsError(f"--exclude {run.exclude} leaves no fact of {run.dataset}")
        training, held_out = split_by_subject(left, held_out=settings.held_out, seed=settings.seed)
        training = without(training, held_out)
        agent, spec = build(editor, inner, run, settings.seed)
        # What the files of facts hold has to be the same too when a run is resumed.
        folder.settings["facts"] = {"training": fingerprint(training), "number": len(training)}
        if folder.finished:
            return folder.result()
        trainer = Trainer(inner, agent, training, settings)
        stack.enter_context(folder.held())
        if folder.finished:  # by another process, since it was looked at first
            return folder.result()
        rows = folder.load(trainer, inner) if resume else []
        # With those of levels that were trained before and are taken from their folders.
        facts = fact_hashes(training) | editor.training_facts(run.model, trained=False)
        about = {
            "model_name": run.model,
            "model": describe_model(inner.llm),
            "training": {
                **folder.settings,
                **facts_entry(facts),
                "versions": versions(),
            },
        }
        _calibrate(trainer, progress)
        with _Log(out, rows, progress, tensorboard, settings) as log:
            for number in range(len(rows), settings.episodes):
                log.add(trainer.episode(number, log.fact))
                folder.save(trainer, spec, about, log.rows)
        result = _evaluate(env, agent, held_out, run, settings, progress)
        if result:
            write_json(out / "evaluation.json", result)
        # Last: with it the run is finished, and until then it can be resumed.
        last = log.rows[-1] if log.rows else {}
        save_agent(out, spec, parameters(trainer), {**about, "log": last})
        folder.clear()
    return result


def collapse(out: Path) -> str | None:
    """What collapsed in a finished training; None where nothing did.

    Args:
        out: Its folder.

    Returns:
        The end of a sentence: which episodes ended early, or that of the evaluation.
    """
    file = out / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [parse_json(line) for line in lines]
    if rows and rows[-1].get("collapsed"):
        count = sum(bool(row.get("collapsed")) for row in rows)
        return f"{count} of {len(rows)} episodes, the last one among them, ended early"
    file = out / "evaluation.json"
    found = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("error_type"):
        return f"the episode on held-out facts ended early ({found['error_type']})"
    return None


def _checked(run: TrainingRun) -> SpecAgent:
    """The agent to train; what is wrong with it is said before a model is loaded.

    Raises:
        SettingsError: it has nothing to train, or does not take an argument of the run.
    """
    editor = spec_agent(run.agent, run.layers_per_edit)
    if not editor.spec.learns:
        raise SettingsError(
            f"agent {run.agent!r} has nothing to train; give a learned high level (policy, "
            "straight-through) or low level (hypernetwork, rehearsal, step-sizes), or one of your "
            "own that has parameters"
        )
    if editor.spec.high == "no-edit":
        raise SettingsError(
            f"agent {run.agent!r} has nothing to train: under 'no-edit' no layer is ever written"
        )
    if run.layers_per_edit is not None and editor.keeps_size is not None:
        raise SettingsError(f"layers_per_edit={run.layers_per_edit}: {editor.keeps_size}")
    if run.max_steps_per_edit is not None:
        whole_number(run.max_steps_per_edit, "max_steps_per_edit", 1)
    return editor


def make_env(
    run: TrainingRun, settings: TrainSettings, editor: SpecAgent, progress: bool
) -> gym.Env[Any, Any]:
    """The environment an agent is trained in; the horizon is the agent's, where it has one."""
    with candidates_for([editor], run.model, run.layers) as layers:
        return gym.make(
            "hiedit/LayerSelection-v1",
            disable_env_checker=True,
            model=run.model,
            dataset=run.dataset,
            num_edits=None,
            layers=layers,
            device=run.device,
            dtype=run.dtype,
            trust_remote_code=run.trust_remote_code,
            memory_check=run.memory_check,
            prompt_form=run.prompt_form or "plain",
            end_token=bool(run.end_token),
            progress=progress,
            reward_weights=settings.reward_weights(),
            retention_window=settings.retention_window,
            retention_decay=settings.retention_decay,
            locality_reference=settings.locality_reference,
        )


def build(
    editor: SpecAgent, env: EditingEnv, run: TrainingRun, seed: int
) -> tuple[HierarchicalAgent, AgentSpec]:
    """The agent to train, and the spec that makes it again."""
    if run.step_size is not None:
        editor = editor.with_low_settings(step_size=run.step_size)
    editor = editor.seeded(seed)
    agent = editor.build(env.llm, run.model, trained=False)
    if run.max_steps_per_edit is not None:
        agent.max_steps_per_edit = run.max_steps_per_edit
    spec = editor.spec
    low_settings = dict(spec.low_settings)
    if agent.low is not None:
        low_settings["step_size"] = agent.low.step_size
    return agent, replace(
        spec,
        name=run.name or editor.name,
        low_settings=low_settings,
        max_steps_per_edit=agent.max_steps_per_edit,
    )


def _calibrate(trainer: Trainer, progress: bool) -> None:
    wanted = trainer.calibration_prompts()
    texts: list[EncodedPrompt] = []
    if wanted and trainer.settings.own_texts:
        with bar("writing texts", trainer.settings.own_texts, progress) as shown:
            texts = trainer.write_texts(shown.update)
    if wanted:
        with bar("calibrating", len(wanted) + len(texts), progress) as shown:
            trainer.calibrate(shown.update, texts)
    low = trainer.agent.low
    if getattr(low, "wants_calibration", False):
        print(
            "hiedit: warning: the training facts have no unrelated prompts that the evaluation "
            "does not ask; nothing will protect unrelated answers",
            file=sys.stderr,
        )


def _evaluate(
    env: gym.Env[Any, Any],
    agent: HierarchicalAgent,
    held_out: Sequence[Request],
    run: TrainingRun,
    settings: TrainSettings,
    progress: bool,
) -> dict[str, Any]:
    requests = list(held_out[: settings.evaluation_edits])
    if not requests:
        return {}
    episode = play(env, agent, settings.seed, options={"requests": requests}, progress=progress)
    llm = unwrapped(env).llm
    with stage_bars("held-out facts: measuring", progress) as report:
        found = evaluate(
            llm, episode.requests, UneditedModel(llm), forms=run.forms, progress=report
        )
    edits = episode.edits
    return {
        "agent": agent.name,
        "num_edits": len(edits),
        "error_type": episode.error_type,
        "metrics": {**found.metrics, "efficacy_right_after": episode.right_after()},
        "layers_per_edit": sum(int(e.layers.sum()) for e in edits) / max(len(edits), 1),
        "steps_per_edit": sum(e.steps for e in edits) / max(len(edits), 1),
        "seconds_per_edit": episode.seconds / max(len(edits), 1),
    }


class _Log:
    """Progress bar, ``train.jsonl`` and TensorBoard."""

    def __init__(
        self,
        out: Path,
        rows: list[LogRow],
        progress: bool,
        tensorboard: bool,
        settings: TrainSettings,
    ) -> None:
        self.rows = list(rows)
        self._file = out / "train.jsonl"
        done = len(rows) * settings.edits_per_episode
        total = settings.episodes * settings.edits_per_episode
        self._manager = bar("training", total, progress)
        self._done = done
        self._means: dict[str, float] = {}
        self._writer = (
            _summary_writer(out / "tensorboard", len(rows), progress) if tensorboard else None
        )

    def __enter__(self) -> _Log:
        self._bar = self._manager.__enter__()
        self._bar.update(self._done)
        return self

    def __exit__(self, *error: Any) -> None:
        self._manager.__exit__(*error)
        if self._writer is not None:
            self._writer.close()

    def fact(self, tally: Tally) -> None:
        """Moves the bar; shown are running means over about 30 facts."""
        latest = {"reward": tally.rewards[-1:], "loss": tally.losses[-1:]}
        for name, values in latest.items():
            for value in values:
                old = self._means.get(name, value)
                self._means[name] = old + (value - old) / 30
        text = ", ".join(f"{name} {mean:.3f}" for name, mean in self._means.items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def add(self, row: LogRow) -> None:
        """A finished episode."""
        self.rows.append(row)
        text = "".join(json.dumps(plain(r)) + "\n" for r in self.rows)
        write_text(self._file, text)
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(f"train/{name}", value, len(self.rows))
            self._writer.flush()


def _summary_writer(folder: Path, purge: int, progress: bool) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if progress:
            missing = MissingLibraryError("TensorBoard", "train")
            print(f"{missing} (train.jsonl holds the same numbers)", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=purge + 1)


def main(
    run: TrainingRun, settings: TrainSettings, out: Path, resume: bool, tensorboard: bool
) -> int:
    """``hiedit train``: trains and prints what was measured on held-out facts.

    Returns:
        Exit status: 0, or ``TRAINING_COLLAPSED``.
    """
    result = train(run, settings, out, resume=resume, tensorboard=tensorboard)
    if result:
        metrics = result["metrics"]
        names = ("efficacy", "generalization", "specificity", "retention")
        values = {name: metrics[name]["token_accuracy"] for name in names}
        print(f"{result['num_edits']} held-out facts, percent, teacher-forced:")
        # A file holds None where nothing could be measured.
        shown = {name: math.nan if value is None else value for name, value in values.items()}
        print(", ".join(f"{name} {value:.1f}" for name, value in shown.items()))
    print(f"trained agent: {out} (use it as --agents {out})", file=sys.stderr)
    problem = collapse(out)
    if problem is None:
        return 0
    print(
        f"hiedit: the training collapsed: {problem}; train again with a smaller --step-size or "
        "learning rate",
        file=sys.stderr,
    )
    return TRAINING_COLLAPSED
