"""Saves what an editor has made: a model folder, a LoRA adapter, or the edited matrices alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from hiedit_agents.editing.adapter import (
    AdapterReport,
    change_of,
    sizes,
    write_adapter,
)
from hiedit_agents.editing.checks import AskedFact
from hiedit_agents.editing.delta import write_delta
from hiedit_agents.editing.low_rank_sum import sum_of
from hiedit_agents.editing.model_card import Measured, model_card
from hiedit_agents.editing.out_folder import OutFolder
from hiedit_agents.editing.session import Session
from hiedit_env.errors import LedgerError, SettingsError, whole_number
from hiedit_env.files import write_bytes
from hiedit_env.model.saving import EditedMatrix, check_source, locate, save_edited

#: Facts that are asked when something is saved, evenly spaced.
ASKED = 200
_CARD, _BASE_CARD = "README.md", "README.base.md"


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
    matrices = [] if source is None else _matrices(session, source)

    def write(folder: Path) -> list[str]:
        left_out: list[str] = []
        if source is None:
            folder.mkdir()
            cast(Any, session.llm.model).save_pretrained(folder)
            session.llm.tokenizer.save_pretrained(folder)
        else:
            left_out = save_edited(source, folder, matrices)
        if (folder / _CARD).exists() and not (folder / _BASE_CARD).exists():
            os.replace(folder / _CARD, folder / _BASE_CARD)
        write_bytes(folder / _CARD, card.encode())
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
    edited = {name: new for name, (_, new) in _edited(session).items()}
    write_delta(path, session.ledger.base, edited, session.llm.weights_fingerprint())


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


def _edited(session: Session) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Layer name → unedited and edited weight, of the layers that differ."""
    llm = session.llm
    with llm.unedited():
        old = {name: _weight(session, name).detach().clone() for name in llm.names}
    found = {name: (old[name], _weight(session, name).detach()) for name in llm.names}
    return {name: pair for name, pair in found.items() if not bool((pair[0] == pair[1]).all())}


def _weight(session: Session, name: str) -> Tensor:
    return cast(Tensor, session.llm.model.get_submodule(name).weight)


def _matrices(session: Session, source: Path) -> list[EditedMatrix]:
    edited = _edited(session)
    places = locate({f"{name}.weight": old for name, (old, _) in edited.items()}, source)
    return [
        EditedMatrix(f"{name}.weight", old, new, places[f"{name}.weight"])
        for name, (old, new) in edited.items()
    ]
