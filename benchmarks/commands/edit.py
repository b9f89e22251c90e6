"""Facts from a file into a model, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hiedit_agents.named.candidates import candidates_for
from hiedit_agents.registry import labelled, make_agent, refuse_unused_size
from hiedit_benchmarks.comparison.compare import make_env
from hiedit_benchmarks.comparison.episode import FinishedEdit, bar, play, unwrapped
from hiedit_benchmarks.comparison.results import versions, write_json
from hiedit_benchmarks.comparison.settings import CompareSettings
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import ModelError, ResultsExistError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match, starts_with
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.model.memory_budget import auto_class
from hiedit_env.resident.resident import ResidentLLM

#: Facts shown in the printed table; ``edits.json`` holds all.
SHOWN = 20


@dataclass(frozen=True, slots=True)
class SavedEdits:
    """The outcome of :func:`edit_model`.

    Args:
        out: The folder of the edited model.
        facts: What ``edits.json`` says of each fact.
        text: Before and after, as a table.
        unverified: What differs in the saved model, or why it could not be loaded again beside the
            edited one; None where all its weights and tokens are the same.
        opened_by: The class of transformers that opens it with all its parts.
    """

    out: Path
    facts: list[dict[str, Any]]
    text: str
    unverified: str | None
    opened_by: str = "AutoModelForCausalLM"


def edit_model(
    settings: CompareSettings, agent: str, out: Path, *, progress: bool = True
) -> SavedEdits:
    """Writes all facts of a data set into a model, in file order, and saves it.

    The folder holds the model (safetensors) and its tokenizer as ``save_pretrained`` writes them,
    and ``edits.json``. It appears only when everything is done. The model is then loaded again and
    its weights are compared; if they differ, or there is no room for a second model, the folder is
    kept all the same, unverified.

    Args:
        settings: ``dataset`` is the file of facts; ``num_edits`` and ``generation`` are not used.
        agent: Name for :func:`hiedit_agents.registry.make_agent`.
        out: A folder that does not exist or is empty.
        progress: Whether to show progress on standard error.

    Raises:
        ResultsExistError: ``out`` is not empty; nothing has been done.
        ModelError: the model cannot be edited, or it collapsed; nothing is saved.
        SettingsError: unknown agent, or ``out`` cannot be written; that is found before the model
            is loaded, so far as it can be.
    """
    _require_writable(out)
    _require_free(out)
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
    for request in inner.requests:
        # All of it, before anything else: an error here names the file's row.
        inner.episode.evaluator.encode(request)
    before = _answers(inner.llm, inner.requests, "answers before", progress)
    episode = play(env, editor, 0, progress=progress)
    if episode.error_type is not None:
        raise ModelError(
            f"the model collapsed at fact {len(episode.edits)} ({episode.error_type}), nothing was "
            "saved; a smaller --step-size may help"
        )
    after = _answers(inner.llm, inner.requests, "answers after", progress)
    correct = evaluate(inner.llm, episode.requests, None, generation=()).per_fact["efficacy"]
    facts = [
        _fact(request, was, now, edit, end == 100.0, inner.llm.names)
        for request, was, now, edit, end in zip(
            episode.requests, before, after, episode.edits, correct["exact_match"], strict=True
        )
    ]
    rule = inner.episode.rule
    # What ran, which need not be what the environment was made with.
    ran = {
        "num_edits": len(facts),
        "max_steps_per_edit": inner.episode.max_steps_per_edit,
        "update_rule": getattr(rule, "name", type(rule).__name__),
        "step_size": rule.step_size,
    }
    record = {
        "agent": label,
        "identity": {"agent": name, **getattr(editor, "identity", {})},
        "settings": {**asdict(settings), **ran},
        "versions": versions(),
        "facts": facts,
    }
    unverified = _save(inner.llm, episode.requests, settings, record, out)
    env.close()
    opened_by = auto_class(inner.llm.model.config).__name__
    return SavedEdits(out, facts, before_and_after(facts), unverified, opened_by)


def before_and_after(facts: Sequence[dict[str, Any]]) -> str:
    """Prompt, answer before, answer wanted and answer after of up to ``SHOWN`` facts, as text."""
    lines = []
    for fact in facts[:SHOWN]:
        mark = verdict(fact["after"], fact["answer"])
        lines += [
            fact["prompt"],
            f"    before: {_one_line(fact['before'])}",
            f"    wanted: {_one_line(fact['answer'])}",
            f"    after:  {_one_line(fact['after'])}   ({mark})",
        ]
    if len(facts) > SHOWN:
        lines.append(f"… and {len(facts) - SHOWN} more, all in edits.json")
    return "\n".join(lines)


def verdict(generated: str, answer: str) -> str:
    """Whether a greedy continuation gives the answer, in words.

    >>> verdict(" Bengali. He", "Bengali"), verdict(" Bengali, which he", "Bengali")
    ('answered', 'answered, but runs on')
    >>> verdict(" Spanish.", "Bengali")
    'NOT answered'
    """
    if is_match(generated, answer):
        return "answered"
    return "answered, but runs on" if starts_with(generated, answer) else "NOT answered"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _require_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ResultsExistError(f"{out} exists and is not an empty folder; give another --out")


def _require_writable(out: Path) -> None:
    """Makes a file in what exists of the folders above, where ``_save`` will work."""
    try:
        above = next(path for path in out.absolute().parents if path.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise SettingsError(f"{out} cannot be written, give another --out: {error}") from error


def _answers(
    llm: ResidentLLM, requests: Sequence[Request], label: str, progress: bool
) -> list[str]:
    """Greedy continuations of the requests' prompts, in their order."""
    texts: list[str] = []
    with bar(label, len(requests), progress) as shown:
        for start in range(0, len(requests), 64):
            group = requests[start : start + 64]
            budgets = [len(llm.encode(r.prompt, r.answer).answer_ids) + EXTRA_TOKENS for r in group]
            texts += llm.generate([r.prompt for r in group], budgets)
            shown.update(len(group))
    return texts


def _fact(
    request: Request,
    before: str,
    after: str,
    edit: FinishedEdit,
    answered: bool,
    names: Sequence[str],
) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "answer": request.answer,
        "subject": request.subject,
        "before": before,
        "after": after,
        "answered_right_after": bool(edit.metrics["answered"]),
        "answered": answered,
        "generated": is_match(after, request.answer),
        "steps": edit.steps,
        "layers": [name for name, written in zip(names, edit.layers, strict=True) if written],
    }


def _save(
    llm: ResidentLLM,
    requests: Sequence[Request],
    settings: CompareSettings,
    record: dict[str, Any],
    out: Path,
) -> str | None:
    """Saves, verifies and puts in place; returns why it could not be verified, if so.

    Removed is only what is half written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise SettingsError(f"the model cannot be saved to {out}: {error}") from error
    folder = work / "model"
    try:
        llm.model.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)
        write_json(folder / "edits.json", record)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise SettingsError(f"the model cannot be saved to {out}: {error}") from error
        raise
    try:
        unverified = _verify(llm, requests, settings, folder)
    except BaseException:  # an interruption
        _place(folder, out)
        raise
    _place(folder, out)
    return unverified


def _place(folder: Path, out: Path) -> None:
    """Moves the finished model out of its temporary folder."""
    try:
        if out.exists():
            out.rmdir()  # empty: replacing a folder is not possible everywhere
        os.replace(folder, out)
    except OSError as error:
        raise SettingsError(
            f"the edited model is finished but cannot be moved to {out} ({error}); it is in "
            f"{folder}"
        ) from error
    shutil.rmtree(folder.parent, ignore_errors=True)


@torch.inference_mode()
def _verify(
    llm: ResidentLLM, requests: Sequence[Request], settings: CompareSettings, folder: Path
) -> str | None:
    """Loads the folder as anybody would and compares weights and tokens, bit for bit.

    Logits are not compared: in some models they differ in the last bit from run to run.

    Returns:
        None where they are equal; else what differs, or why they could not be compared.
    """
    tokenizers: Any = AutoTokenizer
    trust = settings.trust_remote_code
    try:
        loader = auto_class(llm.model.config)
        model = loader.from_pretrained(folder, dtype=llm.dtype, trust_remote_code=trust)
        tokenizer = tokenizers.from_pretrained(folder, trust_remote_code=trust)
        return _difference(llm, model, tokenizer, requests)
    # Above all memory: there are two models now. PyTorch says so with a RuntimeError.
    except (RuntimeError, MemoryError, OSError, ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _difference(
    llm: ResidentLLM, model: Any, tokenizer: Any, requests: Sequence[Request]
) -> str | None:
    """What a loaded model and its tokenizer do not have in common with the edited ones, if any."""
    ours, theirs = llm.model.state_dict(), model.state_dict()
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"loaded again, the model differs: only one of the two has {name}"
    for name, own in ours.items():
        again = theirs[name]
        if own.dtype != again.dtype or not torch.equal(_bits(own), _bits(again)):
            return f"loaded again, the model differs in {name}"
    for request in requests[:SHOWN]:
        if tokenizer(request.prompt)["input_ids"] != llm.tokenizer(request.prompt)["input_ids"]:
            return f"loaded again, the tokenizer differs on {request.prompt!r}"
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def main(settings: CompareSettings, agent: str, out: Path) -> None:
    """``hiedit edit``: edits, saves and says what happened."""
    saved = edit_model(settings, agent, out)
    print(saved.text)
    count = len(saved.facts)
    print(
        f"\n{sum(f['generated'] for f in saved.facts)} of {count} facts are given in full by "
        f"greedy generation, {sum(f['answered'] for f in saved.facts)} of {count} under teacher "
        f"forcing."
    )
    if saved.unverified is None:
        print(f"Saved to {out}; loaded again from there, its weights are identical bit for bit.")
    else:
        print(f"Saved to {out}, but not verified: {saved.unverified}")
        print(f"hiedit: warning: {out} is not verified ({saved.unverified})", file=sys.stderr)
    print(f"{saved.opened_by}.from_pretrained({str(out)!r}) opens it.")
    print(f"What was edited, and where: {out / 'edits.json'}", file=sys.stderr)
