"""The edits of a folder: ``hiedit log``, ``show``, ``revoke`` and ``rewind``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import Event
from hiedit_agents.editing.saved_folder import Change, SavedFolder
from hiedit_env.errors import one_line


def log(folder: Path) -> str:
    """One line per event: id, what it did, whether an edit is still in place, when, the fact."""
    with Ledger.open(folder) as ledger:
        active = set(ledger.active)
        lines = [_line(event, event.id in active) for event in ledger]
        count = len(active)
        edits = "1 edit is" if count == 1 else f"{count} edits are"
        base = ledger.base
        lines.append(f"{edits} in place, of the model {base.model or base.source!r}")
    return "\n".join(lines)


def show(folder: Path, id: int) -> str:
    """Everything the ledger says of an event; of an edit, its updates layer by layer too."""
    with Ledger.open(folder) as ledger:
        event = ledger[id]
        lines = [_line(event, id in ledger.active)]
        lines.append(_json(event.record))
        if event.kind == "edit":
            for number, updates in enumerate(ledger.steps(id)):
                for layer, update in zip(ledger.base.layers, updates, strict=True):
                    if update is not None:
                        norm = float(update.squared_norm().clamp_min(0).sqrt())
                        lines.append(
                            f"update {number} of {one_line(layer.name)}: rank {len(update.left)}, "
                            f"norm {norm:.4g}"
                        )
    return "\n".join(lines)


def revoke(folder: Path, id: int, base: Path | None) -> str:
    """Takes one edit of a saved model back."""
    with SavedFolder(folder, base) as saved:
        later = [number for number in saved.ledger.active if number > id]
        done = saved.revoke(id)
    text = f"edit {id} is taken back as event {done.event}; {_written(done)}"
    if later:
        one = len(later) == 1
        stay = (
            "1 later edit stays as it is" if one else f"{len(later)} later edits stay as they are"
        )
        text += f"\n{stay}; what was written later was computed while edit {id} was in place"
    return text


def rewind(folder: Path, id: int, base: Path | None) -> str:
    """Brings a saved model back to where it was after an event."""
    with SavedFolder(folder, base) as saved:
        done = saved.rewind(id)
    state = "the unedited model" if id == 0 else f"the state after event {id}"
    exact = {
        True: ", bit for bit",
        False: ", up to rounding (another machine or number of threads wrote it)",
        None: "",
    }[done.is_exact]
    return f"{state} is in place again{exact}, as event {done.event}; {_written(done)}"


def _written(done: Change) -> str:
    files = ", ".join(done.files) or "no file had to be written"
    return f"{len(done.active)} edits in place; {files}"


def _line(event: Event, in_place: bool) -> str:
    """One line, whatever its facts hold: nothing of them may steer a terminal."""
    time = str(event.record.get("time", ""))[:19].replace("T", " ")
    if event.kind != "edit":
        return one_line(f"{event.id:>5}  {event.kind:<6}  {time:<19}  {event.kind}s {event.target}")
    requests = [fact["request"] for fact in event.record["facts"]]
    facts = [f"{r['prompt']} → {r['answer']}" for r in requests]
    state = "" if in_place else "  (taken back)"
    return one_line(f"{event.id:>5}  edit    {time:<19}  {'; '.join(facts)}{state}")


def _json(record: Mapping[str, Any]) -> str:
    """A record as JSON of its true texts, with JSON's own escapes for what steers a terminal."""
    text = json.dumps(dict(record), indent=2, ensure_ascii=False)
    lines = (
        "".join(sign if one_line(sign) == sign else json.dumps(sign)[1:-1] for sign in line)
        for line in text.split("\n")
    )
    return "\n".join(lines)
