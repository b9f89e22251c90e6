"""Agents side by side: the same facts in the same order, for every agent and seed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import RenderableType

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_agents.hierarchy.simple import OracleAgent
from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.protocol import Agent
from hiedit_agents.registry import labelled as labelled_name
from hiedit_agents.registry import make_agent, refuse_unused_options, refuse_unused_size
from hiedit_agents.rivals.in_context import InContext
from hiedit_benchmarks.comparison.asking import settle_asking
from hiedit_benchmarks.comparison.contamination import trained_on
from hiedit_benchmarks.comparison.episode import (
    PlayedEpisode,
    play,
    stage_bars,
    unwrapped,
)
from hiedit_benchmarks.comparison.figure import draw
from hiedit_benchmarks.comparison.report import as_text, report, show
from hiedit_benchmarks.comparison.results import (
    FORMAT_VERSION,
    UNEDITED,
    ResultsFolder,
    Row,
    check_file_names,
    plain,
    write_json,
)
from hiedit_benchmarks.comparison.rows import details_of, row_of
from hiedit_benchmarks.comparison.settings import MAX_STEPS, CompareSettings
from hiedit_benchmarks.comparison.statistics import (
    PairedDifferences,
    Summary,
    baseline_of,
    paired_differences,
    summarise,
)
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import fingerprint
from hiedit_env.envs.planted import Planted
from hiedit_env.errors import MissingLibraryError, SettingsError
from hiedit_env.evaluation.metrics import Evaluation, evaluate
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.files import write_bytes
from hiedit_env.model.relatives import environment_for


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of :func:`compare`.

    Args:
        rows: One per agent and seed, as in ``results.jsonl``, the unedited model first.
        details: ``(agent, seed)`` → what ``runs/`` holds.
        summary: Means over seeds.
        paired: Differences from the baseline.
        baseline: The agent that the others are compared with, if any edits.
        picture: ``compare.png``; None where matplotlib is not installed.
    """

    rows: list[Row]
    details: Mapping[tuple[str, int], Mapping[str, Any]] = field(repr=False)
    summary: Summary
    paired: PairedDifferences
    baseline: str | None
    picture: Path | None

    def report(self, encoding: str | None = None) -> RenderableType:
        """Tables and legend for rich; characters that ``encoding`` lacks are replaced."""
        return report(self.summary, self.paired, self.baseline, self.rows, encoding=encoding)

    @property
    def text(self) -> str:
        """Tables and legend as plain text of at most 80 columns."""
        return as_text(self.report())


def compare(
    settings: CompareSettings,
    agents: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    baseline: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Comparison:
    """Runs every agent on every seed's stream and writes ``out``.

    ``results.jsonl`` gets a row as soon as a run is finished, ``runs/AGENT-seedS.json`` its
    details, ``summary.json`` and ``compare.png`` come at the end. The unedited model always runs.

    Args:
        settings: Shared by all runs.
        agents: Names for :func:`hiedit_agents.registry.make_agent`, or ``LABEL=NAME`` where the
            rows are to carry another name.
        seeds: Each draws one stream, the same for every agent, and seeds the agents.
        out: The folder.
        baseline: Agent (by the name of its rows) that the others are compared with in pairs; None
            for ``all-layers``, or the first that edits if that is not among them.
        resume: Whether to skip runs that ``out`` holds already.
        progress: Whether to show progress on standard error.

    Raises:
        ResultsExistError: ``out`` holds results and ``resume`` is False.
        SettingsError: unknown agents, negative seeds, or results made with other settings or in an
            older format.
        OutputError: another process writes into ``out``, or a file cannot be written.
    """
    labelled = _labels((UNEDITED, *agents))
    names = list(labelled)
    check_file_names(names)
    if baseline is not None and baseline not in names:
        raise SettingsError(f"baseline {baseline!r} is none of the agents: {', '.join(names)}")
    if not seeds or any(seed < 0 for seed in seeds):
        raise SettingsError(f"seeds must be whole numbers ≥ 0, at least one, got {list(seeds)}")
    seeds = list(dict.fromkeys(seeds))
    # What is cheap to check comes before the model is loaded.
    made = {
        name: make_agent(
            agent,
            layers_per_edit=settings.layers_per_edit,
            max_steps_per_edit=settings.max_steps_per_edit,
            step_size=settings.step_size,
            update_rule=settings.update_rule,
        )
        for name, agent in labelled.items()
    }
    refuse_unused_size(list(made.values()), settings.layers_per_edit)
    refuse_unused_options(
        list(made.values()),
        max_steps_per_edit=settings.max_steps_per_edit,
        step_size=settings.step_size,
        update_rule=settings.update_rule,
    )
    settings = settle_asking(settings, in_chat=settings.ask_in_chat)
    with candidates_for(list(made.values()), settings.model, settings.layers) as layers:
        settings = replace(
            settings,
            layers=layers,
            update_rule=settings.rule,
            max_steps_per_edit=settings.max_steps_per_edit or MAX_STEPS,
        )
        folder = ResultsFolder(out, recorded(settings), resume=resume)
        env = make_env(settings, progress)
    fixed = {**recorded(settings), **_facts_of(env)}
    folder.check(fixed)
    for agent in made.values():
        agent.reset(env, seeds[0])
    identities = plain({name: _identity(made[name], labelled[name]) for name in names})
    folder.create(fixed)
    try:
        _check_agents(folder, identities, seeds)
        seen = trained_on(made, unwrapped(env), seeds)
        noted = {**asdict(settings), **fixed, "agents": identities, "seeds": seeds}
        _run_all(folder, env, made, seeds, settings, noted, progress)
        env.close()
        chosen = baseline or baseline_of(names)
        return _report(folder, names, seeds, fixed["candidate_layers"], chosen, seen)
    finally:
        folder.close()


def _check_agents(
    folder: ResultsFolder, identities: Mapping[str, Any], seeds: Sequence[int]
) -> None:
    for seed in seeds:
        for name, identity in identities.items():
            row = folder.find(name, seed)
            if row is None:
                continue
            found = row["settings"].get("agents", {}).get(name)
            if found != identity:
                raise SettingsError(
                    f"cannot resume {folder.path}: its row of {name!r}, seed {seed}, is of another "
                    f"agent ({found}); give another folder or label"
                )


def _run_all(
    folder: ResultsFolder,
    env: gym.Env[Any, Any],
    agents: Mapping[str, Agent],
    seeds: Sequence[int],
    settings: CompareSettings,
    noted: Mapping[str, Any],
    progress: bool,
) -> None:
    """Runs what the folder does not hold yet."""
    reference = UneditedModel(unwrapped(env).llm)
    for seed in seeds:
        best: list[float] | None = None
        for name, agent in agents.items():
            if folder.find(name, seed) is not None:
                continue
            if best is None:
                best = _best_rewards(env, seed, progress)
            episode, evaluation = _run(env, agent, name, seed, reference, settings, progress)
            folder.add(
                row_of(name, seed, episode, evaluation, best, noted),
                details_of(unwrapped(env).llm.names, episode, evaluation),
            )


def _labels(agents: Sequence[str]) -> dict[str, str]:
    """Label → name.

    Raises:
        SettingsError: one label for two agents.
    """
    found: dict[str, str] = {}
    for label, name in map(labelled_name, agents):
        if found.setdefault(label, name) != name:
            raise SettingsError(
                f"two agents are called {label!r}: {found[label]!r} and {name!r}; give each a "
                "label of its own"
            )
    return found


def _identity(agent: Agent, name: str) -> dict[str, Any]:
    """What a finished row has to have been made with to be kept."""
    return {"agent": name, **getattr(agent, "identity", {})}


def recorded(settings: CompareSettings) -> dict[str, Any]:
    """The settings that results depend on."""
    found = asdict(settings)
    del found["memory_check"]
    return found


def make_env(settings: CompareSettings, progress: bool, **overrides: Any) -> gym.Env[Any, Any]:
    """The environment of a comparison; ``overrides`` replace or add keyword arguments of it."""
    arguments = asdict(settings)
    for name in ("layers_per_edit", "generation", "ask_in_chat"):
        del arguments[name]
    # Where nothing was settled, as in an environment.
    arguments["prompt_form"] = settings.prompt_form or "plain"
    arguments["end_token"] = bool(settings.end_token)
    arguments["max_steps_per_edit"] = settings.max_steps_per_edit or MAX_STEPS
    arguments.update(progress=progress, **overrides)
    # The checker tests the environment, not the agents, and is run in the tests.
    name = environment_for(settings.model, settings.dataset)
    return gym.make(name, disable_env_checker=True, **arguments)


def _facts_of(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """Settings that follow from the given ones, and files that may change under their names."""
    inner = unwrapped(env)
    return {
        "dataset_fingerprint": fingerprint(inner.requests),
        "candidate_layers": list(inner.llm.names),
        "step_size_used": inner.rule.step_size,
    }


def _run(
    env: gym.Env[Any, Any],
    agent: Agent,
    name: str,
    seed: int,
    reference: UneditedModel,
    settings: CompareSettings,
    progress: bool,
) -> tuple[PlayedEpisode, Evaluation]:
    episode = play(env, agent, seed, progress=progress)
    asked: Sequence[Request] = episode.requests
    if isinstance(agent, InContext):
        asked, reference = agent.judged(asked, reference)
    with stage_bars(f"{name}, seed {seed}: measuring", progress) as report:
        evaluation = evaluate(
            unwrapped(env).llm,
            asked,
            reference,
            forms=settings.forms,
            generation=settings.generation,
            progress=report,
        )
    return episode, evaluation


def _best_rewards(env: gym.Env[Any, Any], seed: int, progress: bool) -> list[float] | None:
    """Reward of the oracle for each fact of a stream; None where there is no oracle."""
    if not isinstance(unwrapped(env), Planted):
        return None
    episode = play(env, OracleAgent(), seed, progress=progress)
    rewards = [edit.reward for edit in episode.edits]
    return rewards + [episode.ending] * (len(episode.requests) - len(rewards))


def _report(
    folder: ResultsFolder,
    names: Sequence[str],
    seeds: Sequence[int],
    layers: Sequence[str],
    baseline: str | None,
    seen: Mapping[str, Mapping[str, int]],
) -> Comparison:
    """Summary, table and picture of the runs asked for."""
    rows = [row for name in names for seed in seeds if (row := folder.find(name, seed)) is not None]
    for seed in seeds:
        streams = {row["stream_fingerprint"] for row in rows if row["seed"] == seed}
        if len(streams) > 1:
            raise SettingsError(f"the rows of seed {seed} in {folder.file} saw different facts")
    details = {(r["agent"], r["seed"]): folder.details(r["agent"], r["seed"]) for r in rows}
    summary = summarise(rows)
    runs = {name: [details[name, seed]["per_fact"] for seed in seeds] for name in names}
    paired = {
        name: paired_differences(runs[name], runs[baseline])
        for name in names
        if baseline is not None and name != baseline
    }
    write_json(
        folder.path / "summary.json",
        {
            "format_version": FORMAT_VERSION,
            "agents": summary,
            "baseline": baseline,
            "paired_differences": paired,
            "seeds": seeds,
            "trained_on": seen,
        },
    )
    picture: Path | None = folder.path / "compare.png"
    try:
        write_bytes(folder.path / "compare.png", draw(names, seeds, details, layers))
    except MissingLibraryError as error:
        picture = None
        print(f"hiedit: no picture: {error}; then --resume draws it", file=sys.stderr)
    return Comparison(rows, details, summary, paired, baseline, picture)


def main(
    settings: CompareSettings,
    agents: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    resume: bool,
    baseline: str | None,
) -> None:
    """``hiedit compare``: runs a comparison and prints it."""
    result = compare(settings, agents, seeds, out, baseline=baseline, resume=resume)
    show(result.report(sys.stdout.encoding))
    drawn = "" if result.picture is None else f", picture: {result.picture}"
    print(f"rows: {out / 'results.jsonl'}{drawn}", file=sys.stderr)
