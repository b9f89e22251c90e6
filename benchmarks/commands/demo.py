"""A real language model, a few dozen facts, and what editing does to it, in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiedit_agents.registry import default_agent
from hiedit_benchmarks.commands.edit_report import in_print, verdict
from hiedit_benchmarks.comparison.asking import settle_asking
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.results import UNEDITED
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_benchmarks.comparison.statistics import baseline_of
from hiedit_env.errors import ModelError
from hiedit_env.model.relatives import known_as

#: Facts whose answers are printed.
SHOWN = 8
#: Simple agents, for a model that no trained agent ships for.
CONTROLS = ["all-layers", "random-layers", "gradient-norm"]


def default_agents(model: str) -> list[str]:
    """What is shown for a model: the trained agent where one ships, and controls."""
    first = default_agent(model)
    return [first, "all-layers", "random-layers"] if first != "all-layers" else CONTROLS


def main(model: str, agents: Sequence[str] | None, num_edits: int, out: Path) -> None:
    """``hiedit demo``: edits a model, shows its answers before and after, compares agents.

    Args:
        model: ``"smollm2-135m"``, or anything else that ``load_model`` knows.
        agents: Agents to compare, besides the unedited model; None for :func:`default_agents`.
        num_edits: Facts per agent.
        out: Folder for the results.

    Raises:
        ModelError: the model is not to be had; says how to run without it.
        ResultsExistError: ``out`` holds results.
    """
    start = time.perf_counter()
    agents = default_agents(model) if agents is None else agents
    settings = CompareSettings(
        model=model,
        # The half that no shipped agent was trained on.
        dataset=None if known_as(model) == "tiny" else "world-facts-test",
        num_edits=num_edits,
        generation=("efficacy", "generalization", "specificity"),
        # Earlier facts are asked at the end; while they are edited it would take most of the time.
        retention_window=0,
    )
    print(
        f"Stage 1 of 3: load {model}, then give it {num_edits} facts that contradict what it "
        f"knows,\none after another, once per agent: {', '.join(agents)}; and, to compare with, "
        "none at all.",
        flush=True,
    )
    try:
        # An instruct model is edited and asked both plainly and in chat.
        result = compare(settle_asking(settings, both=True), agents, [0], out)
    except ModelError as error:
        raise ModelError(
            f"{error}\nThe demo also runs offline on a toy model: hiedit demo --model tiny"
        ) from error
    shown = default_agent(model) if default_agent(model) in agents else baseline_of(list(agents))
    if shown is not None:
        print(
            f"\nStage 2 of 3: what the model says, before any edit and after all {num_edits} by "
            f"{shown}\n"
        )
        print(_answers(result.details[UNEDITED, 0], result.details[shown, 0]))
    print(f"\nStage 3 of 3: the agents side by side ({num_edits} edits each)\n")
    print(result.text)
    print(f"\nPicture: {result.picture}")
    print(f"Numbers: {out / 'results.jsonl'}, {out / 'summary.json'}, {out / 'runs'}")
    print(f"This took {time.perf_counter() - start:.0f} s. Next: hiedit compare --help")


def _answers(unedited: Mapping[str, Any], edited: Mapping[str, Any]) -> str:
    """Every n-th fact, so that early and late ones are shown; each asked in all ways."""
    count = len(edited["prompts"])
    chosen = sorted({round(i * (count - 1) / max(SHOWN - 1, 1)) for i in range(SHOWN)})
    return "\n".join(line for i in chosen for line in _fact(unedited, edited, i))


def _fact(unedited: Mapping[str, Any], edited: Mapping[str, Any], i: int) -> list[str]:
    """One fact: as it was edited, in other words, in chat; and a question of another subject."""
    wanted = edited["wanted"][i]
    lines = [f"{i + 1}. {in_print(edited['prompts'][i])}   (wanted: {in_print(wanted)})"]
    for what, key, asked in (
        ("as it is", "efficacy", ""),
        ("in chat", "chat_efficacy", ""),
        ("in other words", "generalization", edited["paraphrases"][i]),
        ("unrelated", "specificity", edited["unrelated"][i]),
    ):
        before, after = (found["first_texts"].get(key) for found in (unedited, edited))
        if before is None or after is None or not before[i] + after[i] + asked:
            continue
        if asked:
            lines.append(f"   {what}: {in_print(asked)}")
        said = "" if key == "specificity" else f"   ({verdict(after[i], wanted)})"
        lines.append(f"      {what + ', ' if not asked else ''}before: {in_print(before[i])}")
        lines.append(f"      {what + ', ' if not asked else ''}after:  {in_print(after[i])}{said}")
    return lines
