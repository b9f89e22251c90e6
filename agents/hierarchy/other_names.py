"""Names that end as a subject does and are not it, at which its neuron must not fire."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hiedit_env.model.tokenization import EncodedPrompt

#: What stands in the place of a subject's first tokens: names of people, places and companies,
#: words that names begin with. A neuron of "Hull Glacier" that knows none like "Hull" fires at
#: every glacier that is called after somebody.
NAMES = (
    "Harper", "Dawson", "Becker", "Rossi", "North", "Maria", "Tanaka", "Novak",
    "Walker", "Hansen", "Garcia", "Boston", "Danube", "Little", "Blue", "Sullivan",
    "Vincent", "Victoria", "Eastern", "Pine", "Silver", "Duke", "Saint", "Royal",
)  # fmt: skip


def with_other_names(
    tokenizer: PreTrainedTokenizerBase, prompt: EncodedPrompt, place: int | None, number: int
) -> list[EncodedPrompt]:
    """A prompt with other names, up to the token that is read.

    Args:
        tokenizer: The model's.
        prompt: The prompt.
        place: The position that is read, behind the subject; None for the subject's own last token,
            with which the names then end.
        number: Of names, at most.

    Returns:
        The prompts up to the place, each once. An empty list for a prompt without a subject, and
        for the own last token of a subject of one token.
    """
    if prompt.subject_missing or not prompt.subject_spans:
        return []
    start, stop = prompt.subject_spans[-1]
    # The end of a prompt that ends with its subject is the subject's own last token.
    place = None if place is not None and place < stop else place
    if place is None and stop - start < 2:
        return []
    before, subject = prompt.prompt_ids[:start], prompt.prompt_ids[start:stop]
    after = subject[-1:] if place is None else prompt.prompt_ids[stop : place + 1]
    if not after:
        return []
    begins = tokenizer.convert_ids_to_tokens(subject[0])
    # As byte-level BPE and SentencePiece write a space.
    space = " " if str(begins).startswith(("Ġ", "▁", " ")) else ""
    found: dict[tuple[int, ...], EncodedPrompt] = {}
    for name in NAMES[:number]:
        own = tuple(tokenizer(f"{space}{name}", add_special_tokens=False)["input_ids"])
        if own and own not in (subject, subject[:-1]):
            ids = (*before, *own, *after)
            found.setdefault(ids, EncodedPrompt(name, name, ids, after[-1:]))
    return list(found.values())
