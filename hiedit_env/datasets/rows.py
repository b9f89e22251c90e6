"""One object of a data file, read field by field: what is wrong is named, what is read is noted.

Every reader names file, row and field when it refuses. A row remembers which of its fields were
read, so that those that were not can be named (:meth:`Row.unread`). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from hiedit_env.datasets.requests import Probe
from hiedit_env.datasets.writing import MAX_CHARACTERS, is_blank, trimmed
from hiedit_env.errors import DatasetError

Path = tuple[str, ...]

# "{{}}" stands for the braces themselves.
_PLACE = re.compile(r"\{\{\}\}|\{\}|\{subject\}")

# Fields that number or describe a row and say nothing about its fact: never reported as unread.
_BOOKKEEPING = re.compile(
    r"(case_|pararel_|known_)?(id|ids|idx|index)|\w+_ids?|uid|qid|guid|tag|source|split|logit"
)


def kind_of(value: object) -> str:
    """Name of a JSON value's type for messages.

    >>> kind_of([["Paris"]]), kind_of({}), kind_of(3)
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


def is_gap(value: object) -> bool:
    """Whether a released file left the field out: null, blank, or NaN (unequal to itself)."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file.

    Args:
        fields: The JSON object.
        source: ``file row number``, the number counted from 0.
        prefix: Path to this object inside the row, e.g. ``"locality[2]."``.
        subject: What fills ``{}`` and ``{subject}`` in the prompts of this row, once it is known.
        path: The same as ``prefix`` by names only, without numbers.
        read: Paths of the fields that were read; shared by the objects of one row.
        left_out: Why rows of this kind give no request; shared likewise.
    """

    fields: Mapping[str, object]
    source: str
    prefix: str = ""
    subject: str | None = None
    path: Path = ()
    read: set[Path] = field(default_factory=set, compare=False)
    left_out: list[str] = field(default_factory=list, compare=False)

    def error(self, field: str, problem: str) -> DatasetError:
        """The error to raise for ``field``."""
        return DatasetError(f"{self.source}: field {self.prefix + field!r} {problem}")

    def about(self, subject: str | None) -> Row:
        """This row, with the subject that its prompts are filled with."""
        return replace(self, subject=subject)

    def has(self, field: str) -> bool:
        """Whether the field is there and no gap."""
        return not is_gap(self.fields.get(field))

    def value(self, field: str) -> object:
        """The value as it is, noted as read."""
        self.read.add((*self.path, field))
        return self.fields.get(field)

    def unread(self) -> list[str]:
        """Fields with something in them that nobody read, by dotted names, in the row's order.

        >>> row = Row({"prompt": "P", "locality": {"a": [{"prompt": "x", "why": "y"}]}}, "doc")
        >>> _ = row.text("prompt")
        >>> row.unread()
        ['locality.a.prompt', 'locality.a.why']
        """
        return list(dict.fromkeys(".".join(p) for p in self._unread(self.fields, self.path)))

    def _unread(self, value: object, path: Path) -> Iterator[Path]:
        if path in self.read or is_gap(value) or value in ([], {}):
            return
        if isinstance(value, Mapping):
            for name, item in value.items():
                if not _BOOKKEEPING.fullmatch(name):
                    yield from self._unread(item, (*path, name))
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for item in value:
                yield from self._unread(item, path)
        else:
            yield path

    def checked(self, field: str, value: object, *, prompt: bool = False) -> str:
        """A value that must be text, without white space around it; a prompt keeps its end."""
        if not isinstance(value, str):
            raise self.error(field, f"must be text, got {kind_of(value)}")
        if len(value) > MAX_CHARACTERS:
            raise self.error(
                field, f"has {len(value)} characters; at most {MAX_CHARACTERS} are read: shorten it"
            )
        text = trimmed(value)
        if is_blank(text):
            raise self.error(field, "is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON allows half of a surrogate pair; no tokenizer does
            raise self.error(field, "holds an unpaired surrogate, which is not text") from None
        return self._filled(field, trimmed(value, end=False)) if prompt else text

    def _filled(self, field: str, text: str) -> str:
        def put(match: re.Match[str]) -> str:
            if match[0] == "{{}}":
                return "{}"
            if self.subject is None:
                raise self.error(
                    field,
                    f"has {match[0]!r}, the place of a subject, but the row gives no 'subject': "
                    "add it, or write '{{}}' for the braces themselves",
                )
            return self.subject

        return _PLACE.sub(put, text)

    def text(self, field: str, *, prompt: bool = False) -> str:
        """A required text; a prompt is filled with the subject and keeps its end as it is."""
        value = self.value(field)
        if value is None:
            raise self.error(field, "is missing")
        return self.checked(field, value, prompt=prompt)

    def prompt(self, field: str = "prompt") -> str:
        """A required prompt."""
        return self.text(field, prompt=True)

    def optional(self, field: str) -> str | None:
        """A text, or None where the field is absent or null; present but empty is an error."""
        value = self.value(field)
        return None if value is None else self.checked(field, value)

    def patchy(self, field: str, *, prompt: bool = False) -> str | None:
        """A text, or None where a released file has a gap: absent, null, NaN or blank."""
        value = self.value(field)
        return None if is_gap(value) else self.checked(field, value, prompt=prompt)

    def texts(self, field: str, *, prompt: bool = False) -> tuple[str, ...]:
        """A list of texts; nothing where the field is absent or null."""
        value = self.value(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of texts, got {kind_of(value)}")
        return tuple(
            self.checked(f"{field}[{i}]", item, prompt=prompt) for i, item in enumerate(value)
        )

    def text_or_texts(self, field: str, *, prompt: bool = False) -> tuple[str, ...]:
        """One text or a list of them; nothing where there is a gap."""
        value = self.value(field)
        if is_gap(value):
            return ()
        if isinstance(value, str):
            return (self.checked(field, value, prompt=prompt),)
        return self.texts(field, prompt=prompt)

    def all_texts(self, field: str, *, prompt: bool = False) -> tuple[str, ...]:
        """Every text with something in it, however deep in lists, in order.

        >>> Row({"a": [["", "Berlin"], ["Berlin, Germany"]]}, "doc").all_texts("a")
        ('Berlin', 'Berlin, Germany')
        """
        waiting = [self.value(field)]
        found = []
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(reversed(value))
            elif not is_gap(value):
                found.append(self.checked(field, value, prompt=prompt))
        return tuple(found)

    def first_text(self, field: str, *, prompt: bool = False) -> str | None:
        """The first of :meth:`all_texts`; None if there is none."""
        return next(iter(self.all_texts(field, prompt=prompt)), None)

    def child(self, field: str) -> Row:
        """A required object."""
        value = self.fields.get(field)
        if value is None:
            raise self.error(field, "is missing")
        if not isinstance(value, Mapping):
            raise self.error(field, f"must be an object, got {kind_of(value)}")
        return self._inner(value, field, field)

    def children(self, field: str) -> tuple[Row, ...]:
        """A list of objects; nothing where the field is absent or null."""
        value = self.fields.get(field)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of objects, got {kind_of(value)}")
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise self.error(f"{field}[{i}]", f"must be an object, got {kind_of(item)}")
        return tuple(self._inner(item, f"{field}[{i}]", field) for i, item in enumerate(value))

    def _inner(self, value: Mapping[str, object], place: str, name: str) -> Row:
        return replace(self, fields=value, prefix=f"{self.prefix}{place}.", path=(*self.path, name))

    def probes(self, field: str, answer: str) -> tuple[Probe, ...]:
        """Objects with ``prompt`` and ``answer`` fields; nothing where absent or null."""
        return tuple(Probe(item.prompt(), item.text(answer)) for item in self.children(field))
