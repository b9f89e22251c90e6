"""What is left of a long stream of edits, asked in plain transformers on the way.

Writes facts one after another, as ``hiedit edit`` would, and asks the live model by ``generate`` of
transformers and by one forward pass a prompt, so that nothing of the resident model stands between
the edited weights and the answers::

    python -m hiedit_benchmarks.studies.held_out FACTS … --edits 1000 --check-at 150 1000 --out DIR

Asked are the facts and their paraphrases (generated; right where they are the answer and nothing
else), prompts about other subjects and control questions in chat (share of the unedited model's own
first answer tokens that are left). DIR gets results.jsonl, a line for every check as soon as it is
made, results.md, and for several checks a picture.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from transformers import PreTrainedModel

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import AskedFact, as_asked
from hiedit_agents.editing.controls import CONTROL_CHAT, end_id, has_template
from hiedit_agents.editing.held import for_editing
from hiedit_agents.editing.levels import HowToEdit, make_levels
from hiedit_agents.editing.writer import FactWriter
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies.held_out_report import draw, report
from hiedit_benchmarks.studies.plain_asking import first_tokens, generated, tokens_kept
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.streams import fingerprint, stream
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import HieditWarning, ResultsExistError, SettingsError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match
from hiedit_env.evaluation.names import AskedForm, metric_in
from hiedit_env.evaluation.questions import Questions, questions_about
from hiedit_env.evaluation.unedited import REFERENCE_TOKENS
from hiedit_env.files import write_bytes
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.encoded import EncodedPrompt
from hiedit_env.model.loading import load_model
from hiedit_env.resident.resident import ResidentLLM

PROGRAM = "python -m hiedit_benchmarks.studies.held_out"

_Files = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FACTS [FACTS ...]", help_behavior_hint=""),
]


@settings
class Options:
    """Who edits what."""

    facts: _Files
    """files of facts, or names of built-in data sets; the stream is drawn from all of them"""
    out: Path
    """folder of the results; it must not exist"""
    agent: str = "hiedit"
    """who edits: a name, a folder, or settings behind a name"""
    model: str = "smollm2-135m"
    """name or folder of the model"""
    edits: AtLeast1 = 150
    """number of facts that are written"""
    seed: AtLeast0 = 0
    """of which facts, in which order"""
    together: AtLeast1 = 1
    """facts that are written at once"""
    check_at: tuple[int, ...] = ()
    """after how many facts the model is asked; by default after the last"""
    ask: AtLeast1 = 150
    """largest number of facts that are asked about, evenly spaced among those written"""
    neighbours: AtLeast0 = 3
    """largest number of prompts about other subjects beside each fact"""
    prompt_form: PromptForm | None = None
    """how facts are edited: plain, chat or both; by default both where there is a template"""
    end_token: bool | None = None
    """whether the token that ends the model's turn is put behind every answer"""
    threads: AtLeast1 = 1
    """threads of torch"""


@dataclass(frozen=True, slots=True)
class Check:
    """What a model gave after some edits.

    Args:
        edits: Number of facts written.
        seconds: Median of the seconds that writing a fact took, since the last check.
        steps: Primitive steps per fact, the same way; 0 where nothing was written.
        shares: Metric, in chat with ``chat_`` in front, → share per fact asked, None where the fact
            has no such prompts. ``controls`` has one share per control question.
        asked: The facts asked, by place in the stream.
    """

    edits: int
    seconds: float
    steps: list[int]
    shares: dict[str, list[float | None]]
    asked: list[int]


class Stream:
    """A model into which facts are written, one after another.

    Args:
        given: The settings.
        checks: After how many edits it will be asked.

    Raises:
        DatasetError, ModelError, SettingsError: what was asked for cannot be had.
    """

    def __init__(self, given: Options, checks: Sequence[int]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HieditWarning)
            everything = [r for name in given.facts for r in load_requests(name)]
        rng = np.random.default_rng([given.seed, 18])
        self.requests = stream(everything, given.edits, rng)
        how = HowToEdit(given.agent)
        made = how.make()
        loaded = load_model(given.model, progress=False)
        find = getattr(made, "candidate_layers", None)
        candidates = find_candidates(
            loaded.model, None if find is None else find(given.model), given.model
        )
        end = end_id(loaded.tokenizer, given.model, given.end_token)
        self.model: PreTrainedModel = loaded.model
        self.llm = ResidentLLM(loaded.model, loaded.tokenizer, candidates, end_id=end)
        levels = make_levels(how, made, self.llm, given.model)
        self._writer = FactWriter(self.llm, levels)
        self.explained = levels.explained
        chat = has_template(loaded.tokenizer)
        form: PromptForm = given.prompt_form or ("both" if chat else "plain")
        forms: tuple[AskedForm, ...] = ("plain", "chat") if chat else ("plain",)
        self._facts = [as_asked(self.llm, request, form) for request in self.requests]
        self._questions = questions_about(self.llm, self.requests, forms)
        self._forms, self._neighbours = forms, given.neighbours
        encode = self.llm.encoder.encode_chat
        controls = [encode(text, "x") for text in CONTROL_CHAT] if chat else []
        asked = sorted({i for edits in checks for i in _places(edits, given.ask)})
        near = [p for i in asked for p in self._near(i)]
        with for_editing(self.model), torch.inference_mode():
            own = first_tokens(self.llm, [*near, *controls], REFERENCE_TOKENS)
        self._reference = dict(zip(near, own, strict=False))
        self._controls = own[len(near) :]

    def _near(self, place: int, form: AskedForm | None = None) -> list[EncodedPrompt]:
        """Prompts about other subjects beside a fact."""
        groups = self._questions.groups
        names = [metric_in(f, "specificity") for f in self._forms if form in (None, f)]
        return [p for name in names for p in groups[name].facts[place][: self._neighbours]]

    def write(self, first: int, last: int, together: int) -> list[tuple[float, int]]:
        """Writes the facts from one place of the stream to another.

        Returns:
            Seconds and steps per fact.
        """
        found = []
        for place in range(first, last, together):
            group: list[AskedFact] = self._facts[place : min(place + together, last)]
            started = time.perf_counter()
            with for_editing(self.model), warnings.catch_warnings():
                warnings.simplefilter("ignore", HieditWarning)
                prompts = [prompt for fact in group for prompt in fact.prompts]
                written = self._writer.write(prompts, place / len(self.requests))
            seconds = (time.perf_counter() - started) / len(group)
            found += [(seconds, written.steps if written.layers else 0)] * len(group)
        return found

    def ask(self, edits: int, number: int) -> tuple[list[int], dict[str, list[float | None]]]:
        """Asks about some of the facts written.

        Args:
            edits: Number of facts written.
            number: Of facts asked, at most.

        Returns:
            The facts asked, and the shares of :class:`Check`.
        """
        places = _places(edits, number)
        shares: dict[str, list[float | None]] = {}
        with for_editing(self.model), torch.inference_mode():
            for form in self._forms:
                for metric in ("efficacy", "generalization"):
                    name = metric_in(form, metric)
                    shares[name] = self._given(self._questions, name, places)
                near = [[self._reference[p] for p in self._near(i, form)] for i in places]
                kept = iter(tokens_kept(self.llm, [p for group in near for p in group]))
                name = metric_in(form, "neighbours")
                shares[name] = [_mean([next(kept) for _ in group]) for group in near]
            shares["controls"] = list(tokens_kept(self.llm, self._controls))
        return places, shares

    def _given(self, asked: Questions, name: str, places: Sequence[int]) -> list[float | None]:
        """Share of the prompts of a metric that are given, per fact."""
        groups = [asked.groups[name].facts[i] for i in places]
        flat = [prompt for group in groups for prompt in group]
        budgets = [len(p.answer_ids) + EXTRA_TOKENS for p in flat]
        texts = generated(self.llm, flat, budgets)
        right = iter(is_match(t, p.answer) for t, p in zip(texts, flat, strict=True))
        return [_mean([float(next(right)) for _ in group]) for group in groups]


def _places(edits: int, number: int) -> list[int]:
    """At most so many of the facts written, evenly spaced."""
    return sorted({i * edits // min(number, edits) for i in range(min(number, edits))})


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, asks and reports; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    if not given.facts:
        raise SettingsError(f"FACTS must be given; see {PROGRAM} --help")
    checks = sorted({*given.check_at} or {given.edits})
    if checks[0] < 1 or checks[-1] > given.edits:
        raise SettingsError(f"check_at must be from 1 to --edits {given.edits}, got {checks}")
    if given.out.exists():
        raise ResultsExistError(f"{given.out} exists; give another --out")
    torch.set_num_threads(given.threads)
    facts = Stream(given, checks)
    given.out.mkdir(parents=True)
    made_by = {
        **{name: value for name, value in asdict(given).items() if name not in ("out", "facts")},
        "data": [Path(name).name for name in given.facts],
        "stream": fingerprint(facts.requests),
        "agent_is": facts.explained,
        "versions": versions(),
    }
    found: list[dict[str, Any]] = []
    with (given.out / "results.jsonl").open("x", encoding="utf-8") as file:
        for first, last in zip([0, *checks], checks, strict=False):
            written = facts.write(first, last, given.together)
            asked, shares = facts.ask(last, given.ask)
            seconds = statistics.median([one for one, _ in written])
            check = Check(last, round(seconds, 3), [steps for _, steps in written], shares, asked)
            found.append(asdict(check))
            print(json.dumps({**found[-1], "made_by": made_by}), file=file, flush=True)
            print(report(found[-1:]), flush=True)
    write_bytes(given.out / "results.md", report(found).encode())
    if len(found) > 1:
        write_bytes(given.out / "results.png", draw(found))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
