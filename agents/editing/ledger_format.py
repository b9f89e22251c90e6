"""The format of a ledger: its model, its events, and the digests that show damage.

Format 1 (``PRAGMA user_version``; ``PRAGMA application_id`` is 0x68694564, "hiEd"):

- ``base``: one row, ``record``: JSON of :class:`Base`, the unedited model that the edits belong to.
- ``events``: ``id`` (1, 2, …, without gaps), ``kind``, ``target``, ``record`` (JSON), ``factors``
  (a safetensors file; NULL where nothing was written), ``factors_digest``, ``digest``.

========== ====================================== ===========================================
``kind``   ``target``                             ``record``
========== ====================================== ===========================================
``edit``   NULL                                   ``facts`` (one, or those written together:
                                                  ``request``, what was said ``before`` and
                                                  ``after``, whether all its tokens were
                                                  ``answered``, the id of the edit that it
                                                  ``replaces``, ``problems``), ``agent``,
                                                  ``layers``, ``steps``, losses, checks,
                                                  fingerprints, ``time``
``revoke`` the edit that is taken back            fingerprints, ``time``
``rewind`` the event whose state is taken up      fingerprints, ``time``
           again; 0 for the unedited model
========== ====================================== ===========================================

No row is ever changed or removed: taking something back is an event of its own, so it can be taken
back too. The *edits in place* follow from the events: an edit adds itself, ``revoke`` removes its
target, ``rewind`` takes those that were in place right after its target.

The tensors of ``factors`` are called ``STEP.LAYER.left`` (r × d_in) and ``STEP.LAYER.right``
(r × d_out), STEP counting the primitive steps of the edit and LAYER the layers of the base, both
from 0; a step changes the weight, read as d_in × d_out, by leftᵀ right. ``digest`` is the SHA-256
of the previous event's digest (at first of the base) and of all else in the row, so that a changed
or missing row shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from hiedit_env.errors import LedgerError
from hiedit_env.resident.low_rank import LowRankUpdate, Updates

#: Name of the ledger's file in its folder.
FILE = "ledger.sqlite"
#: There while the weight files beside a ledger are being replaced.
MARKER = ".hiedit-rewriting"
FORMAT = 1
APPLICATION = 0x68694564
Kind = Literal["edit", "revoke", "rewind"]
KINDS = ("edit", "revoke", "rewind")
TABLES = (
    "CREATE TABLE base (record TEXT NOT NULL)",
    "CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, target INTEGER, "
    "record TEXT NOT NULL, factors BLOB, factors_digest BLOB NOT NULL, digest BLOB NOT NULL)",
)


@dataclass(frozen=True, slots=True)
class BaseLayer:
    """One candidate layer of the unedited model.

    Args:
        name: Dotted name of the module.
        d_in, d_out: Its size.
        is_transposed: Whether its weight is stored as d_out × d_in.
    """

    name: str
    d_in: int
    d_out: int
    is_transposed: bool

    @property
    def shape(self) -> str:
        """As in ``"32 × 96"``, d_in × d_out."""
        stored = ", stored transposed" if self.is_transposed else ""
        return f"{self.d_in} × {self.d_out}{stored}"


@dataclass(frozen=True, slots=True)
class Base:
    """The unedited model that a ledger belongs to.

    Args:
        model: The name it was loaded by.
        source: The folder or hub id of its files; empty if it was never read from files.
        dtype: The dtype it was loaded in, such as ``"float32"``.
        fingerprint: Of its unedited candidate weights, see
            :meth:`~hiedit_env.resident.weights.EditableWeights.weights_fingerprint`.
        layers: Its candidate layers in forward order.
        others: Fingerprint of its other weights, see :mod:`.other_weights`; empty in ledgers that
            were begun without it, and then they are not compared.
    """

    model: str
    source: str
    dtype: str
    fingerprint: str
    layers: tuple[BaseLayer, ...]
    others: str = ""

    def refuse_other(self, other: Base) -> None:
        """Checks that another model is this one.

        Raises:
            LedgerError: other layers, dtype or weights; says which.
        """
        if self.layers != other.layers:
            remedy = f"give the model and the layers that it was begun with ({self.model!r})"
            names, others = ([layer.name for layer in b.layers] for b in (self, other))
            if names != others:
                raise LedgerError(
                    f"the ledger is of a model with the candidate layers {_some(names, others)}, "
                    f"this model has {_some(others, names)}; {remedy}"
                )
            one, two = next(
                pair for pair in zip(self.layers, other.layers, strict=True) if pair[0] != pair[1]
            )
            raise LedgerError(
                f"the ledger is of a model whose {one.name} is {one.shape}, this model's is "
                f"{two.shape}; {remedy}"
            )
        if self.dtype != other.dtype:
            raise LedgerError(
                f"the ledger is of a model in {self.dtype}, this one is in {other.dtype}; load it "
                f"in {self.dtype}"
            )
        if self.fingerprint != other.fingerprint:
            raise LedgerError(
                f"the ledger belongs to another model: its unedited weights have the fingerprint "
                f"{self.fingerprint}, this model's {other.fingerprint}; give the unedited model "
                f"that it was begun with ({self.model!r})"
            )
        self.refuse_other_weights(other.others)

    def refuse_other_weights(self, others: str, owner: str = "the ledger") -> None:
        """Checks the weights that no edit writes.

        Args:
            others: Their fingerprint in the model at hand; empty where it is not known.
            owner: What this base is of, for the message.

        Raises:
            LedgerError: they are other ones; nothing is raised where a fingerprint is not known.
        """
        if self.others and others and self.others != others:
            raise LedgerError(
                f"{owner} belongs to another model: the weights that no edit writes have the "
                f"fingerprint {self.others}, this model's {others}; give the model that it was "
                f"begun with ({self.model!r})"
            )


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a ledger.

    Args:
        id: From 1.
        kind: ``"edit"``, ``"revoke"`` or ``"rewind"``.
        target: See the table above.
        record: See the table above.
    """

    id: int
    kind: Kind
    target: int | None
    record: Mapping[str, Any]


def require_finished(folder: Path) -> None:
    """Checks that no undo in a saved model's folder was interrupted.

    Raises:
        LedgerError: one was, so that the weights are not those of the ledger.
    """
    if (folder / MARKER).exists():
        raise LedgerError(
            f"taking edits back in {folder} was interrupted; finish it with 'hiedit rewind "
            f"{folder} ID' and the id of the last event of 'hiedit log {folder}'"
        )


def base_of(record: Mapping[str, Any]) -> Base:
    """A base from its JSON; fields that this version does not know are left out."""
    layers = tuple(BaseLayer(**layer) for layer in record["layers"])
    known = {field.name for field in fields(Base)}
    return Base(**{**{k: v for k, v in record.items() if k in known}, "layers": layers})


def fold(heads: Sequence[tuple[Kind, int | None]]) -> list[int]:
    """Edits in place after some events.

    >>> fold([("edit", None), ("edit", None), ("revoke", 1), ("rewind", 1), ("edit", None)])
    [1, 5]
    """
    active: list[int] = []
    for place, (kind, target) in enumerate(heads):
        if kind == "edit":
            active.append(place + 1)
        elif kind == "revoke":
            active = [number for number in active if number != target]
        else:
            # Its target lies before it, so this ends.
            active = fold(heads[: min(target or 0, place)])
    return active


def edit_id(
    number: object, heads: Sequence[tuple[Kind, int | None]], active: Sequence[int] | None
) -> int:
    """A number as the id of an edit.

    Args:
        number: What was given.
        heads: Kind and target of every event.
        active: Ids of the edits in place, where it must be one of them; None where it need not.

    Raises:
        LedgerError: there is no such edit, or it is not in place; says what there is.
    """
    whole = number if isinstance(number, int) and not isinstance(number, bool) else 0
    if not 1 <= whole <= len(heads) or heads[whole - 1][0] != "edit":
        edits = [place + 1 for place, (kind, _) in enumerate(heads) if kind == "edit"]
        raise LedgerError(f"there is no edit {number!r}; {ids_text('edits', edits)}")
    if active is not None and whole not in active:
        raise LedgerError(
            f"edit {whole} is not in place any more; {ids_text('edits in place', active)}"
        )
    return whole


def digest_of(
    before: bytes, number: int, kind: str, target: int | None, text: str, factors: bytes
) -> bytes:
    """Digest of an event, which depends on all events before it."""
    head = json.dumps([number, kind, target]).encode()
    return hashlib.sha256(
        b"".join(hashlib.sha256(part).digest() for part in (before, head, text.encode(), factors))
    ).digest()


def factors_file(steps: Sequence[Updates]) -> bytes | None:
    """A safetensors file of the factors; None where there are none."""
    tensors: dict[str, Tensor] = {}
    for number, updates in enumerate(steps):
        for layer, update in enumerate(updates):
            if update is not None:
                left, right = (f.detach().float().cpu() for f in (update.left, update.right))
                # Copies: factors may share memory, which safetensors refuses.
                tensors[f"{number}.{layer}.left"] = left.contiguous().clone()
                tensors[f"{number}.{layer}.right"] = right.contiguous().clone()
    return save(tensors, {"format": str(FORMAT)}) if tensors else None


def steps_of(
    tensors: Mapping[str, Tensor], layers: int, device: torch.device | None
) -> list[Updates]:
    """The updates of every primitive step from the tensors of a factors file."""
    found: dict[int, list[LowRankUpdate | None]] = {}
    for name in tensors:
        number, layer, side = name.split(".")
        if side == "left":
            pair = (tensors[name], tensors[f"{number}.{layer}.right"])
            made = found.setdefault(int(number), [None] * layers)
            if not 0 <= int(layer) < layers:
                raise ValueError(f"tensor {name!r} is of a layer that the base does not have")
            made[int(layer)] = LowRankUpdate(*(x if device is None else x.to(device) for x in pair))
    return [tuple(found[number]) for number in sorted(found)]


def ids_text(what: str, ids: Sequence[int]) -> str:
    """What there is, for a message.

    >>> ids_text("edits", [1, 2, 4]), ids_text("edits", [])
    ('the edits are 1, 2, 4', 'there are no edits')
    """
    if not ids:
        return f"there are no {what}"
    shown = ", ".join(map(str, ids[-20:]))
    return f"the {what} are {'…, ' if len(ids) > 20 else ''}{shown}"


def _some(names: Sequence[str], others: Sequence[str]) -> str:
    """Some of the names, and how many there are; first those that are not among the others."""
    first = sorted(names, key=lambda name: name in others)
    return ", ".join(first[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
