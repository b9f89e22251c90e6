"""Formats that hold no facts to write, refused by their names with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping

_OWN = '{"prompt": …, "answer": …, "subject": …} per fact'

#: What a row holds, its name, and the remedy; the first that fits counts.
_REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("image",),
        "a multimodal set (MMEdit, VLKEB, …)",
        "only text is edited; take its text-only rows",
    ),
    (
        ("messages",),
        "a file of chats",
        'write {"prompt": …, "answer": …} per fact, the prompt made with '
        "tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)",
    ),
    (
        ("conversations",),
        "a file of chats (ShareGPT)",
        'write {"prompt": …, "answer": …} per fact, the prompt made with the chat template',
    ),
    (
        ("instruction", "output"),
        "instruction data (Alpaca)",
        'write {"prompt": instruction, "answer": output} per fact',
    ),
    (
        ("prompt", "completion"),
        "a file of prompts and completions",
        'rename "completion" to "answer"',
    ),
    (
        ("adversarial prompt",),
        "SafeEdit",
        "it holds behaviour, not facts",
    ),
    (
        ("success", "locality"),
        "KnowEdit's Sanitation",
        'write {"prompt": question, "answer": target_new} for each row of "success"',
    ),
    (
        ("edit", "example_type"),
        "RippleEdits",
        f"its targets are names of Wikidata: write {_OWN}",
    ),
    (
        ("prompt", "target_true", "target_false"),
        "counterfact-tracing",
        'write {"prompt": prompt, "answer": target_false, "old_answer": target_true} per fact',
    ),
    (
        ("known_id", "attribute"),
        "ROME's known_1000",
        'write {"prompt": prompt, "answer": …} with the new answer of each fact',
    ),
    (("ent", "target_per"), "PersonalityEdit", "it holds opinions, not facts"),
    (("question", "answers"), "a set of questions (SQuAD, NQ, …)", f"write {_OWN}"),
)
_LANGUAGES = frozenset(
    (
        *("en", "zh", "de", "fr", "es", "pt", "ru", "th", "tr", "vi"),
        *("cz", "cs", "du", "nl", "ja", "ko", "ar", "hi", "it"),
    )
)


def refusal(fields: Mapping[str, object]) -> str | None:
    """Why a row, or a whole document, with these fields is refused; None where it is unknown.

    >>> refusal({"instruction": "Say", "input": "", "output": "Hi"})
    'is instruction data (Alpaca): write {"prompt": instruction, "answer": output} per fact'
    """
    for names, called, remedy in _REFUSED:
        if all(name in fields for name in names):
            return f"is {called}: {remedy}"
    if len(fields) > 1 and all(
        name in _LANGUAGES and isinstance(value, Mapping) for name, value in fields.items()
    ):
        return (
            "is a set in several languages (MzsRE, BiZsRE, …): write the rows of one language, "
            f"such as {next(iter(fields))!r}, to a file"
        )
    return None


def is_by_columns(document: Mapping[str, object]) -> bool:
    """Whether a document is a table stored column by column, as pandas writes it by default.

    >>> is_by_columns({"prompt": {"0": "Rome is in"}, "answer": {"0": "Peru"}})
    True
    """
    if {"columns", "data"} <= document.keys():
        return True
    columns = [value for value in document.values() if isinstance(value, Mapping | list)]
    # The only field of a row that holds an object or a list where others hold the prompt.
    return 1 < len(columns) == len(document) and "requested_rewrite" not in document
