"""Facts from a file into a model, saved as an ordinary Hugging Face folder: ``hiedit edit``.

The parts: what was edited before is in :mod:`.edit_history`, what the model says before and after
in :mod:`.edit_report`, the folder in :mod:`.edit_folder`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.registry import explain, labelled, make_agent, refuse_unused_size
from hiedit_benchmarks.commands.edit_folder import OutFolder, Reloaded, reload
from hiedit_benchmarks.commands.edit_history import FORMAT, History, read_history
from hiedit_benchmarks.commands.edit_report import Questions, Report, before_and_after
from hiedit_benchmarks.comparison.compare import make_env
from hiedit_benchmarks.comparison.episode import FinishedEdit, play, unwrapped
from hiedit_benchmarks.comparison.results import versions, write_json
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import ModelError
from hiedit_env.evaluation.matching import is_match, starts_with
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.model.memory_budget import auto_class
from hiedit_env.model.saving import EditedMatrix, check_source, find_folder, locate, source_folder

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
    settings: CompareSettings, agent: str, out: Path, *, progress: bool = True
) -> SavedEdits:
    """Writes all facts of a data set into a model, in file order, and saves it.

    The folder holds everything that the unedited model's folder holds, with other bytes in the
    edited matrices alone, and ``edits.json``. It appears when the model is complete on disk. Then
    it is loaded again, compared and asked; whatever that shows, it is kept.

    Args:
        settings: ``dataset`` is the file of facts; ``num_edits`` and ``generation`` are not used.
        agent: Name for :func:`hiedit_agents.registry.make_agent`.
        out: A folder that does not exist or is empty.
        progress: Whether to show progress on standard error.

    Raises:
        ResultsExistError: ``out`` is not empty; nothing has been done.
        ModelError: a folder that cannot be edited, or the model collapsed; ``out`` is left as it
            was.
        CheckpointError: the agent does not fit the model; nothing has been generated.
        SettingsError: unknown agent, or ``out`` cannot be written; that is found before the model
            is loaded, so far as it can be.
    """
    place = OutFolder(out)
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
    with candidates_for([editor], settings.model, settings.layers) as layers:
        settings = replace(settings, layers=layers)
        env = make_env(settings, progress, num_edits=None, shuffle=False)
    inner = unwrapped(env)
    source = source_folder(inner.llm.model)
    check_source(source, out)
    history = read_history(source)
    weights = {f"{name}.weight": _weight(inner, name) for name in inner.llm.names}
    places = locate(weights, source)
    for request in inner.requests:
        # All of it, before anything else: an error here names the file's row.
        inner.episode.evaluator.encode(request)
    # Builds the agent for this model, which shows whether it fits.
    editor.reset(env, 0)
    rehearsed = _remember(inner, history)
    print(f"hiedit: agent {label}: {explain(editor, settings.model)}", file=sys.stderr)
    if history.facts:
        print(f"hiedit: {history.text(rehearsed)}", file=sys.stderr)
    questions = Questions(inner.llm, inner.requests, history.requests)
    before = questions.before(progress)

    episode = play(env, editor, 0, progress=progress)
    if episode.error_type is not None:
        raise ModelError(
            f"the model collapsed at fact {len(episode.edits)} ({episode.error_type}), nothing was "
            "saved; a smaller --step-size may help"
        )
    correct = evaluate(inner.llm, episode.requests, None, generation=()).per_fact["efficacy"]
    rule = inner.episode.rule
    # What ran, which need not be what the environment was made with.
    ran = {
        "num_edits": len(episode.edits),
        "max_steps_per_edit": inner.episode.max_steps_per_edit,
        "update_rule": getattr(rule, "name", type(rule).__name__),
        "step_size": rule.step_size,
    }
    facts = [
        _fact(request, was, edit, end == 100.0, inner.llm.names, len(history.runs))
        for request, was, edit, end in zip(
            episode.requests, before.facts, episode.edits, correct["exact_match"], strict=True
        )
    ]
    run: dict[str, Any] = {
        "agent": label,
        "identity": {"agent": name, **getattr(editor, "identity", {})},
        "settings": {**asdict(settings), **ran},
        "versions": versions(),
    }
    record = {
        "format": FORMAT,
        **run,
        "runs": [*history.runs, run],
        "facts": [*history.facts, *facts],
    }
    matrices = _edited(inner, weights, places)
    left_out = place.save(source, matrices, record)
    reloaded = reload(out, source, inner.llm, matrices, settings, inner.requests)
    llm = reloaded.llm or inner.llm
    report = questions.report(llm, before, progress)
    for fact, now in zip(facts, report.after.facts, strict=True):
        fact["after"] = now
        fact["generated"] = is_match(now, fact["answer"])
        fact["given"] = starts_with(now, fact["answer"])
    run["report"] = report.to_json()
    run["saved"] = reloaded.to_json()
    write_json(out / "edits.json", record)
    env.close()
    opened_by = auto_class(inner.llm.model.config).__name__
    return SavedEdits(out, facts, report, reloaded, left_out, opened_by)


def _weight(env: EditingEnv, name: str) -> Any:
    return env.llm.model.get_submodule(name).weight


def _remember(env: EditingEnv, history: History) -> bool:
    """Tells a low level that rehearses about facts that were edited into the model before.

    Returns:
        Whether it rehearses.
    """
    remember = getattr(env.rule, "remember", None)
    if remember is None:
        return False
    remember([env.llm.encode(r.prompt, r.answer) for r in history.requests])
    return True


def _edited(env: EditingEnv, weights: dict[str, Any], places: dict[str, Any]) -> list[EditedMatrix]:
    """The matrices that differ from the unedited ones."""
    with env.llm.unedited():
        base = {name: _weight(env, name[: -len(".weight")]).detach().clone() for name in weights}
    made = []
    for name, old in base.items():
        new = _weight(env, name[: -len(".weight")]).detach()
        if not bool((new == old).all()):
            made.append(EditedMatrix(name, old, new, places[name]))
    return made


def _fact(
    request: Request,
    before: str,
    edit: FinishedEdit,
    answered: bool,
    names: Sequence[str],
    run: int,
) -> dict[str, Any]:
    """What ``edits.json`` says of a fact; what the saved model says is added later."""
    return {
        "prompt": request.prompt,
        "answer": request.answer,
        "subject": request.subject,
        "run": run,
        "before": before,
        "answered_right_after": bool(edit.metrics["answered"]),
        "answered": answered,
        "steps": edit.steps,
        "layers": [name for name, written in zip(names, edit.layers, strict=True) if written],
    }


def main(settings: CompareSettings, agent: str, out: Path) -> int:
    """``hiedit edit``: edits, saves and says what happened.

    Returns:
        Exit status: 0, or ``NONE_GIVEN``.
    """
    saved = edit_model(settings, agent, out)
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
    but = "" if damage is None else "; the model is damaged"
    print(
        f"{saved.given} of {count} facts are given by the saved model, asked in the form they "
        f"were given{alone}{but}."
    )
    return 0 if saved.given else NONE_GIVEN
