"""Edits of one model, recorded in a ledger: one fact after another, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from hiedit_agents.editing.checks import AskedFact, Checks, Examiner, Verdict, as_asked
from hiedit_agents.editing.facts import as_requests, request_record
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import Base, BaseLayer, Kind
from hiedit_agents.editing.levels import Levels
from hiedit_agents.editing.results import EditResult
from hiedit_agents.editing.undo import replay
from hiedit_agents.editing.writer import FactWriter, Written
from hiedit_env.datasets.requests import Request
from hiedit_env.model.asking import PromptForm
from hiedit_env.resident.resident import ResidentLLM


class Session:
    """A resident model whose weights are always those of the edits in place in a ledger.

    Every method that changes weights does so wholly or not at all.

    Args:
        llm: The model.
        levels: Who edits.
        ledger: Of this model; edits in place there are written into the weights.
        checks: What must hold after an edit.
        form: Form in which facts are edited and asked.
        max_error: As for :class:`.writer.FactWriter`.

    Raises:
        LedgerError: the recorded updates cannot be read; the weights are as they were.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        levels: Levels,
        ledger: Ledger,
        checks: Checks,
        form: PromptForm,
        max_error: float,
    ) -> None:
        self.llm, self.levels, self.ledger, self.form = llm, levels, ledger, form
        self.examiner = Examiner(llm, checks)
        self._writer = FactWriter(llm, levels, max_error)
        if len(ledger):
            replay(llm, ledger, ledger.active)
        self.remember()

    def asked(self, request: Request) -> AskedFact:
        """A fact in the session's form."""
        return as_asked(self.llm, request, self.form)

    @property
    def facts(self) -> list[AskedFact]:
        """The facts in place: for every prompt its latest answer, earliest first."""
        return [fact for _, fact in self._in_place.values()]

    def edit(self, fact: AskedFact, share: float) -> EditResult:
        """Writes one fact; all or nothing."""
        request, examiner = fact.request, self.examiner
        before = examiner.say(fact)
        if fact.is_given(before):
            return EditResult(
                "known", None, request.prompt, request.answer, request.subject, before, before
            )
        replaced, _ = self._in_place.get(request.prompt, (None, None))
        others = [other for number, other in self._in_place.values() if number != replaced]
        held = examiner.held(others)
        state, fingerprint = self._writer.save(), self.llm.weights_fingerprint()
        try:
            written = self._writer.write(fact.prompts, share)
            result = self._judged(fact, before, written, held)
            result = replace(result, replaces=replaced)
            if result.status != "written":
                self._writer.restore(state)
                return result
            record = self._record(request, result, written, fingerprint)
            number = self.ledger.append("edit", replaced, record, written.updates)
        except BaseException:
            self._writer.restore(state)
            raise
        self._in_place.pop(request.prompt, None)
        self._in_place[request.prompt] = number, fact
        return replace(result, id=number)

    def _judged(
        self,
        fact: AskedFact,
        before: Mapping[str, str],
        written: Written,
        held: Sequence[AskedFact],
    ) -> EditResult:
        """What became of a fact, before it is in the ledger."""
        request, examiner = fact.request, self.examiner
        broken = written.problem
        if broken is None and not written.steps:
            broken = "the agent chose no layers"
        if broken is None:
            after = examiner.say(fact)
            verdict = examiner.judge(fact, after, held)
        else:
            # The model may give no text at all.
            after, verdict = {}, Verdict((broken,), None, len(held), 0)
        keep = not verdict.problems or (broken is None and not examiner.checks.roll_back)
        return EditResult(
            status="written" if keep else "rolled back",
            id=None,
            prompt=request.prompt,
            answer=request.answer,
            subject=request.subject,
            before=before,
            after=after,
            layers=tuple(self.llm.names[i] for i in written.layers),
            steps=written.steps,
            holds=not verdict.problems,
            problems=verdict.problems,
            agreement=verdict.agreement,
            earlier=verdict.earlier,
            kept=verdict.kept,
        )

    def _record(
        self, request: Request, result: EditResult, written: Written, fingerprint: str
    ) -> dict[str, Any]:
        return {
            "request": request_record(request),
            "agent": self.levels.name,
            "identity": self.levels.identity,
            "layers": list(result.layers),
            "steps": result.steps,
            "before": dict(result.before),
            "after": dict(result.after),
            "loss_before": written.loss_before,
            "loss_after": written.loss_after,
            "holds": result.holds,
            "problems": list(result.problems),
            "agreement": result.agreement,
            "earlier": result.earlier,
            "kept": result.kept,
            "fingerprint_before": fingerprint,
            "fingerprint_after": self.llm.weights_fingerprint(),
            "time": now(),
        }

    def go_to(self, edits: Sequence[int], kind: Kind, target: int) -> None:
        """Makes the edits in place some of those recorded, and records that."""
        state, fingerprint = self._writer.save(), self.llm.weights_fingerprint()
        try:
            replay(self.llm, self.ledger, edits)
            record = {
                "fingerprint_before": fingerprint,
                "fingerprint_after": self.llm.weights_fingerprint(),
                "time": now(),
            }
            self.ledger.append(kind, target, record)
        except BaseException:
            self._writer.restore(state)
            raise
        self.remember()

    def remember(self) -> None:
        """Takes the facts in place from the ledger; the low level begins new statistics."""
        self._in_place: dict[str, tuple[int, AskedFact]] = {}
        for prompt, event in self.ledger.facts().items():
            [request] = as_requests(event.record["request"])
            self._in_place[prompt] = event.id, self.asked(request)
        self._writer.forget([p for _, fact in self._in_place.values() for p in fact.prompts])


def base_of_model(llm: ResidentLLM, name: str) -> Base:
    """What a ledger says of an unedited model.

    Args:
        llm: The model; it may be edited.
        name: The name it was loaded by.
    """
    layers = tuple(
        BaseLayer(layer.name, layer.d_in, layer.d_out, layer.is_transposed) for layer in llm.layers
    )
    with llm.unedited():
        fingerprint = llm.weights_fingerprint()
    dtype = str(llm.dtype).removeprefix("torch.")
    return Base(name, str(llm.model.name_or_path or ""), dtype, fingerprint, layers)


def now() -> str:
    """The time in UTC, to the millisecond, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
