"""Edits of one model, recorded in a ledger: one fact after another, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

from transformers import PreTrainedModel

from hiedit_agents.editing.checks import AskedFact, Checks, Examiner, Verdict, as_asked
from hiedit_agents.editing.facts import as_requests, request_record
from hiedit_agents.editing.found import Opened
from hiedit_agents.editing.in_place import FactsInPlace
from hiedit_agents.editing.ledger_format import Base, BaseLayer, Kind
from hiedit_agents.editing.levels import Levels
from hiedit_agents.editing.other_weights import OtherWeights
from hiedit_agents.editing.results import EditResult, told
from hiedit_agents.editing.undo import replay
from hiedit_agents.editing.writer import FactWriter, Written
from hiedit_env.datasets.requests import Request
from hiedit_env.model.asking import PromptForm
from hiedit_env.model.memory_budget import require_room
from hiedit_env.resident.resident import ResidentLLM

#: The problem of a fact for which nothing was to be written.
NO_LAYERS = "the agent chose no layers"


class Session:
    """A resident model whose weights are always those of the edits in place in a ledger.

    Every method that changes weights does so wholly or not at all.

    Args:
        llm: The model.
        levels: Who edits.
        opened: The ledger of this model, whose edits in place are written into the weights, and the
            weights as the model was found.
        checks: What must hold after an edit.
        form: Form in which facts are edited and asked.
        max_error: As for :class:`.writer.FactWriter`.
        earlier: Facts that were edited into the model before and are in no ledger, for a low level
            that rehearses; earliest first.
        memory: What is done with a fact that seems not to fit, see
            :func:`~hiedit_env.model.memory_budget.require_room`.

    Raises:
        LedgerError: the recorded updates cannot be read; the weights are as they were.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        levels: Levels,
        opened: Opened,
        checks: Checks,
        form: PromptForm,
        max_error: float,
        earlier: Sequence[Request] = (),
        memory: str | None = None,
    ) -> None:
        self._memory = memory
        self.llm, self.levels, self.form = llm, levels, form
        self.ledger, self.found = opened.ledger, opened.found
        self._earlier = [self.asked(request) for request in earlier]
        self.examiner = Examiner(llm, checks)
        self._writer = FactWriter(llm, levels, max_error)
        if len(self.ledger):
            replay(llm, self.ledger, self.ledger.active)
        self.remember()

    def asked(self, request: Request) -> AskedFact:
        """A fact in the session's form."""
        return as_asked(self.llm, request, self.form)

    def arriving(self, request: Request) -> AskedFact:
        """A fact that is to be edited, in the session's form.

        Raises:
            NotEnoughMemoryError: it does not fit beside the model.
        """
        found = self.asked(request)
        model = cast(PreTrainedModel, self.llm.model)
        require_room(model, self.llm.tokenizer, request, self._memory)
        return found

    @property
    def facts(self) -> list[AskedFact]:
        """The facts in place: for every prompt as it is asked its latest answer, earliest first."""
        return list(self._in_place)

    def edit(self, facts: Sequence[AskedFact], share: float) -> list[EditResult]:
        """Writes facts together, by one option; all or nothing.

        What the model gives already is left alone. Facts that fail a check together are rolled back
        and written one by one.

        Args:
            facts: With different prompts; at least one.
            share: Share of the stream that is done, in [0, 1].

        Returns:
            One result per fact, in order.
        """
        before = self.examiner.say_all(facts)
        results: list[EditResult | None] = [
            told(fact, "known", said, said) if fact.is_given(said) else None
            for fact, said in zip(facts, before, strict=True)
        ]
        left = [i for i, result in enumerate(results) if result is None]
        if left:
            chosen = [facts[i] for i in left]
            made = self._write(chosen, [before[i] for i in left], share)
            if len(left) > 1 and made[0].status != "written":
                made = [result for fact in chosen for result in self.edit([fact], share)]
            for i, result in zip(left, made, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    def _write(
        self, facts: Sequence[AskedFact], before: Sequence[Mapping[str, str]], share: float
    ) -> list[EditResult]:
        """Writes facts that the model does not give, and records them, or rolls them back."""
        replaced = [self._in_place.replaced_by(fact) for fact in facts]
        held = self.examiner.held(self._in_place.without(facts))
        state, fingerprint = self._writer.save(), self.llm.weights_fingerprint()
        number = len(self.ledger) + 1
        try:
            written = self._writer.write([p for fact in facts for p in fact.prompts], share)
            results, keep = self._judged(facts, before, replaced, written, held)
            if not keep:
                self._writer.restore(state)
                return results
            record = self._record(facts, results, written, fingerprint)
            self.ledger.append("edit", None, record, written.updates)
        except BaseException:
            if len(self.ledger) < number:
                self._writer.restore(state)
            else:  # interrupted when it was on disk already
                self._in_place.put(number, facts)
            raise
        self._in_place.put(number, facts)
        return [replace(result, id=number) for result in results]

    def _judged(
        self,
        facts: Sequence[AskedFact],
        before: Sequence[Mapping[str, str]],
        replaced: Sequence[int | None],
        written: Written,
        held: Sequence[AskedFact],
    ) -> tuple[list[EditResult], bool]:
        """What became of facts, before they are in the ledger, and whether they are kept."""
        examiner = self.examiner
        broken = written.problem
        if broken is None and not written.steps:
            broken = NO_LAYERS
        after: list[dict[str, str]] = [{} for _ in facts]  # a broken model may give no text at all
        answered = [False] * len(facts)
        verdict = Verdict((broken or "",), None, len(held), 0)
        if broken is None:
            after = examiner.say_all(facts)
            answered = examiner.answered(facts)
            verdict = examiner.judge(held)
        shared = verdict.problems
        own = [
            () if broken is not None else examiner.missed(fact, said)
            for fact, said in zip(facts, after, strict=True)
        ]
        holds = not shared and not any(own)
        keep = holds or (broken is None and not examiner.checks.roll_back)
        results = [
            told(
                fact,
                "written" if keep else "rolled back",
                was,
                now_said,
                layers=tuple(self.llm.names[i] for i in written.layers),
                steps=written.steps,
                answered=right,
                holds=holds,
                problems=(*missed, *shared),
                replaces=earlier,
                agreement=verdict.agreement,
                earlier=verdict.earlier,
                kept=verdict.kept,
            )
            for fact, was, now_said, right, missed, earlier in zip(
                facts, before, after, answered, own, replaced, strict=True
            )
        ]
        return results, keep

    def _record(
        self,
        facts: Sequence[AskedFact],
        results: Sequence[EditResult],
        written: Written,
        fingerprint: str,
    ) -> dict[str, Any]:
        first = results[0]
        return {
            "facts": [
                {
                    "request": request_record(fact.request),
                    "before": dict(result.before),
                    "after": dict(result.after),
                    "answered": result.answered,
                    "replaces": result.replaces,
                    "problems": list(result.problems),
                }
                for fact, result in zip(facts, results, strict=True)
            ],
            "agent": self.levels.name,
            "identity": self.levels.identity,
            "layers": list(first.layers),
            "steps": first.steps,
            "loss_before": written.loss_before,
            "loss_after": written.loss_after,
            "holds": first.holds,
            "agreement": first.agreement,
            "earlier": first.earlier,
            "kept": first.kept,
            "fingerprint_before": fingerprint,
            "fingerprint_after": self.llm.weights_fingerprint(),
            "time": now(),
        }

    def go_to(self, edits: Sequence[int], kind: Kind, target: int) -> None:
        """Makes the edits in place some of those recorded, and records that."""
        state, fingerprint = self._writer.save(), self.llm.weights_fingerprint()
        before = len(self.ledger)
        try:
            replay(self.llm, self.ledger, edits)
            record = {
                "fingerprint_before": fingerprint,
                "fingerprint_after": self.llm.weights_fingerprint(),
                "time": now(),
            }
            self.ledger.append(kind, target, record)
        except BaseException:
            if len(self.ledger) == before:
                self._writer.restore(state)
            else:  # interrupted when it was on disk already
                self.remember()
            raise
        self.remember()

    def remember(self) -> None:
        """Takes the facts in place from the ledger; the low level begins new statistics."""
        self._in_place = FactsInPlace()
        for number, record in self.ledger.requests():
            [request] = as_requests(record)
            self._in_place.put(number, [self.asked(request)])
        asked = {p.prompt_ids for fact in self._in_place for p in fact.prompts}
        earlier = [p for fact in self._earlier for p in fact.prompts if p.prompt_ids not in asked]
        self._writer.forget([*earlier, *(p for fact in self._in_place for p in fact.prompts)])


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
    others = OtherWeights(llm.model, llm.layers).fingerprint()
    return Base(name, str(llm.model.name_or_path or ""), dtype, fingerprint, layers, others)


def now() -> str:
    """The time in UTC, to the millisecond, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
