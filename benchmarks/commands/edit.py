"""Facts from a file into a model, saved as an ordinary Hugging Face folder: ``hiedit edit``.

The parts: what was edited before is in :mod:`.edit_history`, what the model says before and after
in :mod:`.edit_report`, the folder in :mod:`.edit_folder`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.registry import explain, labelled, make_agent, refuse_unused_size
from hiedit_benchmarks.commands.edit_folder import OutFolder, Reloaded, reload
from hiedit_benchmarks.commands.edit_history import FORMAT, History, read_history
from hiedit_benchmarks.commands.edit_questions import Questions, forms_of
from hiedit_benchmarks.commands.edit_report import Report, Said, before_and_after
from hiedit_benchmarks.comparison.asking import settle_asking
from hiedit_benchmarks.comparison.compare import make_env, recorded
from hiedit_benchmarks.comparison.episode import play, unwrapped
from hiedit_benchmarks.comparison.results import versions, write_json
from hiedit_benchmarks.comparison.rows import efficacy_as_edited
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.requests import PromptForm, Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.episode import check_units
from hiedit_env.errors import ModelError
from hiedit_env.evaluation.matching import is_match, starts_with
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.model.encoded import EncodedFact
from hiedit_env.model.memory_budget import auto_class
from hiedit_env.model.saving import EditedMatrix, check_source, find_folder, locate, source_folder
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
    settings = settle_asking(settings, both=True)
    form = settings.prompt_form or "plain"
    with candidates_for([editor], settings.model, settings.layers) as layers:
        settings = replace(settings, layers=layers)
        env = make_env(settings, progress, num_edits=None, shuffle=False, retention_window=0)
    inner = unwrapped(env)
    source = source_folder(inner.llm.model)
    check_source(source, out)
    history = read_history(source)
    weights = {f"{name}.weight": _weight(inner, name) for name in inner.llm.names}
    places = locate(weights, source)
    # All of it, before anything else: an error here names the file's row.
    encoded = [inner.episode.evaluator.encode(request) for request in inner.requests]
    check_units(encoded, settings.edits_per_step)
    # Builds the agent for this model, which shows whether it fits.
    editor.reset(env, 0)
    if inner.rule.tokens == "subject":
        _warn_of_subjects(encoded)
    rehearsed = _remember(inner, history)
    print(f"hiedit: agent {label}: {explain(editor, settings.model)}", file=sys.stderr)
    if history.facts:
        print(f"hiedit: {history.text(rehearsed)}", file=sys.stderr)
    questions = Questions(inner.llm, inner.requests, history.requests, form)
    before = questions.before(progress)

    # Of each fact only itself is judged while it is edited; the rest is asked at the end.
    bare = [
        replace(request, paraphrases=(), locality=(), portability=()) for request in inner.requests
    ]
    episode = play(env, editor, 0, options={"requests": bare}, progress=progress)
    if episode.error_type is not None:
        raise ModelError(
            f"the model collapsed at fact {len(episode.edits)} ({episode.error_type}), nothing was "
            "saved; a smaller --step-size may help"
        )
    in_chat = any("chat" in forms_of(inner.llm, r, form) for r in episode.requests)
    found = evaluate(
        inner.llm,
        episode.requests,
        None,
        forms=("plain", "chat") if in_chat else ("plain",),
        generation=(),
    )
    correct = efficacy_as_edited(episode.requests, found, form, "exact_match")
    rule = inner.episode.rule
    # What ran, which need not be what the environment was made with.
    ran = {
        "num_edits": len(episode.edits),
        "max_steps_per_edit": inner.episode.max_steps_per_edit,
        "update_rule": getattr(rule, "name", type(rule).__name__),
        "step_size": rule.step_size,
    }
    facts = [
        {
            **_asked(inner.llm, request, form),
            "run": len(history.runs),
            **_said(before, i, "before"),
            "answered_right_after": bool(edit.metrics["answered"]),
            "answered": end == 100.0,
            "steps": edit.steps,
            "layers": [
                name for name, written in zip(inner.llm.names, edit.layers, strict=True) if written
            ],
        }
        for i, (request, edit, end) in enumerate(
            zip(episode.requests, episode.edits, correct, strict=True)
        )
    ]
    run: dict[str, Any] = {
        "agent": label,
        "identity": {"agent": name, **getattr(editor, "identity", {})},
        "settings": {**recorded(settings), **ran},
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
    for i, fact in enumerate(facts):
        fact |= _said(report.after, i, "after")
        texts = report.after.of_fact(i).values()
        fact["generated"] = all(is_match(text, fact["answer"]) for text in texts)
        fact["given"] = all(starts_with(text, fact["answer"]) for text in texts)
    run["report"] = report.to_json()
    run["saved"] = reloaded.to_json()
    write_json(out / "edits.json", record)
    env.close()
    opened_by = auto_class(inner.llm.model.config).__name__
    return SavedEdits(out, facts, report, reloaded, left_out, opened_by)


def _weight(env: EditingEnv, name: str) -> Any:
    return env.llm.model.get_submodule(name).weight


def _warn_of_subjects(facts: Sequence[EncodedFact]) -> None:
    """Says which facts cannot be edited at their subject, since their prompt does not name it."""
    found = [fact.request for fact in facts if any(p.subject_missing for p in fact.prompts)]
    if found:
        print(
            f"hiedit: warning: {len(found)} of {len(facts)} facts name a subject that is not in "
            f"their prompt, such as {found[0].source} ({found[0].subject!r:.60}); they are edited "
            "at the prompt's last token, which does not carry over to other words: write the "
            "subject as it stands in the prompt",
            file=sys.stderr,
        )


def _remember(env: EditingEnv, history: History) -> bool:
    """Tells a low level that rehearses about facts that were edited into the model before.

    Returns:
        Whether it rehearses.
    """
    remember = getattr(env.rule, "remember", None)
    if remember is None:
        return False
    encode = env.episode.evaluator.encode
    remember([prompt for r in history.requests for prompt in encode(r).prompts])
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
    how = _by_form(saved.facts)
    but = "" if damage is None else "; the model is damaged"
    print(
        f"{saved.given} of {count} facts are given by the saved model, asked in the form they "
        f"were given{how}{alone}{but}."
    )
    return 0 if saved.given else NONE_GIVEN
