"""Records what every choice of a block brings, fact by fact, on a real model.

For each fact and each of some blocks, one edit from the unedited model: the low level ``neuron``
writes the fact into the MLP of that block, as ``hiedit edit`` would. Recorded are the fact and its
paraphrases, generated and as probabilities, in plain and in chat form; agreement with the unedited
model's own answers about other subjects; and what could be seen of fact and blocks before a choice.
Facts to learn from and to evaluate on alternate, so that an unfinished file can be reported::

    python -m hiedit_benchmarks.studies.record_blocks --train FACTS --evaluate OTHERS --out DIR

Begun again with the same settings it goes on where it was. ``--part 1 --parts 2`` records every
second pair of facts, into a file of its own. :mod:`.block_regret` makes the tables.
"""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import as_asked
from hiedit_agents.editing.controls import end_id, has_template
from hiedit_agents.editing.levels import Levels
from hiedit_agents.editing.writer import FactWriter
from hiedit_agents.hierarchy.calibration import calibration_prompts
from hiedit_agents.hierarchy.neuron import Neuron
from hiedit_agents.hierarchy.options import Choice
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.studies.block_measure import FactQuestions, Observer
from hiedit_benchmarks.studies.block_records import FactRecord, RecordFile, Role, Tried
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import fingerprint, stream, without
from hiedit_env.envs.settings import AtLeast0, AtLeast1, settings
from hiedit_env.errors import HieditWarning, SettingsError
from hiedit_env.evaluation.names import AskedForm
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.loading import load_model
from hiedit_env.resident.resident import ResidentLLM

PROGRAM = "python -m hiedit_benchmarks.studies.record_blocks"


@settings
class Options:
    """What is recorded."""

    out: Path
    """folder of the records, part-0.jsonl and so on, and of what the low level was shown"""
    train: str
    """facts to learn from: a file or the name of a built-in data set"""
    evaluate: str
    """facts to evaluate on; nothing that they ask is in the others"""
    model: str = "smollm2-135m"
    """name or folder of the model"""
    blocks: tuple[int, ...] = (7, 10, 13, 16, 19)
    """blocks whose MLPs are the options"""
    matrices: str = "mlp.*_proj"
    """the matrices of an MLP within a block"""
    facts: AtLeast1 = 100
    """largest number of facts of each kind"""
    paraphrases: AtLeast0 = 2
    """facts with fewer paraphrases are left out: one half chooses, the other half scores"""
    neighbours: AtLeast0 = 2
    """unrelated prompts that are asked beside each fact; facts with fewer are left out"""
    max_steps: AtLeast1 = 3
    """largest number of primitive steps of an option"""
    calibration: str = "world-facts-train"
    """facts whose prompts the low level is shown before"""
    calibration_prompts: AtLeast1 = 2000
    """largest number of them"""
    controls: AtLeast1 = 200
    """prompts of other training facts, at which nothing should fire"""
    control_facts: str | None = None
    """facts whose prompts these are instead: a file or the name of a built-in data set"""
    seed: AtLeast0 = 0
    """of which facts, in which order"""
    part: AtLeast0 = 0
    """which part of the facts this process records"""
    parts: AtLeast1 = 1
    """number of parts"""
    threads: AtLeast1 = 1
    """threads of torch"""


class OneBlock:
    """A high level that takes the layers it was given."""

    name = "one-block"
    looks = False

    def __init__(self, count: int) -> None:
        self.layers = np.zeros(count, bool)

    def reset(self, seed: int) -> None:
        """Nothing here is random."""

    def choose(
        self, observation: Any, capture: Any, generator: torch.Generator | None = None
    ) -> Choice:
        """The layers it was given."""
        return Choice(self.layers)


class Drawn:
    """The facts of a study.

    Args:
        given: Which.

    Raises:
        DatasetError: data that cannot be read.
        SettingsError: no facts are left.
    """

    def __init__(self, given: Options) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HieditWarning)
            train, evaluate, calibrate = map(
                load_requests, (given.train, given.evaluate, given.calibration)
            )
            apart = [] if given.control_facts is None else load_requests(given.control_facts)
        rng = np.random.default_rng([given.seed, 19])

        def enough(requests: Sequence[Request]) -> list[Request]:
            """Those with prompts for both halves."""
            return [
                replace(r, locality=r.locality[: given.neighbours])
                for r in requests
                if len(r.paraphrases) >= given.paraphrases and len(r.locality) >= given.neighbours
            ]

        self.evaluate = _drawn(enough(evaluate), rng)[: given.facts]
        others = _drawn(without(train, self.evaluate), rng)
        # One prompt of each.
        if given.control_facts is None:
            self.controls = others[: given.controls]
            self.train = enough(without(others[given.controls :], self.controls))[: given.facts]
        else:
            self.train = enough(others)[: given.facts]
            others = _drawn(without(apart, [*self.train, *self.evaluate]), rng)
            self.controls = others[: given.controls]
        for name, data, found in (
            ("evaluate", given.evaluate, self.evaluate),
            ("train", given.train, self.train),
        ):
            if not found:
                raise SettingsError(
                    f"{data} has no facts to {name} on with {given.paraphrases} paraphrases and "
                    f"{given.neighbours} unrelated prompts (beside {given.controls} facts as "
                    "controls, and nothing that is asked twice); ask for fewer"
                )
        if not self.controls:
            raise SettingsError(
                f"{given.control_facts or given.train} has no facts left as controls beside those "
                "to train and to evaluate on; give others by --control-facts, or ask for fewer"
            )
        asked = [*self.train, *self.evaluate, *self.controls]
        self.calibration = without(calibrate, asked)

    def pairs(self, part: int, parts: int) -> Iterator[tuple[Role, Request]]:
        """Facts of both kinds in turn: those of every pair of a part."""
        for i in range(part, max(len(self.train), len(self.evaluate)), parts):
            if i < len(self.train):
                yield "train", self.train[i]
            if i < len(self.evaluate):
                yield "evaluate", self.evaluate[i]


def _drawn(requests: Sequence[Request], rng: np.random.Generator) -> list[Request]:
    """Different facts in random order; none of none."""
    return stream(requests, None, rng) if requests else []


class BlockRecorder:
    """Tries every block on one fact after another, from the unedited model.

    Args:
        given: The settings.
        drawn: The facts.

    Raises:
        ModelError, LayerError: the model cannot be edited, or has no such blocks.
        SettingsError: a block whose MLP is no ordinary one.
    """

    def __init__(self, given: Options, drawn: Drawn) -> None:
        loaded = load_model(given.model, progress=False)
        patterns = [f"*.{block}.{given.matrices}" for block in given.blocks]
        candidates = find_candidates(loaded.model, patterns, given.model)
        end = end_id(loaded.tokenizer, given.model, None)
        self.llm = ResidentLLM(loaded.model, loaded.tokenizer, candidates, end_id=end)
        self.low = Neuron(self.llm)
        self.blocks = tuple(mlp.block for mlp in self.low.mlps)
        if self.blocks != tuple(sorted(given.blocks)):
            raise SettingsError(
                f"blocks must be different ones with ordinary MLPs, got {given.blocks}; usable "
                f"among them are {self.blocks}"
            )
        chat = has_template(loaded.tokenizer)
        self.forms: tuple[AskedForm, ...] = ("plain", "chat") if chat else ("plain",)
        self._calibrate(given, drawn)
        self._high = OneBlock(len(self.llm.layers))
        levels = Levels("one-block", "", self._high, self.low, given.max_steps, {})
        self._writer = FactWriter(self.llm, levels)
        self._unedited = UneditedModel(self.llm)
        controls = [self.llm.encode(r.prompt, r.answer) for r in drawn.controls]
        self._observer = Observer(self.llm, self.low, controls)
        self._fingerprint = self.llm.weights_fingerprint()

    def _calibrate(self, given: Options, drawn: Drawn) -> None:
        """Shows the low level what it has to see, or takes what another process has found."""
        shown = (
            fingerprint(drawn.calibration),
            self.llm.weights_fingerprint(),
            self.blocks,
            given.calibration_prompts,
            given.seed,
        )
        digest = hashlib.blake2b(repr(shown).encode(), digest_size=8).hexdigest()
        file = given.out / f"calibration-{digest}.safetensors"
        if file.exists():
            self.low.load_state_dict(load_file(file))
            return
        prompts = calibration_prompts(
            drawn.calibration, self.llm.encoder, given.calibration_prompts, given.seed, every=True
        )
        self.low.calibrate_on(prompts)
        part = file.with_suffix(f".{given.part}")
        save_file({n: t.contiguous() for n, t in self.low.state_dict().items()}, part)
        part.replace(file)

    def record(self, role: Role, request: Request) -> FactRecord:
        """One fact with all its options; the model is unedited again at the end.

        Args:
            role: What the fact is there for.
            request: The fact.

        Raises:
            PromptError: a text that cannot be tokenised; names the request's source.
        """
        form: PromptForm = "both" if len(self.forms) > 1 else "plain"
        prompts = as_asked(self.llm, request, form).prompts
        questions = FactQuestions(self.llm, self._unedited, request, self.forms)
        before = questions.measure()
        sight = self._observer.look(request, prompts)
        state, tried = self._writer.save(), []
        for mlp, fires in zip(self.low.mlps, sight.fires, strict=True):
            self._high.layers = self._observer.mask_of(mlp)
            started = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", HieditWarning)
                    written = self._writer.write(prompts)
                seconds = time.perf_counter() - started
                measured = questions.measure() if written.layers else before
            finally:
                self._writer.restore(state)
            steps = written.steps if written.layers else 0
            tried.append(Tried(measured, steps, round(fires, 5), round(seconds, 2)))
        if self.llm.weights_fingerprint() != self._fingerprint:
            raise SettingsError("the model is not unedited any more; nothing was recorded")
        return FactRecord(
            role,
            request.prompt,
            request.answer,
            request.subject,
            request.relation or "",
            sight.fact,
            sight.options,
            before,
            tried,
        )


def settings_of(given: Options, drawn: Drawn, recorder: BlockRecorder) -> dict[str, Any]:
    """What all records of a study have in common."""
    facts = {
        "train": drawn.train,
        "evaluate": drawn.evaluate,
        "control": drawn.controls,
        "calibration": drawn.calibration,
    }
    own = {"out", "part", "parts", "threads", "train", "evaluate", "control_facts", "calibration"}
    return {
        **{name: value for name, value in asdict(given).items() if name not in own},
        **{f"{name}_facts": fingerprint(requests) for name, requests in facts.items()},
        "train_name": Path(given.train).name,
        "evaluate_name": Path(given.evaluate).name,
        "blocks": recorder.blocks,
        "forms": recorder.forms,
        "weights": recorder.llm.weights_fingerprint(),
        "search_dtype": str(recorder.low.search_dtype),
        "versions": {n: v for n, v in versions().items() if n != "threads"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Records what is not recorded yet; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    if given.part >= given.parts:
        raise SettingsError(f"part must be below --parts {given.parts}, got {given.part}")
    torch.set_num_threads(given.threads)
    drawn = Drawn(given)
    given.out.mkdir(parents=True, exist_ok=True)
    recorder = BlockRecorder(given, drawn)
    file = RecordFile(given.out / f"part-{given.part}.jsonl", settings_of(given, drawn, recorder))
    try:
        known = {record.key for record in file.records}
        for role, request in drawn.pairs(given.part, given.parts):
            if (request.prompt, request.answer) in known:
                continue
            started = time.perf_counter()
            file.append(recorder.record(role, request))
            shown = time.perf_counter() - started
            say(f"{len(file.records)} facts, {shown:.0f} s for {request.prompt!r}")
    finally:
        file.close()
    return 0


def say(text: str) -> None:
    """Progress, to standard error."""
    print(f"hiedit: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
