"""Fields of a row beside the fact: rewordings, unrelated prompts, portability. No torch.

The same things go by many names, and by several shapes: texts, lists, objects, and objects that
name groups. The tables below are the names that are known; what is in a row and in no table is
reported as not read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from hiedit_env.datasets.requests import NEIGHBOUR, Probe
from hiedit_env.datasets.rows import Row, is_gap

#: Rewordings of the prompt, whose answer is that of the fact.
_PARAPHRASES = (
    "rephrase_prompt",
    "rephrase",
    "ood_rephrase",
    "rephrase_prompts",
    "rephrases",
    "paraphrase_prompts",
    "paraphrase_prompt",
    "paraphrases",
    "equiv_prompt",
    "queries",
    "para_question",
    "paraphrased_question",
    "personas",
)
#: Unrelated prompts and where their answers are.
_UNRELATED = (
    ("locality_prompt", ("locality_ground_truth", "locality_answer", "locality_ans")),
    ("locality_prompts", ("locality_ground_truth", "locality_answers")),
    ("loc_prompt", ("loc_ans", "loc_answer", "loc_ground_truth")),
    ("loc", ("loc_ans", "loc_answer")),
    ("unrel_prompt", ("unrel_ans", "unrel_answer")),
)
#: Prompts of portability, where their answers are, and what kind they are.
_PORTABLE = (
    (
        "portability_prompt",
        ("portability_ground_truth", "portability_answer", "portability_ans"),
        "portability",
    ),
    ("portability_prompts", ("portability_ground_truth", "portability_answers"), "portability"),
    ("mhop", ("mhop_ans",), "multi-hop"),
    ("sub_question", ("sub_answer",), "sub-question"),
    *((f"question_{n}hop", (f"answer_{n}hop",), f"{n}-hop") for n in range(2, 7)),
)
_ITEM_PROMPTS = ("prompt", "question", "loc", "loc_prompt")
_ITEM_ANSWERS = ("ground_truth", "answer", "loc_ans", "target", "target_new", "answers")
#: Groups of KnowEdit's ``portability``, and what they ask.
_KINDS = {"subject_aliasing": "alias", "logical_generalization": "logical generalization"}


def paraphrases(row: Row, without: Collection[str] = ()) -> tuple[str, ...]:
    """All rewordings of a row, in the order of the table, each once."""
    found: list[str] = []
    for name in _PARAPHRASES:
        if name not in without and row.has(name):
            found += row.text_or_texts(name, prompt=True)
    return tuple(dict.fromkeys(found))


def unrelated(
    row: Row, old_answer: str | None = None, without: Collection[str] = ()
) -> tuple[Probe, ...]:
    """All unrelated prompts of a row; one without prompt or answer is left out.

    Args:
        row: The row.
        old_answer: The answer of ``neighborhood_prompts``, which share it.
        without: Fields that the caller reads.
    """
    found: list[Probe] = []
    if "locality" not in without:
        found += _groups(row, "locality", "")
    if "neighborhood_prompts" not in without and row.has("neighborhood_prompts"):
        found += neighbours(row, old_answer)
    for name, answers in _UNRELATED:
        if name not in without:
            found += _pairs(row, name, answers, "")
    return tuple(dict.fromkeys(replace(probe, aliases=()) for probe in found))


def neighbours(row: Row, answer: str | None) -> list[Probe]:
    """CounterFact's ``neighborhood_prompts``: texts that share the old answer, or objects."""
    value = row.fields.get("neighborhood_prompts")
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return list(_groups(row, "neighborhood_prompts", NEIGHBOUR))
    if answer is None:
        return []
    prompts = row.texts("neighborhood_prompts", prompt=True)
    return [Probe(prompt, answer, NEIGHBOUR) for prompt in prompts]


def portability(row: Row) -> tuple[Probe, ...]:
    """All prompts whose answers follow from the fact; one without an answer is left out."""
    found = list(_groups(row, "portability", "portability"))
    for name, answers, kind in _PORTABLE:
        found += _pairs(row, name, answers, kind)
    for name, answer in (("yes_question", "Yes"), ("no_question", "No")):
        if row.has(name):
            found.append(Probe(row.prompt(name), answer, "yes or no"))
    if row.has("reversed_relation_question") and row.subject is not None:
        found.append(Probe(row.prompt("reversed_relation_question"), row.subject, "reversed"))
    return tuple(dict.fromkeys(found))


def subject_aliases(row: Row) -> tuple[str, ...]:
    """Other names of the subject."""
    return row.text_or_texts("subject_aliases") + row.text_or_texts("subject_alias")


def _pairs(row: Row, name: str, answers: Collection[str], kind: str) -> Iterator[Probe]:
    """Fields beside each other: a text and its answer, or two lists of one length."""
    answer = next((answer for answer in answers if row.has(answer)), None)
    if answer is None or not row.has(name):
        return  # a prompt without its answer stays unread, and is reported
    yield from _parallel(row, name, answer, kind)


def _parallel(row: Row, name: str, answer: str, kind: str) -> Iterator[Probe]:
    prompts, right = row.fields[name], row.fields[answer]
    if isinstance(prompts, list) and isinstance(right, list) and len(prompts) > 1:
        if len(prompts) != len(right):
            raise row.error(
                answer, f"has {len(right)} answers for the {len(prompts)} prompts of {name!r}"
            )
        row.value(name)
        row.value(answer)
        for i, (asked, said) in enumerate(zip(prompts, right, strict=True)):
            if is_gap(asked) or is_gap(said):
                continue
            inner = Row({"a": said}, row.source, row.prefix)
            texts = inner.all_texts("a")
            if texts:
                prompt = row.checked(f"{name}[{i}]", asked, prompt=True)
                yield Probe(prompt, texts[0], kind, texts[1:])
        return
    asked_once = row.first_text(name, prompt=True)
    texts = row.all_texts(answer)
    if asked_once is not None and texts:
        yield Probe(asked_once, texts[0], kind, texts[1:])


def _groups(row: Row, name: str, kind: str) -> Iterator[Probe]:
    """A field that holds probes: a list of objects, an object, or an object of named groups."""
    value = row.fields.get(name)
    if is_gap(value) or value == {}:
        return
    if isinstance(value, list) and value:
        for item in row.children(name):
            yield from _item(item, kind)
        return
    group = row.child(name)
    if "New Question" in group.fields:  # EasyEdit's portability of zsRE and CounterFact
        yield from _pairs(group, "New Question", ("New Answer",), "multi-hop")
        return
    if any(key in group.fields for key in _ITEM_PROMPTS):
        yield from _item(group, kind)
        return
    for key, inner in group.fields.items():
        if isinstance(inner, Mapping):
            yield from _groups(group, key, kind and _kind(key))
        elif isinstance(inner, list):
            for item in group.children(key):
                yield from _item(item, kind and _kind(key))


def _item(item: Row, kind: str) -> Iterator[Probe]:
    """One object; a prompt that names its own subject is filled with it."""
    prompt = next((name for name in _ITEM_PROMPTS if item.has(name)), None)
    answer = next((name for name in _ITEM_ANSWERS if item.has(name)), None)
    if item.has("subject"):
        item = item.about(item.text("subject"))
    if prompt is not None and answer is not None:
        yield from _parallel(item, prompt, answer, kind)


def _kind(group: str) -> str:
    return _KINDS.get(group.lower(), group.lower().replace("_", " "))
