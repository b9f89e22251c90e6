"""Reports a model's answers before and after editing: to facts, paraphrases and other prompts.

A fact counts as *given* if the greedy continuation begins with its answer. *Agreement* is the share
of the unedited model's own greedy answer tokens (at most 5) that are still the argmax, mean over
prompts. Control prompts are asked as they are and, where the tokenizer has a chat template, also as
the message of a user in a chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hiedit_benchmarks.comparison.episode import bar
from hiedit_env.datasets.requests import Request
from hiedit_env.errors import PromptError
from hiedit_env.evaluation.matching import EXTRA_TOKENS, is_match, starts_with
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.resident import ResidentLLM

#: Facts shown in the printed table; ``edits.json`` holds all.
SHOWN = 20
#: Prompts of a kind that are asked at most, evenly spaced in the file; all facts are asked.
LIMIT = 200
#: Agreement on control prompts under which the model counts as damaged.
MIN_AGREEMENT = 0.6
#: Prompts that no file of facts is about.
CONTROL = (
    "The capital of France is",
    "Water is made of hydrogen and",
    "The opposite of hot is",
    "Two plus two equals",
    "The sun rises in the",
    "A week has seven",
    "Once upon a time, there was a",
    "In order to bake bread, you need",
    "The first month of the year is",
    "Dogs and cats are kept as",
    "She opened the door and",
    "The largest planet of the solar system is",
)
#: The same as messages of a user.
CONTROL_CHAT = (
    "What is the capital of France?",
    "What is water made of?",
    "What is the opposite of hot?",
    "What is two plus two?",
    "Name three animals.",
    "How do I bake bread?",
    "Write a short sentence about the sea.",
    "What is the first month of the year?",
)
#: A question: its text and the answer looked for.
Question = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says.

    Args:
        facts: Greedy continuation of each fact's prompt.
        given: Per kind of question, how many answers were given.
    """

    facts: list[str]
    given: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """Before and after.

    Args:
        asked: Per kind of question (``facts``, ``paraphrases``, ``chat``, ``earlier``) how many
            were asked.
        before, after: What the model said.
        agreement: Per kind of prompt (``unrelated``, ``control``, ``control_chat``) their number
            and the mean agreement with the unedited model, as a share.
    """

    asked: dict[str, int]
    before: Said
    after: Said
    agreement: dict[str, tuple[int, float]]

    @property
    def damage(self) -> str | None:
        """What a warning says; None where control prompts agree well enough."""
        controls = [self.agreement[k] for k in ("control", "control_chat") if k in self.agreement]
        count = sum(number for number, _ in controls)
        if not count:
            return None
        mean = sum(number * share for number, share in controls) / count
        if mean >= MIN_AGREEMENT:
            return None
        return (
            f"the edits damaged the model: on {count} control prompts {100 * mean:.0f} % of the "
            f"unedited model's answer tokens are left (under {100 * MIN_AGREEMENT:.0f} % counts as "
            "damage); a smaller --step-size, fewer facts or another --agent may help"
        )

    @property
    def text(self) -> str:
        """Some lines."""
        names = {
            "facts": "facts given",
            "paraphrases": "paraphrases given",
            "chat": "facts given in a chat",
            "earlier": "earlier facts given",
        }
        lines = [
            f"{names[kind]}: {self.before.given[kind]} of {number} before, "
            f"{self.after.given[kind]} of {number} after"
            for kind, number in self.asked.items()
        ]
        prompts = {
            "unrelated": "unrelated prompts of the file",
            "control": "control prompts",
            "control_chat": "control prompts in a chat",
        }
        lines += [
            f"agreement with the unedited model, {number} {prompts[kind]}: {100 * share:.0f} %"
            for kind, (number, share) in self.agreement.items()
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For ``edits.json``."""
        return {
            "given": {
                kind: {
                    "number": number,
                    "before": self.before.given[kind],
                    "after": self.after.given[kind],
                }
                for kind, number in self.asked.items()
            },
            "agreement": {
                kind: {"number": number, "share": share}
                for kind, (number, share) in self.agreement.items()
            },
            "damaged": self.damage is not None,
        }


class Questions:
    """What is asked before and after.

    Args:
        llm: The model, unedited.
        requests: The facts of this run.
        earlier: Those of earlier runs.
    """

    def __init__(
        self, llm: ResidentLLM, requests: Sequence[Request], earlier: Sequence[Request]
    ) -> None:
        self._llm = llm
        chat = [
            (text, r.answer)
            for r in _some(requests)
            if not _is_marked(llm, r.prompt) and (text := in_chat(llm, r.prompt)) is not None
        ]
        again = {request.prompt for request in requests}
        kinds: dict[str, list[Question]] = {
            "facts": [(r.prompt, r.answer) for r in requests],
            "paraphrases": _some([(text, r.answer) for r in requests for text in r.paraphrases]),
            "chat": chat,
            "earlier": _some([(r.prompt, r.answer) for r in earlier if r.prompt not in again]),
        }
        self.kinds = {
            kind: [q for q in questions if kind == "facts" or _fits(llm, *q)]
            for kind, questions in kinds.items()
        }
        chats = [text for q in CONTROL_CHAT if (text := in_chat(llm, q)) is not None]
        prompts: dict[str, list[str]] = {
            "unrelated": _some([probe.prompt for r in requests for probe in r.locality]),
            "control": list(CONTROL),
            "control_chat": chats,
        }
        self._references: dict[str, list[EncodedPrompt]] = {}
        for kind, texts in prompts.items():
            found = [llm.encode(text, "x") for text in dict.fromkeys(texts) if _fits(llm, text)]
            if found:
                self._references[kind] = UneditedModel(llm).answers(found)

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

    def _ask(self, llm: ResidentLLM, label: str, progress: bool) -> Said:
        flat = [question for questions in self.kinds.values() for question in questions]
        texts = ask(llm, flat, label, progress)
        rest = iter(texts)
        given = {
            kind: sum(starts_with(next(rest), answer) for _, answer in questions)
            for kind, questions in self.kinds.items()
        }
        return Said(texts[: len(self.kinds["facts"])], given)


def ask(llm: ResidentLLM, questions: Sequence[Question], label: str, progress: bool) -> list[str]:
    """Greedy continuations of prompts, in their order, a little longer than their answers."""
    texts: list[str] = []
    with bar(label, len(questions), progress) as shown:
        for start in range(0, len(questions), 64):
            group = questions[start : start + 64]
            budgets = [len(llm.encode(*question).answer_ids) + EXTRA_TOKENS for question in group]
            texts += llm.generate([prompt for prompt, _ in group], budgets)
            shown.update(len(group))
    return texts


@torch.inference_mode()
def agreement_with(llm: ResidentLLM, references: Sequence[EncodedPrompt]) -> float:
    """Share of given answer tokens that are the argmax, mean over prompts."""
    shares: list[float] = []
    for bucket in llm.buckets(references):
        batch = llm.batch([references[i] for i in bucket])
        right = (llm.answer_logits(batch, remember=False).argmax(-1) == batch.labels).cpu()
        sizes = [len(references[i].answer_ids) for i in bucket]
        shares += [float(part.float().mean()) for part in torch.split(right, sizes)]
    return sum(shares) / len(shares)


def in_chat(llm: ResidentLLM, message: str) -> str | None:
    """A user's message through the tokenizer's chat template; None where there is none."""
    tokenizer: Any = llm.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    # A template is a program of the model's makers, which may fail in any way.
    except Exception:
        return None
    return text if isinstance(text, str) else None


def before_and_after(facts: Sequence[dict[str, Any]]) -> str:
    """Prompt, answer before, answer wanted and answer after of up to ``SHOWN`` facts, as text."""
    lines = []
    for fact in facts[:SHOWN]:
        mark = verdict(fact["after"], fact["answer"])
        lines += [
            fact["prompt"],
            f"    before: {_one_line(fact['before'])}",
            f"    wanted: {_one_line(fact['answer'])}",
            f"    after:  {_one_line(fact['after'])}   ({mark})",
        ]
    if len(facts) > SHOWN:
        lines.append(f"… and {len(facts) - SHOWN} more, all in edits.json")
    return "\n".join(lines)


def verdict(generated: str, answer: str) -> str:
    """Whether a greedy continuation gives the answer, in words.

    >>> verdict(" Bengali. He", "Bengali"), verdict(" Bengali, which he", "Bengali")
    ('answered', 'answered, but runs on')
    >>> verdict(" Spanish.", "Bengali")
    'NOT answered'
    """
    if is_match(generated, answer):
        return "answered"
    return "answered, but runs on" if starts_with(generated, answer) else "NOT answered"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _some(items: Sequence[Any]) -> list[Any]:
    """At most ``LIMIT`` of them, evenly spaced.

    >>> len(_some(range(1000))), _some([1, 2])
    (200, [1, 2])
    """
    if len(items) <= LIMIT:
        return list(items)
    return [items[i * len(items) // LIMIT] for i in range(LIMIT)]


def _is_marked(llm: ResidentLLM, prompt: str) -> bool:
    """Whether a prompt holds special tokens, as one that went through a chat template does."""
    return any(len(token) > 2 and token in prompt for token in llm.tokenizer.all_special_tokens)


def _fits(llm: ResidentLLM, prompt: str, answer: str = "x") -> bool:
    """Whether a prompt can be asked; the facts' own are checked before."""
    try:
        llm.encode(prompt, answer)
    except PromptError:
        return False
    return True
