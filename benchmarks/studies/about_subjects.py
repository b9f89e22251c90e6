"""What a model says otherwise about the subject of a fact that was edited.

Writes facts by an agent's two levels, each into the unedited model, and asks the live model other
questions about their subjects::

    python -m hiedit_benchmarks.studies.about_subjects FACTS … --edits 16 --out DIR

Asked are the facts and their paraphrases, and :data:`STATEMENTS` and :data:`QUESTIONS` about their
subjects: what share of the unedited model's next tokens are still the most probable ones under
teacher forcing, whether the first one is, and whether the new answer is in the generated text. No
agent of this package knows these questions, though some are like those that ``neuron`` keeps. DIR
gets results.jsonl, a line for every fact, and results.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.controls import right_tokens
from hiedit_agents.editing.held import for_editing
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies import held_out
from hiedit_benchmarks.studies.held_out_report import interval
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import fingerprint
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import HieditWarning, PromptError, SettingsError
from hiedit_env.evaluation.names import AskedForm, metric_in
from hiedit_env.files import write_bytes
from hiedit_env.model.encoded import EncodedPrompt

PROGRAM = "python -m hiedit_benchmarks.studies.about_subjects"

#: In plain form.
STATEMENTS = (
    "{} was first mentioned in",
    "The age of {} is",
    "Who is {}? It is",
    "The history of {} is",
    "{} became famous because",
    "In 2010, {}",
    "I asked my friend about {} and she said",
    "The colour of {} is",
    "The father of {} was",
    "The name of the owner of {} is",
    "{} is larger than",
    "The number of people who know {} is",
)

#: In chat.
QUESTIONS = (
    "Tell me about {}.",
    "What is the age of {}?",
    "Why do people know {}?",
    "Write a sentence about {}.",
    "Who is the father of {}?",
    "Is {} expensive?",
)

#: Tokens of the unedited model that are looked at; tokens in which the new answer is looked for.
KEPT, GENERATED = 5, 8

#: Title of a column, and its metric.
COLUMNS: Mapping[str, str] = {
    "facts": "efficacy",
    "paraphrases": "generalization",
    "tokens kept": "kept",
    "first token kept": "first",
    "text has the new answer": "answer",
}


@settings
class Options:
    """Who edits what."""

    facts: held_out.Files
    """files of facts, or names of built-in data sets; the facts are drawn from all of them"""
    out: Path
    """folder of the results; it must not hold any"""
    agent: str = "hiedit"
    """who edits: a name, a folder, or settings behind a name"""
    model: str = "smollm2-135m"
    """name or folder of the model"""
    edits: AtLeast1 = 16
    """number of facts, each of which is written alone; those that name no subject are left out"""
    seed: AtLeast0 = 0
    """of which facts, in which order"""
    threads: AtLeast1 = 1
    """threads of torch"""


class Alone(held_out.Stream):
    """A model into which facts are written one at a time, and taken out again.

    Args:
        given: The settings.

    Raises:
        DatasetError, ModelError, SettingsError: what was asked for cannot be had.
    """

    def __init__(self, given: Options) -> None:
        stream = held_out.Options(
            facts=given.facts,
            out=given.out,
            agent=given.agent,
            model=given.model,
            edits=given.edits,
            seed=given.seed,
            ask=1,
            unrelated=0,
            texts=0,
        )
        super().__init__(stream, [1])

    def fact(self, place: int) -> dict[str, Any] | None:
        """Writes a fact, asks, and takes it out again.

        Returns:
            The fact, how it was written (see :class:`.held_out.Fact`), and a share per metric, in
            chat with ``chat_`` in front; None where there is no such prompt. None for a fact whose
            subject is not named.
        """
        request = self.requests[place]
        if request.subject.strip() == request.prompt.strip():
            return None
        before = {form: self._own(request, form) for form in self._forms}
        state = self._writer.save()
        try:
            (written,) = self.write(place, place + 1, 1)
            shares: dict[str, float | None] = {}
            with for_editing(self.model), torch.inference_mode():
                for form, prompts in before.items():
                    for metric in ("efficacy", "generalization"):
                        name = metric_in(form, metric)
                        shares[name] = self._given([self._groups[name].facts[place]])[0]
                    for name, share in self._said_otherwise(request, prompts).items():
                        shares[f"chat_{name}" if form == "chat" else name] = share
        finally:
            self._writer.restore(state)
        fact = {"prompt": request.prompt, "subject": request.subject, "answer": request.answer}
        return {**fact, **asdict(written), "shares": shares}

    def _own(self, request: Request, form: AskedForm) -> list[EncodedPrompt]:
        """The other questions in one form, with what the unedited model says as their answers."""
        texts = [x.format(request.subject) for x in (QUESTIONS if form == "chat" else STATEMENTS)]
        prompts: list[EncodedPrompt] = []
        for text in texts:
            with suppress(PromptError):  # too long for the model
                prompts += self.llm.encoder.encode_forms(text, request.answer, form)
        with for_editing(self.model):
            said = self.llm.continuations(prompts, [KEPT] * len(prompts))
        return [
            replace(p, answer=self.llm.encoder.decode(ids), answer_ids=tuple(ids))
            for p, ids in zip(prompts, said, strict=True)
        ]

    def _said_otherwise(
        self, request: Request, prompts: Sequence[EncodedPrompt]
    ) -> dict[str, float]:
        """What the edited model says to other questions; nothing where there are none."""
        if not prompts:
            return {}
        right = [part.float() for part in right_tokens(self.llm, prompts)]
        texts = self.llm.generate(prompts, [GENERATED] * len(prompts))
        answer = request.answer.strip().casefold()
        return {
            "kept": statistics.fmean(float(part.mean()) for part in right),
            "first": statistics.fmean(float(part[0]) for part in right),
            "answer": statistics.fmean(float(answer in text.casefold()) for text in texts),
        }


def report(facts: Sequence[Mapping[str, Any]]) -> str:
    """Percent with 95 % bootstrap intervals over facts, a row for every form.

    Args:
        facts: From :meth:`Alone.fact`; at least one.
    """
    lines = [f"| form | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for form, before in (("plain", ""), ("chat", "chat_")):
        cells = []
        for name in COLUMNS.values():
            found = interval([fact["shares"].get(before + name) for fact in facts])
            cells.append("" if found is None else "{:.1f} [{:.0f}, {:.0f}]".format(*found))
        if any(cells):
            lines.append(f"| {form} | {' | '.join(cells)} |")
    seconds = statistics.median(fact["seconds"] for fact in facts)
    broken = sum(fact["problem"] is not None for fact in facts)
    end = f", {broken} broken off" if broken else ""
    return "\n".join(lines) + f"\n\n{len(facts)} facts{end}, {seconds:.1f} s an edit (median)\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, asks and reports; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    if not given.facts:
        raise SettingsError(f"FACTS must be given; see {PROGRAM} --help")
    torch.set_num_threads(given.threads)
    with held_out.new_file(given.out / "results.jsonl") as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HieditWarning)
            alone = Alone(given)
        made_by = {
            "agent": given.agent,
            "agent_is": alone.explained,
            "model": given.model,
            "edits": given.edits,
            "seed": given.seed,
            "stream": fingerprint(alone.requests),
            "data": [Path(name).name for name in given.facts],
            "versions": versions(),
        }
        found: list[dict[str, Any]] = []
        for place in range(len(alone.requests)):
            fact = alone.fact(place)
            if fact is not None:
                found.append(fact)
                print(json.dumps({**fact, "made_by": made_by}), file=file, flush=True)
        if not found:
            raise SettingsError("none of the facts names its subject; give others")
    text = report(found)
    print(text, end="")
    write_bytes(given.out / "results.md", text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
