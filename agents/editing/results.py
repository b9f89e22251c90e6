"""What became of one fact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hiedit_agents.editing.checks import AskedFact
from hiedit_agents.editing.ledger_format import Event


@dataclass(frozen=True, slots=True)
class EditResult:
    """What became of one fact.

    Args:
        status: ``"written"``; ``"known"``: the model gives the answer already, nothing was done;
            ``"rolled back"``: a check failed, nothing was changed.
        id: Of the edit in the ledger; None where nothing was written. Facts that were written
            together have one id.
        prompt, answer, subject: What was asked for.
        before, after: What the model said before and says now, by form (``"plain"``, ``"chat"``):
            greedy continuations. Of an edit that was rolled back, ``after`` is what it would say.
        layers: Names of the layers written.
        steps: Number of primitive steps.
        answered: Whether right after it every answer token is the argmax, given those before it, in
            every form.
        holds: Whether all checks hold.
        problems: One line per check that failed.
        replaces: Id of the earlier edit of the same prompt, whose answer this one replaces.
        agreement: With the unedited model on control prompts, 0 to 1; None where not measured.
        earlier, kept: Number of earlier facts that were asked, and of those still answered.
    """

    status: str
    id: int | None
    prompt: str
    answer: str
    subject: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    layers: tuple[str, ...] = ()
    steps: int = 0
    answered: bool = True
    holds: bool = True
    problems: tuple[str, ...] = ()
    replaces: int | None = None
    agreement: float | None = None
    earlier: int = 0
    kept: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def told(
    fact: AskedFact,
    status: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    **more: Any,
) -> EditResult:
    """The result of a fact, not yet in the ledger."""
    request = fact.request
    return EditResult(
        status, None, request.prompt, request.answer, request.subject, before, after, **more
    )


def recorded(event: Event) -> list[EditResult]:
    """The results of an edit's facts, as its record says them."""
    record = event.record
    return [
        EditResult(
            "written",
            event.id,
            fact["request"]["prompt"],
            fact["request"]["answer"],
            fact["request"]["subject"],
            fact["before"],
            fact["after"],
            tuple(record["layers"]),
            record["steps"],
            fact.get("answered", True),  # not in ledgers of older versions
            record["holds"],
            tuple(fact["problems"]),
            fact["replaces"],
            record["agreement"],
            record["earlier"],
            record["kept"],
        )
        for fact in record["facts"]
    ]
