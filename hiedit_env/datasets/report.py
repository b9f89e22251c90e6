"""Report on a data set: counts, repetitions, contradictions, fields that were not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.writing import ZERO_WIDTH, comparable, mentions

#: Examples that a line names before it only counts.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Repetition:
    """Two requests that ask the same prompt, but for case and white space.

    Args:
        first: The earlier request.
        later: The later one.
    """

    first: Request
    later: Request

    @property
    def contradicts(self) -> bool:
        """Whether the answers differ."""
        return self.first.answer != self.later.answer

    def __str__(self) -> str:
        where = f"{_place(self.later)} repeats {_place(self.first)}"
        if not self.contradicts:
            return where
        return f"{where} with the answer {self.later.answer!r} for {self.first.answer!r}"


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """A data set with what is to be known about it.

    Args:
        name: The name or path that was given.
        format: Name of its format in :data:`~hiedit_env.datasets.formats.FORMATS`.
        requests: All requests, in file order; nothing is dropped.
        rows: Number of rows in the file; one row may hold several facts, or none.
        unread: Fields with something in them that are not read → number of rows.
        left_out: Reason → number of rows that give no request.
        repetitions: Requests whose prompt an earlier one has, in file order.
    """

    name: str
    format: str
    requests: list[Request]
    rows: int
    unread: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    repetitions: tuple[Repetition, ...] = ()

    @property
    def duplicates(self) -> tuple[Repetition, ...]:
        """Repetitions with the same answer."""
        return tuple(found for found in self.repetitions if not found.contradicts)

    @property
    def contradictions(self) -> tuple[Repetition, ...]:
        """Repetitions with another answer: an edit by the later one undoes the earlier one."""
        return tuple(found for found in self.repetitions if found.contradicts)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of everything that a request holds."""
        requests = self.requests
        return {
            "rows": self.rows,
            "facts": len(requests),
            "subjects": len({request.subject.casefold() for request in requests}),
            "prompts": len({request.prompt for request in requests}),
            "paraphrases": sum(len(request.paraphrases) for request in requests),
            "unrelated prompts": sum(len(request.locality) for request in requests),
            "portability prompts": sum(len(request.portability) for request in requests),
            "old answers": sum(request.old_answer is not None for request in requests),
        }

    def serious(self) -> list[str]:
        """What must not go unnoticed, a line each: contradictions, rows and fields left out."""
        lines = []
        if self.contradictions:
            lines.append(
                f"{self.name}: {len(self.contradictions)} facts contradict an earlier one of the "
                f"same prompt: {_some(self.contradictions)}"
            )
        for reason, count in self.left_out.items():
            lines.append(f"{self.name}: {count} of {self.rows} rows are left out: {reason}")
        if self.unread:
            names = ", ".join(f"{name} ({count} rows)" for name, count in self.unread.items())
            lines.append(f"{self.name}: fields that are not read: {names}")
        return lines

    def remarks(self) -> list[str]:
        """All that is worth saying, a line each, :meth:`serious` first."""
        lines = self.serious()
        if self.duplicates:
            lines.append(
                f"{self.name}: {len(self.duplicates)} facts repeat an earlier one: "
                f"{_some(self.duplicates)}"
            )
        lost = [r for r in self.requests if not mentions(r.prompt, r.subject)]
        if lost:
            lines.append(
                f"{self.name}: {len(lost)} facts name a subject that is not in their prompt "
                f"(first: {_place(lost[0])}, {lost[0].subject!r:.60}): write it as it stands there"
            )
        spaced = [r for r in self.requests if _ends_in_a_space(r.prompt)]
        if spaced:
            lines.append(
                f"{self.name}: {len(spaced)} prompts end in a space, which is kept as part of the "
                f"text (first: {_place(spaced[0])})"
            )
        for what, missing in (
            ("paraphrases, so generalization is not measured", not self.counts["paraphrases"]),
            (
                "unrelated prompts, so specificity is not measured",
                not self.counts["unrelated prompts"],
            ),
        ):
            if missing:
                lines.append(f"{self.name}: no {what}")
        return lines


def repetitions(requests: Sequence[Request]) -> tuple[Repetition, ...]:
    """Every request whose prompt an earlier one has, with the first of them.

    Prompts are compared without regard to case and white space, which do not change what is asked.

    >>> facts = [Request("Rome is in", "Peru", "Rome"), Request("Rome is in", "Chad", "Rome")]
    >>> repetitions(facts)[0].contradicts
    True
    """
    first: dict[str, Request] = {}
    found = []
    for request in requests:
        earlier = first.setdefault(comparable(request.prompt), request)
        if earlier is not request:
            found.append(Repetition(earlier, request))
    return tuple(found)


def _ends_in_a_space(prompt: str) -> bool:
    last = prompt[-1:]
    return (last.isspace() and last != "\n") or last in ZERO_WIDTH


def _place(request: Request) -> str:
    """``row 3`` of ``set.json row 3``."""
    before, row, number = request.source.rpartition("row ")
    return f"{row}{number}" if before else request.source


def _some(found: Sequence[Repetition]) -> str:
    named = "; ".join(str(one) for one in found[:_NAMED])
    return named + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
