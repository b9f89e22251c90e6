"""Facts from a file into a model, saved as an ordinary Hugging Face folder: ``hiedit edit``.

The parts: what was edited before is in :mod:`.edit_history`, the editing itself in
:mod:`.edit_work`, what the model says before and after in :mod:`.edit_report`, the folder in
:mod:`.edit_folder`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hiedit_agents.editing.checks import as_asked
from hiedit_agents.editing.export import edited_matrices, locate_layers
from hiedit_agents.protocol import Agent
from hiedit_agents.registry import (
    explain,
    labelled,
    make_agent,
    refuse_unused_options,
    refuse_unused_size,
)
from hiedit_benchmarks.commands.edit_folder import OutFolder, Reloaded, reload
from hiedit_benchmarks.commands.edit_history import FORMAT
from hiedit_benchmarks.commands.edit_questions import Questions, forms_of
from hiedit_benchmarks.commands.edit_report import Report, Said, before_and_after
from hiedit_benchmarks.commands.edit_work import EditorWork, EpisodeWork, begin_work
from hiedit_benchmarks.commands.unfinished import Unfinished, refuse_overlap, tidied
from hiedit_benchmarks.comparison.asking import settle_asking
from hiedit_benchmarks.comparison.compare import recorded
from hiedit_benchmarks.comparison.results import versions, write_json
from hiedit_benchmarks.comparison.rows import efficacy_as_edited
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import PromptForm, Request
from hiedit_env.envs.units import check_units
from hiedit_env.evaluation.matching import is_match, starts_with
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.model.memory_budget import auto_class
from hiedit_env.model.saving import check_source, find_folder
from hiedit_env.resident.resident import ResidentLLM

#: Exit status of ``hiedit edit`` where the saved model gives none of the facts.
NONE_GIVEN = 3


@dataclass(frozen=True, slots=True)
class SavedEdits:
    """The outcome of :func:`edit_model`.

    Args:
        out: The folder of the edited model.
        facts: What ``edits.json`` says of each fact of this run.
        report: What the model says before and after.
        reloaded: What loading the folder again showed.
        left_out: Files of the unedited model's folder that were not copied.
        opened_by: The class of transformers that opens it with all its parts.
    """

    out: Path
    facts: list[dict[str, Any]]
    report: Report
    reloaded: Reloaded
    left_out: list[str]
    opened_by: str = "AutoModelForCausalLM"

    @property
    def text(self) -> str:
        """Before and after, as a table."""
        return before_and_after(self.facts)

    @property
    def unverified(self) -> str | None:
        """What differs in the saved model, or why it could not be loaded beside the edited one.

        None where all its weights and tokens are the same.
        """
        return next(iter(self.reloaded.differences), self.reloaded.unverified)

    @property
    def given(self) -> int:
        """Number of facts that the saved model gives, asked in the form they were given."""
        return sum(fact["given"] for fact in self.facts)


def edit_model(
    settings: CompareSettings,
    agent: str,
    out: Path,
    *,
    ledger: Path | None = None,
    progress: bool = True,
) -> SavedEdits:
    """Writes all facts of a data set into a model, in file order, and saves it.

    The folder holds everything that the unedited model's folder holds, with other bytes in the
    edited matrices alone, ``edits.json``, and the ledger of the edits (of an agent that acts in an
    environment only, no ledger). It appears when the model is complete on disk. Then it is loaded
    again, compared and asked; whatever that shows, it is kept.

    Args:
        settings: ``dataset`` is the file of facts; ``num_edits`` and ``generation`` are not used.
        agent: Name for :func:`hiedit_agents.registry.make_agent`.
        out: A folder that does not exist or is empty.
        ledger: Folder of the ledger while it is written; by default ``OUT.unfinished``, which is
            removed at the end. A run that was interrupted goes on from there, see
            :mod:`.unfinished`.
        progress: Whether to show progress on standard error.

    Raises:
        ResultsExistError: ``out`` is not empty; nothing has been done.
        ModelError: a folder that cannot be edited, or the model collapsed; ``out`` is left as it
            was.
        CheckpointError: the agent does not fit the model; nothing has been generated.
        LedgerError: a ledger of another model, or a damaged one.
        SettingsError: an interrupted run with this ``out`` wrote other facts or had other settings,
            or the ledger would be in ``out``.
        SettingsError: unknown agent, or ``out`` cannot be written; that is found before the model
            is loaded, so far as it can be.
    """
    with tidied(out, ledger):
        place = OutFolder(out)
    refuse_overlap(out, ledger)
    known = find_folder(settings.model)
    if known is not None:
        check_source(known, out)
    label, name = labelled(agent)
    editor = make_agent(
        name,
        layers_per_edit=settings.layers_per_edit,
        max_steps_per_edit=settings.max_steps_per_edit,
        step_size=settings.step_size,
        update_rule=settings.update_rule,
    )
    refuse_unused_size([editor], settings.layers_per_edit)
    refuse_unused_options(
        [editor],
        max_steps_per_edit=settings.max_steps_per_edit,
        step_size=settings.step_size,
        update_rule=settings.update_rule,
    )
    settings = settle_asking(settings, both=True)
    requests = load_requests(settings.facts)
    given = {"agent": name, **recorded(settings)}
    del given["dataset"]  # the facts themselves are compared
    unfinished = Unfinished(place.out, ledger, given, requests)
    work = begin_work(settings, name, editor, requests, out, unfinished, progress)
    try:
        return _edit(settings, label, name, editor, requests, place, work, progress)
    finally:
        work.close()


def _edit(
    settings: CompareSettings,
    label: str,
    name: str,
    agent: Agent,
    requests: Sequence[Request],
    place: OutFolder,
    work: EditorWork | EpisodeWork,
    progress: bool,
) -> SavedEdits:
    llm, source, history = work.llm, work.source, work.history
    form = settings.prompt_form or "plain"
    places = locate_layers(llm, work.found, source)
    # All of it, before anything else: an error here names the file's row.
    check_units([as_asked(llm, r, form) for r in requests], settings.edits_per_step)
    rehearsed = hasattr(work.low, "remember")
    print(f"hiedit: agent {label}: {explain(agent, settings.model)}", file=sys.stderr)
    if history.facts:
        print(f"hiedit: {history.text(rehearsed, name)}", file=sys.stderr)
    questions = Questions(llm, requests, history.requests, form)
    with work.found.in_place(llm):  # edits of a run that was interrupted may be in the model
        before = questions.before(progress)
    written = work.write(requests)
    in_chat = any("chat" in forms_of(llm, r, form) for r in requests)
    bare = [replace(r, paraphrases=(), locality=(), portability=()) for r in requests]
    found = evaluate(
        llm,
        bare,
        None,
        forms=("plain", "chat") if in_chat else ("plain",),
        generation=(),
    )
    correct = efficacy_as_edited(bare, found, form, "exact_match")
    # What ran, which need not be what the command was given.
    ran = {
        "num_edits": len(written),
        "max_steps_per_edit": work.max_steps,
        "update_rule": getattr(work.low, "name", type(work.low).__name__),
        "step_size": work.low.step_size,
    }
    facts = [
        {
            **_asked(llm, request, form),
            "run": len(history.runs),
            **_said(before, i, "before"),
            "answered_right_after": fact.answered,
            "answered": end == 100.0,
            "steps": fact.steps,
            "layers": list(fact.layers),
        }
        for i, (request, fact, end) in enumerate(zip(requests, written, correct, strict=True))
    ]
    run: dict[str, Any] = {
        "agent": label,
        "identity": {"agent": name, **getattr(agent, "identity", {})},
        "settings": {**recorded(settings), **ran},
        "versions": versions(),
    }
    record = {
        "format": FORMAT,
        **run,
        "runs": [*history.runs, run],
        "facts": [*history.facts, *facts],
    }
    matrices = edited_matrices(llm, work.found, places)
    left_out = place.save(source, matrices, record, work.ledger)
    out = place.given
    work.saved()
    reloaded = reload(out, source, llm, matrices, settings, requests)
    report = questions.report(reloaded.llm or llm, before, progress)
    for i, fact in enumerate(facts):
        fact |= _said(report.after, i, "after")
        texts = report.after.of_fact(i).values()
        fact["generated"] = all(is_match(text, fact["answer"]) for text in texts)
        fact["given"] = all(starts_with(text, fact["answer"]) for text in texts)
    run["report"] = report.to_json()
    run["saved"] = reloaded.to_json()
    write_json(out / "edits.json", record)
    opened_by = auto_class(llm.model.config).__name__
    return SavedEdits(out, facts, report, reloaded, left_out, opened_by)


def _asked(llm: ResidentLLM, request: Request, form: PromptForm) -> dict[str, Any]:
    """What was edited, and in which form."""
    forms = forms_of(llm, request, form)
    return {
        "prompt": request.prompt,
        "answer": request.answer,
        "subject": request.subject,
        "prompt_form": forms[0] if len(forms) == 1 else "both",
        "system": request.system if "chat" in forms else None,
    }


def _said(said: Said, index: int, when: str) -> dict[str, str | None]:
    """What a model says to a fact: ``before`` or ``after``, and the same in chat."""
    texts = said.of_fact(index)
    found = {when: texts.get("plain")}
    return {**found, f"chat_{when}": texts["chat"]} if "chat" in texts else found


def _by_form(facts: Sequence[dict[str, Any]]) -> str:
    """How many facts are given in each form, where some are asked in both."""
    if not any(fact["prompt_form"] == "both" for fact in facts):
        return ""
    counts = [
        sum(starts_with(fact.get(when) or "", fact["answer"]) for fact in facts)
        for when in ("after", "chat_after")
    ]
    return f", plain and in chat (plain {counts[0]}, in chat {counts[1]})"


def main(settings: CompareSettings, agent: str, out: Path, ledger: Path | None = None) -> int:
    """``hiedit edit``: edits, saves and says what happened.

    Returns:
        Exit status: 0, or ``NONE_GIVEN``.
    """
    saved = edit_model(settings, agent, out, ledger=ledger)
    print(saved.text)
    count = len(saved.facts)
    print(f"\n{saved.report.text}")
    print(f"Saved to {out}; {saved.reloaded.text}")
    print(f"{saved.opened_by}.from_pretrained({str(out)!r}) opens it.")
    if saved.left_out:
        print(f"Not copied, since they hold the unedited weights: {', '.join(saved.left_out)}")
    problems = (*saved.reloaded.differences, saved.reloaded.unverified)
    for problem in problems:
        if problem is not None:
            print(f"hiedit: warning: {out} is not verified ({problem})", file=sys.stderr)
    damage = saved.report.damage
    if damage is not None:
        print(f"hiedit: warning: {damage}", file=sys.stderr)
    print(f"What was edited, and where: {out / 'edits.json'}", file=sys.stderr)
    full = sum(fact["generated"] for fact in saved.facts)
    alone = f" ({full} with nothing behind the answer)" if full != saved.given else ""
    how = _by_form(saved.facts)
    but = "" if damage is None else "; the model is damaged"
    print(
        f"{saved.given} of {count} facts are given by the saved model, asked in the form they "
        f"were given{how}{alone}{but}."
    )
    return 0 if saved.given else NONE_GIVEN
