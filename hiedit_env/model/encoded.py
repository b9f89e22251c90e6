"""Facts as tokens: a prompt with its answer, and a request with everything that judges it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import PromptError
from hiedit_env.model.asking import Tokens

AskedForm = Literal["plain", "chat"]
"""One form in which a prompt is asked."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt with its answer, as token ids.

    Args:
        prompt: The prompt.
        answer: The answer, without white space at its start.
        prompt_ids: What the model sees before it answers: the special tokens the tokenizer puts
            in front of a text, if any, then the prompt. At least one.
        answer_ids: The tokens to predict, in order. At least one.
        form: Whether it stands in the tokenizer's chat template.
        subject_spans: Positions in ``prompt_ids`` of the subject's mentions, each as its first
            position and the one after its last. Empty if no subject was named.
        subject_missing: Whether a subject was named that is not in the prompt; then the only span
            is the prompt's last token.

    Two are equal if their texts and tokens are.

    Raises:
        PromptError: if ``prompt_ids`` or ``answer_ids`` is empty.

    >>> encoded = EncodedPrompt("It is", "Lyon", prompt_ids=(1, 7, 8), answer_ids=(5, 6))
    >>> encoded.input_ids
    (1, 7, 8, 5)
    >>> encoded.length, encoded.first_position
    (4, 2)
    """

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    form: AskedForm = field(default="plain", compare=False)
    subject_spans: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    subject_missing: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise no_tokens("prompt", self.prompt)
        if not self.answer_ids:
            raise no_tokens("answer", self.answer)

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What the model reads: all tokens but the last of the answer, which is only predicted."""
        return self.prompt_ids + self.answer_ids[:-1]

    @property
    def length(self) -> int:
        """Number of tokens the model reads, ``len(input_ids)``."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1

    @property
    def first_position(self) -> int:
        """Position (from 0) in ``input_ids`` whose logits predict ``answer_ids[0]``."""
        return len(self.prompt_ids) - 1

    def positions(self, tokens: Tokens) -> range:
        """Positions in ``input_ids`` of some of the tokens that the model reads.

        Args:
            tokens: ``"subject"`` is the last token of the subject's last mention; the prompt's
                last token where the prompt names no subject.

        >>> fact = EncodedPrompt("p", "a", (1, 7, 8), (5, 6), subject_spans=((0, 2),))
        >>> [list(fact.positions(tokens)) for tokens in ("answer", "last", "subject")]
        [[2, 3], [2], [1]]
        """
        last = self.first_position
        if tokens in ("answer", "all"):
            return range(last if tokens == "answer" else 0, self.length)
        if tokens == "subject" and self.subject_spans:
            last = self.subject_spans[-1][1] - 1
        return range(last, last + 1)


@dataclass(frozen=True, slots=True)
class EncodedFact:
    """A request and everything that judges it, as tokens.

    Args:
        request: The request.
        prompts: Its prompt in every form asked, plain first; at least one.
        paraphrases: Every paraphrase in every form.
        probes: Every unrelated prompt in every form. The subject is not looked for in them.
    """

    request: Request
    prompts: tuple[EncodedPrompt, ...]
    paraphrases: tuple[EncodedPrompt, ...]
    probes: tuple[EncodedPrompt, ...]

    @property
    def prompt(self) -> EncodedPrompt:
        """The prompt in the first form asked."""
        return self.prompts[0]

    @property
    def first_probes(self) -> tuple[EncodedPrompt, ...]:
        """The first unrelated prompt of every form."""
        firsts: dict[str, EncodedPrompt] = {}
        for probe in self.probes:
            firsts.setdefault(probe.form, probe)
        return tuple(firsts.values())

    def in_form(self, form: AskedForm) -> EncodedFact | None:
        """What is asked in one form; None where the fact itself is not."""
        kinds = (self.prompts, self.paraphrases, self.probes)
        own, *rest = (tuple(p for p in prompts if p.form == form) for prompts in kinds)
        return EncodedFact(self.request, own, *rest) if own else None


def no_tokens(name: str, text: str) -> PromptError:
    """The error about a text that a tokenizer drops."""
    return PromptError(
        f"{name} {first_words(text)!r} yields no tokens: this tokenizer drops all of its "
        "characters; reword it or use another tokenizer"
    )


def first_words(text: str) -> str:
    """Enough of a text to find it again."""
    start = " ".join(text.split()[:8])[:60]
    return start if start == text else f"{start}..."
