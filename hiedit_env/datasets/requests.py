"""A request to edit a fact, and the probes that judge the edit. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hiedit_env.datasets.writing import is_blank
from hiedit_env.errors import DatasetError

PromptForm = Literal["plain", "chat", "both"]
"""A prompt as it is, in the tokenizer's chat template, or both."""

#: Kind of an unrelated prompt that the data calls one about another subject of the same relation.
NEIGHBOUR = "neighbour"


def _require_text(value: object, field: str, source: str) -> None:
    if not isinstance(value, str):
        raise DatasetError(f"{source}: field {field!r} must be text, got {type(value).__name__}")
    if is_blank(value):
        raise DatasetError(f"{source}: field {field!r} is empty")


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with its answer: unrelated to a fact (locality) or following from it (portability).

    Args:
        prompt: Text the model is asked to continue.
        answer: The right answer, without a leading space.
        kind: What a portability prompt asks: ``"alias"``, ``"reversed"``, ``"multi-hop"``,
            ``"reasoning"``, … as the data says. Of the other prompts, ``"neighbour"`` where the
            data says that it asks the same about another subject, else empty.
        aliases: Other answers that are right as well.
    """

    prompt: str
    answer: str
    kind: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One fact to write into the model.

    Args:
        prompt: Text the model is asked to continue, e.g. ``"The capital of France is"``.
        answer: The answer wanted after the edit, without a leading space.
        subject: Who or what the fact is about; splits keep a subject on one side.
        paraphrases: Other wordings of ``prompt`` that must give the same answer.
        locality: Unrelated prompts whose answers must not change.
        old_answer: What the model was supposed to answer before, if the data says so.
        relation: Name of the relation, if the data says so.
        source: ``file row number`` for error messages.
        true_layers: Names of the layers that hold the fact, where a model was made so that this is
            known; empty elsewhere.
        portability: Prompts whose answers follow from the fact without repeating it.
        subject_aliases: Other names of the subject.
        prompt_form: In which form the fact is edited; ``None`` for the environment's. A prompt that
            a chat template has written already stays as it is.
        system: System message of the chat form; ``None`` leaves it to the template.

    Raises:
        DatasetError: if a text is missing or empty, or the form is unknown; names the source and
            the field.

    >>> Request(prompt="The capital of France is", answer="Lyon", subject="France").paraphrases
    ()
    """

    prompt: str
    answer: str
    subject: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    old_answer: str | None = None
    relation: str | None = None
    source: str = "request"
    true_layers: tuple[str, ...] = ()
    portability: tuple[Probe, ...] = ()
    subject_aliases: tuple[str, ...] = ()
    prompt_form: PromptForm | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        _require_text(self.prompt, "prompt", self.source)
        _require_text(self.answer, "answer", self.source)
        _require_text(self.subject, "subject", self.source)
        for i, text in enumerate(self.paraphrases):
            _require_text(text, f"paraphrases[{i}]", self.source)
        for i, name in enumerate(self.true_layers):
            _require_text(name, f"true_layers[{i}]", self.source)
        for i, name in enumerate(self.subject_aliases):
            _require_text(name, f"subject_aliases[{i}]", self.source)
        for field, probes in (("locality", self.locality), ("portability", self.portability)):
            for i, probe in enumerate(probes):
                _require_text(probe.prompt, f"{field}[{i}].prompt", self.source)
                _require_text(probe.answer, f"{field}[{i}].answer", self.source)
        if self.prompt_form not in (None, *get_args(PromptForm)):
            forms = ", ".join(get_args(PromptForm))
            raise DatasetError(
                f"{self.source}: field 'prompt_form' must be one of {forms}, "
                f"got {self.prompt_form!r:.60}"
            )
        if not isinstance(self.system, str | None):
            raise DatasetError(
                f"{self.source}: field 'system' must be text, got {type(self.system).__name__}"
            )
