"""What is left of a long stream of edits, asked on the way.

Writes facts one after another by an agent's two levels, without checks, so that nothing is rolled
back, and asks the live model by ``generate`` of transformers::

    python -m hiedit_benchmarks.studies.held_out FACTS … --edits 1000 --check-at 150 1000 --out DIR

Asked are the facts and their paraphrases (generated; right where they are the answer and nothing
else), the unrelated prompts of the facts and control prompts (share of the unedited model's own
first answer tokens that are left, under teacher forcing). DIR gets results.jsonl, a line for every
check as soon as it is made, results.md, and for several checks a picture.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import as_asked
from hiedit_agents.editing.controls import Controls, end_id, has_template, right_tokens
from hiedit_agents.editing.held import for_editing
from hiedit_agents.editing.in_place import different
from hiedit_agents.editing.levels import HowToEdit, make_levels
from hiedit_agents.editing.writer import FactWriter
from hiedit_agents.hierarchy.calibration import TEXT_TOKENS
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies.held_out_report import draw, report
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.streams import fingerprint, stream
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import (
    HieditWarning,
    OutputError,
    ResultsExistError,
    SettingsError,
    require_libraries,
)
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match
from hiedit_env.evaluation.names import AskedForm, metric_in
from hiedit_env.evaluation.questions import questions_about
from hiedit_env.evaluation.unedited import REFERENCE_TOKENS
from hiedit_env.files import write_bytes
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.encoded import EncodedPrompt
from hiedit_env.model.loading import load_model
from hiedit_env.model.relatives import known_as
from hiedit_env.model.sampling import beginnings, sampled_texts
from hiedit_env.resident.resident import ResidentLLM

#: Seed of the texts that are asked.
_TEXT_SEED = 2**31 + 18

PROGRAM = "python -m hiedit_benchmarks.studies.held_out"

#: What is edited, on the command line.
Files = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FACTS [FACTS ...]", help_behavior_hint=""),
]


@settings
class Options:
    """Who edits what."""

    facts: Files
    """files of facts, or names of built-in data sets; the stream is drawn from all of them"""
    out: Path
    """folder of the results; it must not hold any"""
    agent: str = "hiedit"
    """who edits: a name, a folder, or settings behind a name"""
    model: str = "smollm2-135m"
    """name or folder of the model"""
    edits: AtLeast1 = 150
    """number of facts that are written; the model is asked after the last one in any case"""
    seed: AtLeast0 = 0
    """of which facts, in which order"""
    together: AtLeast1 = 1
    """facts that are written at once"""
    check_at: tuple[int, ...] = ()
    """after how many facts the model is asked as well"""
    ask: AtLeast1 = 150
    """largest number of facts that are asked about, evenly spaced among those written"""
    unrelated: AtLeast0 = 3
    """largest number of unrelated prompts beside each fact"""
    texts: AtLeast0 = 24
    """texts of 224 tokens that the unedited model writes itself, half of them chats"""
    prompt_form: PromptForm | None = None
    """how facts are edited: plain, chat or both; by default both where there is a template"""
    end_token: bool | None = None
    """whether the token that ends the model's turn is put behind every answer"""
    threads: AtLeast1 = 1
    """threads of torch"""


@dataclass(frozen=True, slots=True)
class Fact:
    """How one fact was written.

    Args:
        seconds: How long it took.
        steps: Primitive steps; 0 where nothing was written.
        problem: Why it was broken off, None if it was not.
    """

    seconds: float
    steps: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """What a model gave after some edits.

    Args:
        edits: Number of facts written.
        written: The facts written since the last check.
        asked: The facts asked, by place in the stream.
        shares: Metric, in chat with ``chat_`` in front, → share per fact asked, None where the fact
            has no such prompts. ``controls`` has one share per control prompt, ``texts`` one per
            text.
    """

    edits: int
    written: list[Fact]
    asked: list[int]
    shares: dict[str, list[float | None]]


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
        patterns = None if find is None else find(given.model)
        candidates = find_candidates(loaded.model, patterns, known_as(given.model))
        end = end_id(loaded.tokenizer, given.model, given.end_token)
        self.model: PreTrainedModel = loaded.model
        self.llm = ResidentLLM(loaded.model, loaded.tokenizer, candidates, end_id=end)
        levels = make_levels(how, made, self.llm, given.model)
        self._writer = FactWriter(self.llm, levels)
        self.explained = levels.explained
        chat = has_template(loaded.tokenizer)
        form: PromptForm = given.prompt_form or ("both" if chat else "plain")
        self._forms: tuple[AskedForm, ...] = ("plain", "chat") if chat else ("plain",)
        self._facts = [as_asked(self.llm, request, form) for request in self.requests]
        self._groups = questions_about(self.llm, self.requests, self._forms).groups
        self._unrelated = given.unrelated
        asked = sorted({i for edits in checks for i in _places(edits, given.ask)})
        with for_editing(self.model):
            self._texts = _OwnTexts(self.llm, given.texts)
            self._controls = Controls(self.llm).references
            flat = [p for form in self._forms for i in asked for p in self._kept(form, i)]
            own = self.llm.continuations(flat, [REFERENCE_TOKENS] * len(flat))
        #: What the unedited model says to the unrelated prompts.
        self._said = {
            p: replace(p, answer=self.llm.encoder.decode(ids), answer_ids=tuple(ids))
            for p, ids in zip(flat, own, strict=True)
        }

    def _kept(self, form: AskedForm, place: int) -> tuple[EncodedPrompt, ...]:
        """Unrelated prompts beside a fact."""
        return self._groups[metric_in(form, "specificity")].facts[place][: self._unrelated]

    def write(self, first: int, last: int, together: int) -> list[Fact]:
        """Writes the facts from one place of the stream to another.

        A fact that is broken off leaves the model as it was.
        """
        found: list[Fact] = []
        while first + len(found) < last:
            place = first + len(found)
            group = different(self._facts[place : min(place + together, last)])
            state, started = self._writer.save(), time.perf_counter()
            with for_editing(self.model), warnings.catch_warnings():
                warnings.simplefilter("ignore", HieditWarning)
                prompts = [prompt for fact in group for prompt in fact.prompts]
                written = self._writer.write(prompts, place / len(self.requests))
                if written.problem is not None:
                    self._writer.restore(state)
            seconds = (time.perf_counter() - started) / len(group)
            steps = written.steps if written.layers else 0
            found += [Fact(round(seconds, 3), steps, written.problem)] * len(group)
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
                    shares[name] = self._given([self._groups[name].facts[i] for i in places])
                kept = [[self._said[p] for p in self._kept(form, i)] for i in places]
                shares[metric_in(form, "specificity")] = self._left(kept)
            shares["controls"] = self._left([[prompt] for prompt in self._controls])
            shares["texts"] = self._texts.left()
        return places, shares

    def _given(self, groups: Sequence[Sequence[EncodedPrompt]]) -> list[float | None]:
        """Per group the share of its prompts whose answer is generated, and nothing else."""
        flat = [prompt for group in groups for prompt in group]
        texts = self.llm.generate(flat, [len(p.answer_ids) + EXTRA_TOKENS for p in flat])
        right = (float(is_match(t, p.answer)) for t, p in zip(texts, flat, strict=True))
        return [_mean(list(itertools.islice(right, len(group)))) for group in groups]

    def _left(self, groups: Sequence[Sequence[EncodedPrompt]]) -> list[float | None]:
        """Per group the mean share of answer tokens that are the argmax."""
        flat = [prompt for group in groups for prompt in group]
        right = (float(part.float().mean()) for part in right_tokens(self.llm, flat))
        return [_mean(list(itertools.islice(right, len(group)))) for group in groups]


class _OwnTexts:
    """Texts that the unedited model has written itself, and its most probable next tokens in them.

    Args:
        llm: The model, at its unedited weights.
        number: Of the texts.
    """

    def __init__(self, llm: ResidentLLM, number: int) -> None:
        self._llm = llm
        begin = beginnings(llm.encoder, number)
        length = min(TEXT_TOKENS, llm.encoder.max_length or TEXT_TOKENS)
        # What low levels are shown in training has other seeds.
        cached = not llm.generates_whole
        texts = sampled_texts(llm.model, begin, length, _TEXT_SEED, use_cache=cached)
        self._ids = [[*text.prompt_ids, *text.answer_ids] for text in texts]
        self._own = self._most_probable()

    def left(self) -> list[float | None]:
        """Per text the share of tokens that are the most probable ones as before."""
        pairs = zip(self._most_probable(), self._own, strict=True)
        return [float((now == own).float().mean()) for now, own in pairs]

    @torch.inference_mode()
    def _most_probable(self) -> list[Tensor]:
        model = self._llm.model
        rows = [torch.tensor([ids], device=model.device) for ids in self._ids]
        return [model(input_ids=row).logits[0].argmax(-1) for row in rows]


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
    checks = sorted({*given.check_at, given.edits})
    if checks[0] < 1 or checks[-1] > given.edits:
        raise SettingsError(f"check_at must be from 1 to --edits {given.edits}, got {checks}")
    if len(checks) > 1:
        require_libraries("plots", "matplotlib")
    torch.set_num_threads(given.threads)
    with new_file(given.out / "results.jsonl") as file:
        facts = Stream(given, checks)
        made_by = {
            **{n: value for n, value in asdict(given).items() if n not in ("out", "facts")},
            "data": [Path(name).name for name in given.facts],
            "stream": fingerprint(facts.requests),
            "agent_is": facts.explained,
            "versions": versions(),
        }
        found: list[dict[str, Any]] = []
        for first, last in itertools.pairwise([0, *checks]):
            written = facts.write(first, last, given.together)
            found.append(asdict(Check(last, written, *facts.ask(last, given.ask))))
            print(json.dumps({**found[-1], "made_by": made_by}), file=file, flush=True)
            print(report(found[-1:]), flush=True)
    write_bytes(given.out / "results.md", report(found).encode())
    if len(found) > 1:
        write_bytes(given.out / "results.png", draw(found))
    return 0


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A file in a folder of its own; one that nothing was written to is removed at the end.

    Raises:
        ResultsExistError: it is there.
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise ResultsExistError(f"{path} exists; give another --out") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    try:
        with file:
            yield file
    finally:
        if not path.stat().st_size:
            path.unlink()
            with suppress(OSError):  # there is something else in it
                path.parent.rmdir()


if __name__ == "__main__":
    sys.exit(run_script(main))
