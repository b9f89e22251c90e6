"""How many edits survive rounding to 8 and 4 bits, as a GGUF file of that type holds the weights.

Facts are written, then every matrix is rounded as :func:`~hiedit_agents.write_gguf` rounds it, and
the model is asked for each fact again, with the greedy continuation. Agreement is measured with the
unrounded, unedited model; that of the rounded model without edits shows what rounding alone costs.
Prints JSON::

    python -m hiedit_benchmarks.studies.quantised --model smollm2-135m --edits 50
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hiedit_agents.command_line import parse, run_script
from hiedit_agents.editing.checks import Checks
from hiedit_agents.editing.editor import Editor
from hiedit_agents.editing.export import given_of
from hiedit_agents.editing.gguf_file import TYPES, GgufType, rounded
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.model.relatives import belongings

PROGRAM = "python -m hiedit_benchmarks.studies.quantised"


@settings
class Options:
    """What is written and rounded."""

    model: str = "tiny"
    """the model that is edited"""
    facts: str | None = None
    """file of facts; by default the model's own"""
    edits: AtLeast1 = 20
    """facts that are written"""
    agent: str | None = None
    """who edits; by default hiedit if a trained one fits the model, else all-layers"""
    ledger: Path | None = None
    """folder of the ledger; the facts in place there are not written again"""


@dataclass(frozen=True, slots=True)
class Row:
    """One type of file.

    Args:
        type: See :data:`~hiedit_agents.editing.gguf_file.TYPES`.
        given: Number of facts whose answer the rounded model begins with, in every form edited.
        agreement: With the unedited, unrounded model on control prompts, 0 to 1.
        agreement_unedited: The same of the rounded model without edits.
    """

    type: str
    given: int
    agreement: float | None
    agreement_unedited: float | None


@contextmanager
def rounded_model(model: PreTrainedModel, type: GgufType) -> Iterator[None]:
    """Runs the body with all weights rounded; puts them back bit for bit."""
    kept = {name: weight.data for name, weight in model.named_parameters()}
    try:
        for name, weight in model.named_parameters():
            weight.data = rounded(name, kept[name], type)
        yield
    finally:
        for name, weight in model.named_parameters():
            weight.data = kept[name]


def measure(given: Options) -> dict[str, object]:
    """Writes the facts and asks for them, type by type."""
    requests = load_requests(given.facts or belongings(given.model).dataset)[: given.edits]
    checks = Checks(target=False, min_agreement=None, earlier=0)
    with Editor.from_pretrained(
        given.model, agent=given.agent, checks=checks, ledger=given.ledger
    ) as editor:
        editor.edit(requests)
        session, llm, model = editor._session, editor.llm, editor.model
        facts, controls = session.facts, session.examiner.controls
        # Answers of the unrounded model, before anything is rounded.
        assert controls.references is not None
        rows = []
        for type in TYPES:
            with rounded_model(model, type), torch.inference_mode():
                # What was remembered of the blocks below is of other weights.
                llm.cache.clear()
                found = sum(given_of(session, facts))
                edited = controls.agreement()
            with llm.unedited(), rounded_model(model, type), torch.inference_mode():
                llm.cache.clear()
                rows.append(asdict(Row(type, found, edited, controls.agreement())))
        llm.cache.clear()
        agent = editor.agent
    return {"model": given.model, "agent": agent, "facts": len(facts), "types": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement and prints it as JSON; returns 0."""
    print(json.dumps(measure(parse(Options, arguments, program=PROGRAM)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
