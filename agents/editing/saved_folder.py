"""Taking edits back in a saved model folder, without loading the model.

Only the candidate matrices are read: the unedited ones from the base model's folder, the recorded
updates from the ledger. The event is appended to the ledger first, then each weight file is written
anew beside its place and put there whole. A process that is killed in between leaves a ledger that
is ahead of the weights and a marker file; the next command finishes what it had begun.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import MARKER, Kind
from hiedit_agents.editing.model_card import CARD, is_card, model_card
from hiedit_agents.editing.session import now
from hiedit_agents.editing.stored import base_folder, editable, places
from hiedit_agents.editing.undo import replay
from hiedit_env.errors import LedgerError, OutputError
from hiedit_env.files import write_bytes
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.folders import DTYPES, StoredTensor, weight_files
from hiedit_env.model.saving import EditedMatrix


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to a folder.

    Args:
        event: Id of the event in the ledger.
        active: Ids of the edits in place now.
        files: Names of the weight files that were written.
        is_exact: Whether the weights have the fingerprint that the ledger recorded for this state;
            None where it recorded none (after a revoke) or in another dtype.
    """

    event: int
    active: tuple[int, ...]
    files: tuple[str, ...]
    is_exact: bool | None


class SavedFolder:
    """A model folder that ``Editor.save`` has written, open for changes.

    Args:
        folder: The model folder.
        base: Folder of the unedited model; None to look where the ledger says.

    Raises:
        LedgerError: no ledger, no unedited model on this machine, another one than the ledger's, or
            weights that are not those of the ledger. Nothing has changed.
    """

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        self.folder = folder
        self.ledger = Ledger.open(folder, write=True)
        if not weight_files(folder):
            self.ledger.close()
            raise LedgerError(
                f"{folder} holds a ledger and no model to change; take the edit back in Python, "
                f"Editor.from_pretrained({self.ledger.base.model!r}, ledger={str(folder)!r})"
                ".undo(ID), or through 'hiedit serve --ledger'"
            )
        try:
            self._source = base_folder(self.ledger.base, folder) if base is None else base
            self._layers = self.ledger.base.layers
            self._dtype: torch.dtype = getattr(torch, self.ledger.base.dtype)
            self._base_places = places(self._source, self._layers)
            self._places_here = places(folder, self._layers)
            self._weights = editable(self._layers, self._base_places, self._dtype)
            found = self._weights.weights_fingerprint()
            if found != self.ledger.base.fingerprint:
                raise LedgerError(
                    f"the model in {self._source} is not the one that the ledger in {folder} "
                    f"belongs to (fingerprint {found}, not {self.ledger.base.fingerprint}); give "
                    "the folder of the unedited model with --base"
                )
            if not (folder / MARKER).exists():
                self._refuse_other_weights()
        except BaseException:
            self.close()
            raise

    def revoke(self, id: int) -> Change:
        """Takes one edit back, see :mod:`.undo`.

        Raises:
            LedgerError: no edit in place has this id; nothing has changed.
            OutputError: the disk is full, for instance; the next command finishes the work.
        """
        number = self.ledger.require_edit(id, in_place=True)
        left = tuple(i for i in self.ledger.active if i != number)
        return self._go_to(left, "revoke", number, None)

    def rewind(self, id: int) -> Change:
        """Goes back to the state after an event, bit for bit; 0 is the unedited model.

        Raises:
            LedgerError: there is no such event; nothing has changed.
            OutputError: the disk is full, for instance; the next command finishes the work.
        """
        edits = self.ledger.active_at(id)
        base = self.ledger.base
        wanted = self.ledger[id].record["fingerprint_after"] if id else base.fingerprint
        return self._go_to(edits, "rewind", id, wanted)

    def close(self) -> None:
        """Releases the ledger."""
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------

    def _stored(self) -> list[Tensor]:
        """The present weights as this folder stores them."""
        made: list[Tensor] = []
        with self._weights.unedited():
            old = [_weight(layer).clone() for layer in self._weights.layers]
        for layer, base, place, here in zip(
            self._weights.layers, old, self._base_places, self._places_here, strict=True
        ):
            matrix = EditedMatrix(layer.name, base, _weight(layer), ())
            made.append(matrix.stored(place, place.read()).to(DTYPES[here.dtype]))
        return made

    def _refuse_other_weights(self) -> None:
        """Checks that the folder holds what its ledger says, so that nobody else's work is lost."""
        base, count = self.ledger.base, len(self.ledger)
        same_dtype = all(DTYPES[p.dtype] == self._dtype for p in self._places_here)
        if same_dtype:
            wanted = self.ledger[count].record["fingerprint_after"] if count else base.fingerprint
            here = editable(self._layers, self._places_here, self._dtype)
            right = here.weights_fingerprint() == wanted
        else:
            replay(self._weights, self.ledger, self.ledger.active)
            pairs = zip(self._stored(), self._places_here, strict=True)
            right = all(torch.equal(new, place.read()) for new, place in pairs)
        if not right:
            raise LedgerError(
                f"the weights in {self.folder} are not those of its ledger, something else has "
                "changed them; save the model anew from an Editor"
            )

    def _go_to(self, edits: Sequence[int], kind: Kind, target: int, wanted: str | None) -> Change:
        before = self.ledger[len(self.ledger)].record if len(self.ledger) else {}
        base = self.ledger.base.fingerprint
        replay(self._weights, self.ledger, edits)
        fingerprint = self._weights.weights_fingerprint()
        record: Mapping[str, Any] = {
            "fingerprint_before": before.get("fingerprint_after", base),
            "fingerprint_after": fingerprint,
            "time": now(),
        }
        try:
            (self.folder / MARKER).touch()
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error}") from error
        event = self.ledger.append(kind, target, record)
        files = self._rewrite()
        return Change(
            event,
            self.ledger.active,
            tuple(files),
            None if wanted is None else wanted == fingerprint,
        )

    def _rewrite(self) -> list[str]:
        """Writes the weights that differ, file by file; each file is whole at any moment."""
        changes: dict[Path, list[tuple[StoredTensor, Tensor]]] = {}
        for new, place in zip(self._stored(), self._places_here, strict=True):
            if not torch.equal(new, place.read()):
                changes.setdefault(place.file, []).append((place, new))
        try:
            for left_behind in self.folder.glob(".*.hiedit-new"):
                left_behind.unlink()
            for file, parts in sorted(changes.items()):
                work = file.with_name(f".{file.name}.hiedit-new")
                shutil.copyfile(file, work)
                with work.open("r+b") as opened:
                    for place, new in parts:
                        opened.seek(place.start)
                        flat = new.contiguous().flatten().view(torch.uint8)
                        opened.write(flat.numpy().tobytes())
                    opened.flush()
                    os.fsync(opened.fileno())
                os.replace(work, file)
            # A README that is not a card of edits is somebody else's.
            if is_card(self.folder / CARD):
                card = model_card(self.ledger, None, "model", _USE)
                write_bytes(self.folder / CARD, card.encode())
            (self.folder / MARKER).unlink()
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be written ({error}); its ledger says what was meant: run "
                "the command 'hiedit rewind' with the id of the last event to finish"
            ) from error
        return [str(file.relative_to(self.folder)) for file in sorted(changes)]


_USE = (
    "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("DIR")'
)


def _weight(layer: CandidateLayer) -> Tensor:
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    return weight.detach()
