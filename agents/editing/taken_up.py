"""A saved model that is edited again: its ledger goes on, and its unedited weights are found again.

The model is loaded with its edits in the weights. Its ledger says which unedited matrices and which
recorded updates they are made of, so the weights are taken apart into the two; together they have
the bits that were loaded. So every earlier edit can still be taken back.

Files of half precision hold that sum rounded. Where its rounding has the bits that were loaded, the
model gets the sum itself again, as it was when the last edit was made, and the history goes on
exactly; what was loaded is kept to be put back.
"""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hiedit_agents.editing.found import FoundWeights, Opened
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE, Base, require_finished
from hiedit_agents.editing.session import base_of_model
from hiedit_agents.editing.stored import base_folder, editable, places
from hiedit_agents.editing.undo import replay
from hiedit_env.errors import HieditWarning, LedgerError
from hiedit_env.model.folders import DTYPES
from hiedit_env.resident.resident import ResidentLLM


def open_ledger(llm: ResidentLLM, name: str, folder: str | PathLike[str] | None) -> Opened:
    """The ledger of an editor; of a saved model that is edited again it begins with that beside it.

    Args:
        llm: The model as it was loaded; its weights keep their values, up to the rounding of files
            of half precision.
        name: The name it was loaded by.
        folder: Where the ledger is kept; None for memory.

    Raises:
        LedgerError: it belongs to another model, lacks edits that the model has, or is damaged; the
            model is as it was.
        OutputError: it cannot be written; the model is as it was.
    """
    own = Path(str(llm.model.name_or_path or ""))
    place = None if folder is None else Path(folder)
    if place is not None and (own / FILE).exists() and place.resolve() == own.resolve():
        raise LedgerError(f"{folder} holds the ledger of the saved model itself; give another one")
    base = base_of_model(llm, name)
    taken = take_up(own, base, llm)
    if taken is None:
        new = Ledger.in_memory(base) if place is None else Ledger.open_or_create(place, base)
        return Opened(new, FoundWeights(llm.snapshot()))
    if place is None:
        return taken
    with taken.ledger:
        try:
            ledger = Ledger.open_or_create(place, taken.ledger.base, taken.ledger)
        except BaseException:
            taken.found.put_back(llm)
            raise
    return Opened(ledger, taken.found)


def take_up(folder: Path, own: Base, llm: ResidentLLM) -> Opened | None:
    """The ledger in a model's folder, in memory, with the model's weights taken apart.

    Args:
        folder: Where the model was loaded from.
        own: What a new ledger would say of the model as it was loaded.
        llm: The model; its weights keep their values, up to the rounding of files of half
            precision.

    Returns:
        None where there is no ledger; also where it cannot go on (other candidate layers, another
        dtype, weights that are not those of the ledger, or an unedited model that is not on this
        machine), which a warning says.

    Raises:
        LedgerError: the ledger is damaged, or an undo in the folder was interrupted.
    """
    if not (folder / FILE).is_file():
        return None
    require_finished(folder)
    with Ledger.open(folder) as found:
        ledger = found.copy_in_memory()
    try:
        found_weights = _take_apart(ledger, folder, own, llm)
    except LedgerError as error:
        ledger.close()
        warnings.warn(
            f"the ledger in {folder} does not go on, a new one begins with the model as it is: "
            f"{error}",
            HieditWarning,
            stacklevel=4,
        )
        return None
    return Opened(ledger, found_weights)


def _take_apart(ledger: Ledger, folder: Path, own: Base, llm: ResidentLLM) -> FoundWeights:
    """Makes the unedited weights those of the ledger's base, and the rest its edits.

    Returns:
        The model's weights as they were loaded.

    Raises:
        LedgerError: they are not; the model is as it was.
    """
    base = ledger.base
    if own.layers != base.layers:
        raise LedgerError("it is of other candidate layers")
    if own.dtype != base.dtype:
        raise LedgerError(f"it is of a model in {base.dtype}, this one is in {own.dtype}")
    base.refuse_other_weights(own.others)
    stored = places(base_folder(base, folder), base.layers)
    weights = editable(base.layers, stored, getattr(torch, base.dtype), llm.device)
    if weights.weights_fingerprint() != base.fingerprint:
        raise LedgerError("the unedited model on this machine is another one")
    unedited = [cast(Tensor, layer.module.weight).detach().clone() for layer in weights.layers]
    replay(weights, ledger, ledger.active)
    loaded: dict[int, Tensor] = {}
    for i, place in enumerate(stored):
        found, exact = llm.present_weight(i).detach(), weights.present_weight(i)
        if torch.equal(found, exact):
            continue
        # Files of half precision hold the sum rounded, and rounding it again gives their bits.
        if not torch.equal(found, exact.to(DTYPES[place.dtype]).to(exact.dtype)):
            raise LedgerError(
                f"the weights in the folder are not those of its ledger to the last bit (edited in "
                f"{base.dtype}, saved as {place.dtype})"
            )
        loaded[i] = found
    edits = weights.snapshot()
    llm.rebase(unedited)
    llm.restore(edits)
    return FoundWeights(edits, loaded)
