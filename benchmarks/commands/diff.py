"""What two models answer differently: ``hiedit diff``."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from hiedit_agents.editing.controls import CONTROL, CONTROL_CHAT, has_template
from hiedit_agents.editing.ledger import Ledger
from hiedit_agents.editing.ledger_format import FILE
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import PromptError, SettingsError, one_line
from hiedit_env.model.generation import generate
from hiedit_env.model.loading import load_model
from hiedit_env.model.tokenization import PromptEncoder, vocabulary_size

#: Tokens of an answer that are compared.
TOKENS = 16
_BATCH = 16


def diff(one: str, two: str, facts: str | None) -> str:
    """Asks two models the same and tells the answers that differ.

    Args:
        one: Name or folder of a model.
        two: Name or folder of the other.
        facts: File of facts, whose prompts and paraphrases are asked; None for the facts of the
            ledgers in the two folders.

    Raises:
        ModelError: a model that cannot be loaded.
        SettingsError: neither facts nor a ledger.
    """
    prompts = list(dict.fromkeys(_prompts(one, two, facts)))
    kinds = [(prompt, False) for prompt in (*prompts, *CONTROL)]
    kinds += [(prompt, True) for prompt in (*prompts, *CONTROL_CHAT)]
    answers = [_answers(name, kinds) for name in (one, two)]
    lines: list[str] = []
    asked = 0
    for question, first, second in zip(kinds, *answers, strict=True):
        if first is None or second is None:
            continue
        asked += 1
        if first != second:
            prompt, in_chat = question
            lines += [
                one_line(prompt) + ("  (in a chat)" if in_chat else ""),
                f"  < {one_line(first.strip()) or '(nothing)'}",
                f"  > {one_line(second.strip()) or '(nothing)'}",
            ]
    names = one_line(f"< {one}, > {two}")
    lines.append(f"{len(lines) // 3} of {asked} answers differ ({names})")
    return "\n".join(lines)


def _prompts(one: str, two: str, facts: str | None) -> list[str]:
    if facts is not None:
        requests = load_requests(facts)
        return [text for r in requests for text in (r.prompt, *r.paraphrases)]
    found: list[str] = []
    for name in (one, two):
        if (Path(name) / FILE).is_file():
            with Ledger.open(Path(name)) as ledger:
                edits = [event.record["facts"] for event in ledger if event.kind == "edit"]
                found += [fact["request"]["prompt"] for facts in edits for fact in facts]
    if not found:
        raise SettingsError(
            f"neither {one!r} nor {two!r} has a ledger of edits; name the facts with --facts FILE"
        )
    return found


def _answers(name: str, questions: Sequence[tuple[str, bool]]) -> list[str | None]:
    """Greedy continuations; None where a model cannot be asked."""
    loaded = load_model(name, progress=False)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    encoder = PromptEncoder(loaded.tokenizer, limit, vocabulary=vocabulary_size(loaded.model))
    chats = has_template(loaded.tokenizer)
    answers: list[str | None] = [None] * len(questions)
    places, encoded = [], []
    for place, (prompt, in_chat) in enumerate(questions):
        if in_chat and not chats:
            continue
        try:
            encoded.append(
                encoder.encode_chat(prompt, "x") if in_chat else encoder.encode(prompt, "x")
            )
        except PromptError:
            continue
        places.append(place)
    texts = generate(loaded.model, encoder, encoded, [TOKENS] * len(encoded), _BATCH)
    for place, text in zip(places, texts, strict=True):
        answers[place] = text
    del loaded
    gc.collect()
    return answers
