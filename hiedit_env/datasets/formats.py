"""The row formats of the field, each turned into requests.

:data:`FORMATS` is the whole truth: name, the fields that give the format away, parser. Parsers of
published sets are in :mod:`hiedit_env.datasets.published`; files, built-in sets and splits in
:mod:`hiedit_env.datasets.load`; formats that are refused by their names in
:mod:`hiedit_env.datasets.refused`. No torch here.

Rules common to all formats:

- ``{}`` or ``{subject}`` in a prompt is filled with the subject; without one it is an error.
  ``{{}}`` stands for the braces themselves.
- White space around a text is removed, except at the end of a prompt, which is the text it is.
- A format without a subject, or a row where it is missing, uses the prompt as its subject; what
  edits at the subject looks for a name in it.
- A field that a format requires must be text with something in it. Optional fields of released
  files, which have gaps, may be null, NaN or blank.
- Questions whose answers merely follow from the edit are kept in ``Request.portability``.
- A field that is there and not read is remembered by the row and reported once per file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from hiedit_env.datasets import published
from hiedit_env.datasets.requests import Probe, PromptForm, Request
from hiedit_env.datasets.rows import Row, kind_of


def _hiedit(row: Row) -> Request:
    """The built-in sets: ``answer`` is true today, ``target`` is what to write instead.

    ``true_layers`` names the layers that hold the fact, where that is known.
    """
    subject = row.optional("subject")
    row = row.about(subject)
    prompt = row.prompt()
    return Request(
        prompt=prompt,
        answer=row.text("target"),
        subject=subject or prompt,
        paraphrases=row.texts("paraphrases", prompt=True),
        locality=row.probes("locality", "answer"),
        old_answer=row.text("answer"),
        relation=row.optional("relation"),
        source=row.source,
        true_layers=row.texts("true_layers"),
    )


_FACT_FIELDS = (
    "prompt",
    "answer",
    "subject",
    "paraphrases",
    "locality",
    "relation",
    "old_answer",
    "portability",
    "subject_aliases",
    "prompt_form",
    "system",
)


def _facts(row: Row) -> Request:
    """A user's own file: ``prompt`` and ``answer`` (what to write), the rest optional.

    Unlike in published sets, an unknown field is an error: it is most likely a misspelt one, and
    leaving it out silently would lose paraphrases or probes.
    """
    for field in row.fields:
        if field not in _FACT_FIELDS:
            raise row.error(field, f"is unknown; format 'facts' has {', '.join(_FACT_FIELDS)}")
    subject = row.optional("subject")
    row = row.about(subject)
    prompt = row.prompt()
    return Request(
        prompt=prompt,
        answer=row.text("answer"),
        subject=subject or prompt,
        paraphrases=row.texts("paraphrases", prompt=True),
        locality=row.probes("locality", "answer"),
        old_answer=row.optional("old_answer"),
        relation=row.optional("relation"),
        source=row.source,
        portability=tuple(
            Probe(
                item.prompt(),
                item.text("answer"),
                item.patchy("kind") or "portability",
                item.texts("aliases"),
            )
            for item in row.children("portability")
        ),
        subject_aliases=row.texts("subject_aliases"),
        prompt_form=cast(PromptForm | None, row.optional("prompt_form")),  # the request checks it
        system=row.optional("system"),
    )


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Args:
        signature: Fields whose presence in the first row gives the format away.
        parse: One row into a request, several, or None where the row is left out for a stated
            reason; raises ``DatasetError`` for a malformed row.
        shapes: Kinds that values of the first row must be of, where names alone do not tell.
    """

    signature: tuple[str, ...]
    parse: Callable[[Row], Request | tuple[Request, ...] | None]
    shapes: tuple[tuple[str, str], ...] = ()

    def fits(self, fields: Mapping[str, object]) -> bool:
        """Whether a row with these fields is of this format."""
        return all(name in fields for name in self.signature) and all(
            kind_of(fields[name]) == kind for name, kind in self.shapes
        )


# The first entry that fits is taken, so "hiedit" stands before its subset "facts".
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "counterfact": Format(
            ("requested_rewrite",), published.counterfact, (("requested_rewrite", "an object"),)
        ),
        "zsre": Format(("src", "rephrase"), published.zsre),
        "mquake": Format(
            ("requested_rewrite",), published.mquake, (("requested_rewrite", "a list"),)
        ),
        "mend": Format(("input", "alternatives"), published.mend),
        "wikibigedit": Format(("update", "ans"), published.wikibigedit),
        "ultraeditbench": Format(("prompt", "ans"), published.ultraeditbench),
        "rome": Format(("prompt", "target_new"), published.rome, (("target_new", "an object"),)),
        "cknowedit": Format(("prompt", "target_old", "target_new"), published.knowedit),
        "knowedit": Format(("prompt", "target_new"), published.knowedit),
        "knowedit-wikibio": Format(("text", "labels", "concept"), published.knowedit_wikibio),
        "fever": Format(("prompt", "equiv_prompt", "alt"), published.fever),
        "hiedit": Format(("prompt", "answer", "target"), _hiedit),
        "fastedit": Format(("prompt", "target", "queries"), published.target),
        "qaedit": Format(("prompt", "target"), published.target),
        "facts": Format(("prompt", "answer"), _facts),
        "hallueditbench": Format(("question", "object"), published.hallueditbench),
        "unke": Format(("question", "answer"), published.unke),
    }
)


def recognise(fields: Mapping[str, object]) -> str | None:
    """The name of the format of a row with these fields, or None.

    >>> recognise({"prompt": "Berlin is in", "answer": "Spain"})
    'facts'
    """
    return next((name for name, known in FORMATS.items() if known.fits(fields)), None)
