"""Questions to a model before and after editing: facts, what follows from them, what must stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hiedit_agents.editing.controls import CONTROL, CONTROL_CHAT, agreement_with
from hiedit_benchmarks.commands.edit_report import AGREEMENT, Report, Said
from hiedit_benchmarks.comparison.episode import bar
from hiedit_env.datasets.requests import Probe, PromptForm, Request
from hiedit_env.evaluation.matching import EXTRA_TOKENS, starts_with
from hiedit_env.evaluation.names import AskedForm, portability_of
from hiedit_env.evaluation.questions import is_neighbour, portability_probes
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.asking import has_markers
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

#: Prompts of a kind that are asked at most, evenly spaced in the file; all facts are asked.
LIMIT = 200
#: The same of prompts whose answers must not change; they take longest, token after token.
AGREEMENT_LIMIT = 60


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Args:
        prompt: Its text.
        answers: Those that are looked for; the first is encoded.
        form: How it is asked.
        system: System message of the chat form.
    """

    prompt: str
    answers: tuple[str, ...]
    form: AskedForm = "plain"
    system: str | None = None

    def encode(self, llm: ResidentLLM) -> EncodedPrompt:
        """Its tokens; raises PromptError where the model cannot be asked."""
        if self.form == "chat":
            return llm.encoder.encode_chat(self.prompt, self.answers[0], self.system)
        return llm.encode(self.prompt, self.answers[0])

    def given(self, text: str) -> bool:
        """Whether a continuation begins with one of the answers."""
        return any(starts_with(text, answer) for answer in self.answers)


class Questions:
    """What is asked before and after.

    Args:
        llm: The model, unedited.
        requests: The facts of this run.
        earlier: Those of earlier runs.
        form: How a fact is edited that does not say so itself.
    """

    def __init__(
        self,
        llm: ResidentLLM,
        requests: Sequence[Request],
        earlier: Sequence[Request],
        form: PromptForm = "plain",
    ) -> None:
        self._llm = llm
        in_chat = bool(getattr(llm.tokenizer, "chat_template", None))
        again = {request.prompt for request in requests}
        kinds: dict[str, list[Question]] = {
            "paraphrases": [Question(t, (r.answer,)) for r in requests for t in r.paraphrases],
            "chat_facts": [],
            "chat_paraphrases": [],
            "portability": [],
            "earlier": [
                Question(r.prompt, (r.answer,), asked, r.system)
                for r in earlier
                if r.prompt not in again
                for asked in forms_of(llm, r, "plain")
            ],
        }
        if in_chat:
            for name, texts in (
                ("chat_facts", [(r, (r.prompt,)) for r in requests]),
                ("chat_paraphrases", [(r, r.paraphrases) for r in requests]),
            ):
                kinds[name] = [
                    Question(text, (r.answer,), "chat", r.system)
                    for r, several in texts
                    for text in several
                    if not has_markers(llm.tokenizer, text)
                ]
        for request in requests:
            for probe in portability_probes(request):
                asked = Question(probe.prompt, (probe.answer, *probe.aliases))
                kinds["portability"].append(asked)
                kinds.setdefault(portability_of(probe.kind), []).append(asked)
        kinds["earlier"] = kinds.pop("earlier")  # last
        #: Per form the facts that are edited in it.
        self._facts: dict[AskedForm, list[Question | None]] = {
            asked: [
                Question(r.prompt, (r.answer,), asked, r.system)
                if asked in forms_of(llm, r, form)
                else None
                for r in requests
            ]
            for asked in (("plain", "chat") if in_chat else ("plain",))
        }
        plain = [Question(r.prompt, (r.answer,)) for r in requests]
        self.kinds = {
            "facts": plain,
            **{kind: [q for q in _some(asked) if _fits(llm, q)] for kind, asked in kinds.items()},
        }
        self._references = self._agreed(requests, in_chat)

    def before(self, progress: bool) -> Said:
        """What the unedited model says."""
        return self._ask(self._llm, "answers before", progress)

    def report(self, llm: ResidentLLM, before: Said, progress: bool) -> Report:
        """Asks again.

        Args:
            llm: The edited model; it may be another object than the unedited one.
            before: From :meth:`before`.
            progress: Whether to show it on standard error.
        """
        after = self._ask(llm, "answers after", progress)
        asked = {kind: len(questions) for kind, questions in self.kinds.items() if questions}
        agreement = {
            kind: (len(prompts), agreement_with(llm, prompts))
            for kind, prompts in self._references.items()
        }
        return Report(asked, before, after, agreement)

    def _agreed(self, requests: Sequence[Request], in_chat: bool) -> dict[str, list[EncodedPrompt]]:
        """Prompts with the unedited model's answers, by kind."""
        pairs: list[tuple[Request, Probe]] = [(r, probe) for r in requests for probe in r.locality]
        near = [probe.prompt for r, probe in pairs if is_neighbour(r, probe)]
        texts: dict[str, list[str]] = {
            "unrelated": [probe.prompt for _, probe in pairs],
            "neighbours": near,
        }
        prompts = {
            **{
                kind: [Question(t, ("x",)) for t in _some(found, AGREEMENT_LIMIT)]
                for kind, found in texts.items()
            },
            "control": [Question(text, ("x",)) for text in CONTROL],
        }
        if in_chat:
            for kind, found in texts.items():
                chat = [t for t in found if not has_markers(self._llm.tokenizer, t)]
                prompts[f"chat_{kind}"] = [
                    Question(t, ("x",), "chat") for t in _some(chat, AGREEMENT_LIMIT)
                ]
            prompts["control_chat"] = [Question(text, ("x",), "chat") for text in CONTROL_CHAT]
        references: dict[str, list[EncodedPrompt]] = {}
        unedited = UneditedModel(self._llm)
        for kind in AGREEMENT:
            asked = [q for q in dict.fromkeys(prompts.get(kind, [])) if _fits(self._llm, q)]
            if asked:
                encoded = [question.encode(self._llm) for question in asked]
                references[kind] = unedited.answers(encoded)
        return references

    def _ask(self, llm: ResidentLLM, label: str, progress: bool) -> Said:
        facts = [q for found in self._facts.values() for q in found if q is not None]
        flat = [q for questions in self.kinds.values() for q in questions]
        texts = ask(llm, [*flat, *facts], label, progress)
        given = {
            kind: sum(question.given(texts[question]) for question in questions)
            for kind, questions in self.kinds.items()
        }
        return Said(
            {
                form: [None if q is None else texts[q] for q in found]
                for form, found in self._facts.items()
            },
            given,
        )


def forms_of(llm: ResidentLLM, request: Request, form: PromptForm) -> tuple[AskedForm, ...]:
    """The forms in which a fact is edited.

    Args:
        llm: Its tokenizer knows what a chat template writes.
        request: The fact.
        form: Of a fact that does not say so itself.
    """
    asked = request.prompt_form or form
    if asked == "plain" or has_markers(llm.tokenizer, request.prompt):
        return ("plain",)
    return ("chat",) if asked == "chat" else ("plain", "chat")


def ask(
    llm: ResidentLLM, questions: Sequence[Question], label: str, progress: bool
) -> dict[Question, str]:
    """Greedy continuations, a little longer than the longest answer; equal questions run once."""
    texts: dict[Question, str] = {}
    different = list(dict.fromkeys(questions))
    with bar(label, len(different), progress) as shown:
        for start in range(0, len(different), 64):
            group = different[start : start + 64]
            encoded = [question.encode(llm) for question in group]
            budgets = [
                max(len(llm.encode(q.prompt, answer).answer_ids) for answer in q.answers)
                + EXTRA_TOKENS
                for q in group
            ]
            texts.update(zip(group, llm.generate(encoded, budgets), strict=True))
            shown.update(len(group))
    return texts


def _some(items: Sequence[Any], limit: int = LIMIT) -> list[Any]:
    """At most ``limit`` of them, evenly spaced.

    >>> len(_some(range(1000))), _some([1, 2]), _some(range(10), 2)
    (200, [1, 2], [0, 5])
    """
    if len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _fits(llm: ResidentLLM, question: Question) -> bool:
    """Whether a prompt can be asked; the facts' own are checked before."""
    try:
        question.encode(llm)
    # A template is a program of the model's makers, which may fail in any way.
    except Exception:
        return False
    return True
