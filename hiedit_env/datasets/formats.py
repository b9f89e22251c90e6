"""The row formats of the field, each turned into a :class:`~hiedit_env.datasets.requests.Request`.

:data:`FORMATS` is the whole truth: name, the fields that give the format away, parser. Files,
built-in sets and splits are in :mod:`hiedit_env.datasets.load`. No torch here.

Rules common to all formats:

- White space around a text is removed, because the answer is joined to its prompt by one space.
- A format without a subject, or a row where it is missing, uses the prompt as its subject.
- A field that a format requires must be text with something in it. Only WikiBigEdit and KnowEdit,
  whose released files have gaps, may leave optional fields null, NaN or blank.
- Questions whose answer merely follows from the edit (WikiBigEdit's ``mhop``, KnowEdit's
  ``portability``) are not read: a request holds rewordings with the same answer and unrelated
  prompts, and such a question is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.writing import is_closed, question_mark_for
from hiedit_env.errors import DatasetError


def _kind(value: object) -> str:
    """Name of a JSON value's type for messages.

    >>> _kind([["Paris"]]), _kind({}), _kind(3)
    ('a list of lists', 'an object', 'a number')
    """
    if isinstance(value, list):
        return "a list of lists" if value and isinstance(value[0], list) else "a list"
    if isinstance(value, bool):  # before numbers: bool is an int
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if value is None:
        return "null"
    return "an object" if isinstance(value, Mapping) else "text"


def _is_gap(value: object) -> bool:
    """Whether a released file left the field out: null, blank, or NaN (unequal to itself)."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file; every reader names file, row and field when it refuses.

    Args:
        fields: The JSON object.
        source: ``file row number``, the number counted from 0.
        prefix: Path to this object inside the row, e.g. ``"locality[2]."``.
    """

    fields: Mapping[str, object]
    source: str
    prefix: str = ""

    def error(self, field: str, problem: str) -> DatasetError:
        """The error to raise for ``field``."""
        return DatasetError(f"{self.source}: field {self.prefix + field!r} {problem}")

    def _checked(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"must be text, got {_kind(value)}")
        text = value.strip()
        if not text:
            raise self.error(field, "is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON allows half of a surrogate pair; no tokenizer does
            raise self.error(field, "holds an unpaired surrogate, which is not text") from None
        return text

    def text(self, field: str) -> str:
        """A required text."""
        if self.fields.get(field) is None:
            raise self.error(field, "is missing")
        return self._checked(field, self.fields[field])

    def optional(self, field: str) -> str | None:
        """A text, or None where the field is absent or null; present but empty is an error."""
        value = self.fields.get(field)
        return None if value is None else self._checked(field, value)

    def patchy(self, field: str) -> str | None:
        """A text, or None where a released file has a gap: absent, null, NaN or blank."""
        value = self.fields.get(field)
        return None if _is_gap(value) else self._checked(field, value)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts; nothing where the field is absent or null."""
        value = self.fields.get(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of texts, got {_kind(value)}")
        return tuple(self._checked(f"{field}[{i}]", item) for i, item in enumerate(value))

    def text_or_texts(self, field: str) -> tuple[str, ...]:
        """One text or a list of them; nothing where there is a gap."""
        value = self.fields.get(field)
        if _is_gap(value):
            return ()
        return (self._checked(field, value),) if isinstance(value, str) else self.texts(field)

    def first_text(self, field: str) -> str | None:
        """The first text with something in it, however deep in lists; None if there is none.

        >>> Row({"a": [["", "Berlin"], ["Berlin, Germany"]]}, "doc").first_text("a")
        'Berlin'
        """
        waiting = [self.fields.get(field)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(reversed(value))
            elif not _is_gap(value):
                return self._checked(field, value)
        return None

    def child(self, field: str) -> Row:
        """A required object."""
        value = self.fields.get(field)
        if value is None:
            raise self.error(field, "is missing")
        if not isinstance(value, Mapping):
            raise self.error(field, f"must be an object, got {_kind(value)}")
        return Row(value, self.source, f"{self.prefix}{field}.")

    def children(self, field: str) -> tuple[Row, ...]:
        """A list of objects; nothing where the field is absent or null."""
        value = self.fields.get(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of objects, got {_kind(value)}")
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise self.error(f"{field}[{i}]", f"must be an object, got {_kind(item)}")
        return tuple(
            Row(item, self.source, f"{self.prefix}{field}[{i}].") for i, item in enumerate(value)
        )

    def probes(self, field: str, answer: str) -> tuple[Probe, ...]:
        """Objects with ``prompt`` and ``answer`` fields; nothing where absent or null."""
        return tuple(Probe(item.text("prompt"), item.text(answer)) for item in self.children(field))


def _zsre(row: Row) -> Request:
    """Question answering from zero-shot relation extraction, in the two layouts in use.

    Both have ``src``, ``rephrase``, ``loc``, ``loc_ans`` and mostly ``subject``. They differ in the
    answer to write:

    - With ``ans`` (MALMEN, RLEdit, UltraEdit and HiEdit, each in its ``data/zsre.py``): ``ans``.
      All four edit to it and ignore ``alt``, so results stay comparable with theirs.
    - With ``answers`` and ``alt`` (``zsre_mend_*.json``, as in EasyEdit's
      ``easyeditor/dataset/zsre.py``): ``alt``, the alternative that MEND edits to; ``answers[0]``
      is then the old answer. Where ``alt`` is blank, ``answers[0]`` is written, as always in ROME.

    In the files seen that carry both ``ans`` and ``alt``, the two are equal in every row.

    The four code bases append "?" to every ``loc``; here only to one without closing punctuation.
    """
    prompt = row.text("src")
    recorded = row.texts("answers")
    candidates = (row.patchy("ans"), row.patchy("alt"), *recorded[:1])
    target = next((answer for answer in candidates if answer is not None), None)
    if target is None:
        raise row.error("ans", "holds no answer, and neither do 'alt' and 'answers'")
    unrelated = row.text("loc")
    if not is_closed(unrelated):
        unrelated += question_mark_for(unrelated)
    return Request(
        prompt=prompt,
        answer=target,
        subject=row.optional("subject") or prompt,
        paraphrases=(row.text("rephrase"),),
        locality=(Probe(unrelated, row.text("loc_ans")),),
        old_answer=recorded[0] if recorded and recorded[0] != target else None,
        source=row.source,
    )


def _counterfact(row: Row) -> Request:
    """CounterFact (ROME, arXiv 2202.05262), as in RLEdit's and HiEdit's ``data/counterfact.py``.

    ``requested_rewrite`` holds ``prompt`` with "{}" where the ``subject`` goes, ``target_new.str``
    and ``target_true.str``. ``neighborhood_prompts`` are about subjects that share the true answer.
    A ``locality`` list of ``prompt`` and ``ground_truth``, where it is not empty, replaces them.
    """
    rewrite = row.child("requested_rewrite")
    template = rewrite.text("prompt")
    if "{}" not in template:
        raise rewrite.error("prompt", "has no '{}' to put the subject in")
    subject = rewrite.text("subject")
    true_answer = rewrite.child("target_true").text("str")
    neighbours = row.texts("neighborhood_prompts")
    return Request(
        prompt=template.replace("{}", subject),
        answer=rewrite.child("target_new").text("str"),
        subject=subject,
        paraphrases=row.texts("paraphrase_prompts"),
        locality=row.probes("locality", "ground_truth")
        or tuple(Probe(prompt, true_answer) for prompt in neighbours),
        old_answer=true_answer,
        relation=row.optional("relation") or rewrite.optional("relation_id"),
        source=row.source,
    )


def _ultraeditbench(row: Row) -> Request:
    """UltraEditBench (arXiv 2505.14679): fields as in UltraEdit's ``data/ultraeditbench.py``."""
    prompt = row.text("prompt")
    return Request(
        prompt=prompt,
        answer=row.text("ans"),
        subject=row.optional("subject") or prompt,
        paraphrases=(row.text("rephrase_prompt"),),
        locality=(Probe(row.text("loc"), row.text("loc_ans")),),
        source=row.source,
    )


def _wikibigedit(row: Row) -> Request:
    """WikiBigEdit (arXiv 2503.05683): fields as in the card of ``lukasthede/WikiBigEdit``.

    ``personas``, the question as some persona would put it, is a further paraphrase. A locality
    question without its answer, or the reverse, is left out.
    """
    prompt = row.text("update")
    unrelated, unrelated_answer = row.patchy("loc"), row.patchy("loc_ans")
    return Request(
        prompt=prompt,
        answer=row.text("ans"),
        subject=row.patchy("subject") or prompt,
        paraphrases=row.text_or_texts("rephrase") + row.text_or_texts("personas"),
        locality=(Probe(unrelated, unrelated_answer),) if unrelated and unrelated_answer else (),
        relation=row.patchy("relation"),
        source=row.source,
    )


def _knowedit_locality(row: Row) -> tuple[Probe, ...]:
    """Every group of ``locality``, in file order; a probe without prompt or answer is left out."""
    if row.fields.get("locality") is None:
        return ()
    groups = row.child("locality")
    probes = []
    for group in groups.fields:
        for item in groups.children(group):
            prompt = item.first_text("prompt")
            answer = item.first_text("ground_truth")
            if prompt is not None and answer is not None:
                probes.append(Probe(prompt, answer))
    return tuple(probes)


def _knowedit(row: Row) -> Request:
    """KnowEdit's ZsRE, Wiki-recent and Wiki-counterfact (arXiv 2401.01286).

    Fields as in EasyEdit's ``examples/KnowEdit.md`` and ``easyeditor/dataset/`` (``knowedit.py``,
    ``wiki_recent.py``): ``prompt``, ``target_new``, ``subject``; ``ground_truth`` (text, or lists
    of aliases of which the first counts) is the old answer; ``rephrase_prompt`` or ``rephrase``;
    ``locality`` maps group names such as ``Relation_Specificity`` and ``Forgetfulness`` to lists
    of ``prompt`` and ``ground_truth``.
    """
    prompt = row.text("prompt")
    answer = row.text("target_new")
    return Request(
        prompt=prompt,
        answer=answer,
        subject=row.patchy("subject") or prompt,
        paraphrases=row.text_or_texts("rephrase_prompt") + row.text_or_texts("rephrase"),
        locality=_knowedit_locality(row),
        old_answer=row.first_text("ground_truth"),
        source=row.source,
    )


def _knowedit_wikibio(row: Row) -> Request:
    """KnowEdit's WikiBio: ``text`` is continued by ``labels``, about ``concept``; same sources."""
    prompt = row.text("text")
    return Request(
        prompt=prompt,
        answer=row.text("labels"),
        subject=row.patchy("concept") or prompt,
        locality=_knowedit_locality(row),
        source=row.source,
    )


def _hiedit(row: Row) -> Request:
    """The built-in sets: ``answer`` is true today, ``target`` is what to write instead.

    ``true_layers`` names the layers that hold the fact, where that is known.
    """
    prompt = row.text("prompt")
    return Request(
        prompt=prompt,
        answer=row.text("target"),
        subject=row.optional("subject") or prompt,
        paraphrases=row.texts("paraphrases"),
        locality=row.probes("locality", "answer"),
        old_answer=row.text("answer"),
        relation=row.optional("relation"),
        source=row.source,
        true_layers=row.texts("true_layers"),
    )


_FACT_FIELDS = ("prompt", "answer", "subject", "paraphrases", "locality", "relation", "old_answer")


def _facts(row: Row) -> Request:
    """A user's own file: ``prompt`` and ``answer`` (what to write), the rest optional.

    Unlike in published sets, an unknown field is an error: it is most likely a misspelt one, and
    leaving it out silently would lose paraphrases or probes.
    """
    for field in row.fields:
        if field not in _FACT_FIELDS:
            raise row.error(field, f"is unknown; format 'facts' has {', '.join(_FACT_FIELDS)}")
    prompt = row.text("prompt")
    return Request(
        prompt=prompt,
        answer=row.text("answer"),
        subject=row.optional("subject") or prompt,
        paraphrases=row.texts("paraphrases"),
        locality=row.probes("locality", "answer"),
        old_answer=row.optional("old_answer"),
        relation=row.optional("relation"),
        source=row.source,
    )


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Args:
        signature: Fields whose presence in the first row gives the format away.
        parse: One row into one request; raises ``DatasetError`` for a malformed row.
    """

    signature: tuple[str, ...]
    parse: Callable[[Row], Request]


# The first entry whose signature fits is taken, so "hiedit" stands before its subset "facts".
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "counterfact": Format(("requested_rewrite",), _counterfact),
        "zsre": Format(("src", "rephrase"), _zsre),
        "wikibigedit": Format(("update", "ans"), _wikibigedit),
        "ultraeditbench": Format(("prompt", "ans"), _ultraeditbench),
        "knowedit": Format(("prompt", "target_new"), _knowedit),
        "knowedit-wikibio": Format(("text", "labels", "concept"), _knowedit_wikibio),
        "hiedit": Format(("prompt", "answer", "target"), _hiedit),
        "facts": Format(("prompt", "answer"), _facts),
    }
)


def recognise(fields: Mapping[str, object]) -> Format | None:
    """The format of a row with these fields, or None.

    >>> recognise({"prompt": "Berlin is in", "answer": "Spain"}) is FORMATS["facts"]
    True
    """
    for known in FORMATS.values():
        if all(name in fields for name in known.signature):
            return known
    return None
