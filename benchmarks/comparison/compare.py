"""Agents side by side: the same facts in the same order, for every agent and seed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from hiedit_agents.hierarchy.simple import OracleAgent
from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.protocol import Agent
from hiedit_agents.registry import is_trained, make_agent
from hiedit_benchmarks.comparison.contamination import trained_on
from hiedit_benchmarks.comparison.episode import (
    FinishedEdit,
    PlayedEpisode,
    play,
    stage_bars,
    unwrapped,
)
from hiedit_benchmarks.comparison.figure import draw
from hiedit_benchmarks.comparison.results import (
    UNEDITED,
    ResultsFolder,
    Row,
    plain,
    versions,
    write_json,
)
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_benchmarks.comparison.statistics import (
    LEGEND,
    ORACLE_LEGEND,
    baseline_of,
    paired_differences,
    summarise,
    table,
)

import hiedit_env  # noqa: F401 - registers the environments
from hiedit_env.datasets.streams import fingerprint
from hiedit_env.envs.planted import Planted
from hiedit_env.errors import SettingsError
from hiedit_env.evaluation.metrics import Evaluation, UneditedAnswers, evaluate
from hiedit_env.files import write_bytes
from hiedit_env.model.built_in import environment_for


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of :func:`compare`.

    Args:
        rows: One per agent and seed, as in ``results.jsonl``, the unedited model first.
        details: ``(agent, seed)`` → what ``runs/`` holds.
        text: The table, with its legend and paired differences.
        picture: Where ``compare.png`` is.
    """

    rows: list[Row]
    details: Mapping[tuple[str, int], Mapping[str, Any]] = field(repr=False)
    text: str
    picture: Path


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
        SettingsError: unknown agents, negative seeds, or results made with other settings.
    """
    labelled = _labels((UNEDITED, *agents))
    names = list(labelled)
    if baseline is not None and baseline not in names:
        raise SettingsError(f"baseline {baseline!r} is none of the agents: {', '.join(names)}")
    if not seeds or any(seed < 0 for seed in seeds):
        raise SettingsError(f"seeds must be whole numbers ≥ 0, at least one, got {list(seeds)}")
    seeds = list(dict.fromkeys(seeds))
    # What is cheap to check comes before the model is loaded.
    made = {
        name: make_agent(agent, layers_per_edit=settings.layers_per_edit)
        for name, agent in labelled.items()
    }
    with candidates_for(list(made.values()), settings.model, settings.layers) as layers:
        settings = replace(settings, layers=layers, update_rule=settings.rule)
        folder = ResultsFolder(out, asdict(settings), resume=resume)
        env = make_env(settings, progress)
    fixed = {**asdict(settings), **_facts_of(env)}
    folder.check(fixed)
    for agent in made.values():
        agent.reset(env, seeds[0])
    folder.create()
    seen = trained_on(made, unwrapped(env), seeds)
    reference = UneditedAnswers(unwrapped(env).llm)
    identities = plain({name: _identity(made[name], labelled[name]) for name in names})
    recorded = {**fixed, "agents": identities, "seeds": seeds}
    for seed in seeds:
        for name in names:
            row = folder.find(name, seed)
            if row is not None and row["settings"]["agents"].get(name) != identities[name]:
                raise SettingsError(
                    f"cannot resume {out}: its row of {name!r}, seed {seed}, is of another agent "
                    f"({row['settings']['agents'].get(name)}); give another folder or label"
                )
    for seed in seeds:
        best: list[float] | None = None
        for name, agent in made.items():
            if folder.find(name, seed) is not None:
                continue
            if best is None:
                best = _best_rewards(env, seed, progress)
            episode, evaluation = _run(env, agent, name, seed, reference, settings, progress)
            folder.add(
                _row(name, seed, episode, evaluation, best, recorded),
                _details(env, episode, evaluation),
            )
    env.close()
    chosen = baseline or baseline_of(names)
    return _report(folder, names, seeds, fixed["candidate_layers"], chosen, seen)


def _labelled(agent: str) -> tuple[str, str]:
    label, equals, name = agent.partition("=")
    # The "=" of arguments comes after a "?", and a folder may be called anything.
    if not equals or "?" in label or is_trained(agent.partition("?")[0]):
        return agent, agent
    return label, name


def _labels(agents: Sequence[str]) -> dict[str, str]:
    """Label → name.

    Raises:
        SettingsError: one label for two agents.
    """
    found: dict[str, str] = {}
    for label, name in map(_labelled, agents):
        if found.setdefault(label, name) != name:
            raise SettingsError(
                f"two agents are called {label!r}: {found[label]!r} and {name!r}; give each a "
                "label of its own"
            )
    return found


def _identity(agent: Agent, name: str) -> dict[str, Any]:
    """What a finished row has to have been made with to be kept."""
    return {"agent": name, **getattr(agent, "identity", {})}


def make_env(settings: CompareSettings, progress: bool, **overrides: Any) -> gym.Env[Any, Any]:
    """The environment of a comparison; ``overrides`` replace or add keyword arguments of it."""
    arguments = asdict(settings)
    for name in ("layers_per_edit", "generation"):
        del arguments[name]
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
        "step_size_used": inner.episode.rule.step_size,
    }


def _run(
    env: gym.Env[Any, Any],
    agent: Agent,
    name: str,
    seed: int,
    reference: UneditedAnswers,
    settings: CompareSettings,
    progress: bool,
) -> tuple[PlayedEpisode, Evaluation]:
    episode = play(env, agent, seed, progress=progress)
    with stage_bars(f"{name}, seed {seed}: measuring", progress) as report:
        evaluation = evaluate(
            unwrapped(env).llm,
            episode.requests,
            reference,
            generation=settings.generation,
            progress=report,
        )
    return episode, evaluation


def _best_rewards(env: gym.Env[Any, Any], seed: int, progress: bool) -> list[float] | None:
    """What the oracle is paid for each fact of a stream; None where there is no oracle."""
    if not isinstance(unwrapped(env), Planted):
        return None
    episode = play(env, OracleAgent(), seed, progress=progress)
    paid = [edit.reward for edit in episode.edits]
    return paid + [episode.ending] * (len(episode.requests) - len(paid))


def _row(
    name: str,
    seed: int,
    episode: PlayedEpisode,
    evaluation: Evaluation,
    best: Sequence[float] | None,
    settings: Mapping[str, Any],
) -> Row:
    edits = episode.edits
    return {
        "agent": name,
        "seed": seed,
        "num_edits": len(edits),
        "error_type": episode.error_type,
        "metrics": {
            **evaluation.metrics,
            "efficacy_right_after": episode.right_after(),
            **episode.against_oracle(best),
        },
        "layers_per_edit": _average([int(edit.layers.sum()) for edit in edits]),
        "steps_per_edit": _average([edit.steps for edit in edits]),
        "seconds_per_edit": episode.seconds / max(len(edits), 1),
        "stream_fingerprint": fingerprint(episode.requests),
        "settings": dict(settings),
        "versions": versions(),
    }


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _details(
    env: gym.Env[Any, Any], episode: PlayedEpisode, evaluation: Evaluation
) -> dict[str, Any]:
    requests = episode.requests
    return {
        "layer_names": unwrapped(env).llm.names,
        "prompts": [request.prompt for request in requests],
        "wanted": [request.answer for request in requests],
        "answers": evaluation.answers,
        "per_fact": evaluation.per_fact,
        "edits": [
            {
                "layers": np.flatnonzero(edit.layers),
                "steps": edit.steps,
                "reward": edit.reward,
                "metrics": edit.metrics,
                **_oracle_details(edit),
            }
            for edit in episode.edits
        ],
    }


def _oracle_details(edit: FinishedEdit) -> dict[str, Any]:
    if edit.oracle is None or edit.true_layers is None:
        return {}
    return {
        "one_step_regret": edit.one_step_regret,
        "best_layers": np.flatnonzero(edit.oracle.layers),
        "true_layers": np.flatnonzero(edit.true_layers),
    }


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
            "agents": summary,
            "baseline": baseline,
            "paired_differences": paired,
            "seeds": seeds,
            "trained_on": seen,
        },
    )
    picture = folder.path / "compare.png"
    write_bytes(picture, draw(names, seeds, details, layers))
    lines = [table(summary), "", LEGEND]
    if any("regret" in columns for columns in summary.values()):
        lines += [ORACLE_LEGEND]
    for name, found in paired.items():
        if name != UNEDITED and "average" in found:
            lines += [_difference_line(name, str(baseline), found)]
    for row in rows:
        if row["error_type"]:
            lines += [
                f"{row['agent']}, seed {row['seed']}: ended after {row['num_edits']} edits "
                f"({row['error_type']})"
            ]
    return Comparison(rows, details, "\n".join(lines), picture)


def _difference_line(name: str, baseline: str, found: Mapping[str, Mapping[str, float]]) -> str:
    parts = [
        f"{measure} {found[measure]['difference']:+.1f} "
        f"[{found[measure]['low']:+.1f}, {found[measure]['high']:+.1f}]"
        for measure in ("average", "retention", "agreement")
        if measure in found
    ]
    return f"{name} − {baseline}, paired, 95 % bootstrap interval: " + ", ".join(parts)


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
    print(result.text)
    print(f"rows: {out / 'results.jsonl'}, picture: {result.picture}", file=sys.stderr)
