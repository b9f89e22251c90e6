"""Saves what an editor has made: a model folder, a LoRA adapter, or the edited matrices alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hiedit_agents.editing.adapter import (
    AdapterReport,
    change_of,
    sizes,
    write_adapter,
)
from hiedit_agents.editing.checks import AskedFact
from hiedit_agents.editing.delta import write_delta
from hiedit_agents.editing.found import FoundWeights
from hiedit_agents.editing.low_rank_sum import sum_of
from hiedit_agents.editing.model_card import CARD, Measured, is_card, model_card
from hiedit_agents.editing.out_folder import OutFolder
from hiedit_agents.editing.session import Session
from hiedit_env.errors import LedgerError, SettingsError, whole_number
from hiedit_env.files import write_bytes
from hiedit_env.model.folders import StoredTensor
from hiedit_env.model.saving import EditedMatrix, check_source, locate, save_edited
from hiedit_env.resident.resident import ResidentLLM

#: Facts that are asked when something is saved, evenly spaced.
ASKED = 200
_BASE_CARD = "README.base.md"


@dataclass(frozen=True, slots=True)
class Saved:
    """A model folder that was written.

    Args:
        out: The folder.
        measured: What the model was measured to do.
        left_out: Files of the unedited model's folder that were not copied, since they hold the
            unedited weights in other formats.
    """

    out: Path
    measured: Measured
    left_out: tuple[str, ...] = ()


def save_model(session: Session, out: Path, source: Path | None) -> Saved:
    """Writes the edited model as a Hugging Face folder with its ledger and a model card.

    Args:
        session: The edited model.
        out: A folder that does not exist or is empty.
        source: The folder that the model was read from, which is copied with other bytes in the
            edited matrices alone; None to write the model as transformers writes it.

    Raises:
        ResultsExistError: ``out`` is not empty.
        ModelError: the source cannot be copied.
        SettingsError: it cannot be written; nothing is left.
    """
    place = OutFolder(out)
    if source is not None:
        check_source(source, out)
    measured = measure(session)
    use = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({out.name!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({out.name!r})"
    )
    card = model_card(session.ledger, measured, "model", use, _HOW_TO_UNDO)
    matrices = []
    if source is not None:
        places = locate_layers(session.llm, session.found, source)
        matrices = edited_matrices(session.llm, session.found, places)

    def write(folder: Path) -> list[str]:
        left_out: list[str] = []
        if source is None:
            folder.mkdir()
            cast(Any, session.llm.model).save_pretrained(folder)
            session.llm.tokenizer.save_pretrained(folder)
        else:
            left_out = save_edited(source, folder, matrices)
        if (folder / CARD).exists() and not is_card(folder / CARD):
            os.replace(folder / CARD, folder / _BASE_CARD)
        write_bytes(folder / CARD, card.encode())
        session.ledger.copy_to(folder)
        return left_out

    return Saved(out, measured, tuple(place.fill(write)))


_HOW_TO_UNDO = (
    "`hiedit log DIR` lists the edits of this folder, `hiedit revoke DIR ID` takes one back and "
    "`hiedit rewind DIR 0` all of them."
)


def save_adapter(
    session: Session, out: Path, max_rank: int | None, allow_loss: bool
) -> AdapterReport:
    """Writes the edits as a LoRA adapter, see :mod:`.adapter`.

    Args:
        session: The edited model.
        out: A folder that does not exist or is empty.
        max_rank: Largest rank; None for as much as it takes.
        allow_loss: Whether it may give fewer facts than the edited model does.

    Raises:
        ResultsExistError: ``out`` is not empty.
        LedgerError: no edit is in place.
        SettingsError: a rank below 1, or one that cannot hold the edits; nothing was written.
    """
    if max_rank is not None:
        whole_number(max_rank, "max_rank", 1)
    place = OutFolder(out)
    ledger = session.ledger
    sums = sum_of(ledger, ledger.active, max_rank)
    if not sums:
        raise LedgerError("no edit is in place, so there is nothing to save as an adapter")
    rank, needed, error = sizes(sums)
    facts = some(session.facts, ASKED)
    examiner, llm = session.examiner, session.llm
    agreement, given = examiner.controls.agreement(), given_of(session, facts)
    before = llm.snapshot()
    llm.restore(change_of(sums, [layer.is_transposed for layer in llm.layers]))
    try:
        own_agreement, own = examiner.controls.agreement(), given_of(session, facts)
    finally:
        llm.restore(before)
    report = AdapterReport(
        rank, needed, error, len(facts), sum(given), sum(own), agreement, own_agreement
    )
    lost = sum(one and not two for one, two in zip(given, own, strict=True))
    if lost and not report.is_exact and not allow_loss:
        raise SettingsError(
            f"an adapter of rank {rank} cannot hold the edits: {lost} of the {sum(given)} facts "
            f"that the edited model gives are lost (relative error of the weights {error:.2g}); "
            f"give a larger max_rank (exact: {needed}), or allow the loss"
        )
    use = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("BASE")  # the unedited model\n'
        f"model = PeftModel.from_pretrained(base, {out.name!r})"
    )
    measured = Measured(len(ledger.active), len(facts), sum(own), own_agreement)
    card = model_card(ledger, measured, "adapter", use, f"Adapter of {report.text}.")
    place.fill(lambda folder: write_adapter(folder, ledger, sums, report, card))
    return report


def save_delta(session: Session, path: Path) -> None:
    """Writes the edited matrices alone, see :mod:`.delta`.

    Raises:
        OutputError: it cannot be written.
    """
    llm = session.llm
    write_delta(path, session.ledger.base, _edited(llm), llm.weights_fingerprint())


def measure(session: Session, count: int = ASKED) -> Measured:
    """Asks the model for the facts in place, so many at most, and for the control prompts."""
    facts = some(session.facts, whole_number(count, "facts", 1))
    return Measured(
        len(session.ledger.active),
        len(facts),
        sum(given_of(session, facts)),
        session.examiner.controls.agreement(),
    )


def given_of(session: Session, facts: Sequence[AskedFact]) -> list[bool]:
    """Whether the model gives each fact, in every form it was edited in."""
    return [
        fact.is_given(said)
        for fact, said in zip(facts, session.examiner.say_all(facts), strict=True)
    ]


def some(facts: Sequence[AskedFact], count: int) -> list[AskedFact]:
    """At most so many, evenly spaced."""
    if len(facts) <= count:
        return list(facts)
    return [facts[i * len(facts) // count] for i in range(count)]


def edited_matrices(
    llm: ResidentLLM, found: FoundWeights, places: Mapping[str, tuple[StoredTensor, ...]]
) -> list[EditedMatrix]:
    """The matrices that differ from those that the model was found with.

    Args:
        llm: The edited model.
        found: Its weights as it was loaded.
        places: Where each of them is stored, by parameter.
    """
    old, new = found.weights(llm), _weights(llm)
    return [
        EditedMatrix(name, old[name], new[name], places[name])
        for name in old
        if not torch.equal(old[name], new[name])
    ]


def locate_layers(
    llm: ResidentLLM, found: FoundWeights, source: Path
) -> dict[str, tuple[StoredTensor, ...]]:
    """Where the candidate weights of a model are stored in the folder it was loaded from.

    Raises:
        ModelError: in another layout, or not at all.
    """
    return locate(found.weights(llm), source)


def _weights(llm: ResidentLLM) -> dict[str, Tensor]:
    return {
        f"{name}.weight": cast(Tensor, llm.model.get_submodule(name).weight).detach()
        for name in llm.names
    }


def _edited(llm: ResidentLLM) -> dict[str, Tensor]:
    """Layer name → edited weight, of the layers that differ from the unedited ones."""
    with llm.unedited():
        old = {name: weight.clone() for name, weight in _weights(llm).items()}
    found = _weights(llm).items()
    return {name[: -len(".weight")]: new for name, new in found if not torch.equal(old[name], new)}
