"""The README of what is exported: which edits it holds, and what they were measured to do."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import Event
from hiedit_env.errors import one_line

#: Name of a card's file.
CARD = "README.md"
_TAGS = "tags: [model-editing, hiedit]"
#: Edits that a card lists; the ledger holds all.
LISTED = 100


@dataclass(frozen=True, slots=True)
class Measured:
    """The edits in place, asked at the moment of saving.

    Args:
        edits: Number of edits in place.
        asked: Number of their facts that were asked, evenly spaced.
        given: How many of those the model gives: its greedy continuation begins with the answer.
        agreement: Agreement with the unedited model on control prompts, 0 to 1; None where it
            cannot be measured.
    """

    edits: int
    asked: int
    given: int
    agreement: float | None

    @property
    def text(self) -> str:
        """One sentence."""
        agreement = (
            ""
            if self.agreement is None
            else (
                f" On control prompts {100 * self.agreement:.0f} % of the unedited model's own "
                "answer tokens are left."
            )
        )
        return (
            f"{self.edits} edits are in place; asked for {self.asked} of their facts, the model "
            f"gives {self.given} (its greedy continuation begins with the answer).{agreement}"
        )


def model_card(
    ledger: Ledger, measured: Measured | None, what: str, use: str, more: str = ""
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        ledger: The edits.
        measured: What was measured; None where nothing was since the last change.
        what: ``"model"`` or ``"adapter"``.
        use: Python lines that load it.
        more: Further text.
    """
    base = ledger.base
    # A path of this machine says nothing elsewhere.
    name = Path(base.model).name if os.path.exists(base.model) else base.model
    front = ["library_name: " + ("peft" if what == "adapter" else "transformers")]
    if name and not os.path.exists(base.model):
        front.insert(0, f"base_model: {json.dumps(name)}")
    front.append(_TAGS)
    layers = sorted({layer for event in _edits(ledger) for layer in event.record["layers"]})
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {'Edits of' if what == 'adapter' else 'Edited'} {one_line(name) or 'a model'}",
        f"{len(ledger.active)} edits are in place. The model was not asked since the last change."
        if measured is None
        else measured.text,
        *([more] if more else []),
        f"```python\n{use}\n```",
        "## Edits",
        _table(ledger),
        "## Changed matrices",
        ", ".join(f"`{one_line(layer)}`" for layer in layers) or "None.",
        f"The unedited candidate matrices have the fingerprint `{base.fingerprint}` in "
        f"{base.dtype}.",
    ]
    return "\n\n".join(parts) + "\n"


def is_card(file: Path) -> bool:
    """Whether a file is a card that :func:`model_card` has made."""
    if not file.is_file():
        return False
    front = file.read_text(encoding="utf-8", errors="replace").partition("\n---\n")[0]
    return _TAGS in front.splitlines()


def _edits(ledger: Ledger) -> list[Event]:
    return [ledger[number] for number in ledger.active]


def _table(ledger: Ledger) -> str:
    rows = ["| id | prompt | answer | before the edit | agent |", "|---|---|---|---|---|"]
    events = _edits(ledger)
    for event in events[:LISTED]:
        for fact in event.record["facts"]:
            before = next(iter(fact["before"].values()), "")
            request = fact["request"]
            cells = (request["prompt"], request["answer"], before, event.record["agent"])
            rows.append(f"| {event.id} | " + " | ".join(cell(text) for text in cells) + " |")
    if not events:
        return "None."
    if len(events) > LISTED:
        rows.append(f"\n… and {len(events) - LISTED} more, all in the ledger.")
    return "\n".join(rows)


def cell(text: str) -> str:
    r"""A text in a table of Markdown: one line, no markup and no control characters of its own.

    >>> print(cell("a | b <i>*c*"), cell("\x1b"))
    a \| b &lt;i>\*c\* \\x1b
    """
    line = one_line(" ".join(text.split()))
    line = line if len(line) <= 200 else line[:199] + "…"
    for sign in "\\`*_[]|":
        line = line.replace(sign, f"\\{sign}")
    return line.replace("<", "&lt;")
