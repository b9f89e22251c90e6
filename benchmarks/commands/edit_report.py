"""Reports a model's answers before and after editing: to facts, paraphrases and other prompts.

A fact counts as *given* if the greedy continuation begins with its answer. *Agreement* is the share
of the unedited model's own greedy answer tokens (at most 5) that are still the argmax, mean over
prompts. Where the tokenizer has a chat template, everything but portability is asked in chat as
well: as the message of a user, whatever form it was edited in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hiedit_env.errors import one_line
from hiedit_env.evaluation.matching import is_match, starts_with
from hiedit_env.evaluation.names import AskedForm

#: Facts shown in the printed table; ``edits.json`` holds all.
SHOWN = 20
#: Agreement on control prompts under which the model counts as damaged.
MIN_AGREEMENT = 0.6


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says.

    Args:
        facts: Form → greedy continuation of each fact's prompt; None for a fact that is not edited
            in this form.
        given: Per kind of question, how many answers were given.
    """

    facts: dict[AskedForm, list[str | None]]
    given: dict[str, int]

    def of_fact(self, index: int) -> dict[AskedForm, str]:
        """Form → continuation, of one fact in the forms in which it is edited."""
        texts = {form: found[index] for form, found in self.facts.items()}
        return {form: text for form, text in texts.items() if text is not None}


#: What kinds of questions, and kinds of prompts that agreement is measured on, are called in print.
_GIVEN: Mapping[str, str] = {
    "facts": "facts given",
    "paraphrases": "paraphrases given",
    "chat_facts": "facts given in a chat",
    "chat_paraphrases": "paraphrases given in a chat",
    "portability": "portability prompts right",
    "earlier": "earlier facts given",
}
AGREEMENT: Mapping[str, str] = {
    "unrelated": "unrelated prompts of the file",
    "neighbours": "prompts of the file that ask the same about other subjects",
    "chat_unrelated": "unrelated prompts of the file in a chat",
    "chat_neighbours": "prompts of the file that ask the same about other subjects in a chat",
    "control": "control prompts",
    "control_chat": "control prompts in a chat",
}


@dataclass(frozen=True, slots=True)
class Report:
    """Before and after.

    Args:
        asked: Per kind of question how many were asked: ``facts``, ``paraphrases``,
            ``chat_facts``, ``chat_paraphrases``, ``portability``, ``portability/KIND``,
            ``earlier``.
        before, after: What the model said.
        agreement: Per kind of prompt (``unrelated``, ``neighbours``, ``chat_unrelated``,
            ``chat_neighbours``, ``control``, ``control_chat``) their number and the mean agreement
            with the unedited model, as a share.
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
        lines = [
            f"{_name(kind)}: {self.before.given[kind]} of {number} before, "
            f"{self.after.given[kind]} of {number} after"
            for kind, number in self.asked.items()
        ]
        lines += [
            f"agreement with the unedited model, {number} {AGREEMENT[kind]}: {100 * share:.0f} %"
            for kind, (number, share) in self.agreement.items()
            if not self._all_near(kind)
        ]
        return "\n".join(lines)

    def _all_near(self, kind: str) -> bool:
        """Whether these unrelated prompts are all neighbours, and need no line of their own."""
        near = self.agreement.get(kind.replace("unrelated", "neighbours"))
        return "unrelated" in kind and near is not None and near[0] == self.agreement[kind][0]

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


def before_and_after(facts: Sequence[Mapping[str, Any]]) -> str:
    """Prompt, answer before, answer wanted and answer after of up to ``SHOWN`` facts, as text.

    Args:
        facts: ``prompt``, ``answer``, ``before`` and ``after``; where a fact was edited in chat as
            well, ``chat_before`` and ``chat_after``.
    """
    lines = []
    for fact in facts[:SHOWN]:
        lines.append(in_print(fact["prompt"]))
        told = [("", "before", "after"), ("in chat ", "chat_before", "chat_after")]
        told = [names for names in told if fact.get(names[2]) is not None]
        lines += [f"    {form}before: {in_print(fact[was])}" for form, was, _ in told]
        lines.append(f"    wanted: {in_print(fact['answer'])}")
        lines += [
            f"    {form}after:  {in_print(fact[now])}   ({verdict(fact[now], fact['answer'])})"
            for form, _, now in told
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


def in_print(text: str) -> str:
    r"""A text of a model or of a fact for a terminal: on one line, control characters as escapes.

    >>> in_print(" Lyon  is "), in_print(""), in_print("\x1b[31m") == r"\x1b[31m"
    ('Lyon is', '(nothing)', True)
    """
    return one_line(" ".join(text.split())) or "(nothing)"


def _name(kind: str) -> str:
    """What a kind of question is called in print."""
    return _GIVEN.get(kind) or f"… of kind {kind.partition('/')[2]}"
